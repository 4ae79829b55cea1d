"""What a run prints: the regions' geometric means, then every single point, wins and losses alike."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Group
from rich.table import Table
from rich.text import Text

from fused_rnn.bench.grid import CELLS, REGIONS, SEQUENCES, Point
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
    """(mode, region, speed-ups by cell), for every mode and region that has any point."""
    for mode in SEQUENCES:
        for name, contains in REGIONS.items():
            found = results.speedups(provider, lambda p, m=mode, c=contains: p.mode == m and c(p))  # type: ignore[misc]
            cells = {cell: [value for point, value in found.items() if point.cell == cell] for cell in CELLS}
            if any(cells.values()):
                yield mode, name, cells


def region_table(results: Results, provider: str) -> Table:
    """Geometric means against torch.nn, the region's worst point behind."""
    table = Table(title=f"{title(provider)}: × torch.nn, by geometric mean (worst)", title_justify="left")
    table.add_column("mode")
    table.add_column("region")
    for cell in CELLS:
        table.add_column(cell, justify="right")
    for mode, region, cells in regions(results, provider):
        columns = []
        for values in cells.values():
            if not values:
                columns.append(Text("–", style="dim"))
                continue
            mean, worst = geometric_mean(values), min(values)
            columns.append(Text.assemble((f"{mean:.2f}×", style(mean)), " (", (f"{worst:.2f}", style(worst)), ")"))
        table.add_row(mode, region, *columns)
    return table


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
    ours, theirs = results.value(point, provider), results.value(point, baseline(point))
    if not ours:
        return Text("refused", style="bold red")
    text = Text(f"{ours:.4g} ")
    if theirs:
        text.append(f"{theirs / ours:.2f}×", style=style(theirs / ours))
    if floor := results.value(point, FLOOR):
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
    for point in sorted(points, key=lambda p: (CELLS.index(p.cell), p.H)):
        table.add_row(f"{point.cell} {point.H}", *(_entry(results, provider, point) for provider in columns))
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
        theirs = results.value(point, BASELINE, MEMORY)
        entries = []
        for provider in providers:
            ours = results.value(point, provider, MEMORY)
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
        parts += [region_table(results, provider), losses(results, provider)]
    parts.append(refusals(results))
    return Group(*(part for part in parts if part is not None))
