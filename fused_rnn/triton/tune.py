"""Measure schedules on the GPU at hand and keep the fastest in the table that planner.choose looks into first.

    python -m fused_rnn.triton.tune --cell lstm --dtype bfloat16 --hidden 512 [--batch 16 64 256] [--steps 256]

For each batch size the shipped schedules and their neighbours run forward, then backward, by CUDA events, the median of
some repeats; what does not compile or does not fit is left out. Nothing is ever tuned by itself.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import statistics
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

import torch
import triton
from torch import Tensor

from fused_rnn.cells import CELLS
from fused_rnn.gpu.loops import Layer
from fused_rnn.triton import measured, planner
from fused_rnn.triton.device import activation_of, kind_of, precision_of, target_at
from fused_rnn.triton.launch import Loops
from fused_rnn.triton.launches import LaunchConfig, waves
from fused_rnn.triton.schedule import Schedule, Shape, shape_of
from fused_rnn.triton.target import INTERPRETER, Target

Timer = Callable[[Callable[[], None]], float]


def candidates(shape: Shape, target: Target) -> list[Schedule]:
    """The shipped schedules, and for teams other numbers of units, warps and batch rows."""
    schedules = planner.shipped(shape, target)
    seen = dict.fromkeys(schedules)
    for schedule in schedules:
        if schedule.registers:
            for warps in (2, 4, 8, 16):
                seen[replace(schedule, tile=replace(schedule.tile, warps=warps))] = None
            continue
        solo = schedule.loop == "solo"
        for units, warps in itertools.product((16, 32, 64), (2, 4, 8)):
            for batch in {16, 32, schedule.tile.batch}:
                tile = replace(schedule.tile, units=units, warps=warps, batch=batch)
                team = 1 if solo else -(-shape.hidden // (units * schedule.spread))
                spread = -(-shape.hidden // units) if solo else schedule.spread
                seen[Schedule(schedule.loop, tile, team, spread, False, schedule.hold)] = None
    return list(seen)


def runner(
    shape: Shape, schedule: Schedule, dtype: torch.dtype, target: Target, steps: int, batch: int
) -> Callable[[], None]:
    """A function that runs one loop of a layer with made-up inputs."""
    cell, hidden = CELLS[shape.cell], shape.hidden
    layer = Layer(cell, steps, batch, hidden, (1,), None, None)
    precision, activation = precision_of(shape.kind, target), activation_of(shape.kind, target)
    loops = Loops(layer, LaunchConfig(schedule, target, precision, activation))
    where = "cpu" if target is INTERPRETER else "cuda"

    def random(*sizes: int) -> Tensor:
        return torch.rand(*sizes, device=where).sub_(0.5).to(dtype)

    def wide(count: int) -> list[Tensor]:
        return [torch.zeros(1, batch, hidden, device=where) for _ in range(count)]

    w, h0, y = random(1, cell.gates, hidden, hidden), random(1, batch, hidden), random(steps, batch, 1, hidden)
    saved = random(steps, batch, 1, cell.saved, hidden) if cell.saved else None
    histories = [random(steps, batch, 1, hidden) for _ in cell.states[1:]]
    if shape.backward:
        states, first = [y, *histories], [random(1, batch, hidden) for _ in cell.states]
        dgates, dstates = random(steps, batch, 1, cell.gradients, hidden), wide(len(cell.states))

        def run_backward() -> None:
            loops.counters = None  # a run counts from zero
            loops.backward(
                dy=y, dsequences=[], w=w, params=None, states=states, first=first, saved=saved, dgates=dgates,
                dstates=dstates, dparams=None,
            )  # fmt: skip

        return run_backward
    gx, h_n = random(steps, batch, 1, cell.gates, hidden), torch.empty_like(h0)
    bias = random(1, cell.apart, hidden) if cell.apart else None
    carried = wide(cell.carried)

    def run_forward() -> None:
        kept: dict[str, Any] = {"carried": carried, "histories": histories, "checkpoints": []}
        loops.forward(gx=gx, w=w, bias=bias, params=None, h0=h0, y=y, h_n=h_n, saved=saved, every=1, **kept)

    return run_forward


def by_events(run: Callable[[], None], repeats: int = 7) -> float:
    """Median milliseconds of a run, after two that warm up."""
    run()
    run()
    times = []
    for _ in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return float(statistics.median(times))


def measure(
    shape: Shape, schedules: list[Schedule], dtype: torch.dtype, target: Target, steps: int, batch: int, timer: Timer
) -> list[tuple[float, Schedule]]:
    """(milliseconds, schedule), fastest first, of those that run."""
    results = []
    for schedule in schedules:
        try:
            waves(batch, 1, schedule, target)
            results.append((timer(runner(shape, schedule, dtype, target, steps, batch)), schedule))
        except Exception as error:  # too much shared memory, too many programs, a compiler's failure: none for here
            print(f"  left out: {schedule}: {type(error).__name__}", file=sys.stderr)
    return sorted(results, key=lambda result: result[0])


def tune(shape: Shape, dtype: torch.dtype, target: Target, steps: int, batches: list[int], timer: Timer) -> None:
    """Measure, print, and put into the table on disk."""
    best: measured.Rows = []
    for batch in sorted(batches):
        results = measure(shape, candidates(shape, target), dtype, target, steps, batch, timer)
        if not results:
            continue
        best.append((batch, results[0][1]))
        for milliseconds, schedule in results[:3]:
            print(f"B={batch:<5}{milliseconds * 1000 / steps:9.3f} us a step  {schedule}")
    name = "the interpreter" if target is INTERPRETER else torch.cuda.get_device_name()
    note = {
        "device": name,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "date": datetime.date.today().isoformat(),
        "steps": str(steps),
        "first": str(asdict(best[0][1])) if best else "none",
    }
    measured.record(shape, target, best, note)


def main() -> int:
    parser = argparse.ArgumentParser(prog="tune", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cell", nargs="+", default=["lstm", "gru"], choices=list(CELLS))
    parser.add_argument("--dtype", nargs="+", default=["bfloat16"], choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--hidden", nargs="+", type=int, default=[64, 128, 256, 512, 1024])
    parser.add_argument("--batch", nargs="+", type=int, default=[16, 64, 256], help="up to each of these, a schedule")
    parser.add_argument("--steps", type=int, default=256)
    chosen = parser.parse_args()
    if not torch.cuda.is_available():
        print("tune: torch sees no GPU, there is nothing to measure", file=sys.stderr)
        return 1
    target = target_at(torch.cuda.current_device())
    for cell in chosen.cell:
        for name in chosen.dtype:
            dtype = getattr(torch, name)
            for hidden in chosen.hidden:
                for backward in (False, True):
                    shape = shape_of(CELLS[cell], kind_of(dtype, target), hidden, backward)
                    print(f"{cell} {name} H={hidden} {'backward' if backward else 'forward'}")
                    tune(shape, dtype, target, chosen.steps, chosen.batch, by_events)
    print(f"written to {measured.path()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
