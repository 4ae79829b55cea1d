"""More threads in one process, or more processes of one thread each: sequences a second, ours beside torch.nn's.

Providers and numbers of threads take turns in one process, as in measure.py; the first call after the number has
changed does not count. Processes are as many as cores, as servers run them: all of them run torch.nn's, then all ours.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from fused_rnn.commands.bench.calls import Call
from fused_rnn.commands.bench.grid import CELLS, SEQUENCES, VARIANTS, Point, Shape
from fused_rnn.commands.bench.measure import BLOCK_S, TOLERANCE, Timing, clock, difference, interleave, percentiles
from fused_rnn.commands.bench.providers import BASELINE, build
from fused_rnn.commands.bench.results import SAME, geometric_mean, write
from fused_rnn.commands.bench.tables import extras
from fused_rnn.commands.bench.worker import Team
from fused_rnn.commands.machine import describe

PREFIX = "scaling-"  # of the result files' names
OURS = "auto"
PROVIDERS = (BASELINE, OURS)
SHAPES: dict[str, tuple[Shape, ...]] = {
    "inference": ((128, 1, 256, 256), (128, 32, 256, 256)),
    "training": ((128, 32, 256, 256),),
}
WINDOW_S = 0.4  # of processes that run side by side
ROUNDS = 7

Way = tuple[int, int]  # threads of a process, processes


@dataclass(frozen=True)
class Rate:
    """Sequences a second of a provider at a point: percentiles over n turns. run: its place in the file's runs."""

    point: Point
    provider: str
    way: Way
    p20: float
    p50: float
    p80: float
    n: int
    run: int = 0

    @property
    def key(self) -> tuple[Point, str, Way]:
        return self.point, self.provider, self.way

    def to_json(self) -> dict[str, Any]:
        point = self.point
        entry: dict[str, Any] = {"kernel": point.cell, "provider": self.provider, "mode": point.mode}
        entry |= {"metric": "sequences_per_s", "dtype": point.dtype, "size": point.size, "variant": point.variant}
        entry |= {"threads": self.way[0], "processes": self.way[1]}
        return entry | {"p20": self.p20, "p50": self.p50, "p80": self.p80, "n": self.n, "run": self.run}

    @staticmethod
    def from_json(entry: dict[str, Any]) -> Rate:
        point = Point(entry["kernel"], entry["mode"], entry["dtype"], **entry["size"], variant=entry["variant"])
        values = {name: entry[name] for name in ("p20", "p50", "p80", "n")}
        run = entry.get("run", 0)  # older files have one run, and no word of it in a row
        return Rate(point, entry["provider"], (entry["threads"], entry["processes"]), **values, run=run)


class AtThreads(Call):
    """A call that is run with a number of threads of its own."""

    def __init__(self, call: Call, threads: int) -> None:
        super().__init__(call.point, call.module, call.forward, call.x, call.dy)
        self.threads = threads

    def prepare(self) -> None:
        """As a call's; after another number of threads a run that does not count, for the threads start in it."""
        super().prepare()
        if torch.get_num_threads() != self.threads:
            torch.set_num_threads(self.threads)
            self.run()
            super().prepare()


def counts(cores: int) -> tuple[int, ...]:
    """1, 2, 4, …, and the cores."""
    powers = [1 << power for power in range(cores.bit_length()) if 1 << power <= cores]
    return tuple(dict.fromkeys([*powers, cores]))


def points(
    dtype: str,
    cells: Sequence[str],
    modes: Sequence[str],
    shapes: Sequence[Shape] = (),
    layers: int = 1,
    bidirectional: bool = False,
) -> list[Point]:
    """What is measured: the shapes given, or one sequence and a batch."""
    return [
        Point(cell, mode, dtype, T, B, H, D=0 if D == H else D, depth=layers, bidirectional=bidirectional)
        for cell, mode in product(cells, modes)
        for T, B, D, H in shapes or SHAPES[mode]
    ]


