"""The cells, as data and plain PyTorch: the judge of every other backend. Imports torch alone."""

from fused_rnn.cells.descriptor import Spec, unknown
from fused_rnn.cells.gru import GRU
from fused_rnn.cells.lstm import LSTM
from fused_rnn.cells.rnn import RNN_RELU, RNN_TANH

CELLS: dict[str, Spec] = {spec.name: spec for spec in (LSTM, GRU, RNN_TANH, RNN_RELU)}

__all__ = ["CELLS", "Spec", "unknown"]
