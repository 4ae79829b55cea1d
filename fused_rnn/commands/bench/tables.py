"""What a run prints: the regions' geometric means, then every single point, wins and losses alike."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from itertools import product

from rich.console import Console, Group
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from fused_rnn.commands.bench.cudnn import algorithm, gpu_of
from fused_rnn.commands.bench.grid import CELLS, MODES, REGIONS, SEQUENCES, VARIANTS, Point
from fused_rnn.commands.bench.measure import DISTURBED
from fused_rnn.commands.bench.providers import BASELINE, OTHERS, STEP_BASELINE, TITLES, baseline, ways_in_torch
from fused_rnn.commands.bench.results import FLOOR, MEMORY, TIME, Results, Row, geometric_mean
from fused_rnn.commands.bench.rivals import RIVALS

WIDTH = 80  # of a terminal that nobody has made wider
_PLAIN = Console(width=1000, color_system=None)  # to measure tables by
EVEN = 0.95  # from here to its inverse a speed-up counts as none


def duration(micros: float) -> str:
    """Three digits, with the unit that suits them."""
    for unit, scale in (("ns", 1e-3), ("µs", 1.0), ("ms", 1e3)):
        if float(f"{micros / scale:.3g}") < 1000:
            return f"{_three(micros / scale)} {unit}"
    return f"{_three(micros * 1e-6)} s"


def ratio(value: float) -> str:
    """Two digits behind the point, of large ones fewer."""
    return f"{value:.2f}" if value < 9.995 else _three(value)


def _three(value: float) -> str:
    """Three digits, never as a power of ten."""
    rounded = float(f"{value:.3g}")
    return f"{rounded:.{max(0, 2 - math.floor(math.log10(rounded)))}f}" if rounded > 0 else "0"


def grid(heading: str, labels: tuple[str, ...], columns: tuple[str, ...]) -> Table:
    """A table of figures behind labels, as narrow as it can be."""
    table = Table(title=heading, title_justify="left", title_style="bold", box=None, padding=(0, 1, 0, 0))
    for label in labels:
        table.add_column(label)
    for column in columns:
        table.add_column(column, justify="right")
    return table


def title(provider: str) -> str:
    """How tables name a provider."""
    return TITLES.get(provider, f"fused_rnn, {provider}")


def style(speedup: float) -> str:
    """Colour of a speed-up: red for a loss, dim for none, green for a win."""
    return "bold red" if speedup < EVEN else "dim" if speedup < 1 / EVEN else "green"


def regions(results: Results, provider: str) -> Iterator[tuple[str, str, dict[str, list[float]]]]:
    """(mode, region, speed-ups by cell), for every mode and region that has any point; of plain problems alone."""
    if not results.runs:
        return
    plain = {point: value for point, value in results.speedups(provider).items() if point.variant == "plain"}
    for mode in SEQUENCES:
        for name, contains in REGIONS[results.runs[-1]["device"]].items():
            found = {point: value for point, value in plain.items() if point.mode == mode and contains(point)}
            cells = {cell: [value for point, value in found.items() if point.cell == cell] for cell in CELLS}
            if any(cells.values()):
                yield mode, name, cells


def _means(values: list[float]) -> Text:
    if not values:
        return Text("–", style="dim")
    mean, worst = geometric_mean(values), min(values)
    return Text.assemble((f"{mean:.2f}×", style(mean)), " (", (f"{worst:.2f}×", style(worst)), ")")


def region_table(results: Results, provider: str) -> Table | None:
    """Geometric means against torch.nn, the region's worst point behind."""
    table = grid(f"{title(provider)}: × torch.nn's speed, geometric mean (worst)", ("mode", "region"), CELLS)
    for mode, region, cells in regions(results, provider):
        table.add_row(mode, region, *map(_means, cells.values()))
    return table if table.row_count else None


def algorithm_table(results: Results, provider: str) -> Table | None:
    """The same on a GPU, by the algorithm that PyTorch's rules have cuDNN run."""
    run = results.runs[-1]
    if run["device"] != "cuda":
        return None
    gpu = gpu_of(run)
    found: dict[tuple[str, str], dict[str, list[float]]] = {}
    for point, speedup in results.speedups(provider).items():
        if point.mode in SEQUENCES:
            cells = found.setdefault((point.mode, algorithm(point, gpu)), {cell: [] for cell in CELLS})
            cells[point.cell].append(speedup)
    table = grid(f"{title(provider)}: × torch.nn's speed, by cuDNN's algorithm", ("mode", "algorithm"), CELLS)
    for (mode, name), cells in sorted(found.items()):
        table.add_row(mode, name, *map(_means, cells.values()))
    return table if found else None


def against_plain(results: Results, provider: str, variant: str) -> dict[Point, float]:
    """A variant's time over that of the plain batch of the same size, at every point that has both."""
    ratios = {}
    for point in results.speedups(provider):
        if point.variant != variant:
            continue
        row = results.rows[point, provider, TIME]
        plain, own = results.value(replace(point, variant="plain"), provider, run=row.run), row.p50
        if plain and own:
            ratios[point] = own / plain
    return ratios


