"""The README's table of a device: what it gives in a dozen rows, the sums of the full tables."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from fused_rnn.commands.bench.grid import CELLS, SEQUENCES, Point
from fused_rnn.commands.bench.providers import BASELINE, STEP_BASELINE
from fused_rnn.commands.bench.results import MEMORY, Results, geometric_mean
from fused_rnn.commands.bench.tables import duration, ratio

STEP_H = 128  # of the stream's row
# What is summed up in a row; a GPU is not taken for single sequences.
PARTS: dict[str, dict[str, Callable[[Point], bool]]] = {
    "cpu": {"batches of 8 to 128": lambda p: p.B >= 8, "one sequence, T ≥ 32": lambda p: p.B == 1 and p.T >= 32},
    "cuda": {"T ≥ 32": lambda p: p.T >= 32},
}


def table(loaded: list[Results], streams: list[Results], provider: str, full: str) -> str:
    """Markdown. loaded: a device's files, provider: our backend there, full: the path of the page with every table.

    Speed-ups are those of backend=None where it was measured, else of the backend.
    """
    device = loaded[0].runs[-1]["device"]
    columns = " | ".join(CELLS)
    lines = [f"| times as fast as `torch.nn`, mean (worst) | {columns} |", "|---" * (1 + len(CELLS)) + "|"]
    for mode in SEQUENCES[::-1]:
        for name, contains in PARTS[device].items():
            for results in loaded:
                lines += _row(results, provider, mode, name, contains)
    lines += [line for results in streams for line in _stream(results)]
    lines += _memory(loaded[0], provider)
    return "\n".join([*lines, "", *_below(loaded, provider, full)])


def _row(results: Results, provider: str, mode: str, name: str, contains: Callable[[Point], bool]) -> Iterator[str]:
    def inside(point: Point) -> bool:
        return point.mode == mode and point.variant == "plain" and contains(point)

    found = results.speedups(_measured(results, provider), inside)
    values = [[speedup for point, speedup in found.items() if point.cell == cell] for cell in CELLS]
    if found:
        entries = " | ".join(f"**{ratio(geometric_mean(v))}×** ({ratio(min(v))})" if v else "–" for v in values)
        yield f"| {mode}, {name}, {results.runs[-1]['dtype']} | {entries} |"


def _measured(results: Results, provider: str) -> str:
    return "auto" if "auto" in results.providers() else provider


def _stream(results: Results) -> Iterator[str]:
    """A step of a stream beside torch.nn's cell."""
    entries = []
    for cell in CELLS:
        point = Point(cell, "stream", "fp32", 1, 1, STEP_H)
        run = results.common_run(point, "stream", STEP_BASELINE)
        ours, theirs = (results.value(point, name, run=run) for name in ("stream", STEP_BASELINE))
        entries.append(f"**{ratio(theirs / ours)}×**, {duration(ours)}" if run is not None and ours and theirs else "–")
    if set(entries) != {"–"}:
        yield f"| `stream.step`, B=1, H={STEP_H}, fp32: beside its cell | {' | '.join(entries)} |"


def _memory(results: Results, provider: str) -> Iterator[str]:
    """Peak memory of training on a long sequence."""
    entries, shape = [], ""
    for cell in CELLS:
        points = [p for p, name, metric in results.rows if (name, metric) == (provider, MEMORY) and p.cell == cell]
        point = next((p for p in points if p.mode == "training"), None)
        run = None if point is None else results.common_run(point, BASELINE, provider, metric=MEMORY)
        if point is None or run is None:
            entries.append("–")
            continue
        ours, theirs = (results.value(point, name, MEMORY, run) or 0.0 for name in (provider, BASELINE))
        shape = point.shape.replace(" ", ", ")
        entries.append(f"{ours:.0f} of {theirs:.0f} MiB")
    if shape:
        yield f"| peak memory of training, {shape}, {results.runs[-1]['dtype']} | {' | '.join(entries)} |"


def _below(loaded: list[Results], provider: str, full: str) -> Iterator[str]:
    run = loaded[0].runs[-1]
    sizes = [point for results in loaded for point in results.speedups(provider) if point.mode in SEQUENCES]
    axes = ", ".join(f"{axis} {_range([getattr(p, axis) for p in sizes])}" for axis in "TBH")
    threads = "" if run["device"] != "cpu" else f" on {run['threads']} thread{'s' * (run['threads'] > 1)}"
    backends = {"`backend=None`" if _measured(r, provider) == "auto" else f'`backend="{provider}"`' for r in loaded}
    yield (
        f"A speed-up is the geometric mean over sizes ({axes}, D = H){threads}, in parentheses the worst of them, by "
        f"{' and '.join(sorted(backends))} against `torch.nn` in eager mode. Every size: [measurements]({full})."
    )
    dates = "; ".join(
        f"{r['dtype']}: commit {r['commit'] or 'unknown'}, {r['date'][:10]}" for results in loaded for r in results.runs
    )
    command = "; `python -m fused_rnn bench`" if run["device"] == "cpu" else ""
    yield ""
    yield f"<sub>{run['device_name']}, torch {run['torch']}; {dates}{command}</sub>"


def _range(values: list[int]) -> str:
    return f"{min(values)} to {max(values)}" if values else "–"
