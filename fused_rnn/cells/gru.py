"""Gated recurrent unit, gate order r, z, n, the reset gate applied after the recurrent product.

Source: Cho et al. 2014; the "reset after" form, with a bias of its own inside it, as in torch.nn.GRU and cuDNN.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from fused_rnn.cells.descriptor import Cell, Parts, register


def gates(x: Sequence[Tensor], r: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """r, z = σ(x + h), n = tanh(x_n + r·h_n)."""
    reset, z = (x[0] + r[0]).sigmoid(), (x[1] + r[1]).sigmoid()
    return reset, z, (x[2] + reset * r[2]).tanh()


def update(a: Sequence[Tensor], s: Sequence[Tensor]) -> tuple[Tensor]:
    """h' = n + z·(h - n)."""
    _, z, n = a
    return (n + z * (s[0] - n),)


PARTS = Parts(("r", "z", "n"), gates, update, candidate=2)
GRU = register(Cell("gru", gates=3, states=("h",), saved=4, step=PARTS.step, apart=1, reads_h=True, parts=PARTS))
