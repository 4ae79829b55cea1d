"""Gated recurrent unit, gate order r, z, n, the reset gate applied after the recurrent product.

Source: Cho et al. 2014; the "reset after" form, with a bias of its own inside it, as in torch.nn.GRU and cuDNN.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from fused_rnn.cells.descriptor import Cell, register


def step(x: Sequence[Tensor], r: Sequence[Tensor], s: Sequence[Tensor], p: Sequence[Tensor]) -> tuple[Tensor]:
    """n = tanh(x_n + r·h_n), h' = n + z·(h - n)."""
    reset, z = (x[0] + r[0]).sigmoid(), (x[1] + r[1]).sigmoid()
    n = (x[2] + reset * r[2]).tanh()
    return (n + z * (s[0] - n),)


GRU = register(Cell("gru", gates=3, states=("h",), saved=4, step=step, apart=1, reads_h=True))
