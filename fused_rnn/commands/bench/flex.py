"""FlexRNN beside what it stands in for: the built-in modules, a Python loop over the step, and JAX's lax.scan.

LSTM, GRU and RNN are written as steps. All of them run in blocks that take turns (measure.py), by one thread on one
core, and what counts is the time that they had this core: on a machine with nothing else to do it is the clock's, and
other work does not come into it. lax.scan is in a process of its own (scan.py) on that same core, and gets its turns
from here. Gradients are those of the input and of all weights, as everywhere in these suites.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import fused_rnn
from fused_rnn.commands.bench.calls import Call
from fused_rnn.commands.bench.grid import CELLS, GRIDS, SEQUENCES, Point
from fused_rnn.commands.bench.measure import BLOCK_S, TOLERANCE, clock, difference, interleave, percentiles
from fused_rnn.commands.bench.providers import BASELINE, build
from fused_rnn.commands.bench.results import Results, continued, geometric_mean, setting, time_row
from fused_rnn.commands.bench.rivals.scan import Scan, ScanCall, missing, version
from fused_rnn.commands.bench.tables import duration, grid, ratio
from fused_rnn.commands.machine import describe

PREFIX = "flex-"  # of the result files' names
BUILT_IN, FLEX, LOOP, SCAN = "auto", "flex", "step loop", "lax.scan"
TITLES = {BUILT_IN: "built-in", FLEX: "FlexRNN", LOOP: "loop over the step", SCAN: "JAX's lax.scan"}
SCANNED = tuple(
    Point(cell, mode, "fp32", 128, B, H) for cell in CELLS for mode in SEQUENCES for B in (1, 32) for H in (64, 256)
)


@fused_rnn.cell(gates=4, states=("h", "c"))
def lstm(x: Any, r: Any, s: Any, p: Any) -> Any:
    """torch.nn.LSTM's step."""
    i, f, o = (torch.sigmoid(x[k] + r[k]) for k in (0, 1, 3))
    c = f * s.c + i * torch.tanh(x[2] + r[2])
    return o * torch.tanh(c), c


@fused_rnn.cell(gates=3)
def gru(x: Any, r: Any, s: Any, p: Any) -> Any:
    """torch.nn.GRU's step."""
    z = torch.sigmoid(x[1] + r[1])
    n = torch.tanh(x[2] + torch.sigmoid(x[0] + r[0]) * r[2])
    return (1 - z) * n + z * s.h


@fused_rnn.cell(gates=1)
def rnn(x: Any, r: Any, s: Any, p: Any) -> Any:
    """torch.nn.RNN's step."""
    return torch.tanh(x[0] + r[0])


STEPS = {"LSTM": lstm, "GRU": gru, "RNN": rnn}


class StepLoop(nn.Module):
    """What a cell of one's own takes without FlexRNN: a Python loop over its step, the input's product before it."""

    def __init__(self, cell: fused_rnn.UserCell, width: int, size: int) -> None:
        super().__init__()
        self.cell, self.size = cell, size
        shapes: dict[str, tuple[int, ...]] = {
            "weight_ih": (cell.gates * size, width),
            "weight_hh": (cell.gates * size, size),
        }
        shapes |= dict.fromkeys(("bias_ih", "bias_hh"), (cell.gates * size,))
        self.weights = [nn.Parameter(torch.zeros(shape, device="cpu")) for shape in shapes.values()]
        for name, weight in zip(shapes, self.weights, strict=True):
            self.register_parameter(f"{name}_l0", weight)

    def forward(self, x: Tensor) -> Tensor:
        w_ih, w_hh, b_ih, b_hh = self.weights
        own = nn.functional.linear(x, w_ih, b_ih)
        state = (x.new_zeros(x.shape[1], self.size),) * len(self.cell.states)
        outputs = []
        for sides in own.unbind(0):
            recurrent = nn.functional.linear(state[0], w_hh, b_hh)
            state = self.cell(sides.chunk(self.cell.gates, -1), recurrent.chunk(self.cell.gates, -1), state)
            outputs.append(state[0])
        return torch.stack(outputs)


def call_of(provider: str, point: Point) -> Call:
    """FlexRNN's or the loop's call, with the numbers that every other provider has."""
    theirs, step = build(BASELINE, point), STEPS[point.cell]
    kind: Callable[..., nn.Module] = fused_rnn.FlexRNN if provider == FLEX else StepLoop
    module = kind(step, point.width, point.H)
    module.load_state_dict(theirs.module.state_dict())
    x, dy = theirs.x.detach().requires_grad_(theirs.training), theirs.dy
    return Call(point, module, (lambda: module(x)[0]) if provider == FLEX else lambda: module(x), x, dy)


