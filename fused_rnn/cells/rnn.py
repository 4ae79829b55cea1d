"""The plain recurrent cell, with tanh or relu.

Source: Elman 1990; as in torch.nn.RNN.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from fused_rnn.cells.descriptor import Cell, register


def tanh(x: Sequence[Tensor], r: Sequence[Tensor], s: Sequence[Tensor], p: Sequence[Tensor]) -> tuple[Tensor]:
    """h' = tanh(x + r)."""
    return ((x[0] + r[0]).tanh(),)


def relu(x: Sequence[Tensor], r: Sequence[Tensor], s: Sequence[Tensor], p: Sequence[Tensor]) -> tuple[Tensor]:
    """h' = relu(x + r)."""
    return ((x[0] + r[0]).relu(),)


RNN_TANH = register(Cell("rnn_tanh", gates=1, states=("h",), saved=0, step=tanh))
RNN_RELU = register(Cell("rnn_relu", gates=1, states=("h",), saved=0, step=relu))
