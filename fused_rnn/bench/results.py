"""Result files: rows of measurements, each pointing to the run (device, versions, commit, date) it came from.

A file holds one dtype and one thread count. Measuring again replaces the rows that were measured and keeps the rest, so
a run restricted to one cell refreshes that cell alone; every row still says which commit it belongs to.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from fused_rnn.bench.grid import Point
from fused_rnn.bench.measure import Timing
from fused_rnn.bench.providers import ways_in_torch

TIME, MEMORY = "time_us", "peak_memory_mib"
FLOOR = "limit"  # the provider name of the rows that hold Limits.floor


@dataclass(frozen=True)
class Row:
    """One provider at one point. p20, p50, p80 are in the metric's unit; refused says why there are none."""

    point: Point
    provider: str
    metric: str
    run: int
    p20: float | None = None
    p50: float | None = None
    p80: float | None = None
    n: int = 0
    refused: str | None = None

    @property
    def key(self) -> tuple[Point, str, str]:
        return self.point, self.provider, self.metric

    def to_json(self) -> dict[str, Any]:
        size = {"T": self.point.T, "B": self.point.B, "H": self.point.H}
        entry: dict[str, Any] = {"kernel": self.point.cell, "provider": self.provider, "mode": self.point.mode}
        entry |= {"metric": self.metric, "dtype": self.point.dtype, "size": size, "variant": self.point.variant}
        if self.refused is None:
            entry |= {"p20": self.p20, "p50": self.p50, "p80": self.p80, "n": self.n}
        else:
            entry |= {"refused": self.refused}
        return entry | {"run": self.run}

    @staticmethod
    def from_json(entry: dict[str, Any]) -> Row:
        point = Point(entry["kernel"], entry["mode"], entry["dtype"], **entry["size"], variant=entry["variant"])
        values = {name: entry.get(name) for name in ("p20", "p50", "p80", "refused")}
        return Row(point, entry["provider"], entry["metric"], entry["run"], n=entry.get("n", 0), **values)


def setting(run: dict[str, Any]) -> str:
    """A run's dtype and, on the CPU, its threads, as titles have them."""
    if run["device"] != "cpu":
        return str(run["dtype"])
    return f"{run['dtype']}, {run['threads']} thread{'s' * (run['threads'] > 1)}"


def time_row(point: Point, provider: str, timing: Timing, run: int) -> Row:
    """A row of microseconds, to four digits, from a timing in seconds."""
    if timing.refused is not None:
        return Row(point, provider, TIME, run, refused=timing.refused)
    p20, p50, p80 = (float(f"{seconds * 1e6:.4g}") for seconds in (timing.p20, timing.p50, timing.p80))
    return Row(point, provider, TIME, run, p20, p50, p80, timing.n)


@dataclass
class Results:
    """The contents of one result file. runs: one description per run that rows still refer to."""

    runs: list[dict[str, Any]] = field(default_factory=list)
    rows: dict[tuple[Point, str, str], Row] = field(default_factory=dict)

    @staticmethod
    def load(path: Path) -> Results:
        data = json.loads(path.read_text(encoding="utf-8"))
        rows = (Row.from_json(entry) for entry in data["rows"])
        return Results(data["runs"], {row.key: row for row in rows})

    def replace(self, rows: list[Row]) -> None:
        """Put rows in, and take out whatever else there was of their points and metrics: no speed-up spans two runs."""
        measured = {(row.point, row.metric) for row in rows}
        kept = {key: row for key, row in self.rows.items() if (row.point, row.metric) not in measured}
        self.rows = kept | {row.key: row for row in rows}

    def with_(self, rows: list[Row]) -> Results:
        """A copy in which rows have been put."""
        copy = Results([*self.runs], {**self.rows})
        copy.replace(rows)
        return copy

    def save(self, path: Path) -> None:
        """Write one line per row, so that a diff shows what changed; runs no row refers to are dropped."""
        rows = sorted(self.rows.values(), key=lambda row: (*asdict(row.point).values(), row.metric, row.provider))
        used = sorted({row.run for row in rows})
        self.runs = [self.runs[run] for run in used]
        rows = [Row(**{**row.__dict__, "run": used.index(row.run)}) for row in rows]
        self.rows = {row.key: row for row in rows}
        lines = ",\n".join("  " + json.dumps(row.to_json()) for row in rows)
        runs = ",\n".join("  " + json.dumps(run) for run in self.runs)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f'{{"runs": [\n{runs}\n], "rows": [\n{lines}\n]}}\n', encoding="utf-8")

    def value(self, point: Point, provider: str, metric: str = TIME) -> float | None:
        """The median of a provider at a point, or None where it was not measured or refused."""
        row = self.rows.get((point, provider, metric))
        return None if row is None else row.p50

    def speedups(self, provider: str, where: Callable[[Point], bool] = lambda point: True) -> dict[Point, float]:
        """torch's median / provider's median at every point that has both, where `where` holds."""
        found = {}
        for point, name, metric in self.rows:
            if name != provider or metric != TIME or not where(point):
                continue
            ours, theirs = self.value(point, provider), self.in_torch(point)
            if ours and theirs:
                found[point] = theirs / ours
        return found

    def in_torch(self, point: Point) -> float | None:
        """The time of the fastest way in torch; None where its own in the dtype of the point was not measured."""
        times = [self.value(point, provider) for provider in ways_in_torch(point)]
        return min(time for time in times if time) if times[0] else None

    def providers(self) -> list[str]:
        """Every provider that has a time, in order of first appearance, the limit left out."""
        seen = dict.fromkeys(row.provider for row in self.rows.values() if row.metric == TIME)
        return [provider for provider in seen if provider != FLOOR]


def geometric_mean(values: Iterable[float]) -> float:
    """Geometric mean; nan of nothing."""
    logs = [math.log(value) for value in values]
    return math.exp(sum(logs) / len(logs)) if logs else math.nan
