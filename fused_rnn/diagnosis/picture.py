"""The picture of a report: gradients on the left, gates on the right, a row for each layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from fused_rnn.cells import CELLS, title
from fused_rnn.diagnosis.flow import Flow
from fused_rnn.diagnosis.recorder import Record

try:
    from matplotlib.figure import Figure
except ModuleNotFoundError as error:
    raise ModuleNotFoundError("report.plot: got no matplotlib, expected it: pip install '.[diagnose]'") from error

INK, GRID, QUIET = "#22223b", "#e5e5ec", "#6b6b7b"
MATTERS = 1e-6  # a state whose gradients are all below this share of the layer's largest has no curve
ROOM = 0.25  # of an axis's length once more, above the curves
COLOURS = ("#1b6ca8", "#c8553d", "#2a9d8f", "#e9a03b", "#7b5ea7", "#5a7d2b")


def draw(
    records: Sequence[Record],
    flows: Mapping[str, Flow],
    gradients: Mapping[str, Tensor],
    gates: Mapping[str, Tensor],
    path: Path,
) -> None:
    """Write the picture. Its format is that of the path's ending."""
    height = 0.9 + 2.3 * len(records)
    figure = Figure(figsize=(11, height), layout="constrained")
    axes = figure.subplots(len(records), 2, squeeze=False, sharex="row")
    for (left, right), record in zip(axes, records, strict=True):
        found = flows[record.name()]
        factor = "" if found.factor is None else f": {found.verdict}, × {found.factor:.3g} a step back"
        _style(left, f"{record.name()} ({title(record.cell)}){factor}")
        least = MATTERS * max(float(gradients[record.name(state)].max()) for state in record.states)
        for state, colour in zip(record.states, COLOURS, strict=False):
            norm, label = gradients[record.name(state)], f"∂L/∂{state}"
            if norm.max() < least:
                left.plot([], color=colour, label=f"{label} < {least:.0e}")
            else:
                left.plot(norm.where(norm > 0, float("nan")).tolist(), color=colour, label=label, **_line(norm))
        left.set_yscale("log")
        left.minorticks_off()
        bottom, top = left.get_ylim()
        left.set_ylim(bottom, top * (top / bottom) ** ROOM)  # for the legend
        left.set_ylabel("norm", color=INK)
        _style(right, "saturated activations")
        named = [(record.gate(k), gates.get(record.name(record.gate(k)))) for k in range(CELLS[record.cell].gates)]
        for (gate, ends), colour in zip(named, COLOURS, strict=False):
            if ends is not None:
                right.plot((100 * ends.sum(0)).tolist(), color=colour, label=gate, **_line(ends[0]))
        right.set_ylim(-2, 102 + 100 * ROOM)
        right.set_yticks(range(0, 101, 20))
        right.yaxis.set_major_formatter(lambda value, _: f"{value:.0f} %")
        for axis in (left, right):
            if axis.lines:
                axis.legend(frameon=False, fontsize=9, ncols=4, loc="upper left", labelcolor=INK)
    for axis in axes[-1]:
        axis.set_xlabel("step", color=INK)
    figure.suptitle("Gradients and gates over time", x=0.01, ha="left", color=INK, fontweight="bold", fontsize=13)
    figure.savefig(path, dpi=140)


def _line(values: Tensor) -> dict[str, Any]:
    """A point for each step where there are few, which a line alone might not show."""
    return {"linewidth": 1.8, "marker": "o" if len(values) <= 64 else "", "markersize": 3}


def _style(axis: Any, name: str) -> None:
    axis.set_title(name, loc="left", fontsize=10.5, color=INK)
    axis.grid(color=GRID)
    axis.set_axisbelow(True)
    axis.spines[:].set_visible(False)
    axis.tick_params(colors=QUIET, length=0, labelsize=9)
    axis.margins(x=0.01)
