"""From what was recorded to numbers: norms, saturation, spectral radii, the factor per step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fused_rnn.cells import CELLS
from fused_rnn.cells.diagonal import dense
from fused_rnn.diagnosis.recorder import Record

# A gradient vanishes or explodes where over the whole sequence it changes by more than FAR, or at each step by more
# than A_STEP. It has reached as far back as its norm is at least 1 / FAR of its largest.
FAR, A_STEP = 1e3, 1.25
FEWEST = 3  # points on which a line can be judged
MOST_ROWS, MOST_POINTS = 32, 128  # of which lines are drawn through every pair


class Flow(NamedTuple):
    """How a layer's recurrence hands gradients on, in one direction.

    Attributes:
        factor: by which a step back in time multiplies the norm of a gradient, of all states together, when no other
            one enters; None where there are too few steps.
        span: how many steps that is at most.
        overflows: some gradient was inf or NaN.
    """

    factor: float | None
    span: int
    overflows: bool

    @property
    def reach(self) -> int:
        """How many steps back at least 1 / FAR of a gradient arrives, at most span."""
        if self.factor is None or self.factor >= 1:
            return self.span
        return min(self.span, int(math.log(FAR) / -math.log(self.factor)))

    @property
    def verdict(self) -> str:
        """ "explodes", "vanishes" or "flows"; "short" without a factor."""
        if self.overflows:
            return "explodes"
        if self.factor is None:
            return "short"
        log, most = math.log(self.factor), min(math.log(FAR) / max(1, self.span), math.log(A_STEP))
        return "explodes" if log > most else "vanishes" if log < -most else "flows"


def norms(record: Record, state: int) -> Tensor:
    """[T]: of a state's gradient at every step the norm over units, batch and calls."""
    return _sum([call.squares[state].sum(1) for call in record.calls]).sqrt()


def saturation(record: Record, gate: int) -> Tensor:
    """[2, T]: of a gate at every step the share of activations near the lower end, and near the upper one."""
    calls = [call for call in record.calls if gate in call.ends]
    return _sum([call.ends[gate] for call in calls]) / _sum([call.seen.double() for call in calls]).clamp(min=1)


def gates(record: Record) -> list[int]:
    """The gates of which activations were seen."""
    return sorted({gate for call in record.calls for gate in call.ends})


def flow(record: Record) -> Flow:
    """A line through what is left of a gradient at every sequence's end, as a logarithm, by the steps it went back: the
    median slope of all pairs of points (Theil and Sen), which a few outliers do not turn."""
    slopes, span = [], 0
    overflows = not all(bool(call.squares.isfinite().all()) for call in record.calls)
    rows = [row for call in record.calls for row in call.gains]
    for gains in _some(rows, MOST_ROWS):
        left = gains[gains.isfinite() & (gains > 0)].log().cumsum(0)  # a reset lets nothing through: not a factor
        if len(left) < FEWEST:
            continue
        span = max(span, len(left))
        at = _some(range(len(left)), MOST_POINTS)
        x, y = torch.tensor(at, dtype=left.dtype, device=left.device), left[at]
        first, second = torch.triu_indices(len(at), len(at), 1, device=left.device)
        slopes.append((y[second] - y[first]) / (x[second] - x[first]))
    factor = math.exp(float(torch.cat(slopes).median())) if slopes else None
    return Flow(factor, span, overflows)


def radii(record: Record) -> dict[int, float]:
    """Of each gate the spectral radius, the largest absolute eigenvalue, of the [H, H] matrix that takes h to its
    pre-activation: its block of W_hh, times W_hr where there is a projection, the largest of all heads."""
    found: dict[int, float] = {}
    cell = CELLS[record.cell]
    for w in record.weights:
        if w.w_hh is None:
            continue
        whole = w.w_hh if cell.diagonal == 1 else dense(w.w_hh, cell.gates, cell.diagonal)
        for gate, block in enumerate(whole.detach().double().chunk(cell.gates)):
            square = block if w.w_hr is None else block @ w.w_hr.detach().double()
            value = float(torch.linalg.eigvals(square).abs().max()) if bool(square.isfinite().all()) else math.nan
            found[gate] = max(found.get(gate, 0.0), value)
    return found


def _sum(each: Sequence[Tensor]) -> Tensor:
    """The sum of tensors [.., T], whose T may differ."""
    longest = max(t.shape[-1] for t in each)
    return torch.stack([torch.nn.functional.pad(t, (0, longest - t.shape[-1])) for t in each]).sum(0)


def _some(each: Sequence[Any], most: int) -> list[Any]:
    """At most as many, evenly spread, the first and the last among them."""
    count = len(each)
    places = range(count) if count <= most else [round(k * (count - 1) / (most - 1)) for k in range(most)]
    return [each[k] for k in places]
