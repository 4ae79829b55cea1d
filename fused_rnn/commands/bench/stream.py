"""One step of `module.stream()` against one of torch.nn's cell and a call of its module with T = 1. B = 1, no gradient.

Where onnxruntime is installed a session of it is one more: it is stepped with T = 1, its states stay where they are.

A step takes a microsecond where the clock of the other suites takes half of one: here a block of calls is timed as a
whole. Blocks take turns as there (measure.py). The limit is the reading of all weights at the rate of summing a buffer
of that size, by torch.sum, which reads it from the front every time: a step that turns round at the end may be faster,
and is then the limit itself.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import fused_rnn
from fused_rnn.commands.bench.grid import CELLS, GATES, Point
from fused_rnn.commands.bench.limits import measure_limits, read_rate
from fused_rnn.commands.bench.measure import (
    BLOCK_S,
    MAX_ROUNDS,
    MIN_ROUNDS,
    TOLERANCE,
    Timing,
    counts_core_time,
    percentiles,
)
from fused_rnn.commands.bench.providers import BASELINE, STEP_BASELINE
from fused_rnn.commands.bench.results import FLOOR, Results, continued, setting, time_row
from fused_rnn.commands.bench.rivals import missing, ort, versions
from fused_rnn.commands.bench.tables import duration, grid, ratio
from fused_rnn.commands.machine import describe

PREFIX = "stream-"  # of the result files' names
SIZES = (32, 64, 128, 256, 512, 1024)
# name → the copy's weights
STREAMS: dict[str, str | None] = {"stream": None, "stream bf16": "bf16", "stream int8": "int8"}
NARROW_TOLERANCE = 5e-2  # a guard against timing something wrong; docs/streaming.md has the error

ORT = "onnxruntime"  # where it is installed
Call = Callable[[], Tensor]


def build(cell: str, H: int) -> dict[str, Call]:
    """Every provider's call: the same weights, input and state, which the streams advance."""
    torch.manual_seed(0)
    module, step = getattr(nn, cell)(H, H, device="cpu"), getattr(nn, f"{cell}Cell")(H, H, device="cpu")
    step.load_state_dict({name.removesuffix("_l0"): value for name, value in module.state_dict().items()})
    ours = getattr(fused_rnn, cell)(H, H, device="cpu")
    ours.load_state_dict(module.state_dict())
    x = torch.randn(1, H, device="cpu")
    h, c = torch.zeros(2, 1, H, device="cpu").unbind(0)
    hx: Any = (h, c) if cell == "LSTM" else h
    whole: Any = (h[None], c[None]) if cell == "LSTM" else h[None]
    sequence = x[None]
    calls: dict[str, Call] = {
        STEP_BASELINE: (lambda: step(x, hx)[0]) if cell == "LSTM" else lambda: step(x, hx),
        BASELINE: lambda: module(sequence, whole)[0][0],
        "auto": lambda: ours(sequence, whole)[0][0],
    }
    for name, weights in STREAMS.items():
        calls[name] = _call(ours.stream(weights=weights), x)
    if ort.missing() is None:
        calls[ORT] = ort.OrtStream(cell, [*module.parameters()], x).step
    return calls


def _call(stream: fused_rnn.Stream, x: Tensor) -> Call:
    return lambda: stream.step(x)


def measure(cell: str, H: int, budget_s: float) -> dict[str, Timing]:
    """Seconds a call, in blocks of BLOCK_S that take turns in random order. Raises RuntimeError for a wrong result."""
    calls = build(cell, H)
    cost: dict[str, float] = {}
    expected = calls[STEP_BASELINE]().double()
    for name, call in calls.items():  # the streams start from the zeros that the others are given
        off = float((call().double() - expected).norm() / expected.norm())
        if not off <= (NARROW_TOLERANCE if STREAMS.get(name) else TOLERANCE["fp32"]):
            raise RuntimeError(f"{cell}, H={H}: {name} differs from torch's cell by {off:.1e}")
        call()
        cost[name] = _block(call, 3)
    order, shuffle = list(calls), random.Random(0).shuffle
    samples: dict[str, list[float]] = {name: [] for name in order}
    start = time.perf_counter()
    for turn in range(MAX_ROUNDS):
        if turn >= MIN_ROUNDS and time.perf_counter() - start > budget_s:
            break
        for name in order:
            samples[name].append(_block(calls[name], max(3, int(BLOCK_S / cost[name]))))
        shuffle(order)
    return {name: percentiles(seconds) for name, seconds in samples.items()}


def _block(call: Call, times: int) -> float:
    """Seconds a call, after one that brings its weights back into the caches."""
    now = time.thread_time_ns if counts_core_time("cpu") else time.perf_counter_ns
    call()
    start = now()
    for _ in range(times):
        call()
    return (now() - start) * 1e-9 / times


