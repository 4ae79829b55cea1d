"""Time of a step of the CUDA loops, by plan, beside the cycles that the planner estimates, whose constants it may mend.

    python scripts/gpu_steps.py --out FOLDER [--cell lstm] [--number bf16] [--hidden 512] [--every] [--minutes 3]

Kernels alone, by torch's profiler, at T = 512. --every: not the planner's choice alone, but every team that fits. For a
quarter of the time behind it whole stacks: layer by layer, and as wavefronts in the number of chunks that is estimated
to pay and in others; last, for no GPU has run one. What fails is said, and the others go on. Run by scripts/gpu.py;
writes steps.json and stacks.json as it goes.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))  # a checkout built in place, with nothing installed

import torch
from gpu_cases import NUMBERS

import fused_rnn
from fused_rnn.cells import CELLS
from fused_rnn.cuda import plans
from fused_rnn.functional import gru, lstm, rnn
from fused_rnn.plan import EXCHANGES, Plan

HIDDEN, BATCH, STEPS, RUNS = (128, 256, 512, 768, 1024, 2048), (8, 64, 256), 512, 3
# Layers of H units on inputs of H; chunks of time, None for as many as the planner finds to pay.
STACKS = [("LSTM", 256, 8, 2, 1024), ("LSTM", 128, 8, 4, 2048), ("GRU", 512, 8, 3, 1024), ("LSTM", 256, 16, 3, 512)]
CHUNKS = (None, 1, 2, 4, 8, 16)
MEMBERS, ROWS = (1, 2, 4, 8, 16, 32, 64, 128), (8, 16, 32)
KERNELS = {"persistent_fwd": "forward", "persistent_bwd": "backward"}  # by a part of their names


def teams(every: bool) -> Iterator[dict[str, Any]]:
    """What plans are forced to."""
    yield {}
    if every:
        for exchange in EXCHANGES:
            for members in (1,) if exchange == "cta" else MEMBERS[1:]:
                yield from ({"exchange": exchange, "members": members, "rows": rows} for rows in ROWS)


def plan_of(cell: str, number: str, hidden: int, batch: int, way: str, forced: dict[str, Any]) -> Plan:
    dtype, tf32 = NUMBERS[number]
    return fused_rnn.plan(cell, batch, hidden, dtype=dtype, tf32=tf32, backward=way == "backward", **forced)


def training(cell: str, number: str, hidden: int, batch: int, steps: int, device: str = "cuda") -> Callable[[], None]:
    """A forward and a backward of one layer, to be called."""
    dtype, gates, width = NUMBERS[number][0], CELLS[cell].gates, hidden**-0.5
    shapes = [(gates * hidden, 8), (gates * hidden, hidden), (gates * hidden,), (gates * hidden,)]
    weights = [(torch.randn(shape, device=device) * width).to(dtype).requires_grad_() for shape in shapes]
    x = torch.randn(steps, batch, 8, device=device).to(dtype).requires_grad_()

    def run() -> None:
        if cell == "lstm":
            y = lstm(x, weights, backend="cuda")[0]
        elif cell == "gru":
            y = gru(x, weights, backend="cuda")[0]
        else:
            y = rnn(x, weights, nonlinearity=cell.removeprefix("rnn_"), backend="cuda")[0]
        torch.autograd.grad(y, [x, *weights], torch.ones_like(y))

    return run


def measure(cell: str, number: str, hidden: int, batch: int) -> dict[str, float]:
    """Microseconds of a step, forward and backward, of the persistent kernels that run."""
    run, flags = training(cell, number, hidden, batch, STEPS), torch.backends.cudnn
    with flags.flags(flags.enabled, flags.benchmark, allow_tf32=NUMBERS[number][1]):
        run()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            for _ in range(RUNS):
                run()
            torch.cuda.synchronize()
    return times(profile.key_averages())


def times(events: Any) -> dict[str, float]:
    """Of a profile's kernels. A loop whose teams do not fit beside each other is several launches."""
    found: dict[str, float] = {}
    for event in events:
        for part, way in KERNELS.items():
            if part in event.key:
                found[way] = found.get(way, 0.0) + event.device_time_total / RUNS / STEPS
    return found


