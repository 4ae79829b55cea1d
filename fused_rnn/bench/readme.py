"""The README's tables, written from the result files and from nothing else."""

from __future__ import annotations

from pathlib import Path

from fused_rnn.bench.goals import judged
from fused_rnn.bench.grid import CELLS, Point
from fused_rnn.bench.providers import BASELINE, STEP_BASELINE
from fused_rnn.bench.results import MEMORY, Results, geometric_mean, setting
from fused_rnn.bench.stream import PREFIX, table
from fused_rnn.bench.tables import EVEN, regions

BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"  # of the CPU's tables


def markers(provider: str) -> tuple[str, str]:
    """Between which lines of the README a backend's tables go."""
    return (BEGIN, END) if provider == "cpu" else (f"<!-- {provider}:begin -->", f"<!-- {provider}:end -->")


def update(readme: Path, directory: Path, provider: str) -> bool:
    """Put the tables of every result file in `directory` between the markers of `readme`; True if that changed it.

    Raises ValueError if the markers are missing, FileNotFoundError if there is no result file.
    """
    text = readme.read_text(encoding="utf-8")
    begin, end = markers(provider)
    if begin not in text or end not in text:
        raise ValueError(f"{readme} must contain the lines {begin} and {end}")
    files = sorted(path for path in directory.glob("*.json") if not path.name.startswith(("quick-", PREFIX)))
    if not files:
        raise FileNotFoundError(f"no result file in {directory}: run `python -m fused_rnn bench` first")
    loaded = [Results.load(path) for path in files]
    loaded.sort(key=lambda results: (results.runs[-1]["dtype"] != "fp32", results.runs[-1]["threads"]))
    parts = [section(results, provider) for results in loaded]
    parts += [steps(loaded[0], provider)]
    parts += [table(Results.load(path)) for path in sorted(directory.glob(f"{PREFIX}*.json"))]
    parts += [memory(loaded[0], provider), goals(loaded, provider)]
    head, rest = text.split(begin, 1)
    tables = "\n\n".join(part for part in parts if part)
    updated = f"{head}{begin}\n{tables}\n{end}{rest.split(end, 1)[1]}"
    readme.write_text(updated, encoding="utf-8")
    return updated != text


def section(results: Results, provider: str) -> str:
    """One file's region table, what it was measured on above, the losses below."""
    run = results.runs[-1]
    lines = [f"**{setting(run)}**", "", "| | " + " | ".join(CELLS) + " |", "|---" * (1 + len(CELLS)) + "|"]
    for mode, region, cells in regions(results, provider):
        entries = [f"{geometric_mean(v):.2f}× ({min(v):.2f})" if v else "–" for v in cells.values()]
        lines.append(f"| {mode}, {region} | " + " | ".join(entries) + " |")
    lines += ["", f"Our kernels alone: {_losses(results, provider)}. Chosen automatically: {_losses(results, 'auto')}."]
    lines += ["", f"<sub>{caption(results)}</sub>"]
    return "\n".join(lines)


def caption(results: Results) -> str:
    """Machine, versions, limits, commit and date of the latest run of a file."""
    run = results.runs[-1]
    limit = run["limits"]["flops"] / 1e9
    kernels = f"{run['cores']} cores; our kernels: {run['kernels']}; " if run["device"] == "cpu" else ""
    device = f"{run['device_name']} ({kernels}torch.mm: {limit:.0f} GFLOP/s)"
    return f"{device}, torch {run['torch']}, commit {run['commit'] or 'unknown'}, {run['date']}"


def _losses(results: Results, provider: str) -> str:
    found = [s for point, s in results.speedups(provider).items() if point.mode != "step"]
    slow = [speedup for speedup in found if speedup < EVEN]
    if not found:
        return "not measured"
    worst = f", the worst {min(slow):.2f}×" if slow else ""
    return f"slower than {EVEN}× at {len(slow)} of {len(found)} points{worst}"


def steps(results: Results, provider: str) -> str:
    """One step, T = 1 and B = 1, in microseconds beside torch's cell."""
    points = [point for point in results.speedups(provider) if point.mode == "step" and point.variant == "plain"]
    if not points:
        return ""
    heights = sorted({point.H for point in points})
    lines = ["**One step: a module call with T=1, B=1, no gradient** (µs, `torch.nn` cell → ours)", ""]
    lines += ["| | " + " | ".join(f"H={H}" for H in heights) + " |", "|---" * (1 + len(heights)) + "|"]
    for cell in CELLS:
        entries = []
        for H in heights:
            point = next((p for p in points if p.cell == cell and p.H == H), None)
            entries.append("–" if point is None else _step(results, point, provider))
        lines.append(f"| {cell} | " + " | ".join(entries) + " |")
    return "\n".join(lines)


def _step(results: Results, point: Point, provider: str) -> str:
    run = results.common_run(point, provider, STEP_BASELINE)
    theirs, ours = (results.value(point, name, run=run) for name in (STEP_BASELINE, provider))
    return f"{theirs:.3g} → {ours:.3g} ({theirs / ours:.1f}×)" if theirs and ours else "–"


def goals(loaded: list[Results], provider: str) -> str:
    """What was promised of a GPU, of every file: the bar, what was measured, met or not."""
    lines = []
    for results in (results for results in loaded if results.runs[-1]["device"] == "cuda"):
        for goal, value in judged(results, provider):
            if value is not None:
                bar = f"{'≤' if goal.at_most else '≥'} {goal.bar:g}"
                verdict = "met" if goal.met(value) else "**not met**"
                lines.append(f"| {setting(results.runs[-1])}: {goal.name} | {bar} | {value:.3g} | {verdict} |")
    return "\n".join(["| goal | bar | measured | |", "|---|---|---|---|", *lines]) if lines else ""


def memory(results: Results, provider: str) -> str:
    """Peak memory of a long sequence, beside torch.nn's."""
    rows = [row for row in results.rows.values() if row.metric == MEMORY and row.p50 is not None]
    if not rows:
        return ""
    point = rows[0].point
    lines = [f"**Peak memory, T={point.T}, B={point.B}, H={point.H}, {point.dtype}** (MiB)", ""]
    lines += ['| | torch.nn | ours | ours, `save="recompute"` |', "|---|---|---|---|"]
    for point in dict.fromkeys(row.point for row in rows):
        run = results.common_run(point, BASELINE, provider, metric=MEMORY)
        names = (BASELINE, provider, f"{provider} save=recompute")
        values = (results.value(point, name, MEMORY, run) for name in names)
        entries = ("–" if value is None else f"{value:.0f}" for value in values)
        lines.append(f"| {point.cell}, {point.mode} | " + " | ".join(entries) + " |")
    return "\n".join(lines)
