"""What a run prints: the regions' geometric means, then every single point, wins and losses alike."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import product

from rich.console import Group
from rich.table import Table
from rich.text import Text

from fused_rnn.bench.cudnn import algorithm, gpu_of
from fused_rnn.bench.grid import CELLS, REGIONS, SEQUENCES, VARIANTS, Point
from fused_rnn.bench.providers import BASELINE, TITLES, baseline
from fused_rnn.bench.results import FLOOR, MEMORY, TIME, Results, geometric_mean

EVEN = 0.95  # from here to its inverse a speed-up counts as none


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
    return Text.assemble((f"{mean:.2f}×", style(mean)), " (", (f"{worst:.2f}", style(worst)), ")")


def region_table(results: Results, provider: str) -> Table:
    """Geometric means against torch.nn, the region's worst point behind."""
    table = Table(title=f"{title(provider)}: × torch.nn, by geometric mean (worst)", title_justify="left")
    for name in ("mode", "region"):
        table.add_column(name)
    for cell in CELLS:
        table.add_column(cell, justify="right")
    for mode, region, cells in regions(results, provider):
        table.add_row(mode, region, *map(_means, cells.values()))
    return table


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
    table = Table(title=f"{title(provider)}: × torch.nn, by cuDNN's algorithm", title_justify="left")
    for name in ("mode", "algorithm"):
        table.add_column(name)
    for cell in CELLS:
        table.add_column(cell, justify="right")
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
    what = "× torch.nn (worst); time over a plain batch's, ours | torch.nn's"
    table = Table(title=f"{title(provider)}: {what}", title_justify="left")
    for name in ("mode", "variant"):
        table.add_column(name)
    for cell in CELLS:
        table.add_column(cell, justify="right")
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


def point_table(results: Results, provider: str, cell: str, mode: str) -> Table | None:
    """Every point of one cell and mode: median time, speed-up against torch.nn, and how much of the limit that is."""
    rows = (row for row in results.rows.values() if row.provider == provider and row.metric == TIME)
    points = [row.point for row in rows if row.point.cell == cell and row.point.mode == mode]
    if not points:
        return None
    heights = sorted({p.H for p in points})
    table = Table(title=f"{cell} {mode}, {title(provider)}: µs, × torch.nn, % of the limit", title_justify="left")
    table.add_column("T, B", justify="right")
    for H in heights:
        table.add_column(f"H={H}", justify="right")
    by_size = {(p.variant, p.T, p.B, p.H): p for p in points}
    for variant, T, B in sorted({size[:3] for size in by_size}):
        name = f"{T}, {B}" if variant == "plain" else f"{variant} {T}, {B}"
        sizes = (by_size.get((variant, T, B, H)) for H in heights)
        table.add_row(name, *(_entry(results, provider, point) for point in sizes))
    return table


def _entry(results: Results, provider: str, point: Point | None) -> Text:
    if point is None:
        return Text("")
    run = results.common_run(point, provider, baseline(point))
    ours, theirs = results.value(point, provider, run=run), results.in_torch(point, run)
    if not ours:
        return Text("refused", style="bold red")
    text = Text(f"{ours:.4g} ")
    if theirs:
        text.append(f"{theirs / ours:.2f}×", style=style(theirs / ours))
    if floor := results.value(point, FLOOR, run=run):
        text.append(f" {100 * floor / ours:.0f}%", style="dim")
    return text


def step_table(results: Results) -> Table | None:
    """One call with T = 1, B = 1: the cell of torch.nn beside the others."""
    points = sorted((p for p, name, _ in results.rows if p.mode == "step" and name == "cell"), key=lambda p: p.H)
    if not points:
        return None
    columns = [provider for provider in results.providers() if provider != "loop"]
    table = Table(title="One step, T=1 B=1, no gradient: µs (× faster than torch.nn's cell)", title_justify="left")
    table.add_column("cell, H")
    for provider in columns:
        table.add_column(title(provider), justify="right")
    for point in sorted(points, key=lambda p: (CELLS.index(p.cell), p.H, p.variant != "plain")):
        name = f"{point.cell} {point.H}" + (" in a graph" if point.variant == "graph" else "")
        table.add_row(name, *(_entry(results, provider, point) for provider in columns))
    return table


def memory_table(results: Results) -> Table | None:
    """Peak memory, beside torch.nn's."""
    rows = [row for row in results.rows.values() if row.metric == MEMORY and row.p50 is not None]
    if not rows:
        return None
    point = rows[0].point
    table = Table(title=f"Peak memory, T={point.T} B={point.B} H={point.H}: MiB (of torch.nn's)", title_justify="left")
    providers = list(dict.fromkeys(row.provider for row in rows))
    table.add_column("cell, mode")
    for provider in providers:
        table.add_column(title(provider), justify="right")
    for point in dict.fromkeys(row.point for row in rows):
        entries = []
        for provider in providers:
            run = results.common_run(point, provider, BASELINE, metric=MEMORY)
            ours, theirs = (results.value(point, name, MEMORY, run) for name in (provider, BASELINE))
            share = f" ({ours / theirs:.2f})" if ours is not None and theirs and provider != BASELINE else ""
            entries.append("–" if ours is None else f"{ours:.0f}{share}")
        table.add_row(f"{point.cell} {point.mode}", *entries)
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
    slow = sorted((speedup, str(point)) for point, speedup in found.items() if speedup < EVEN)
    text = Text(f"{title(provider)}: slower than {EVEN}× at {len(slow)} of {len(found)} points.")
    text.append("".join(f"\n  {speedup:.2f}× {point}" for speedup, point in slow), style="red")
    return text


def report(results: Results) -> Group:
    """Every point of our kernels alone, then the sums for them and for the automatic choice, then what failed."""
    ours = [provider for provider in results.providers() if provider not in ("torch", "loop", "cell")]
    parts: list[Table | Text | None] = []
    for provider in ours:
        if provider != "auto":
            parts += [point_table(results, provider, cell, mode) for cell in CELLS for mode in SEQUENCES]
    parts += [step_table(results), memory_table(results)]
    for provider in ours:
        parts += [region_table(results, provider), algorithm_table(results, provider)]
        parts += [variant_table(results, provider), losses(results, provider)]
    parts.append(refusals(results))
    return Group(*(part for part in parts if part is not None))
