"""Two pictures of a GPU's result file: speed-up over batch and hidden size, and the time of a step beside its limit."""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure

from fused_rnn.commands.bench.grid import CELLS, SEQUENCES, Point
from fused_rnn.commands.bench.plot import COLOURS, GRID, INK, PAPER
from fused_rnn.commands.bench.results import FLOOR, Results, geometric_mean, setting
from fused_rnn.commands.bench.tables import title

SHORTEST = 32  # steps: what is shorter is a launch rather than a loop
BRIGHTEST = 4.0  # times faster, or slower: log2 of the colours' ends is 2


def heat_map(results: Results, provider: str, path: Path) -> None:
    """A map per mode and cell: B over H, the geometric mean over T >= 32 of the speed-up against torch.nn."""
    found = {p: s for p, s in results.speedups(provider).items() if _is_shown(p)}
    if not found:
        return
    modes, cells, heights, batches = _axes(list(found))
    size = (1.6 + (0.9 + 0.62 * len(heights)) * len(cells), 1.3 + (0.7 + 0.42 * len(batches)) * len(modes))
    figure, axes = plt.subplots(len(modes), len(cells), figsize=size, squeeze=False)
    for row, mode in zip(axes, modes, strict=True):
        for axis, cell in zip(row, cells, strict=True):
            mine = {p: s for p, s in found.items() if (p.mode, p.cell) == (mode, cell)}
            means = np.full((len(batches), len(heights)), np.nan)
            for b, B in enumerate(batches):
                for h, H in enumerate(heights):
                    here = [s for p, s in mine.items() if (p.B, p.H) == (B, H)]
                    means[b, h] = geometric_mean(here)
            _map(axis, means, heights, batches)
            axis.set_title(f"{cell}, {mode}   {geometric_mean(mine.values()):.2f}×", loc="left", fontsize=10, color=INK)
    _finish(figure, results, f"{title(provider)}: × torch.nn over B and H, geometric mean over T ≥ {SHORTEST}", path)


def step_plot(results: Results, provider: str, path: Path) -> None:
    """Microseconds of a step over H, a line per B at the longest T, dashed the time that cannot be beaten."""
    longest = max((p.T for p in results.speedups(provider) if _is_shown(p)), default=0)
    found = [p for p in results.speedups(provider) if _is_shown(p) and longest == p.T]
    if not found:
        return
    modes, cells, heights, batches = _axes(found)
    shape = (len(modes), len(cells))
    figure, axes = plt.subplots(
        *shape, figsize=(1 + 4 * shape[1], 1.2 + 3 * shape[0]), sharex=True, sharey=True, squeeze=False
    )
    for row, mode in zip(axes, modes, strict=True):
        for axis, cell in zip(row, cells, strict=True):
            mine = sorted((p for p in found if (p.mode, p.cell) == (mode, cell)), key=lambda p: p.H)
            for b, B in enumerate(batches):
                line = [p for p in mine if p.B == B]
                colour = COLOURS[b % len(COLOURS)]
                for name, style, label in ((provider, "o-", f"B={B}"), (FLOOR, "--", None)):
                    times = [(results.value(p, name) or float("nan")) / p.T for p in line]
                    axis.plot(
                        [p.H for p in line], times, style, color=colour, markersize=3.5, linewidth=1.2, label=label
                    )
            axis.set_xscale("log", base=2)
            axis.set_yscale("log")
            axis.set_xticks(heights, [str(H) for H in heights])
            axis.minorticks_off()
            axis.yaxis.set_major_formatter(lambda value, _: f"{value:g} µs")
            axis.grid(color=GRID)
            axis.tick_params(colors=INK, labelsize=8, length=0)
            axis.spines[:].set_visible(False)
            axis.set_title(f"{cell}, {mode}", loc="left", fontsize=10, color=INK)
    axes[0, 0].legend(frameon=False, fontsize=8, ncols=2)
    _finish(figure, results, f"{title(provider)}: time of a step over H, T={longest}; dashed: the limit", path)


def _is_shown(point: Point) -> bool:
    return point.mode in SEQUENCES and point.variant == "plain" and point.T >= SHORTEST


def _axes(points: list[Point]) -> tuple[list[str], list[str], list[int], list[int]]:
    modes = [mode for mode in SEQUENCES if any(p.mode == mode for p in points)]
    cells = [cell for cell in CELLS if any(p.cell == cell for p in points)]
    return modes, cells, sorted({p.H for p in points}), sorted({p.B for p in points})


def _map(axis: Axes, means: np.ndarray, heights: list[int], batches: list[int]) -> None:
    with np.errstate(invalid="ignore"):
        colours = np.clip(np.log2(means), -np.log2(BRIGHTEST), np.log2(BRIGHTEST))
    end = float(np.log2(BRIGHTEST))
    axis.imshow(colours, cmap="RdYlGn", norm=TwoSlopeNorm(0, -end, end), aspect="auto", origin="lower")
    for (b, h), mean in np.ndenumerate(means):
        if not np.isnan(mean):
            ink = PAPER if abs(colours[b, h]) > 0.7 * end else INK
            axis.text(
                h, b, f"{mean:.2g}" if mean < 10 else f"{mean:.0f}", ha="center", va="center", fontsize=8, color=ink
            )
    axis.set_xticks(range(len(heights)), [str(H) for H in heights])
    axis.set_yticks(range(len(batches)), [f"B={B}" for B in batches])
    axis.set_xlabel("H", fontsize=8, color=INK)
    axis.tick_params(colors=INK, labelsize=8, length=0)
    axis.spines[:].set_visible(False)


def _finish(figure: Figure, results: Results, heading: str, path: Path) -> None:
    run = results.runs[-1]
    versions = f"torch {run['torch']}", f"commit {run['commit']}"
    facts = (run["device_name"], setting(run), *versions, run["date"], "medians")
    top = 1 - 0.36 / figure.get_size_inches()[1]
    figure.suptitle(heading, x=0.01, y=0.99, ha="left", va="top", fontsize=12, color=INK, fontweight="bold")
    figure.text(0.01, 0.008, " · ".join(facts), fontsize=7, color="#6b6b7b")
    figure.tight_layout(rect=(0, 0.03, 1, top))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120, facecolor=PAPER)
    plt.close(figure)