def points(cells: Sequence[str], with_jax: bool) -> list[tuple[Point, tuple[str, ...]]]:
    """What is measured, and who runs it: the quick grid, with the loop where batches are small; what JAX runs too."""
    wanted: list[tuple[Point, tuple[str, ...]]] = []
    for point in GRIDS["quick"].points("fp32", cells, SEQUENCES):
        looped = point.B <= 8 and point.T > 1
        wanted.append((point, (BUILT_IN, FLEX, LOOP) if looped else (BUILT_IN, FLEX)))
    if with_jax:
        wanted += [(point, (BUILT_IN, FLEX, SCAN)) for point in SCANNED if point.cell in cells]
    return wanted


def measure(point: Point, providers: Sequence[str], scan: Scan | None, budget_s: float) -> dict[str, list[float]]:
    """Seconds of every run of each provider. Raises RuntimeError for a result that is not torch.nn's."""
    theirs = build(BASELINE, point)
    theirs.run()
    calls: dict[str, Any] = {}
    for provider in providers:
        if provider == SCAN:
            assert scan is not None
            calls[provider] = ScanCall(scan, theirs)
        else:
            calls[provider] = build(provider, point) if provider == BUILT_IN else call_of(provider, point)
        calls[provider].run()
        if not (off := difference(calls[provider], theirs.results())) <= TOLERANCE[point.dtype]:
            raise RuntimeError(f"{point}: {TITLES[provider]} differs from torch.nn by {off:.1e}")

    run = clock("cpu", core_time=True)
    cost = {provider: run(call, 2)[1] for provider, call in calls.items()}
    return interleave(calls, cost, run, BLOCK_S, budget_s)


@contextmanager
def on_one_core() -> Iterator[None]:
    """This process, and those it starts, on the last core they may have; torch with one thread."""
    threads, cores = torch.get_num_threads(), os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None
    torch.set_num_threads(1)
    if cores:
        os.sched_setaffinity(0, {max(cores)})
    try:
        yield
    finally:
        if cores:
            os.sched_setaffinity(0, cores)
        torch.set_num_threads(threads)


def execute(cells: Sequence[str], jax_python: str, budget_s: float, out: Path, console: Console) -> Path:
    """Measure every point, write the file and print its tables; returns the file's path."""
    if lacking := missing(jax_python):
        console.print(f"Without lax.scan, which needs: {lacking}", soft_wrap=True)
    facts = describe("cpu") | {"dtype": "fp32", "threads": 1, "jax": version(jax_python) or ""}
    wanted = dict(points(cells, not lacking))
    with on_one_core(), ExitStack() as stack:
        scan = None if lacking else stack.enter_context(Scan(jax_python, core_time=True))

        def run(point: Point, seconds: float) -> dict[str, list[float]]:
            return measure(point, wanted[point], scan, seconds)

        path, shown = record(PREFIX, facts, list(wanted), run, budget_s, out, console)
    return report(path, terminal(shown), table(shown), console)


def record(
    prefix: str,
    facts: dict[str, Any],
    wanted: Sequence[Point],
    run: Callable[[Point, float], dict[str, list[float]]],
    budget_s: float,
    out: Path,
    console: Console,
) -> tuple[Path, Results]:
    """Measure every point, and write the file, whatever comes in between; its path, and what this run found.

    prefix: of the file's name.  facts: of the run.  run: (point, seconds for it) → every provider's seconds.
    """
    path, results, said = continued(out / f"{prefix}fp32-1t.json", facts)
    if said is not None:
        console.print(said)
    results.runs.append(facts)
    number = len(results.runs) - 1
    try:
        with console.status("") as status:
            for point in wanted:
                status.update(str(point))
                found = run(point, budget_s / len(wanted))
                results.replace(
                    [time_row(point, name, percentiles(seconds), number) for name, seconds in found.items()]
                )
    finally:
        if results.rows:
            results.save(path)
    return path, results.of_run(len(results.runs) - 1)  # saving has numbered them anew


def report(path: Path, shown: Table, text: str, console: Console) -> Path:
    """Print what was measured, and where it lies."""
    console.print(shown)
    console.print(text, markup=False, soft_wrap=True)
    console.print(f"Written to {path}", soft_wrap=True)
    return path


def terminal(results: Results) -> Table:
    """Every point, with FlexRNN's time over the built-in module's, and the others' over FlexRNN's."""
    return beside(results, "FlexRNN: medians, × FlexRNN's", TITLES, FLEX)


