"""Result files: rows of measurements, each pointing to the run (device, versions, commit, date) it came from.

A file holds one dtype and one thread count. Measuring again replaces the rows that were measured and keeps the rest, so
a run restricted to one cell, or to one provider, refreshes that alone; every row still says which commit it belongs to.
No comparison spans two runs. Hence the rows that a provider not measured again was measured beside stay with it, and a
file from another machine or another torch is never continued.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from fused_rnn.commands.bench.grid import Point
from fused_rnn.commands.bench.measure import DISTURBED, Timing
from fused_rnn.commands.bench.providers import ways_in_torch

TIME, MEMORY = "time_us", "peak_memory_mib"
FLOOR = "limit"  # the provider name of the rows that hold Limits.floor


@dataclass(frozen=True)
class Row:
    """One provider at one point. p20, p50, p80 are in the metric's unit; refused says why there are none.

    compile_s: seconds that it took to compile, of those who do.
    """

    point: Point
    provider: str
    metric: str
    run: int
    p20: float | None = None
    p50: float | None = None
    p80: float | None = None
    n: int = 0
    refused: str | None = None
    compile_s: float | None = None

    @property
    def disturbed(self) -> bool:
        """Whether the times differ so much that something else must have run beside them."""
        return bool(self.p20 and self.p80 and self.p80 > DISTURBED * self.p20)

    @property
    def key(self) -> Key:
        return self.point, self.provider, self.metric

    def to_json(self) -> dict[str, Any]:
        entry: dict[str, Any] = {"kernel": self.point.cell, "provider": self.provider, "mode": self.point.mode}
        entry |= {"metric": self.metric, "dtype": self.point.dtype, "size": self.point.size}
        entry |= {"variant": self.point.variant}
        if self.refused is None:
            entry |= {"p20": self.p20, "p50": self.p50, "p80": self.p80, "n": self.n}
        else:
            entry |= {"refused": self.refused}
        if self.compile_s is not None:
            entry |= {"compile_s": self.compile_s}
        return entry | {"run": self.run}

    @staticmethod
    def from_json(entry: dict[str, Any]) -> Row:
        point = Point(entry["kernel"], entry["mode"], entry["dtype"], **entry["size"], variant=entry["variant"])
        values = {name: entry.get(name) for name in ("p20", "p50", "p80", "refused", "compile_s")}
        return Row(point, entry["provider"], entry["metric"], entry["run"], n=entry.get("n", 0), **values)


def setting(run: dict[str, Any]) -> str:
    """A run's dtype and, on the CPU, its threads, as titles have them."""
    if run["device"] != "cpu":
        return str(run["dtype"])
    return f"{run['dtype']}, {run['threads']} thread{'s' * (run['threads'] > 1)}"


def torch_of(run: dict[str, Any]) -> str:
    """torch's version and, where a run says so, whose kernels it runs for which cell."""
    cells: dict[str, list[str]] = {}
    for cell, kernels in run.get("torch_runs", {}).items():
        cells.setdefault(kernels, []).append(cell)
    said = "; ".join(f"{kernels}: {', '.join(names)}" for kernels, names in cells.items())
    return f"torch {run['torch']}{f' ({said})' if said else ''}"


def time_row(point: Point, provider: str, timing: Timing, run: int) -> Row:
    """A row of microseconds, to four digits, from a timing in seconds."""
    if timing.refused is not None:
        return Row(point, provider, TIME, run, refused=timing.refused)
    p20, p50, p80 = (float(f"{seconds * 1e6:.4g}") for seconds in (timing.p20, timing.p50, timing.p80))
    compile_s = None if timing.compile_s is None else float(f"{timing.compile_s:.3g}")
    return Row(point, provider, TIME, run, p20, p50, p80, timing.n, compile_s=compile_s)


Key = tuple[Point, str, str]  # point, provider, metric
SAME = ("device_name", "torch", "isa", "kernels")  # what all runs of a file have in common