def execute(cells: Sequence[str], threads: int, budget_s: float, out: Path, console: Console) -> Path:
    """Measure every cell at every size, write the file and print its table."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        facts = describe("cpu") | {"dtype": "fp32", "threads": threads, "limits": asdict(measure_limits("fp32", "cpu"))}
        facts |= versions([ORT]) | {"clock": "core" if counts_core_time("cpu") else "wall"}
        if lacking := missing(ORT):
            console.print(lacking)
        path, results, said = continued(out / f"{PREFIX}fp32-{threads}t.json", facts)
        if said is not None:
            console.print(said)
        results.runs.append(facts)
        run = len(results.runs) - 1
        with _saved(results, path), torch.no_grad(), console.status("") as status:
            for cell in cells:
                for H in SIZES:
                    status.update(f"{cell} H={H}")
                    point = Point(cell, "stream", "fp32", 1, 1, H)
                    timings = measure(cell, H, budget_s / len(cells) / len(SIZES))
                    size = 2 * GATES[cell] * H * H * 4
                    floor = size / read_rate(size, "cpu")
                    if timings["stream"].p50 < floor:  # the machine was disturbed, or a step knows a better way to read
                        floor = min(size / read_rate(size, "cpu"), floor, timings["stream"].p50)
                    timings[FLOOR] = Timing(floor, floor, floor, 1)
                    results.replace([time_row(point, name, timing, run) for name, timing in timings.items()])
    finally:
        torch.set_num_threads(before)
    console.print(terminal(results.of_run(len(results.runs) - 1)))
    console.print(f"Written to {path}", soft_wrap=True)
    return path


@contextmanager
def _saved(results: Results, path: Path) -> Iterator[None]:
    """Write what was measured, also where an interrupt or an error ends it."""
    try:
        yield
    finally:
        if results.rows:
            results.save(path)


def terminal(results: Results) -> Table:
    """Every cell and size: torch's cell and module, ours called with T = 1, the streams, the limit."""
    names = (STEP_BASELINE, BASELINE, "auto", *STREAMS, ORT, FLOOR)
    titles = ("torch.nn cell", "torch.nn, T=1", "ours, T=1", *STREAMS, "onnx runtime", "reading its weights")
    shown = grid("One step, B=1, no gradient: time, × torch.nn's cell", ("",), titles)
    shown.columns[0].no_wrap = True
    for point in dict.fromkeys(point for point, _, _ in results.rows):
        run = results.common_run(point, STEP_BASELINE, "stream")
        theirs = results.value(point, STEP_BASELINE, run=run)
        entries = []
        for name in names:
            ours = results.value(point, name, run=run)
            gain = f"\n{ratio(theirs / ours)}×" if ours and theirs and name not in (STEP_BASELINE, FLOOR) else ""
            entries.append("–" if ours is None else duration(ours) + gain)
        shown.add_row(f"{point.cell} H={point.H}", *entries)
    return shown


def table(results: Results) -> str:
    """The README's table: microseconds a step, and how many times as fast as torch's cell and as its module."""
    points = [point for point, name, _ in results.rows if name == "stream"]
    heights = sorted({point.H for point in points})
    run = results.runs[-1]
    lines = [
        f"**One step of a stream, B=1, {setting(run)}** (µs; × `torch.nn`'s cell / × its module called with T=1)",
        "",
    ]
    lines += ["| | " + " | ".join(f"H={H}" for H in heights) + " |", "|---" * (1 + len(heights)) + "|"]
    marked = False
    titles = {"stream": "", "stream bf16": ", bf16 weights", "stream int8": ", int8 weights"}
    for cell in CELLS:
        for name, title in titles.items():
            entries = []
            for H in heights:
                point = Point(cell, "stream", "fp32", 1, 1, H)
                three = (name, STEP_BASELINE, BASELINE)
                run_of = results.common_run(point, *three)
                ours, theirs, whole = (results.value(point, n, run=run_of) for n in three)
                known = ours and theirs and whole
                entries.append(f"{ours:.3g} ({theirs / ours:.1f} / {whole / ours:.0f}×)" if known else "–")  # type: ignore[operator]
            lines.append(f"| {cell}{title} | " + " | ".join(entries) + " |")
        entries = []
        for H in heights:
            point = Point(cell, "stream", "fp32", 1, 1, H)
            limit, ours = (results.value(point, name) for name in (FLOOR, "stream"))
            passed = bool(limit and ours and 1.005 * ours < limit)
            entries.append("–" if limit is None else f"{limit:.3g}{' †' * passed}")
            marked = marked or passed
        lines.append(f"| *{cell}: reading its fp32 weights* | " + " | ".join(entries) + " |")
    if marked:
        lines += ["", "† Exceeded: it reads from the front each time; a step that turns round at the end is faster."]
    lines += [
        "",
        f"<sub>{run['device_name']}, torch {run['torch']}, commit {run['commit'] or 'unknown'}, {run['date']}</sub>",
    ]
    return "\n".join(lines)
