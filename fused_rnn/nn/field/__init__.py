"""The cells of the literature, a file each: its step under fused_rnn.cell, and the module that has it in its layers."""

from __future__ import annotations

from fused_rnn.nn.field import xlstm
from fused_rnn.nn.field.block_gru import BlockGRU
from fused_rnn.nn.field.coupled_lstm import CoupledLSTM
from fused_rnn.nn.field.ind_rnn import IndRNN
from fused_rnn.nn.field.layer_norm import LayerNormGRU, LayerNormLSTM
from fused_rnn.nn.field.li_gru import LiGRU
from fused_rnn.nn.field.min_rnn import MinGRU, MinLSTM
from fused_rnn.nn.field.peephole_lstm import PeepholeLSTM
from fused_rnn.nn.field.reset_before import MGU, ResetBeforeGRU
from fused_rnn.nn.field.slstm import SLSTM
from fused_rnn.nn.field.sru import SRU
from fused_rnn.nn.rnn import GRU, LSTM, RNN

FIELD = (
    BlockGRU, CoupledLSTM, IndRNN, LayerNormGRU, LayerNormLSTM, LiGRU, MGU, MinGRU, MinLSTM, PeepholeLSTM,
    ResetBeforeGRU, SLSTM, SRU,
)  # fmt: skip

__all__ = [
    "FIELD",
    "MGU",
    "SLSTM",
    "SRU",
    "BlockGRU",
    "CoupledLSTM",
    "IndRNN",
    "LayerNormGRU",
    "LayerNormLSTM",
    "LiGRU",
    "MinGRU",
    "MinLSTM",
    "PeepholeLSTM",
    "ResetBeforeGRU",
    "list_cells",
    "xlstm",
]


def list_cells() -> list[str]:
    """The names of the modules that this package has for cells, in alphabetical order: each is `fused_rnn.<name>`.

    Examples:
        >>> [name for name in fused_rnn.list_cells() if name.endswith("GRU")]
        ['BlockGRU', 'GRU', 'LayerNormGRU', 'LiGRU', 'MinGRU', 'ResetBeforeGRU']
    """
    return sorted(cls.__name__ for cls in (LSTM, GRU, RNN, *FIELD))
