"""The plain recurrent cell, with tanh or relu.

Source: Elman 1990; as in torch.nn.RNN.
"""

from __future__ import annotations

from torch import Tensor

from fused_rnn.cells.descriptor import Spec


def step_tanh(gates_x: Tensor, gates_h: Tensor, h: Tensor, c: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """h' = tanh(gates_x + gates_h).  gates_x, gates_h [B, H] → (h' [B, H], None)."""
    return (gates_x + gates_h).tanh(), None


def step_relu(gates_x: Tensor, gates_h: Tensor, h: Tensor, c: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """h' = relu(gates_x + gates_h).  gates_x, gates_h [B, H] → (h' [B, H], None)."""
    return (gates_x + gates_h).relu(), None


RNN_TANH = Spec("rnn_tanh", gates=1, stored=0, has_c=False, step=step_tanh)
RNN_RELU = Spec("rnn_relu", gates=1, stored=0, has_c=False, step=step_relu)