def stacks(out: Path, end: float, device: str = "cuda") -> int:
    """Milliseconds of whole stacks in bf16, by the number of chunks: inference and training. How many failed."""
    rows: list[dict[str, Any]] = []
    failed = 0
    for kind, hidden, batch, layers, steps in STACKS:
        model = getattr(fused_rnn, kind)(hidden, hidden, layers, device=device, dtype=torch.bfloat16, backend="cuda")
        x = torch.randn(steps, batch, hidden, device=device, dtype=torch.bfloat16)
        leaves, dy = [x.clone().requires_grad_(), *model.parameters()], torch.randn_like(x)
        calls = {
            "inference": partial(torch.no_grad()(model), x),
            "training": lambda: torch.autograd.grad(model(leaves[0])[0], leaves, dy),  # noqa: B023
        }
        for (way, call), chunks in product(calls.items(), CHUNKS):
            if time.monotonic() > end:
                return failed
            case = {"kind": kind, "H": hidden, "B": batch, "L": layers, "T": steps, "way": way}
            try:
                with plans.override(chunks=chunks):
                    taken = round(milliseconds(call), 4)
            except Exception as error:
                failed += 1
                print("stack", *case.values(), f"{chunks or 'as planned'}: failed: {error}", flush=True)
                continue
            rows.append({**case, "chunks": chunks, "ms": taken})
            print("stack", *case.values(), f"{chunks or 'as planned'}: {taken:.3f} ms", flush=True)
            (out / "stacks.json").write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    return failed


def milliseconds(call: Callable[[], object]) -> float:
    """The least of a few calls, from an event before to one behind, of a GPU that was idle."""
    taken = []
    for _ in range(RUNS + 2):
        torch.cuda.synchronize()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        torch.cuda.synchronize()
        taken.append(begin.elapsed_time(end))
    return min(taken)


def single(chosen: argparse.Namespace, end: float) -> int:
    """The steps of single layers. How many cases failed."""
    rows: list[dict[str, Any]] = []
    failed = 0
    gigahertz = getattr(torch.cuda.get_device_properties(0), "clock_rate", 0) / 1e6
    print(f"cell number H B way: microseconds a step, estimated cycles (at {gigahertz:.2f} GHz), team")
    numbers, cells = chosen.number or ("bf16", "tf32"), chosen.cell or ("lstm", "gru")
    for number, cell, hidden, batch in product(numbers, cells, chosen.hidden or HIDDEN, BATCH):
        for forced in teams(chosen.every):
            if time.monotonic() > end:
                print("time is up")
                return failed
            wanted = {way: plan_of(cell, number, hidden, batch, way, forced) for way in KERNELS.values()}
            if any(plan.reason for plan in wanted.values()):
                continue  # autograd runs both: a team that fits one alone is not measured
            try:
                with plans.override(**forced):
                    found = measure(cell, number, hidden, batch)
            except Exception as error:
                failed += 1
                print(cell, number, hidden, batch, *forced.values(), f"failed: {error}", flush=True)
                continue
            for way, micros in found.items():
                plan = wanted[way]
                case = {"cell": cell, "number": number, "H": hidden, "B": batch, "way": way}
                team = {
                    "exchange": plan.exchange,
                    "members": plan.members,
                    "known": plan.known,
                    "rows": plan.rows,
                    "waves": plan.waves,
                }
                measured = {"micros": round(micros, 3), "gigahertz": gigahertz}
                rows.append({**case, **team, **measured, "cycles": plan.cycles._asdict()})
                print(*case.values(), f"{micros:.2f} {sum(plan.cycles):.0f}", *team.values(), flush=True)
            (chosen.out / "steps.json").write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    return failed


def main() -> int:
    parser = argparse.ArgumentParser(prog="gpu_steps", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--cell", choices=list(CELLS), action="append")
    parser.add_argument("--number", choices=list(NUMBERS), action="append")
    parser.add_argument("--hidden", type=int, action="append")
    parser.add_argument("--every", action="store_true")
    parser.add_argument("--minutes", type=float, default=3.0)
    chosen = parser.parse_args()
    chosen.out.mkdir(parents=True, exist_ok=True)
    begun = time.monotonic()
    failed = single(chosen, begun + 45 * chosen.minutes) + stacks(chosen.out, begun + 60 * chosen.minutes)
    if failed:
        print(f"{failed} failed")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
