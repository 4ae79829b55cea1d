"""From result files of a GPU to the table by which backend=None goes: fused_rnn/dispatch/fastest.py."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import pairwise
from math import isqrt
from pathlib import Path
from typing import Any, TypeVar

from fused_rnn.commands.bench.grid import SEQUENCES, Point
from fused_rnn.commands.bench.results import Results, geometric_mean
from fused_rnn.dispatch import fastest
from fused_rnn.dispatch.fastest import Row, Rows

CANDIDATES = ("torch", "cuda", "triton")
Value = TypeVar("Value")


def write(directory: Path) -> Path:
    """Make the table of a GPU's result files; returns its path.

    Raises FileNotFoundError if there is none, ValueError if they come from different architectures.
    """
    loaded = [Results.load(path) for path in sorted(directory.glob("*.json"))]
    loaded = [results for results in loaded if results.runs and results.runs[-1]["device"] == "cuda"]
    if not loaded:
        raise FileNotFoundError(
            f"no result file of a GPU in {directory}: run `python -m fused_rnn bench --device cuda`"
        )
    architectures = {"sm_" + results.runs[-1]["capability"].replace(".", "") for results in loaded}
    if len(architectures) > 1:
        raise ValueError(f"{directory}: got results of {', '.join(sorted(architectures))}, expected those of one")
    found: dict[str, Rows] = {}
    for results in loaded:
        found |= choices(results)
    run = max((run for results in loaded for run in results.runs), key=lambda run: str(run["date"]))
    facts = {name: run.get(name) for name in ("device_name", "torch", "cudnn", "triton", "commit", "date")}
    path = fastest.FOLDER / f"{architectures.pop()}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(_text({**facts, "rows": found}), encoding="utf-8")
    fastest.table.cache_clear()
    return path


def choices(results: Results) -> dict[str, Rows]:
    """The rows of every cell, mode and shape that a file has plain problems of."""
    sizes: dict[str, dict[tuple[int, int], list[Point]]] = {}
    for point in results.speedups("torch"):
        if point.variant == "plain" and point.mode in SEQUENCES:
            key = fastest.key_of(point.cell.lower(), point.dtype, point.mode == "training", point.T == 1)
            sizes.setdefault(key, {}).setdefault((point.H, point.B), []).append(point)
    return {key: _rows({size: best(results, points) for size, points in found.items()}) for key, found in sizes.items()}


def best(results: Results, points: Sequence[Point]) -> str:
    """The backend that loses least at the worst of these points, which differ in T: dispatch does not go by T."""
    # By torch's time of the same run, so that backends that were measured in different runs can be compared.
    speedups = {name: results.speedups(name, set(points).__contains__) for name in CANDIDATES}
    times = {name: [1 / found[p] if p in found else None for p in points] for name, found in speedups.items()}
    whole = {name: [time for time in values if time] for name, values in times.items() if all(values)}
    fastest_ = [min(values) for values in zip(*whole.values(), strict=True)]

    def loss(name: str) -> tuple[float, float]:
        ratios = [time / least for time, least in zip(whole[name], fastest_, strict=True)]
        return max(ratios), geometric_mean(ratios)

    return min(whole, key=loss)


def _rows(best: dict[tuple[int, int], str]) -> Rows:
    """Sizes that were not measured go with the nearest that was, by ratio; nearer to twice the largest, to torch."""
    rows: list[tuple[int, Row]] = []
    for hidden in sorted({hidden for hidden, _ in best}):
        of_hidden = [(batch, name) for (h, batch), name in sorted(best.items()) if h == hidden]
        rows.append((hidden, _up_to(of_hidden, "torch")))
    return _up_to(rows, ((None, "torch"),))


def _up_to(values: list[tuple[int, Value]], beyond: Value) -> tuple[tuple[int | None, Value], ...]:
    """(size, value), ascending, to (largest size, value): neighbours of one value as one, the last without end."""
    sizes = [*(size for size, _ in values), 2 * values[-1][0]]
    ends = [*(isqrt(a * b) for a, b in pairwise(sizes)), None]
    joined: list[tuple[int | None, Value]] = []
    for end, value in zip(ends, [*(value for _, value in values), beyond], strict=True):
        if joined and joined[-1][1] == value:
            joined.pop()
        joined.append((end, value))
    return tuple(joined)


def _text(contents: dict[str, Any]) -> str:
    """JSON with a line for each rows, so that a diff shows what changed."""
    rows = ",\n".join(f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in sorted(contents["rows"].items()))
    facts = "".join(f" {json.dumps(key)}: {json.dumps(value)},\n" for key, value in contents.items() if key != "rows")
    return f'{{\n{facts} "rows": {{\n{rows}\n }}\n}}\n'