def variant_table(results: Results, provider: str) -> Table | None:
    """What departs from a plain batch: × torch.nn; and the time as a multiple of the plain batch's, of both."""
    what = "× torch.nn's speed (worst); × a plain batch's time, ours | torch.nn's"
    table = grid(f"{title(provider)}: {what}", ("mode", "variant"), CELLS)
    speedups = results.speedups(provider)
    for mode, variant in product(SEQUENCES, VARIANTS[1:]):
        texts = []
        for cell in CELLS:
            here = [p for p in speedups if (p.cell, p.mode, p.variant) == (cell, mode, variant)]
            text = _means([speedups[point] for point in here])
            ours, theirs = (against_plain(results, name, variant) for name in (provider, BASELINE))
            both = [p for p in here if p in ours and p in theirs]
            if both:
                means = (geometric_mean(ratios[p] for p in both) for ratios in (ours, theirs))
                text.append("; " + " | ".join(f"{mean:.2f}" for mean in means))
            texts.append(text)
        if any(text.plain != "–" for text in texts):
            table.add_row(mode, variant, *texts)
    return table if table.row_count else None


def point_tables(results: Results, provider: str, cell: str, mode: str) -> Iterator[Table]:
    """Every point of one cell and mode: median time, speed-up against torch.nn, and how much of the limit that is.

    A table has as many hidden sizes as fit into WIDTH columns.
    """
    rows = (row for row in results.rows.values() if row.provider == provider and row.metric == TIME)
    points = [row.point for row in rows if row.point.cell == cell and row.point.mode == mode]
    heights = sorted({p.H for p in points})
    while heights:
        table = _point_table(results, provider, points, heights[:1])
        shown = 1
        while shown < len(heights):
            wider = _point_table(results, provider, points, heights[: shown + 1])
            if Measurement.get(_PLAIN, _PLAIN.options, wider).maximum > WIDTH:
                break
            table, shown = wider, shown + 1
        yield table
        heights = heights[shown:]


def _point_table(results: Results, provider: str, points: list[Point], heights: list[int]) -> Table:
    heading = f"{points[0].cell} {points[0].mode}, {title(provider)}: time, × torch.nn's speed, % of the limit"
    table = grid(heading, ("",), tuple(f"H={H}" for H in heights))
    by_size = {(p.variant, p.T, p.B, p.H): p for p in points}
    before: tuple[str, int] | None = None
    for variant, T, B in sorted({size[:3] for size in by_size}, key=lambda s: (VARIANTS.index(s[0]), *s[1:])):
        if before != (variant, T):
            before = variant, T
            table.add_row(Text(f"T={T}" if variant == "plain" else f"{variant}, T={T}", style="bold"))
        sizes = (by_size.get((variant, T, B, H)) for H in heights)
        table.add_row(f" B={B}", *(_entry(results, provider, point) for point in sizes))
    return table


def shape_table(results: Results, provider: str) -> Table | None:
    """A row per shape that was asked for: torch.nn's time and ours."""
    points = [p for p, name, metric in results.rows if (name, metric) == (provider, TIME) and p.D]
    if not points:
        return None
    further = {extras(point) for point in points}
    heading = f"{title(provider)}, beside torch.nn{further.pop() if len(further) == 1 else ''}"
    table = grid(heading, ("mode", "cell", "shape"), ("torch.nn", "fused_rnn", "as fast", "of the limit"))
    order = sorted(points, key=lambda p: (MODES.index(p.mode), CELLS.index(p.cell), VARIANTS.index(p.variant), p.flops))
    for point in order:
        run = results.common_run(point, provider, baseline(point))
        row, theirs = results.rows[point, provider, TIME], results.in_torch(point, run)
        floor = results.value(point, FLOOR, run=run)
        entries: tuple[Text | str, ...] = (Text("refused", style="bold red"), "–", "–")
        if row.p50:
            speedup = theirs / row.p50 if theirs else None
            gain = Text(f"{ratio(speedup)}×", style=style(speedup)) if speedup else Text("–")
            entries = (_time(row), gain, _share(floor, row.p50) if floor else "–")
        name = point.shape + (extras(point) if further else "")
        table.add_row(point.mode, point.cell, name, duration(theirs) if theirs else "–", *entries)
    return table


def extras(point: Point) -> str:
    """What of a point is not in its shape, to be read behind it; "" where it is plain."""
    found = [point.variant] if point.variant != "plain" else []
    found += [f"{point.layers} layers"] if point.layers > 1 else []
    return ", ".join(["", *found, *(["both directions"] if point.directions > 1 else [])])


def _time(row: Row) -> str:
    return f"{'~' * row.disturbed}{duration(row.p50 or 0.0)}"


def disturbed(results: Results) -> Text | None:
    """What "~" means, where there is one."""
    rows = [row for row in results.rows.values() if row.metric == TIME]
    count = sum(row.disturbed for row in rows)
    if not count:
        return None
    what = f"the 80th percentile is more than {DISTURBED}× the 20th: the machine was disturbed"
    return Text(f"~ at {count} of {len(rows)} times: {what}.", style="yellow")


