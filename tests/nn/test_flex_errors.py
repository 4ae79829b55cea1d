"""What FlexRNN says of arguments that do not fit: in torch's words where LSTM has them, else as all modules do."""

from __future__ import annotations

import pickle
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence
from user_cells import chain, indrnn, leaky, lstm

import fused_rnn
from fused_rnn import FlexRNN


def zeros(*shape: int) -> Tensor:
    return torch.zeros(shape)


X = zeros(5, 3, 4)
PACKED = pack_padded_sequence(X, torch.tensor([5, 3, 2]))
# (options, call, error) of a FlexRNN(cell, 4, 6) and of a fused_rnn.LSTM(4, 6), which says the same
AS_LSTM: list[tuple[Callable[[Any], Any], type[Exception], str]] = [
    (lambda m: m(zeros(5, 3, 5)), RuntimeError, "input.size(-1) must be equal to input_size. Expected 4, got 5"),
    (
        lambda m: m(X.double()),
        ValueError,
        "RNN input dtype (torch.float64) does not match weight dtype (torch.float32)",
    ),
    (lambda m: m([1.0]), TypeError, "input: got list, expected a tensor"),
    (lambda m: m(X, zeros(1, 3, 6)), TypeError, "hx: got a tensor [1, 3, 6], expected a pair (h_0, c_0) of tensors"),
    (lambda m: m(X, (zeros(1, 3, 6),)), TypeError, "hx: got a tuple of 1, expected a pair (h_0, c_0) of tensors"),
    (lambda m: m(X, (zeros(1, 3, 6), None)), TypeError, "c_0: got None, expected a tensor [1, 3, 6]"),
    (
        lambda m: m(X, (zeros(1, 3, 6), zeros(1, 3, 5))),
        RuntimeError,
        "Expected hidden[1] size (1, 3, 6), got [1, 3, 5]",
    ),
    (
        lambda m: m(X, (zeros(1, 3, 3), zeros(1, 3, 6))),
        RuntimeError,
        "Expected hidden[0] size (1, 3, 6), got [1, 3, 3]",
    ),
    (lambda m: m(X, (zeros(1, 6),) * 2), RuntimeError, "should also be 3-D but got (2-D, 2-D) tensors"),
    (lambda m: m(X[:, 0], (zeros(1, 3, 6),) * 2), RuntimeError, "should also be 2-D but got (3-D, 3-D) tensors"),
    (lambda m: m(X, torch.tensor([5, 3, 2])), TypeError, "; lengths are given by name: lengths="),
    (lambda m: m(X, lengths=[5, 3]), ValueError, "lengths: got [2], expected [B] = [3]"),
    (lambda m: m(X, lengths=[5, 3, 9]), ValueError, "lengths: got values from 3 to 9, expected 0 to T = 5"),
    (lambda m: m(X[:, 0], lengths=[5, 3]), ValueError, "lengths: got [2], expected [], of unbatched input"),
    (lambda m: m(X, reset=zeros(5, 3)), ValueError, "reset: got torch.float32, expected torch.bool"),
    (lambda m: m(X, reset=zeros(5, 2).bool()), ValueError, "reset: got [5, 2], expected [T, B] = [5, 3]"),
    (lambda m: m(PACKED, lengths=[5, 3, 2]), ValueError, "lengths: got some beside a PackedSequence, expected None"),
]
OF_ITS_OWN: list[tuple[Any, Callable[[Any], Any], type[Exception], str]] = [
    (lstm, lambda m: m(zeros(5)), ValueError, "FlexRNN: Expected input to be 2D or 3D, got 1D instead"),
    (leaky, lambda m: m(X, (zeros(1, 3, 6),)), TypeError, "hx: got tuple, expected a tensor [1, 3, 6]"),
    (leaky, lambda m: m(X, zeros(1, 3, 5)), RuntimeError, "Expected hidden size (1, 3, 6), got [1, 3, 5]"),
    (
        chain,
        lambda m: m(X, (zeros(1, 3, 6),) * 2),
        TypeError,
        "a tuple of 2, expected a tuple (h_0, m_0, k_0) of tensors",
    ),
    (
        chain,
        lambda m: m(PACKED, (zeros(1, 2, 6),) * 3),
        RuntimeError,
        "Expected hidden[0] size (1, 3, 6), got [1, 2, 6]",
    ),
    (lstm, lambda m: m(X.to_sparse()), NotImplementedError, "FlexRNN takes plain tensors alone"),
    (lstm, lambda m: m(X, (zeros(1, 3, 6), zeros(1, 3, 6).double())), ValueError, "c0: got torch.float64 on cpu"),
    (
        chain,
        lambda m: setattr(m.stream(3), "state", (zeros(1, 3, 6),) * 2),
        TypeError,
        "got tuple of 2, expected a tuple",
    ),
    (chain, lambda m: m.stream(3).step(X[0, :2]), ValueError, "x_t: got [2, 4], expected [B, D] = [3, 4]"),
]


