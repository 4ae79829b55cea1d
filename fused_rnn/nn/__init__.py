"""The modules: what torch.nn's LSTM, GRU, RNN and their cells are, in arguments, attributes, state and errors.

FlexRNN, and the cells of the literature in nn.field, have none in torch.nn."""

from fused_rnn.nn.cells import GRUCell, LSTMCell, RNNCell
from fused_rnn.nn.flex import FlexRNN
from fused_rnn.nn.rnn import GRU, LSTM, RNN

__all__ = ["GRU", "LSTM", "RNN", "FlexRNN", "GRUCell", "LSTMCell", "RNNCell"]
