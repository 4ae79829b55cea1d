"""Long short-term memory, gate order i, f, g, o.

Source: Hochreiter & Schmidhuber 1997, with the forget gate of Gers, Schmidhuber & Cummins 2000; gates as in
torch.nn.LSTM.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from fused_rnn.cells.descriptor import Cell, Parts, register


def gates(x: Sequence[Tensor], r: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """i, f, o = σ(x + r), g = tanh(x + r)."""
    i, f, g, o = (a + b for a, b in zip(x, r, strict=True))
    return i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()


def update(a: Sequence[Tensor], s: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """c' = f·c + i·g, h' = o·tanh(c')."""
    i, f, g, o = a
    c = f * s[1] + i * g
    return o * c.tanh(), c


PARTS = Parts(("i", "f", "g", "o"), gates, update, candidate=2)
LSTM = register(Cell("lstm", gates=4, states=("h", "c"), saved=4, step=PARTS.step, projects=True, parts=PARTS))