def beside(results: Results, title: str, providers: Mapping[str, str], own: str) -> Table:
    """Every point: the medians of all providers, and those of the others over one's own. providers: their titles."""
    shown = grid(title, ("",), tuple(providers.values()))
    shown.columns[0].no_wrap = True
    for point in dict.fromkeys(point for point, _, _ in results.rows):
        entries = []
        for provider in providers:
            value, ours = (results.value(point, name) for name in (provider, own))
            gain = f" {ratio(value / ours)}×" if value and ours and provider != own else ""
            entries.append("–" if value is None else duration(value) + gain)
        shown.add_row(f"{point.mode} {point.cell} {point.shape}", *entries)
    return shown


def tables(directory: Path) -> str:
    """Markdown: the tables of every file of a folder; "" where there is none."""
    return "\n\n".join(table(Results.load(path)) for path in sorted(directory.glob(f"{PREFIX}*.json")))


def table(results: Results) -> str:
    """The README's tables: beside the built-in modules and the loop by cell, beside lax.scan by size."""
    run = results.runs[-1]
    lines = [f"| {setting(run)} | " + " | ".join(CELLS) + " |", "|---" * (1 + len(CELLS)) + "|"]
    slower = {point: 1 / value for point, value in results.ratios(BUILT_IN, FLEX).items() if point not in SCANNED}
    for mode in SEQUENCES:
        lines.append(_by_cell(f"time, × the built-in module's, {mode}", slower, mode, max))
    for mode in SEQUENCES:
        lines.append(
            _by_cell(f"times as fast as a Python loop over the step, {mode}", results.ratios(LOOP, FLEX), mode, min)
        )
    if slower:
        worst = max(slower, key=lambda point: slower[point])
        lines += ["", f"Geometric mean (worst) of {_sizes(slower)}; the loop's of batches up to 8, T > 1. In all "]
        lines[-1] += f"{geometric_mean(slower.values()):.2f}× the built-in modules' time; the worst point, "
        lines[-1] += f"{slower[worst]:.2f}×, is {worst.cell} {worst.mode} {worst.shape}."
    if scanned := results.ratios(SCAN, FLEX):
        lines += ["", *_scanned(results, list(scanned))]
    dates = "; ".join(f"commit {run['commit'] or 'unknown'}, {run['date']}" for run in results.runs)
    jax = f", JAX {run['jax']}" if run.get("jax") else ""
    facts = f"{run['device_name']}, torch {run['torch']}{jax}, {dates}"
    said = f"{facts}; `python -m fused_rnn bench --flex`, the clock runs while the one thread has its core"
    return "\n".join([*lines, "", f"<sub>{said}</sub>"])


def _by_cell(title: str, found: dict[Point, float], mode: str, worst: Callable[[list[float]], float]) -> str:
    entries = []
    for cell in CELLS:
        values = [value for point, value in found.items() if (point.cell, point.mode) == (cell, mode)]
        entries.append(f"**{ratio(geometric_mean(values))}×** ({ratio(worst(values))})" if values else "–")
    return f"| {title} | " + " | ".join(entries) + " |"


def _sizes(found: dict[Point, float]) -> str:
    return ", ".join(
        f"{letter} {', '.join(map(str, sorted({getattr(point, letter) for point in found})))}" for letter in "TBH"
    )


def _scanned(results: Results, found: list[Point]) -> Iterator[str]:
    """The rows of the table beside lax.scan: microseconds a step."""
    sizes = sorted({(point.B, point.H) for point in found})
    steps = ", ".join(sorted({f"T={point.T}" for point in found}))
    heads = (f"B={B}, H={H}" for B, H in sizes)
    yield f"| µs a step: FlexRNN / `lax.scan` of JAX, {steps} | " + " | ".join(heads) + " |"
    yield "|---" * (1 + len(sizes)) + "|"
    for cell, mode in dict.fromkeys((point.cell, point.mode) for point in found):
        by_size = {(point.B, point.H): point for point in found if (point.cell, point.mode) == (cell, mode)}
        entries = []
        for size in sizes:
            point = by_size.get(size)
            run = None if point is None else results.common_run(point, SCAN, FLEX)
            both = [] if point is None else [results.value(point, name, run=run) for name in (FLEX, SCAN)]
            entries.append(" / ".join(_three(value / point.T) for value in both if value and point) or "–")
        yield f"| {cell}, {mode} | " + " | ".join(entries) + " |"


def _three(micros: float) -> str:
    """Three digits, never as a power of ten."""
    return f"{float(f'{micros:.3g}'):,g}"
