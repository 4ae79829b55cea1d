"""Measure plans on the GPU at hand and keep the fastest in the table that tiles.choose looks into first.

    python -m fused_rnn.triton.tune --cell lstm --dtype bfloat16 --hidden 512 [--batch 16 64 256] [--steps 256]

For each batch size the plans of the shipped tables and their neighbours run forward, then backward, by CUDA events, the
median of some repeats; what does not compile or does not fit is left out. Nothing is ever tuned by itself.
"""

from __future__ import annotations

import argparse
import datetime
import statistics
import sys
from collections.abc import Callable
from dataclasses import asdict, replace

import torch
import triton
from torch import Tensor

from fused_rnn.cells import CELLS
from fused_rnn.gpu.loops import Layer
from fused_rnn.triton import tiles
from fused_rnn.triton.device import activations_of, device_at, kind_of, precision_of
from fused_rnn.triton.launch import How, Loops, waves
from fused_rnn.triton.tiles import Device, Plan, Shape

Timer = Callable[[Callable[[], None]], float]


def candidates(shape: Shape, device: Device) -> list[Plan]:
    """The shipped plans, and for teams other numbers of units, warps and batch rows."""
    plans = tiles.shipped(shape, device)
    seen = dict.fromkeys(plans)
    for plan in plans:
        if plan.registers:
            for warps in (2, 4, 8, 16):
                seen[replace(plan, tile=replace(plan.tile, warps=warps))] = None
            continue
        for units in (16, 32, 64):
            for warps in (2, 4, 8):
                for batch in {16, 32, plan.tile.batch}:
                    tile = replace(plan.tile, units=units, warps=warps, batch=batch)
                    team = 1 if plan.loop == "a" else -(-shape.hidden // (units * plan.spread))
                    spread = -(-shape.hidden // units) if plan.loop == "a" else plan.spread
                    seen[Plan(plan.loop, tile, team, spread, False, plan.hold)] = None
    return list(seen)


def runner(shape: Shape, plan: Plan, dtype: torch.dtype, device: Device, steps: int, batch: int) -> Callable[[], None]:
    """A function that runs one loop of a layer with made-up inputs."""
    cell, hidden = CELLS[shape.cell], shape.hidden
    layer = Layer(cell, steps, batch, hidden, (1,), None, None)
    loops = Loops(layer, How(plan, device, precision_of(shape.kind, device), activations_of(shape.kind, device)))
    where = "cpu" if device is tiles.INTERPRETER else "cuda"

    def random(*sizes: int) -> Tensor:
        return torch.rand(*sizes, device=where).sub_(0.5).to(dtype)

    w = random(1, cell.gates, hidden, hidden)
    wide = [torch.zeros(1, batch, hidden, device=where) for _ in cell.states]
    h0, y = random(1, batch, hidden), random(steps, batch, hidden)
    saved = random(steps, batch, 1, cell.saved, hidden) if cell.saved else None
    histories = [random(steps, batch, 1, hidden) for _ in cell.states[1:]]
    if shape.backward:
        dgates = random(steps, batch, 1, cell.gradients, hidden)

        def run_backward() -> None:
            loops.counters = None  # a run counts from zero
            loops.backward(
                dy=y, w=w, states=[y, *histories], first=[h0] * len(wide), saved=saved, dgates=dgates, dstates=wide
            )

        return run_backward
    gx, h_n = random(steps, batch, 1, cell.gates, hidden), torch.empty_like(h0)
    bias = random(1, cell.apart, hidden) if cell.apart else None
    return lambda: loops.forward(
        gx=gx, w=w, bias=bias, h0=h0, carried=wide[: cell.carried], y=y, h_n=h_n, saved=saved, histories=histories,
        checkpoints=[], every=1,
    )  # fmt: skip


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
    return statistics.median(times)


def measure(
    shape: Shape, plans: list[Plan], dtype: torch.dtype, device: Device, steps: int, batch: int, timer: Timer
) -> list[tuple[float, Plan]]:
    """(milliseconds, plan), fastest first, of those that run."""
    results = []
    for plan in plans:
        try:
            waves(batch, 1, plan, device)
            results.append((timer(runner(shape, plan, dtype, device, steps, batch)), plan))
        except (
            Exception
        ) as error:  # too much shared memory, too many programs, a compiler's failure: not a plan for here
            print(f"  left out: {plan}: {type(error).__name__}", file=sys.stderr)
    return sorted(results, key=lambda result: result[0])


def tune(shape: Shape, dtype: torch.dtype, device: Device, steps: int, batches: list[int], timer: Timer) -> None:
    """Measure, print, and put into the table on disk."""
    best: list[tuple[int, Plan]] = []
    for batch in sorted(batches):
        results = measure(shape, candidates(shape, device), dtype, device, steps, batch, timer)
        if not results:
            continue
        best.append((batch, results[0][1]))
        for milliseconds, plan in results[:3]:
            print(f"B={batch:<5}{milliseconds * 1000 / steps:9.3f} us a step  {plan}")
    name = "the interpreter" if device is tiles.INTERPRETER else torch.cuda.get_device_name()
    note = {
        "device": name,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "date": datetime.date.today().isoformat(),
        "steps": str(steps),
        "first": str(asdict(best[0][1])) if best else "none",
    }
    tiles.record(shape, device, best, note)


def main() -> int:
    parser = argparse.ArgumentParser(prog="tune", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cell", nargs="+", default=["lstm", "gru"], choices=list(CELLS))
    parser.add_argument("--dtype", nargs="+", default=["bfloat16"], choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--hidden", nargs="+", type=int, default=[64, 128, 256, 512, 1024])
    parser.add_argument("--batch", nargs="+", type=int, default=[16, 64, 256], help="up to each of these, a plan")
    parser.add_argument("--steps", type=int, default=256)
    chosen = parser.parse_args()
    if not torch.cuda.is_available():
        print("tune: torch sees no GPU, there is nothing to measure", file=sys.stderr)
        return 1
    device = device_at(torch.cuda.current_device())
    for cell in chosen.cell:
        for name in chosen.dtype:
            dtype = getattr(torch, name)
            for hidden in chosen.hidden:
                for backward in (False, True):
                    shape = Shape(cell, CELLS[cell].gates, kind_of(dtype, device), hidden, backward)
                    print(f"{cell} {name} H={hidden} {'backward' if backward else 'forward'}")
                    tune(shape, dtype, device, chosen.steps, chosen.batch, by_events)
    print(f"written to {tiles.measured_path()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
