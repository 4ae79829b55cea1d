"""Long short-term memory, gate order i, f, g, o.

Source: Hochreiter & Schmidhuber 1997, with the forget gate of Gers, Schmidhuber & Cummins 2000; gates as in
torch.nn.LSTM.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from fused_rnn.cells.descriptor import Cell, register


def step(x: Sequence[Tensor], r: Sequence[Tensor], s: Sequence[Tensor], p: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """c' = f·c + i·g, h' = o·tanh(c')."""
    i, f, g, o = (a + b for a, b in zip(x, r, strict=True))
    c = f.sigmoid() * s[1] + i.sigmoid() * g.tanh()
    return o.sigmoid() * c.tanh(), c


LSTM = register(Cell("lstm", gates=4, states=("h", "c"), saved=4, step=step, projects=True))