def _entry(results: Results, provider: str, point: Point | None) -> Text:
    if point is None:
        return Text("")
    run = results.common_run(point, provider, baseline(point))
    ours, theirs = results.value(point, provider, run=run), results.in_torch(point, run)
    if not ours:
        return Text("refused", style="bold red")
    text = Text(_time(next(row for row in results.of((point, provider, TIME)) if run in (None, row.run))))
    if theirs and provider != baseline(point):
        text.append(f" {ratio(theirs / ours)}×", style=style(theirs / ours))
    floor = results.value(point, FLOOR, run=run)
    if floor and provider not in (*ways_in_torch(point), BASELINE):
        text.append(f" {_share(floor, ours)}", style="dim")
    return text


def _share(floor: float, ours: float) -> str:
    """How much of the limit that is; of a file whose limits were none, nothing."""
    return f"{100 * floor / ours:.0f}%" if floor <= ours * 1.005 else "–"


def step_table(results: Results) -> Table | None:
    """One call with T = 1, B = 1: the cell of torch.nn beside the others."""
    points = sorted((p for p, name, _ in results.rows if p.mode == "step" and name == "cell"), key=lambda p: p.H)
    if not points:
        return None
    columns = [provider for provider in results.providers() if provider not in ("loop", *RIVALS)]
    columns.sort(key=lambda name: (name != STEP_BASELINE, name != BASELINE, name == "auto", name))
    heading = "One step, T=1 B=1, no gradient: time, × torch.nn's cell, % of the limit"
    table = grid(heading, ("",), tuple(title(provider) for provider in columns))
    for point in sorted(points, key=lambda p: (CELLS.index(p.cell), p.H, p.variant != "plain")):
        name = f"{point.cell} H={point.H}" + (" in a graph" if point.variant == "graph" else "")
        table.add_row(name, *(_entry(results, provider, point) for provider in columns))
    return table


def memory_table(results: Results) -> Table | None:
    """Peak memory, beside torch.nn's."""
    rows = [row for row in results.rows.values() if row.metric == MEMORY and row.p50 is not None]
    if not rows:
        return None
    providers = list(dict.fromkeys(row.provider for row in rows))
    shapes = {row.point.shape for row in rows}
    heading = f"Peak memory{f', {shapes.pop()}' if len(shapes) == 1 else ''}: MiB, × torch.nn's"
    table = grid(heading, ("",), tuple(title(provider) for provider in providers))
    for point in dict.fromkeys(row.point for row in rows):
        entries = []
        for provider in providers:
            run = results.common_run(point, provider, BASELINE, metric=MEMORY)
            ours, theirs = (results.value(point, name, MEMORY, run) for name in (provider, BASELINE))
            share = f" {ours / theirs:.2f}×" if ours is not None and theirs and provider != BASELINE else ""
            entries.append("–" if ours is None else f"{ours:.0f} MiB{share}")
        table.add_row(f"{point.cell} {point.mode}" + (f" {point.shape}" if shapes else ""), *entries)
    return table


def refusals(results: Results) -> Text | None:
    """Every point that gave no time, with its reason."""
    rows = [row for row in results.rows.values() if row.refused is not None]
    if not rows:
        return None
    lines = "\n".join(f"{row.point}, {title(row.provider)}: {row.refused}" for row in rows)
    return Text(f"Not reported ({len(rows)}):\n{lines}", style="red")


def losses(results: Results, provider: str) -> Text:
    """Every point that is slower than torch.nn, the worst first."""
    found = results.speedups(provider)
    if not found:
        return Text(f"{title(provider)}: nothing measured beside torch.nn.")
    slow = sorted((speedup, str(point)) for point, speedup in found.items() if speedup < EVEN)
    text = Text(f"{title(provider)}: slower than {EVEN}× at {len(slow)} of {len(found)} points.")
    text.append("".join(f"\n  {speedup:.2f}× {point}" for speedup, point in slow), style="red")
    return text


def report(results: Results) -> Group:
    """Every point of our kernels alone, then the sums for them and for the automatic choice, then what failed.

    Of shapes that were asked for a row each, and no sums.
    """
    ours = [name for name in results.providers() if name not in OTHERS or name == "auto"]
    parts: list[Table | Text | None] = []
    if any(point.D for point, _, _ in results.rows):
        parts += [shape_table(results, provider) for provider in ours]
        parts += [memory_table(results), disturbed(results), refusals(results)]
        return _spaced(parts)
    for provider in ours:
        if provider != "auto":
            for cell, mode in product(CELLS, SEQUENCES):
                parts += point_tables(results, provider, cell, mode)
    parts += [step_table(results), memory_table(results)]
    for provider in ours:
        parts += [region_table(results, provider), algorithm_table(results, provider)]
        parts += [variant_table(results, provider), losses(results, provider)]
    return _spaced([*parts, disturbed(results), refusals(results)])


def _spaced(parts: list[Table | Text | None]) -> Group:
    return Group(*(line for part in parts if part is not None for line in (part, "")))