def execute(wanted: list[Point], threads: Sequence[int], budget_s: float, out: Path, console: Console) -> Path:
    """Measure every point, write the file and print its table; returns the file's path.

    The points that were measured are written, too, when an interrupt or an error ends the run.
    """
    ways = [*((count, 1) for count in threads), *((1, count) for count in threads if count > 1)]
    facts = describe("cpu") | {"dtype": wanted[0].dtype}
    keys = {(point, provider, way) for point, provider, way in product(wanted, PROVIDERS, ways)}
    path, runs, kept = _continued(out / f"{PREFIX}{wanted[0].dtype}.json", facts, keys, console)
    before = torch.get_num_threads()
    rates: list[Rate] = []
    share = budget_s / len(wanted) / 2
    try:
        with Team(max(threads)) as team, console.status("") as status:
            for point in wanted:
                status.update(str(point))
                at_point = [*_in_one_process(point, threads, share)]
                torch.set_num_threads(1)
                for processes in (count for count in threads if count > 1):
                    at_point += _in_processes(team, point, processes, share / max(1, len(threads) - 1))
                rates += at_point  # a point's rates stand side by side: all of them, or none
    finally:
        torch.set_num_threads(before)
        measured = {rate.point for rate in rates}
        kept = [rate for rate in kept if rate.point not in measured]
        if rates:
            _save(path, [*runs, facts], [*kept, *(replace(rate, run=len(runs)) for rate in rates)])
    console.print(table(rates, facts))
    console.print(summary(rates))
    console.print(f"Written to {path}", soft_wrap=True)
    return path


def _in_one_process(point: Point, threads: Sequence[int], budget_s: float) -> Iterator[Rate]:
    torch.set_num_threads(1)
    plain = {provider: build(provider, point) for provider in PROVIDERS}
    for call in plain.values():
        call.run()
    off = difference(plain[OURS], plain[BASELINE].results())
    if not off <= TOLERANCE[point.dtype]:
        raise RuntimeError(f"{point}: differs from torch.nn by {off:.1e}")
    run = clock("cpu")
    calls = {f"{name} {count}": AtThreads(plain[name], count) for name, count in product(PROVIDERS, threads)}
    cost = {name: run(call, 2)[1] for name, call in calls.items()}
    # A larger block, for the threads are changed before it.
    seconds = interleave(dict(calls), cost, run, 10 * BLOCK_S, budget_s)
    for name, samples in seconds.items():
        provider, count = name.split()
        yield _rate(point, provider, (int(count), 1), [point.B / second for second in samples])


def _in_processes(team: Team, point: Point, processes: int, budget_s: float) -> Iterator[Rate]:
    for provider in PROVIDERS:
        for _ in range(2):
            team.rate(point, provider, 0.0, processes)
    found: dict[str, list[float]] = {provider: [] for provider in PROVIDERS}
    order, shuffle, start = list(PROVIDERS), random.Random(0).shuffle, time.perf_counter()
    for turn in range(10 * ROUNDS):
        if turn >= ROUNDS and time.perf_counter() - start > budget_s:
            break
        for provider in order:
            found[provider].append(team.rate(point, provider, min(WINDOW_S, budget_s / 2 / ROUNDS), processes))
        shuffle(order)
    for provider, values in found.items():
        yield _rate(point, provider, (1, processes), values)


def _rate(point: Point, provider: str, way: Way, values: list[float]) -> Rate:
    timing: Timing = percentiles(values)
    p20, p50, p80 = (float(f"{value:.4g}") for value in (timing.p20, timing.p50, timing.p80))
    return Rate(point, provider, way, p20, p50, p80, timing.n)


def _continued(
    path: Path, facts: dict[str, Any], keys: set[tuple[Point, str, Way]], console: Console
) -> tuple[Path, list[dict[str, Any]], list[Rate]]:
    """The file to write into, and the runs and rates in it. A point's rates stand side by side, so they are replaced
    together: a file of another machine, or that has more of a point than is measured now, stays as it is."""
    wanted, number, points_now = path, 1, {point for point, _, _ in keys}
    while path.exists():
        try:
            runs, rates = load(path)
            there = {rate.key for rate in rates if rate.point in points_now}
            if there <= keys and all(run.get(name) == facts[name] for run in runs for name in SAME):
                return path, runs, rates
        except (ValueError, KeyError, TypeError, AttributeError):
            pass  # somebody else's file, or half of one
        number += 1
        path = wanted.with_stem(f"{wanted.stem}-{number}")
    if path != wanted:
        console.print(f"{wanted} holds other results, which stay. This run goes into {path}.", soft_wrap=True)
    return path, [], []


def load(path: Path) -> tuple[list[dict[str, Any]], list[Rate]]:
    """The descriptions of the runs, the latest last, and every rate."""
    data = json.loads(path.read_text(encoding="utf-8"))
    return data["runs"], [Rate.from_json(entry) for entry in data["rows"]]


def _save(path: Path, runs: list[dict[str, Any]], rates: list[Rate]) -> None:
    """Write one line per rate; runs that no rate is of are dropped."""
    used = sorted({rate.run for rate in rates})
    rows = (replace(rate, run=used.index(rate.run)).to_json() for rate in rates)
    write(path, (runs[run] for run in used), rows)


def _title(way: Way) -> str:
    threads, processes = way
    if processes > 1:
        return f"{processes} processes"
    return f"{threads} thread{'s' * (threads > 1)}"


