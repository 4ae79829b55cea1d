"""The modules as instances of torch.nn's classes, too: for code that asks isinstance(m, torch.nn.LSTM).

Dynamo refuses every instance of torch.nn.LSTM, GRU and RNN, and breaks the graph there: hence not ours by default.
"""

from __future__ import annotations

# Bound now, as in rnn.py.
from torch.nn import GRU as TorchGRU
from torch.nn import LSTM as TorchLSTM
from torch.nn import RNN as TorchRNN
from torch.nn import GRUCell as TorchGRUCell
from torch.nn import LSTMCell as TorchLSTMCell
from torch.nn import RNNCell as TorchRNNCell

from fused_rnn.nn import cells, rnn


class LSTM(rnn.LSTM, TorchLSTM):
    """fused_rnn.LSTM, and a torch.nn.LSTM."""

    _fused_counterpart = TorchLSTM


class GRU(rnn.GRU, TorchGRU):
    """fused_rnn.GRU, and a torch.nn.GRU."""

    _fused_counterpart = TorchGRU


class RNN(rnn.RNN, TorchRNN):
    """fused_rnn.RNN, and a torch.nn.RNN."""

    _fused_counterpart = TorchRNN


class LSTMCell(cells.LSTMCell, TorchLSTMCell):
    """fused_rnn.LSTMCell, and a torch.nn.LSTMCell."""

    _fused_counterpart = TorchLSTMCell


class GRUCell(cells.GRUCell, TorchGRUCell):
    """fused_rnn.GRUCell, and a torch.nn.GRUCell."""

    _fused_counterpart = TorchGRUCell


class RNNCell(cells.RNNCell, TorchRNNCell):
    """fused_rnn.RNNCell, and a torch.nn.RNNCell."""

    _fused_counterpart = TorchRNNCell
