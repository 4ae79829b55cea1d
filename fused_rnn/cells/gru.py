"""Gated recurrent unit, gate order r, z, n, the reset gate applied after the recurrent product.

Source: Cho et al. 2014; the "reset after" form, with a bias of its own inside it, as in torch.nn.GRU and cuDNN.
"""

from __future__ import annotations

from torch import Tensor

from fused_rnn.cells.descriptor import Spec


def step(gates_x: Tensor, gates_h: Tensor, h: Tensor, c: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """n = tanh(x_n + r·h_n), h' = n + z·(h - n).  gates_x, gates_h [B, 3H], h [B, H] → (h' [B, H], None)."""
    x_r, x_z, x_n = gates_x.chunk(3, -1)
    h_r, h_z, h_n = gates_h.chunk(3, -1)
    n = (x_n + (x_r + h_r).sigmoid() * h_n).tanh()
    return n + (x_z + h_z).sigmoid() * (h - n), None


GRU = Spec("gru", gates=3, stored=4, has_c=False, step=step)
