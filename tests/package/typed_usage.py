"""What users write, for a type checker: tests/package/test_distribution.py has mypy read it, strictly, and runs it.

Where a line has to be refused it says so by a `type: ignore`, which in strict mode is an error where it is not needed.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence
from typing_extensions import assert_type

import fused_rnn
from fused_rnn import functional

X = torch.randn(5, 2, 3)  # [T, B, D]


class Tagger(nn.Module):
    """A model with one of our modules in it."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = fused_rnn.LSTM(3, 4, num_layers=2, bidirectional=True, device="cpu", dtype=torch.float32)
        self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        y, (h_n, c_n) = self.rnn(x, lengths=lengths)
        assert_type(y, Tensor)
        assert_type(h_n, Tensor)
        assert_type(c_n, Tensor)
        logits: Tensor = self.head(y)
        return logits


class Named(fused_rnn.GRU):
    """A class derived from ours, with an argument of its own."""

    def __init__(self, input_size: int, hidden_size: int, *, name: str) -> None:
        super().__init__(input_size, hidden_size, backend="cpu", save="recompute")
        self.name = name


def sequences() -> None:
    packed = pack_padded_sequence(X, torch.tensor([5, 3]))
    lstm = fused_rnn.LSTM(3, 4, proj_size=2)
    assert_type(lstm(packed), tuple[PackedSequence, tuple[Tensor, Tensor]])
    assert_type(lstm(X, (torch.zeros(1, 2, 2), torch.zeros(1, 2, 4))), tuple[Tensor, tuple[Tensor, Tensor]])
    assert_type(fused_rnn.GRU(3, 4)(X, lengths=[5, 3]), tuple[Tensor, Tensor])
    assert_type(fused_rnn.RNN(3, 4, 1, "relu")(packed)[0], PackedSequence)
    assert_type(Named(3, 4, name="mine")(X, None, reset=torch.zeros(5, 2, dtype=torch.bool)), tuple[Tensor, Tensor])
    assert_type(lstm.backend, str | None)
    assert_type(lstm.save, str)
    Tagger()(X, torch.tensor([5, 3])).sum().backward()


def cells() -> None:
    h, c = fused_rnn.LSTMCell(3, 4)(X[0])
    assert_type(h, Tensor)
    assert_type(fused_rnn.GRUCell(3, 4)(X[0], h), Tensor)
    assert_type(fused_rnn.RNNCell(3, 4, nonlinearity="relu")(X[0], c), Tensor)


def functions() -> None:
    weights = [torch.randn(12, 3), torch.randn(12, 4)]
    assert_type(functional.gru(X, weights, lengths=[5, 3]), tuple[Tensor, Tensor])
    assert_type(functional.lstm(X, [torch.randn(16, 3), torch.randn(16, 4)]), tuple[Tensor, tuple[Tensor, Tensor]])
    assert_type(functional.gru_cell(X[0], None, weights), Tensor)


def models() -> None:
    model = nn.Sequential(nn.LSTM(3, 4))
    assert_type(fused_rnn.convert(model), nn.Sequential)
    assert_type(fused_rnn.to_torch(model), nn.Sequential)
    with fused_rnn.patch():
        nn.GRU(3, 4)
    assert_type(fused_rnn.plan("gru", 8, 64).cycles.exchange, float)


def refused() -> None:
    """By type checkers, and at run time by what they lead to."""
    fused_rnn.LSTM("3", 4)  # type: ignore[arg-type]
    fused_rnn.GRU(3, 4, proj_size=2)  # type: ignore[call-arg]
    fused_rnn.GRU(3, 4)(X, (X, X))  # type: ignore[call-overload]
    fused_rnn.LSTM(3, 4)(pack_padded_sequence(X, torch.tensor([5, 3])), lengths=[5, 3])  # type: ignore[call-overload]
    fused_rnn.GRUCell(3, 4)(3)  # type: ignore[arg-type]
    fused_rnn.convert("model")  # type: ignore[type-var]