@dataclass
class Results:
    """The contents of one result file.

    runs: one description per run that rows still refer to, the latest last. rows: the latest of every point, provider
    and metric. older: of earlier runs, the latest first, what stands beside a row that was not measured again.
    """

    runs: list[dict[str, Any]] = field(default_factory=list)
    rows: dict[Key, Row] = field(default_factory=dict)
    older: dict[Key, tuple[Row, ...]] = field(default_factory=dict)

    @staticmethod
    def load(path: Path) -> Results:
        data = json.loads(path.read_text(encoding="utf-8"))
        results = Results(data["runs"])
        results.replace([Row.from_json(entry) for entry in data["rows"]])
        return results

    def every_row(self) -> list[Row]:
        """The latest rows and the older ones."""
        return [*self.rows.values(), *(row for rows in self.older.values() for row in rows)]

    def replace(self, rows: list[Row]) -> None:
        """Put rows in, each in the place of its run's, and take out the runs of a point that nothing needs any more.

        That is a run whose providers have all been measured at that point in one later run.
        """
        merged = {(row.key, row.run): row for row in (*self.every_row(), *rows)}
        groups: dict[tuple[Point, str], dict[int, list[Row]]] = {}
        for row in merged.values():
            groups.setdefault((row.point, row.metric), {}).setdefault(row.run, []).append(row)
        found: dict[Key, list[Row]] = {}
        for by_run in groups.values():
            later: list[set[str]] = []
            for run in sorted(by_run, reverse=True):
                providers = {row.provider for row in by_run[run]} - {FLOOR}  # nobody needs a limit alone
                if not any(providers <= others for others in later):
                    for row in by_run[run]:
                        found.setdefault(row.key, []).append(row)
                later.append(providers)
        self.rows = {key: rows[0] for key, rows in found.items()}
        self.older = {key: tuple(rows[1:]) for key, rows in found.items() if rows[1:]}

    def with_(self, rows: list[Row]) -> Results:
        """A copy in which rows have been put."""
        copy = Results([*self.runs], {**self.rows}, {**self.older})
        copy.replace(rows)
        return copy

    def of_run(self, run: int) -> Results:
        """What one run measured, alone."""
        alone = Results([self.runs[run]])
        alone.replace([replace(row, run=0) for row in self.every_row() if row.run == run])
        return alone

    def save(self, path: Path) -> None:
        """Write one line per row, so that a diff shows what changed; runs no row refers to are dropped."""
        rows = self.every_row()
        used = sorted({row.run for row in rows})
        self.runs = [self.runs[run] for run in used]
        rows = [replace(row, run=used.index(row.run)) for row in rows]
        self.rows, self.older = {}, {}
        self.replace(rows)
        rows.sort(key=lambda row: (*asdict(row.point).values(), row.metric, row.provider, -row.run))
        write(path, self.runs, (row.to_json() for row in rows))

    def of(self, key: Key) -> Iterator[Row]:
        """Every row of a point, provider and metric, the latest first."""
        if key in self.rows:
            yield self.rows[key]
            yield from self.older.get(key, ())

    def value(self, point: Point, provider: str, metric: str = TIME, run: int | None = None) -> float | None:
        """The median of a provider at a point, in one run or the latest; None where it was not measured or refused."""
        return next((row.p50 for row in self.of((point, provider, metric)) if run in (None, row.run)), None)

    def common_run(self, point: Point, *providers: str, metric: str = TIME) -> int | None:
        """The latest run in which all of these have a median at this point: the one to compare them in."""
        runs = [{row.run for row in self.of((point, name, metric)) if row.p50} for name in providers]
        return max(set.intersection(*runs), default=None)

    def ratios(self, over: str, provider: str) -> dict[Point, float]:
        """The time of one over another's, at every point that has both in one run."""
        found = {}
        for point in dict.fromkeys(point for point, name, _ in self.rows if name == over):
            run = self.common_run(point, over, provider)
            a, b = (self.value(point, name, run=run) for name in (over, provider))
            if run is not None and a and b:
                found[point] = a / b
        return found

    def speedups(self, provider: str, where: Callable[[Point], bool] = lambda point: True) -> dict[Point, float]:
        """torch's median / provider's median at every point that has both in one run, where `where` holds."""
        found = {}
        for point, name, metric in self.rows:
            if name == provider and metric == TIME and where(point):
                run = self.common_run(point, provider, ways_in_torch(point)[0])
                ours, theirs = self.value(point, provider, run=run), self.in_torch(point, run)
                if run is not None and ours and theirs:
                    found[point] = theirs / ours
        return found

    def in_torch(self, point: Point, run: int | None = None) -> float | None:
        """The time of the fastest way in torch; None where its own in the dtype of the point was not measured."""
        times = [self.value(point, provider, run=run) for provider in ways_in_torch(point)]
        return min(time for time in times if time) if times[0] else None

    def providers(self) -> list[str]:
        """Every provider that has a time, in order of first appearance, the limit left out."""
        seen = dict.fromkeys(row.provider for row in self.rows.values() if row.metric == TIME)
        return [provider for provider in seen if provider != FLOOR]


def write(path: Path, runs: Iterable[dict[str, Any]], rows: Iterable[dict[str, Any]]) -> None:
    """Write a file, one line per run and row. Who is killed meanwhile leaves what was there, and never half a file."""
    lines = (",\n".join("  " + json.dumps(entry) for entry in entries) for entries in (runs, rows))
    text = '{{"runs": [\n{}\n], "rows": [\n{}\n]}}\n'.format(*lines)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)


def continued(path: Path, facts: dict[str, Any]) -> tuple[Path, Results, str | None]:
    """The file to write this run's rows into, what it holds already, and what is to be said about that.

    That is `path` if there is none yet, or its rows come from this machine and this torch. Others stay as they are:
    then it is the first of path-2, path-3, … of which the same can be said.
    """
    wanted, number, others = path, 1, []
    while path.exists():
        earlier = _read(path)
        if earlier is not None and all(run.get(key) == facts[key] for run in earlier.runs for key in SAME):
            break
        others.append(f"{path} holds {_whose(earlier)}, which stays")
        number += 1
        path = wanted.with_stem(f"{wanted.stem}-{number}")
    said = f"{'; '.join(others)}. This run goes into {path}." if others else None
    return path, Results.load(path) if path.exists() else Results(), said


def _read(path: Path) -> Results | None:
    try:
        return Results.load(path)
    except (ValueError, KeyError, TypeError, AttributeError):  # somebody else's file, or half of one
        return None


def _whose(results: Results | None) -> str:
    if results is None or not results.runs:
        return "something else than results"
    run = results.runs[-1]
    return f"results of {run.get('device_name')} with torch {run.get('torch')}, kernels {run.get('kernels')}"


def geometric_mean(values: Iterable[float]) -> float:
    """Geometric mean; nan of nothing."""
    logs = [math.log(value) for value in values]
    return math.exp(sum(logs) / len(logs)) if logs else math.nan