def _rows(rates: list[Rate]) -> Iterator[tuple[Point, dict[Way, tuple[float, float]]]]:
    """(point, ours and torch.nn's rate by way), training last."""
    values, ways = {rate.key: rate.p50 for rate in rates}, _ways(rates)
    order = sorted(
        {rate.point for rate in rates},
        key=lambda p: (
            *(SEQUENCES.index(p.mode), CELLS.index(p.cell), VARIANTS.index(p.variant)),
            *(p.T, p.B, p.H, p.width, p.layers, p.directions),
        ),
    )
    for point in order:
        found = {way: (values.get((point, OURS, way)), values.get((point, BASELINE, way))) for way in ways}
        yield point, {way: (ours, theirs) for way, (ours, theirs) in found.items() if ours and theirs}


def _entry(pair: tuple[float, float] | None) -> str:
    if pair is None:
        return "–"
    ours, theirs = pair
    return f"{ours:,.0f}/s ({ours / theirs:.2f}×)" if ours >= 10 else f"{ours:.2f}/s ({ours / theirs:.2f}×)"


def _ways(rates: list[Rate]) -> list[Way]:
    return sorted({rate.way for rate in rates}, key=lambda way: way[::-1])


def table(rates: list[Rate], facts: dict[str, Any]) -> Table:
    """For a terminal."""
    heading = f"{facts['device_name']}, {facts['dtype']}: sequences a second, × torch.nn's in the same setting"
    shown = Table(title=heading, title_justify="left", title_style="bold", box=None, padding=(0, 1, 0, 0))
    shown.add_column("")
    for way in _ways(rates):
        shown.add_column(_title(way), justify="right")
    for point, by_way in _rows(rates):
        entries = (_entry(by_way.get(way)) for way in _ways(rates))
        shown.add_row(f"{point.mode} {point.cell}\n  {point.shape}{extras(point)}", *entries)
    return shown


def summary(rates: list[Rate]) -> str:
    """What more threads and more processes make of one, in a sentence for each."""
    lines = []
    for way in (way for way in _ways(rates) if way != (1, 1)):
        gains: tuple[list[float], list[float]] = ([], [])
        for _, by_way in _rows(rates):
            if way in by_way and (1, 1) in by_way:
                for gain, more, one in zip(gains, by_way[way], by_way[1, 1], strict=True):
                    gain.append(more / one)
        if gains[0]:
            said = [f"{geometric_mean(gain):.2f}× ({min(gain):.2f} to {max(gain):.2f})" for gain in gains]
            lines.append(f"{_title(way)} do {said[0]} of what one does with ours, {said[1]} with torch.nn.")
    return "\n".join(lines)


def tables(directory: Path) -> str:
    """Markdown: the table of every file of a folder; "" where there is none."""
    return "\n\n".join(_markdown(path) for path in sorted(directory.glob(f"{PREFIX}*.json")))


def _markdown(path: Path) -> str:
    runs, rates = load(path)
    run, ways = runs[-1], _ways(rates)
    shared = {(rate.point.T, rate.point.H) for rate in rates}
    same = len(shared) == 1 and not any(rate.point.D for rate in rates)
    size = ", T={}, H={}".format(*next(iter(shared))) if same else ""
    lines = [f"| {run['dtype']}{size}: sequences a second (× `torch.nn`) | " + " | ".join(map(_title, ways)) + " |"]
    lines.append("|---" * (1 + len(ways)) + "|")
    for point, by_way in _rows(rates):
        name = f"B={point.B}" if same else point.shape
        entries = " | ".join(_entry(by_way.get(way)) for way in ways)
        lines.append(f"| {point.cell}, {point.mode}, {name}{extras(point)} | {entries} |")
    what = "The processes have one thread each; what `torch.nn` does in the same setting is what ours is compared with."
    lines += ["", f"{what} In geometric mean, and from worst to best: " + summary(rates).replace("\n", " ")]
    facts = f"{run['device_name']}, {run['cores']} cores, torch {run['torch']}"
    lines += ["", f"<sub>{facts}, {_dates(runs, rates)}; `python -m fused_rnn bench --scaling`</sub>"]
    return "\n".join(lines)


def _dates(runs: list[dict[str, Any]], rates: list[Rate]) -> str:
    """Commit and date of every run; of several, with what was measured in each."""
    said = []
    for index, run in enumerate(runs):
        of_run = {(rate.point.cell, rate.point.mode): None for rate in rates if rate.run == index}
        what = f"{', '.join(f'{cell} {mode}' for cell, mode in of_run)}: " if len(runs) > 1 else ""
        said.append(f"{what}commit {run['commit'] or 'unknown'}, {run['date']}")
    return "; ".join(said)
