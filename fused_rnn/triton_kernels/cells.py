"""What the loops must be told of each cell. A new cell is a file of its own and an entry here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fused_rnn.triton_kernels import gru, lstm, rnn


@dataclass(frozen=True)
class Cell:
    """A cell's @triton.jit functions and sizes.

    gates: G.  stored: S vectors kept for backward.  gradients: DG that it stores, the recurrent side's last.
    """

    name: str
    fwd: Any
    bwd: Any
    gates: int
    stored: int
    gradients: int
    has_c: bool  # a second state, c
    has_state: bool  # something is carried in float32: c of LSTM, h of GRU
    hidden_bias: bool  # the last gate's recurrent bias stays inside the cell
    needs_state: bool  # backward reads the state of the step
    needs_before: bool  # backward reads the state that entered the step


LSTM = Cell("lstm", lstm.fwd, lstm.bwd, 4, 4, 4, True, True, False, True, True)
GRU = Cell("gru", gru.fwd, gru.bwd, 3, 4, 4, False, True, True, False, True)
RNN_TANH = Cell("rnn_tanh", rnn.fwd_tanh, rnn.bwd_tanh, 1, 0, 1, False, False, False, True, False)
RNN_RELU = Cell("rnn_relu", rnn.fwd_relu, rnn.bwd_relu, 1, 0, 1, False, False, False, True, False)

CELLS: dict[str, Cell] = {cell.name: cell for cell in (LSTM, GRU, RNN_TANH, RNN_RELU)}
