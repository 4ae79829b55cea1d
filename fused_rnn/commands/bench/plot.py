"""One picture per result file: every point's speed-up against torch.nn."""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from fused_rnn.commands.bench.grid import CELLS, SEQUENCES, Point
from fused_rnn.commands.bench.results import Results, geometric_mean, setting
from fused_rnn.commands.bench.tables import title

INK, PAPER, GRID = "#22223b", "#ffffff", "#e5e5ec"
COLOURS = ("#1b6ca8", "#2a9d8f", "#e9a03b", "#c8553d", "#7b5ea7", "#5a7d2b", "#8d6e63")
MARKERS = ("o", "s", "^", "D")


def plot(results: Results, provider: str, path: Path) -> None:
    """Write a PNG: inference above, training below, a column per cell; colour is B, marker is T, above 1 is faster."""
    every = results.speedups(provider).items()
    found = {point: speedup for point, speedup in every if point.mode in SEQUENCES and point.variant == "plain"}
    if not found:
        return
    heights, batches, times = (sorted({getattr(p, axis) for p in found}) for axis in "HBT")
    modes = [mode for mode in SEQUENCES if any(p.mode == mode for p in found)]
    cells = [cell for cell in CELLS if any(p.cell == cell for p in found)]
    size = (4 * max(2, len(cells)), 1.2 + 3 * len(modes))
    figure, axes = plt.subplots(len(modes), len(cells), figsize=size, sharex=True, sharey=True, squeeze=False)
    for row, mode in zip(axes, modes, strict=True):
        for axis, cell in zip(row, cells, strict=True):
            points = {p: s for p, s in found.items() if p.mode == mode and p.cell == cell}
            _panel(axis, points, heights, batches, times)
            mean = f"   geometric mean {geometric_mean(points.values()):.2f}×" if points else ""
            axis.set_title(f"{cell}, {mode}{mean}", loc="left", fontsize=10.5, color=INK)
    run = results.runs[-1]
    figure.suptitle(
        f"{title(provider)}: how many times faster than torch.nn, {setting(run)}",
        x=0.01, y=0.985, ha="left", va="top", fontsize=13, color=INK, fontweight="bold",
    )  # fmt: skip
    facts = (
        run["device_name"],
        f"torch {run['torch']}",
        f"commit {run['commit']}",
        run["date"],
        "medians, interleaved",
    )
    caption = " · ".join(facts)
    figure.text(0.01, 0.008, caption, fontsize=8, color="#6b6b7b")
    legend = _legend(batches, times)
    top = 1 - 0.36 / size[1]
    figure.legend(
        handles=legend, loc="upper left", bbox_to_anchor=(0.0, top), ncols=len(legend), frameon=False, fontsize=9,
        handletextpad=0.1, columnspacing=1.4,
    )  # fmt: skip
    figure.tight_layout(rect=(0, 0.025, 1, top - 0.3 / size[1]))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130, facecolor=PAPER)
    plt.close(figure)


def _panel(axis: Axes, points: dict[Point, float], heights: list[int], batches: list[int], times: list[int]) -> None:
    axis.set_yscale("log", base=2)
    axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}×")
    axis.axhspan(2**-6, 1, color="#faeeea", zorder=0)
    axis.axhline(1, color=INK, linewidth=1, zorder=1)
    axis.grid(axis="y", color=GRID, zorder=0)
    axis.set_xticks(range(len(heights)), [f"H={H}" for H in heights])
    axis.tick_params(colors=INK, labelsize=9, length=0)
    axis.spines[:].set_visible(False)
    for point, speedup in points.items():
        # Columns of one H side by side: the batch sizes in order, the lengths close together within each.
        b, t = batches.index(point.B), times.index(point.T)
        x = heights.index(point.H) + 0.72 * ((b + (t + 0.5) / len(times)) / len(batches) - 0.5)
        axis.plot(
            x, speedup, MARKERS[t % len(MARKERS)], color=COLOURS[b % len(COLOURS)],
            markersize=5.5, markeredgecolor=PAPER, markeredgewidth=0.6, zorder=3,
        )  # fmt: skip
    axis.set_xlim(-0.55, len(heights) - 0.45)
    if points:
        low, high = axis.get_ylim()
        axis.set_ylim(min(0.7, min(points.values()) / 1.2, max(low, 0.5)), max(high, 2, max(points.values()) * 1.2))


def _legend(batches: list[int], times: list[int]) -> list[Line2D]:
    colours = [
        Line2D([], [], marker="o", linestyle="", color=COLOURS[i % len(COLOURS)], label=f"B={B}")
        for i, B in enumerate(batches)
    ]
    markers = [
        Line2D([], [], marker=MARKERS[i % len(MARKERS)], linestyle="", color="#6b6b7b", label=f"T={T}")
        for i, T in enumerate(times)
    ]
    return colours + markers
