"""Long short-term memory, gate order i, f, g, o.

Source: Hochreiter & Schmidhuber 1997, with the forget gate of Gers, Schmidhuber & Cummins 2000; gates as in
torch.nn.LSTM.
"""

from __future__ import annotations

from torch import Tensor

from fused_rnn.cells.descriptor import Spec


def step(gates_x: Tensor, gates_h: Tensor, h: Tensor, c: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """c' = f·c + i·g, h' = o·tanh(c').  gates_x, gates_h [B, 4H], c [B, H] → (h' [B, H], c' [B, H])."""
    i, f, g, o = (gates_x + gates_h).chunk(4, -1)
    assert c is not None
    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    return o.sigmoid() * c.tanh(), c


LSTM = Spec("lstm", gates=4, stored=4, has_c=True, step=step)
