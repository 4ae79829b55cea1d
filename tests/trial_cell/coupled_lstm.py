"""LSTM whose forget gate is 1 - i, gate order i, g, o: a trial of a new cell. Source: Greff et al. 2017, "CIFG"."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from fused_rnn.cells import Cell


def step(x: Sequence[Tensor], r: Sequence[Tensor], s: Sequence[Tensor], p: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """c' = (1 - i)·c + i·g, h' = o·tanh(c')."""
    i, g, o = (a + b for a, b in zip(x, r, strict=True))
    i = i.sigmoid()
    c = (1 - i) * s[1] + i * g.tanh()
    return o.sigmoid() * c.tanh(), c


COUPLED = Cell("coupled_lstm", gates=3, states=("h", "c"), saved=3, step=step, projects=True)
