"""The cells' @triton.jit functions. A new cell is a file of its own and an entry here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fused_rnn.triton.cells import gru, lstm, rnn


@dataclass(frozen=True)
class Kernels:
    """A cell's functions, and what of the states its backward reads."""

    fwd: Any
    bwd: Any
    needs_state: bool  # the state of the step
    needs_before: bool  # the state that entered the step


KERNELS: dict[str, Kernels] = {
    "lstm": Kernels(lstm.fwd, lstm.bwd, True, True),
    "gru": Kernels(gru.fwd, gru.bwd, False, True),
    "rnn_tanh": Kernels(rnn.fwd_tanh, rnn.bwd_tanh, True, False),
    "rnn_relu": Kernels(rnn.fwd_relu, rnn.bwd_relu, True, False),
}
