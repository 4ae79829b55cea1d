"""Time of the cells of the literature on a GPU, beside the closest that torch.nn has: `make gpu-field`.

    python scripts/gpu_field.py --out FOLDER [--cell MinGRU] [--minutes 1] [--seconds 90]

Milliseconds of whole calls in bf16, inference and training, by each backend. Cells that are linear in their states also
without chunks of time side by side. Run by scripts/gpu.py; writes field.json as it goes. A process measures; after a
way that hangs for --seconds, or takes the GPU's context with it, a new one goes on with the ways behind it.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).parent.parent))  # a checkout built in place, with nothing installed

import torch
from gpu_steps import milliseconds
from gpu_tests import wait

import fused_rnn
from fused_rnn.commands.bench.field import closest
from fused_rnn.gpu import chunks

# T, B, H. The last leaves most of a GPU idle without chunks of time.
SHAPES = ((512, 8, 256), (512, 64, 512), (4096, 1, 256))
CELLS = ("LayerNormLSTM", "LayerNormGRU", "BlockGRU", "ResetBeforeGRU", "SLSTM", "PeepholeLSTM", "MinGRU", "MinLSTM")
LINEAR = ("MinGRU", "MinLSTM")
NEVER = 1 << 30
LOST = 3  # the exit status where the GPU takes no more calls of this process


@contextmanager
def as_planned() -> Iterator[None]:
    yield


@contextmanager
def without_chunks() -> Iterator[None]:
    with patch.object(chunks, "FEWEST_CHUNKS", NEVER):
        yield


def ways(cell: str) -> Iterator[tuple[str, str, Callable[[], Any]]]:
    """How a cell is run: by whom, named how."""
    yield "torch", f"torch.nn.{closest(cell)}", as_planned
    for backend in ("cuda", "triton"):
        yield backend, backend, as_planned
        if cell in LINEAR:
            yield backend, f"{backend}, one chunk", without_chunks


def module_of(cell: str, backend: str, hidden: int, device: str) -> torch.nn.Module:
    if backend == "torch":
        return getattr(torch.nn, closest(cell))(hidden, hidden, device=device, dtype=torch.bfloat16)
    return getattr(fused_rnn, cell)(hidden, hidden, device=device, dtype=torch.bfloat16, backend=backend)


def calls(module: torch.nn.Module, x: torch.Tensor) -> dict[str, Callable[[], object]]:
    leaves, dy = [x.clone().requires_grad_(), *module.parameters()], torch.randn_like(x)

    def inference() -> object:
        with torch.no_grad():
            return module(x)[0]

    return {"inference": inference, "training": lambda: torch.autograd.grad(module(leaves[0])[0], leaves, dy)}


def cases(cells: tuple[str, ...]) -> list[tuple[dict[str, Any], str, Callable[[], Any]]]:
    """What is measured, in order: of each its row's beginning, by which backend, planned how."""
    return [
        ({"cell": cell, "T": steps, "B": batch, "H": hidden, "way": title}, backend, planned)
        for steps, batch, hidden in SHAPES
        for cell in cells
        for backend, title, planned in ways(cell)
    ]


def told(out: Path, row: dict[str, Any]) -> None:
    print(*row.values(), flush=True)
    with (out / "field.json").open("a") as rows:
        rows.write(json.dumps(row) + "\n")


def measure(cells: tuple[str, ...], out: Path, end: float, device: str = "cuda", first: int = 0) -> int:
    """Writes a row of each case and mode from the first of these cases on, and in `at` the number of the case under
    way; how many were refused or failed."""
    failed = 0
    for number, (case, backend, planned) in list(enumerate(cases(cells)))[first:]:
        if time.monotonic() > end:
            print("time is up")
            break
        (out / "at").write_text(str(number))
        try:
            x = torch.randn(case["T"], case["B"], case["H"], device=device, dtype=torch.bfloat16)
            with planned():
                for mode, call in calls(module_of(case["cell"], backend, case["H"], device), x).items():
                    call()  # compiles
                    told(out, {**case, "mode": mode, "ms": round(milliseconds(call), 4)})
                    (out / "at").touch()
        except Exception as error:  # of this way; the others go on
            failed += 1
            told(out, {**case, "mode": "failed", "error": str(error)[:300]})
            if device == "cuda" and lost():
                sys.exit(LOST)
    (out / "at").write_text(str(len(cases(cells))))  # to the end, or as far as there was time
    return failed


def lost() -> bool:
    """Whether an error of the GPU stands in the way of all other calls."""
    try:
        torch.ones(1, device="cuda").item()
    except Exception:
        return True
    return False


def in_processes(command: list[str], cells: tuple[str, ...], out: Path, end: float, seconds: float) -> int:
    """One process after the other, each from the case behind that which ended the one before. command: less the number
    of the first case."""
    at, failed, first = out / "at", 0, 0
    while first < len(cases(cells)) and time.monotonic() < end:
        at.write_text(str(first))
        child = subprocess.Popen([*command, str(first), "--minutes", f"{(end - time.monotonic()) / 60:.3f}"])
        ended = wait(child, at, seconds)
        number = int(at.read_text())
        if ended and number == len(cases(cells)):
            return failed + child.returncode
        failed += 1
        if child.returncode != LOST:  # which has told of it
            why = f"exit status {child.returncode}" if ended else f"hung for {seconds:.0f} s"
            told(out, {**cases(cells)[number][0], "mode": "failed", "error": why})
        first = number + 1
    return failed


def main() -> int:
    parser = argparse.ArgumentParser(prog="gpu_field", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--cell", choices=CELLS, action="append")
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument(
        "--seconds", type=float, default=90.0, help="for a way, and once more for its training, at most"
    )
    parser.add_argument("--first", type=int, help="measure in this process, from this case on")
    chosen = parser.parse_args()
    chosen.out.mkdir(parents=True, exist_ok=True)
    cells, end = tuple(chosen.cell or CELLS), time.monotonic() + 60 * chosen.minutes
    if chosen.first is not None:
        return int(measure(cells, chosen.out, end, first=chosen.first) > 0)
    (chosen.out / "field.json").unlink(missing_ok=True)
    command = [sys.executable, __file__, "--out", str(chosen.out)]
    command += [part for cell in cells for part in ("--cell", cell)]
    failed = in_processes([*command, "--first"], cells, chosen.out, end, chosen.seconds)
    if failed:
        print("not all ways were measured")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
