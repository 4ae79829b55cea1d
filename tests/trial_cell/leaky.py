"""A cell of everything at once: two states, a gate that enters apart, and a formula that reads h. Gate order i, g."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from fused_rnn.cells import Cell


def step(x: Sequence[Tensor], r: Sequence[Tensor], s: Sequence[Tensor], p: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """g = tanh(x_g + i·r_g), m' = i·m + h, h' = h + i·(g - h + m')."""
    i = (x[0] + r[0]).sigmoid()
    g, m = (x[1] + i * r[1]).tanh(), i * s[1] + s[0]
    return s[0] + i * (g - s[0] + m), m


LEAKY = Cell("leaky", gates=2, states=("h", "m"), saved=4, step=step, apart=1, reads_h=True)
