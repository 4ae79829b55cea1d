"""Fused LSTM, GRU and RNN time loops for PyTorch."""

from typing import TYPE_CHECKING, Any

from fused_rnn import functional
from fused_rnn.autograd.functions import GRUFunction, LSTMFunction, RNNFunction
from fused_rnn.convert import convert, patch, to_torch, unpatch
from fused_rnn.flex import UserCell, cell
from fused_rnn.nn import GRU, LSTM, RNN, FlexRNN, GRUCell, LSTMCell, RNNCell
from fused_rnn.plan import plan
from fused_rnn.quantize import quantize
from fused_rnn.stream import Stream

if TYPE_CHECKING:
    from fused_rnn.diagnosis import diagnose
    from fused_rnn.nn.field import (
        MGU,
        SLSTM,
        SRU,
        BlockGRU,
        CoupledLSTM,
        IndRNN,
        LayerNormGRU,
        LayerNormLSTM,
        LiGRU,
        MinGRU,
        MinLSTM,
        PeepholeLSTM,
        ResetBeforeGRU,
        list_cells,
    )

__version__ = "0.1.0"

__all__ = [
    "GRU",
    "LSTM",
    "MGU",
    "RNN",
    "SLSTM",
    "SRU",
    "BlockGRU",
    "CoupledLSTM",
    "FlexRNN",
    "GRUCell",
    "GRUFunction",
    "IndRNN",
    "LSTMCell",
    "LSTMFunction",
    "LayerNormGRU",
    "LayerNormLSTM",
    "LiGRU",
    "MinGRU",
    "MinLSTM",
    "PeepholeLSTM",
    "RNNCell",
    "RNNFunction",
    "ResetBeforeGRU",
    "Stream",
    "UserCell",
    "cell",
    "convert",
    "diagnose",
    "functional",
    "list_cells",
    "patch",
    "plan",
    "quantize",
    "to_torch",
    "unpatch",
]


def __getattr__(name: str) -> Any:
    """What not every program uses is imported when it is first asked for."""
    if name == "diagnose":
        from fused_rnn.diagnosis import diagnose

        globals()[name] = diagnose
        return diagnose
    if name in __all__:
        from fused_rnn.nn import field

        globals().update({known: getattr(field, known) for known in field.__all__ if known in __all__})
        return globals()[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
