"""Fused LSTM, GRU and RNN time loops for PyTorch."""

from fused_rnn import functional
from fused_rnn.autograd import GRUFunction, LSTMFunction, RNNFunction

__version__ = "0.1.0"

__all__ = ["GRUFunction", "LSTMFunction", "RNNFunction", "functional"]
