"""The modules: what torch.nn's LSTM, GRU, RNN and their cells are, in arguments, attributes, state and errors.

FlexRNN, and the cells of the literature in nn.field, have none in torch.nn. These are imported when first asked for."""

from importlib import import_module
from typing import Any

from fused_rnn.nn.cells import GRUCell, LSTMCell, RNNCell
from fused_rnn.nn.flex import FlexRNN
from fused_rnn.nn.rnn import GRU, LSTM, RNN

__all__ = ["GRU", "LSTM", "RNN", "FlexRNN", "GRUCell", "LSTMCell", "RNNCell"]


def __getattr__(name: str) -> Any:
    if name == "field":
        return import_module("fused_rnn.nn.field")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
