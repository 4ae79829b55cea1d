"""Writes the table of the CUDA loops' plans into ARCHITECTURE.md: what would run on an H200, its estimated cycles."""

from __future__ import annotations

from pathlib import Path

import torch

import fused_rnn

BEGIN, END = "<!-- plans:begin -->", "<!-- plans:end -->"
ARCHITECTURE = Path(__file__).parent.parent / "ARCHITECTURE.md"
HIDDEN, BATCH = (128, 256, 512, 768, 1024, 2048), (8, 64, 256)


def row(cell: str, hidden: int, batch: int, backward: bool) -> str:
    plan = fused_rnn.plan(cell, batch, hidden, dtype=torch.bfloat16, backward=backward, device="sm_90")
    way = "backward" if backward else "forward"
    if plan.reason is not None:
        return f"| {hidden} | {batch} | {way} | stepwise | | | | | | | |"
    parts = " | ".join(f"{part:.0f}" for part in plan.cycles)
    team = f"{plan.members} × {plan.units} units, {plan.rows} rows"
    sizes = f"{plan.shared / 1024:.0f} | {plan.waves}"
    return f"| {hidden} | {batch} | {way} | {plan.exchange} | {team} | {sizes} | {parts} | {sum(plan.cycles):.0f} |"


def table(cell: str) -> str:
    head = (
        "| H | B | | exchange | team | shared KiB | waves | product | loads | cell | exchange | cycles a step |\n"
        + "|---:" * 2
        + "|---" * 3
        + "|---:" * 7
        + "|"
    )
    rows = [row(cell, h, b, backward) for h in HIDDEN for b in BATCH for backward in (False, True)]
    return "\n".join([head, *rows])


def main() -> None:
    text = ARCHITECTURE.read_text()
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    ARCHITECTURE.write_text(f"{before}{BEGIN}\n{table('lstm')}\n{END}{after}")


if __name__ == "__main__":
    main()