@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize(("call", "error", "words"), AS_LSTM)
def test_as_lstm(call: Callable[[Any], Any], error: type[Exception], words: str, heads: int) -> None:
    for module in (FlexRNN(lstm, 4, 6, heads=heads), fused_rnn.LSTM(4, 6)):
        with pytest.raises(error, match=re.escape(words)):
            call(module)


@pytest.mark.parametrize(("cell", "call", "error", "words"), OF_ITS_OWN)
def test_of_its_own(cell: Any, call: Callable[[Any], Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=re.escape(words)) as raised:
        call(FlexRNN(cell, 4, 6))
    assert "fused_rnn.cell 1|" not in str(raised.value)


@pytest.mark.parametrize(
    ("cell", "options", "error", "words"),
    [
        (lstm.step, {}, TypeError, "cell: got function, expected a cell, as @fused_rnn.cell(gates=..., states=...)"),
        (lstm, {"heads": 4}, ValueError, "heads: got 4, expected a positive divisor of hidden_size = 6"),
        (lstm, {"heads": 0}, ValueError, "heads: got 0, expected a positive divisor of hidden_size = 6"),
        (lstm, {"heads": True}, ValueError, "heads: got True, expected a positive divisor"),
        (lstm, {"return_sequences": "c"}, ValueError, "return_sequences: got 'c', expected 'h' or 'states'"),
        (lstm, {"dropout": 2}, ValueError, "dropout should be a number in range [0, 1]"),
        (lstm, {"num_layers": 0}, ValueError, "num_layers must be greater than zero"),
        (lstm, {"backend": "gpu"}, ValueError, "backend: got 'gpu', expected None or one of"),
        (lstm, {"save": "all"}, ValueError, "save: got 'all', expected one of 'gates', 'recompute'"),
        (lstm, {"init": {"a": 1.0}}, ValueError, "init: got 'a', expected the name of a param of lstm: none"),
        (chain, {"init": {"c": 1.0}}, ValueError, "init: got 'c', expected the name of a param of chain: a, b"),
        (chain, {"init": {"a": zeros(3)}}, ValueError, "init['a']: got [3], expected [H] = [6]"),
        (chain, {"init": {"a": "ones"}}, TypeError, "init['a']: got str, expected a number, a tensor or a function"),
        (chain, {"init": [1.0]}, TypeError, "init: got list, expected values by the names of params"),
    ],
)
def test_a_module_that_cannot_be(cell: Any, options: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=re.escape(words)):
        FlexRNN(cell, 4, 6, **options)


def test_a_param_with_a_weights_name() -> None:
    @fused_rnn.cell(gates=1, params=("bias_ih",))
    def clashing(x: Any, r: Any, s: Any, p: Any) -> Any:
        return torch.tanh(x[0] + r[0] * p.bias_ih)

    with pytest.raises(ValueError, match="cell: got a param 'bias_ih', expected another name"):
        FlexRNN(clashing, 4, 6)


def test_a_step_that_no_loop_runs_is_refused_at_once() -> None:
    @fused_rnn.cell(gates=1)
    def sums(x: Any, r: Any, s: Any, p: Any) -> Any:
        return torch.tanh(x[0] + r[0]) / s.h.amax(-1, keepdim=True)

    with pytest.raises((TypeError, ValueError), match="amax"):
        FlexRNN(sums, 4, 6)


def test_backends_say_why_not() -> None:
    for backend in ("torch", "cuda"):
        with pytest.raises(NotImplementedError) as raised:
            FlexRNN(leaky, 4, 6, backend=backend)(X)
        assert f"backend '{backend}' cannot run this leaky problem" in str(raised.value)
        assert "  torch: it knows the cells lstm, gru, rnn_tanh, rnn_relu, not 'leaky'" in str(raised.value)
        assert "fused_rnn.cell 1|" not in str(raised.value)
    with pytest.raises(
        NotImplementedError, match="goes with the cpu and cuda backends, got backend=None on cpu with heads=2"
    ):
        FlexRNN(lstm, 4, 6, heads=2).stream(weights="bf16")
    with pytest.raises(ValueError, match="bidirectional: got True, expected False"):
        FlexRNN(indrnn, 4, 6, bidirectional=True).stream()


def test_a_cell_in_a_function_does_not_pickle_and_says_so() -> None:
    @fused_rnn.cell(gates=1)
    def inner(x: Any, r: Any, s: Any, p: Any) -> Any:
        return torch.tanh(x[0] + r[0])

    with pytest.raises(pickle.PicklingError, match="cell 'inner': pickled by its name"):
        pickle.dumps(nn.Sequential(FlexRNN(inner, 4, 6)))
