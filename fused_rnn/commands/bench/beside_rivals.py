"""The tables of rivals: how many times as fast as each of them `backend=None` is, and a stream as onnxruntime's."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from fused_rnn.commands.bench.grid import CELLS, GRIDS, REGIONS, SEQUENCES, Point
from fused_rnn.commands.bench.providers import BASELINE, TITLES
from fused_rnn.commands.bench.results import TIME, Results, geometric_mean, setting, torch_of
from fused_rnn.commands.bench.rivals import RIVALS
from fused_rnn.commands.bench.tables import duration, grid, ratio

PREFIX = "rivals-"  # of the result files' names
OURS, STREAM = "auto", "stream"
KEPT = (
    "onnxruntime's weights are constants of its model, packed once and for all; a module's may change, and are packed "
    "in each call."
)
Inside = Callable[[Point], bool]


def anywhere(_: Point) -> bool:
    return True


def present(results: Results) -> list[str]:
    """The rivals that a file has beside ours, in the order of RIVALS."""
    return [name for name in RIVALS if results.ratios(name, OURS)]


def terminal(results: Results) -> list[Table]:
    """For each rival, the geometric means and the worst by mode and region, and every point that is lost."""
    shown = []
    for name in present(results):
        table = grid(f"Ours: × {TITLES[name]}'s speed, geometric mean (worst)", ("mode", "region"), CELLS)
        for mode, region, entries in _regions(results, name):
            table.add_row(mode, region, *entries)
        shown += [table, _points(results, name)]
    return shown


def _points(results: Results, rival: str) -> Table:
    """Every point: both medians, and what it took to compile."""
    table = grid(f"Every point beside {TITLES[rival]}", ("",), ("ours", "theirs", "×", "compiled in"))
    for point, value in sorted(results.ratios(rival, OURS).items(), key=lambda found: _order(found[0])):
        run = results.common_run(point, rival, OURS)
        ours, theirs = (results.value(point, name, run=run) or 0.0 for name in (OURS, rival))
        seconds = results.rows[point, rival, TIME].compile_s
        compiled = "" if seconds is None else f"{seconds:.3g} s"
        table.add_row(
            f"{point.mode} {point.cell} {point.shape}", duration(ours), duration(theirs), ratio(value), compiled
        )
    return table


def _order(point: Point) -> tuple[int, ...]:
    return SEQUENCES.index(point.mode), CELLS.index(point.cell), point.T, point.B, point.H


def _entry(values: Sequence[float]) -> str:
    return f"**{ratio(geometric_mean(values))}×** ({ratio(min(values))})" if values else "–"


def _by_cell(found: dict[Point, float], mode: str, inside: Inside) -> list[str]:
    """An entry for each cell; [] where there is no point."""
    values = [[v for p, v in found.items() if (p.cell, p.mode) == (cell, mode) and inside(p)] for cell in CELLS]
    return [_entry(of_cell) for of_cell in values] if any(values) else []


def _regions(results: Results, rival: str) -> Iterator[tuple[str, str, list[str]]]:
    """(mode, region, entries by cell): the benchmark's regions, then all that was measured."""
    found = results.ratios(rival, OURS)
    for mode in SEQUENCES:
        for region, inside in (REGIONS["cpu"] | {"all": anywhere}).items():
            if entries := _by_cell(found, mode, inside):
                yield mode, region, entries


def tables(directory: Path) -> tuple[str, str]:
    """Markdown of every file of a folder: the few lines of the README, and all of it; "" where there is none."""
    loaded = [Results.load(path) for path in sorted(directory.glob(f"{PREFIX}*.json"))]
    loaded = [results for results in loaded if present(results)]
    streams = [Results.load(path) for path in sorted(directory.glob("stream-*.json"))]
    streams = [results for results in streams if results.ratios("onnxruntime", STREAM)]
    if not loaded and not streams:
        return "", ""
    return _short(loaded, streams), _full(loaded, streams)


def _short(loaded: list[Results], streams: list[Results]) -> str:
    lines = _head("times as fast as, mean (worst)")
    for results in loaded:
        for name in present(results):
            for mode in SEQUENCES:
                if entries := _by_cell(results.ratios(name, OURS), mode, anywhere):
                    lines.append(_row(f"{TITLES[name]}, {mode}", entries))
    for results in streams:
        lines.append(_row("onnxruntime, a step of a stream, B=1", _stream(results)))
    return "\n".join([*lines, "", *_below(loaded, streams)])


def _full(loaded: list[Results], streams: list[Results]) -> str:
    parts = []
    for results in loaded:
        for name in present(results):
            lines = [f"**× {TITLES[name]}'s speed, {setting(results.runs[-1])}**", "", *_head("")]
            lines += [_row(f"{mode}, {region}", entries) for mode, region, entries in _regions(results, name)]
            parts.append("\n".join([*lines, "", " ".join([_lost(results, name), *_compiled(results, name)])]))
        parts += _deepbench(results)
    for results in streams:
        parts.append("\n".join(_streams(results)))
    return "\n\n".join([*parts, "\n".join(_below(loaded, streams))])


def _head(title: str) -> list[str]:
    return [f"| {title} | " + " | ".join(CELLS) + " |", "|---" * (1 + len(CELLS)) + "|"]


