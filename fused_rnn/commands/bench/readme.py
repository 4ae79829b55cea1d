"""The tables of the README and of docs/measurements.md, written from the result files and from nothing else."""

from __future__ import annotations

from pathlib import Path

from fused_rnn.commands.bench import beside_rivals, condensed, field, flex, isas, scaling, stream
from fused_rnn.commands.bench.goals import judged
from fused_rnn.commands.bench.grid import CELLS, GRIDS, Point
from fused_rnn.commands.bench.providers import BASELINE, STEP_BASELINE
from fused_rnn.commands.bench.results import MEMORY, Results, geometric_mean, setting, torch_of
from fused_rnn.commands.bench.tables import EVEN, regions

BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"  # of the CPU's tables
FULL = Path("docs/measurements.md")  # beside the README: every table, of which the README has the sums
# Of files that are no grid's.
PREFIXES = (
    *(f"{name}-" for name in GRIDS),
    *("shapes-", isas.PREFIX, stream.PREFIX, scaling.PREFIX, flex.PREFIX, field.PREFIX),
)


def markers(provider: str) -> tuple[str, str]:
    """Between which lines of a page a backend's tables go."""
    return (BEGIN, END) if provider == "cpu" else (f"<!-- {provider}:begin -->", f"<!-- {provider}:end -->")


def update(readme: Path, directory: Path, provider: str) -> bool:
    """Put the tables of every result file in `directory` into `readme`, condensed, and into docs/measurements.md.

    Returns whether that changed any of the two. Raises ValueError if a page or its markers are missing or two files are
    of the same dtype and threads, FileNotFoundError if there is no result file.
    """
    changed = False
    for page, text in pages(readme, directory, provider).items():
        changed |= text != page.read_text(encoding="utf-8")
        page.write_text(text, encoding="utf-8")
    return changed


def pages(readme: Path, directory: Path, provider: str) -> dict[Path, str]:
    """What `update` makes of the two pages."""
    loaded = _load(directory)
    streams = [Results.load(path) for path in sorted(directory.glob(f"{stream.PREFIX}*.json"))]
    streams = [results for results in streams if _machine(results) == _machine(loaded[0])]
    parts = [section(results, provider) for results in loaded]
    parts += [steps(loaded[0], provider)]
    parts += [stream.table(results) for results in streams]
    parts += [memory(loaded[0], provider), goals(loaded, provider)]
    full = readme.parent / FULL
    short = condensed.table(loaded, streams, provider, FULL.as_posix())
    texts = {readme: _put(readme, markers(provider), short), full: _put(full, markers(provider), _joined(parts))}
    others = {"threads": scaling.tables, "flex": flex.tables, "field": field.tables}
    more = {name: dict.fromkeys(texts, tables(directory)) for name, tables in others.items()}
    more["rivals"] = dict(zip(texts, beside_rivals.tables(directory), strict=True))
    more["isas"] = {full: isas.tables(directory)}
    for name, by_page in more.items():
        for page, found in by_page.items():
            texts[page] = _put(page, markers(name), found, texts[page]) if found else texts[page]
    return texts


def _machine(results: Results) -> str:
    return str(results.runs[-1]["device_name"])


def _load(directory: Path) -> list[Results]:
    files = sorted(path for path in directory.glob("*.json") if not path.name.startswith(PREFIXES))
    if not files:
        raise FileNotFoundError(f"no result file in {directory}: run `python -m fused_rnn bench --out` there")
    found: dict[tuple[bool, int, str], tuple[Path, Results]] = {}
    for path in files:
        results = Results.load(path)
        run = results.runs[-1]
        key = run["dtype"] != "fp32", run["threads"], run["dtype"]
        if key in found:
            both = f"{found[key][0]} and {path} are both of {setting(run)}"
            raise ValueError(f"{both}: expected one, move the other away")
        found[key] = path, results
    return [found[key][1] for key in sorted(found)]


def _joined(parts: list[str]) -> str:
    return "\n\n".join(part for part in parts if part)


def _put(page: Path, lines: tuple[str, str], tables: str, text: str | None = None) -> str:
    """The page's text with tables between its two lines."""
    begin, end = lines
    if not page.exists():
        raise ValueError(f"{page}: no such page, expected one with the lines {begin} and {end}")
    text = page.read_text(encoding="utf-8") if text is None else text
    if begin not in text or end not in text:
        raise ValueError(f"{page} must contain the lines {begin} and {end}")
    head, rest = text.split(begin, 1)
    return f"{head}{begin}\n{tables}\n{end}{rest.split(end, 1)[1]}"


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
    """Machine, versions and limits of a file, commit and date of its runs."""
    run = results.runs[-1]
    limit = run["limits"]["flops"] / 1e9
    dates = "; ".join(f"commit {run['commit'] or 'unknown'}, {run['date']}" for run in results.runs)
    kernels = f"{run['cores']} cores; our kernels: {run['kernels']}; " if run["device"] == "cpu" else ""
    device = f"{run['device_name']} ({kernels}{run['limits'].get('by', 'torch.mm')}: {limit:.0f} GFLOP/s)"
    return f"{device}, {torch_of(run)}, {dates}"


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
