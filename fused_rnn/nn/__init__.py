"""The modules: what torch.nn's LSTM, GRU, RNN and their cells are, in arguments, attributes, state and errors."""

from fused_rnn.nn.cells import GRUCell, LSTMCell, RNNCell
from fused_rnn.nn.rnn import GRU, LSTM, RNN

__all__ = ["GRU", "LSTM", "RNN", "GRUCell", "LSTMCell", "RNNCell"]