def _row(title: str, entries: Sequence[str]) -> str:
    return f"| {title} | " + " | ".join(entries) + " |"


def _lost(results: Results, rival: str) -> str:
    """How many points are slower than the rival's, and the worst of them."""
    found = results.ratios(rival, OURS)
    slower = sorted((value, str(point)) for point, value in found.items() if value < 1)
    worst = f", the worst {slower[0][0]:.2f}× at {slower[0][1]}" if slower else ""
    return f"Ours are slower at {len(slower)} of {len(found)} points{worst}."


def _compiled(results: Results, rival: str) -> Iterator[str]:
    """What it took to compile, from the least to the most."""
    rows = [row for (_, name, _), row in results.rows.items() if name == rival]
    seconds = sorted(row.compile_s for row in rows if row.compile_s is not None)
    if seconds:
        yield f"Before that, it takes {seconds[0]:.2g} to {seconds[-1]:.2g} s to compile each of {len(seconds)} points."


def _deepbench(results: Results) -> Iterator[str]:
    """DeepBench's sizes, one a row: milliseconds, and how many times as fast ours are."""
    wanted = [*GRIDS["deepbench"].points(results.runs[-1]["dtype"])]
    rivals = [name for name in (BASELINE, *RIVALS) if results.ratios(name, OURS)]
    points = [point for point in wanted if results.value(point, OURS)]
    if not {*points} - {*GRIDS["rivals"].points(results.runs[-1]["dtype"])}:
        return  # these two have some in common
    lines = ["**DeepBench's sizes up to H=1024** (ms; × theirs)", ""]
    lines += ["| | ours | " + " | ".join(TITLES[name] for name in rivals) + " |", "|---" * (2 + len(rivals)) + "|"]
    for point in points:
        entries = [f"{(results.value(point, OURS) or 0.0) / 1e3:.3g}"]
        for name in rivals:
            value, times = results.value(point, name), results.ratios(name, OURS).get(point)
            entries.append(f"{value / 1e3:.3g} ({ratio(times)}×)" if value and times else "–")
        lines.append(_row(f"{point.cell}, {point.mode}, {point.shape}", entries))
    yield "\n".join(lines)


def _stream(results: Results) -> list[str]:
    found = results.ratios("onnxruntime", STREAM)
    return [_entry([value for point, value in found.items() if point.cell == cell]) for cell in CELLS]


def _streams(results: Results) -> Iterator[str]:
    """A step of a stream beside a session stepped with T=1, by size."""
    found = results.ratios("onnxruntime", STREAM)
    heights = sorted({point.H for point in found})
    yield f"**One step, B=1, {setting(results.runs[-1])}: a stream beside an onnxruntime session** (µs, theirs → ours)"
    yield ""
    yield "| | " + " | ".join(f"H={H}" for H in heights) + " |"
    yield "|---" * (1 + len(heights)) + "|"
    for cell in CELLS:
        entries = []
        for H in heights:
            point = Point(cell, "stream", "fp32", 1, 1, H)
            ours, theirs = (results.value(point, name) for name in (STREAM, "onnxruntime"))
            known = point in found and ours and theirs
            entries.append(f"{theirs:.3g} → {ours:.3g} ({ratio(found[point])}×)" if known else "–")
        yield _row(cell, entries)


def _below(loaded: list[Results], streams: list[Results]) -> Iterator[str]:
    """What to know of the figures, and where they are from."""
    points = [point for results in loaded for name in present(results) for point in results.ratios(name, OURS)]
    sizes = (f"{letter} {_range([getattr(point, letter) for point in points])}" for letter in "TBH")
    said = [f"Ours are `backend=None`, {', '.join(sizes)}, D = H."] if points else []
    if streams or any("onnxruntime" in present(results) for results in loaded):
        said.append(KEPT)
    yield " ".join(said)
    yield ""
    runs = [run for results in (*loaded, *streams) for run in results.runs]
    core_time = any(run.get("clock") == "core" for run in runs)
    command = "`python -m fused_rnn bench --grid rivals`, `deepbench`, `compiled`, and `--stream`"
    clock = ", the clock runs while the one thread has its core" if core_time else ""
    yield f"<sub>{'; '.join(_facts(runs))}; {command}{clock}</sub>"


def _facts(runs: list[dict[str, Any]]) -> Iterator[str]:
    """Of each machine the versions of all that ran there, with commits and days."""
    for device in dict.fromkeys(run["device_name"] for run in runs):
        of_device = sorted(
            (run for run in runs if run["device_name"] == device), key=lambda run: "torch_runs" not in run
        )
        versions = dict.fromkeys(
            f"{name} {run[name]}" for name in ("onnxruntime", "jax") for run in of_device if run.get(name)
        )
        commits = dict.fromkeys(f"commit {run['commit'] or 'unknown'}, {run['date'][:10]}" for run in of_device)
        yield f"{device}, {', '.join([torch_of(of_device[0]), *versions])}, {'; '.join(commits)}"


def _range(values: list[int]) -> str:
    return f"{min(values)} to {max(values)}" if len({*values}) > 1 else str(values[0])
