"""A cell without W_hh, of two states and two numbers per unit."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from fused_rnn.cells import Cell


def step(x: Sequence[Tensor], r: Sequence[Tensor], s: Sequence[Tensor], p: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """m' = tanh(x) + p·m, h' = q·m'."""
    m = x[0].tanh() + p[0] * s[1]
    return p[1] * m, m


DECAY = Cell("decay", gates=1, states=("h", "m"), saved=1, step=step, params=("p", "q"), recurrent=False)
