"""Wrong arguments meet the exception, and the message, that they meet in torch.nn, which is asked for it.

What is no tensor meets ours, for torch.nn does not refuse it but stumbles: 'tuple' object has no attribute 'dim'.
"""

from __future__ import annotations

import re
import warnings
from collections import namedtuple
from functools import partial
from typing import Any

import pytest
import torch
from counterparts import CELLS, MODULES, SEQUENCES, flatten, make
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

from fused_rnn.dispatch import BACKENDS


def outcome(module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> tuple[type | None, Any]:
    """(type, message) of what a call raises, or (None, what it returns)."""
    try:
        return None, flatten(module(*arguments, **keywords))
    except Exception as error:
        return type(error), str(error)


X = torch.ones(4, 3, 5)
PACKED = pack_padded_sequence(X, [4, 2, 1])
UNSORTED = pack_padded_sequence(X, [2, 4, 1], enforce_sorted=False)


def h(*size: int, **kwargs: Any) -> Tensor:
    return torch.ones(size, **kwargs)


# Arguments that torch.nn's LSTM, GRU or RNN (5, 7) refuse, or take for reasons of their own. A pair stands for (h, c),
# and for h alone where there is no c.
WRONG_SEQUENCES: dict[str, tuple[Any, ...]] = {
    "nothing": (),
    "None": (None,),
    "list": ([1.0],),
    "0-D": (h(),),
    "1-D": (h(5),),
    "4-D": (h(1, 4, 3, 5),),
    "wrong width": (h(4, 3, 6),),
    "wrong width, unbatched": (h(4, 6),),
    "wrong width, one step": (h(1, 3, 6),),
    "double": (X.double(),),
    "double, one step": (X[:1].double(),),
    "integer": (X.long(),),
    "bool": (X.bool(),),
    "complex": (X.to(torch.complex64),),
    "half": (X.half(),),
    "no steps": (h(0, 3, 5),),
    "no steps, unbatched": (h(0, 5),),
    "no steps, no batch": (h(0, 0, 5),),
    "on meta": (X.to("meta"),),
    "hx of a wrong batch": (X, (h(1, 2, 7), h(1, 2, 7))),
    "hx of a wrong batch, one step": (X[:1], (h(1, 2, 7), h(1, 2, 7))),
    "hx of a wrong width": (X, (h(1, 3, 8), h(1, 3, 8))),
    "hx of a wrong width, one step": (X[:1], (h(1, 3, 8), h(1, 3, 8))),
    "hx of too many layers": (X, (h(2, 3, 7), h(2, 3, 7))),
    "hx of another layout": (X, (h(3, 1, 7), h(3, 1, 7))),
    "hx of another layout, one step": (X[:1], (h(3, 1, 7), h(3, 1, 7))),
    "hx unbatched": (X, (h(1, 7), h(1, 7))),
    "hx unbatched, one step": (X[:1, :1], (h(1, 7), h(1, 7))),
    "hx without layers": (X[:1], (h(3, 7), h(3, 7))),
    "hx 4-D": (X, (h(1, 1, 3, 7), h(1, 1, 3, 7))),
    "hx 1-D": (X, (h(7), h(7))),
    "hx batched, input not": (X[:, 0], (h(1, 1, 7), h(1, 1, 7))),
    "hx of a wrong width, unbatched": (X[:, 0], (h(1, 8), h(1, 8))),
    "hx double": (X, (h(1, 3, 7).double(), h(1, 3, 7).double())),
    "hx double, one step": (X[:1], (h(1, 3, 7).double(), h(1, 3, 7).double())),
    "hx integer": (X, (h(1, 3, 7).long(), h(1, 3, 7).long())),
    "hx on meta": (X, (h(1, 3, 7, device="meta"), h(1, 3, 7, device="meta"))),
    "hx on meta, one step": (X[:1], (h(1, 3, 7, device="meta"), h(1, 3, 7, device="meta"))),
    "hx a number": (X, (1.0, 1.0)),
    "hx of Nones": (X, (None, None)),
    "packed, wrong width": (pack_padded_sequence(h(4, 3, 6), [4, 2, 1]),),
    "packed, double": (pack_padded_sequence(X.double(), [4, 2, 1]),),
    "packed, hx of a wrong width": (PACKED, (h(1, 3, 8), h(1, 3, 8))),
    "packed, hx of a wrong batch": (PACKED, (h(1, 2, 7), h(1, 2, 7))),
    "packed, hx of a larger batch": (PACKED, (h(1, 4, 7), h(1, 4, 7))),
    "packed, hx unbatched": (PACKED, (h(1, 7), h(1, 7))),
    "packed, hx double": (PACKED, (h(1, 3, 7).double(), h(1, 3, 7).double())),
    "unsorted, hx of a wrong batch": (UNSORTED, (h(1, 2, 7), h(1, 2, 7))),
    "unsorted, hx of a larger batch": (UNSORTED, (h(1, 4, 7), h(1, 4, 7))),
    "unsorted, hx unbatched": (UNSORTED, (h(7), h(7))),
    "packed data of three dimensions": (PackedSequence(X, torch.tensor([3, 3, 3, 3])),),
}
ONLY_LSTM: dict[str, tuple[Any, ...]] = {
    "hx a tensor": (X, h(1, 3, 7)),
    "hx a stacked tensor": (X, h(2, 1, 3, 7)),
    "hx a stacked tensor, one step": (X[:1], h(2, 1, 3, 7)),
    "hx a list": (X, [h(1, 3, 7), h(1, 3, 7)]),
    "hx a list, one step": (X[:1], [h(1, 3, 7), h(1, 3, 7)]),
    "hx of one": (X, (h(1, 3, 7),)),
    "hx of three": (X, (h(1, 3, 7), h(1, 3, 7), h(1, 3, 7))),
    "hx of three, one step": (X[:1], (h(1, 3, 7), h(1, 3, 7), h(1, 3, 7))),
    "c of a wrong width": (X, (h(1, 3, 7), h(1, 3, 6))),
    "c of a wrong width, one step": (X[:1], (h(1, 3, 7), h(1, 3, 6))),
    "c of a wrong batch": (X, (h(1, 3, 7), h(1, 2, 7))),
    "c double": (X, (h(1, 3, 7), h(1, 3, 7).double())),
    "c unbatched": (X, (h(1, 3, 7), h(1, 7))),
    "c None": (X[:1], (h(1, 3, 7), None)),
    "packed, c of a wrong width": (PACKED, (h(1, 3, 7), h(1, 3, 6))),
    "packed, hx a tensor": (PACKED, h(1, 3, 7)),
}
NOT_LSTM: dict[str, tuple[Any, ...]] = {
    "hx a tuple": (X, (h(1, 3, 7), h(1, 3, 7))),
    "hx a tuple, one step": (X[:1], (h(1, 3, 7), h(1, 3, 7))),
    "packed, hx a tuple": (PACKED, (h(1, 3, 7), h(1, 3, 7))),
}
# The same for the cells (5, 7).
WRONG_CELLS: dict[str, tuple[Any, ...]] = {
    "nothing": (),
    "None": (None,),
    "0-D": (h(),),
    "3-D": (h(1, 3, 5),),
    "wrong width": (h(3, 6),),
    "wrong width, unbatched": (h(6),),
    "double": (h(3, 5).double(),),
    "integer": (h(3, 5).long(),),
    "on meta": (h(3, 5, device="meta"),),
    "packed": (PACKED,),
    "hx of a wrong batch": (h(3, 5), (h(2, 7), h(2, 7))),
    "hx of a wrong width": (h(3, 5), (h(3, 8), h(3, 8))),
    "hx of a wrong width, unbatched": (h(5), (h(8), h(8))),
    "hx 3-D": (h(3, 5), (h(1, 3, 7), h(1, 3, 7))),
    "hx 0-D": (h(3, 5), (h(), h())),
    "hx unbatched": (h(3, 5), (h(7), h(7))),
    "hx unbatched, a batch of one": (h(1, 5), (h(7), h(7))),
    "hx batched, input not": (h(5), (h(1, 7), h(1, 7))),
    "hx double": (h(3, 5), (h(3, 7).double(), h(3, 7).double())),
    "hx on meta": (h(3, 5), (h(3, 7, device="meta"), h(3, 7, device="meta"))),
    "hx a number": (h(3, 5), (1.0, 1.0)),
}
ONLY_LSTM_CELL: dict[str, tuple[Any, ...]] = {
    "hx a tensor": (h(3, 5), h(3, 7)),
    "hx a stacked tensor": (h(3, 5), h(2, 3, 7)),
    "hx a list": (h(3, 5), [h(3, 7), h(3, 7)]),
    "hx of one": (h(3, 5), (h(3, 7),)),
    "hx of three": (h(3, 5), (h(3, 7), h(3, 7), h(3, 7))),
    "c of a wrong width": (h(3, 5), (h(3, 7), h(3, 6))),
    "c of a wrong batch": (h(3, 5), (h(3, 7), h(2, 7))),
    "c None": (h(3, 5), (h(3, 7), None)),
    "hx of Nones": (h(3, 5), (None, None)),
}
TABLES: dict[str, dict[str, tuple[Any, ...]]] = {
    "LSTM": WRONG_SEQUENCES | ONLY_LSTM,
    "GRU": WRONG_SEQUENCES | NOT_LSTM,
    "RNN": WRONG_SEQUENCES | NOT_LSTM,
    "LSTMCell": WRONG_CELLS | ONLY_LSTM_CELL,
    "GRUCell": WRONG_CELLS,
    "RNNCell": WRONG_CELLS,
}
# What torch.nn stumbles over, a case by a prefix of its name, and what we say of it. {} stands for LSTM's first state,
# and the only one of the others.
NO_TENSOR: dict[str, str] = {
    "None": "input: got None, expected a tensor",
    "list": "input: got list, expected a tensor",
    "hx a number": "{}: got 1.0, expected a tensor [",
    "hx of Nones": "{}: got None, expected a tensor [",
    "c None": "c_0: got None, expected a tensor [",
    "hx a tensor": "hx: got a tensor [",
    "hx a stacked tensor": "hx: got a tensor [2, ",
    "packed, hx a tensor": "hx: got a tensor [1, 3, 7], expected a pair (h_0, c_0) of tensors",
    "hx of one": "hx: got a tuple of 1, expected a pair (h_0, c_0) of tensors",
    "hx of three": "hx: got a tuple of 3, expected a pair (h_0, c_0) of tensors",
    "hx a tuple": "hx: got tuple, expected a tensor [1, 3, 7]",
    "packed, hx a tuple": "hx: got tuple, expected a tensor [1, 3, 7]",
}
NO_TENSOR_OF_A_CELL = NO_TENSOR | {"packed": "input: got a PackedSequence, expected a tensor"}


@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no_grad"])
@pytest.mark.parametrize(("name", "case"), [(name, case) for name, table in TABLES.items() for case in table])
def test_wrong_input_meets_what_it_meets_in_torch(name: str, case: str, grad: bool) -> None:
    """The same exception and the same message; where torch takes it, the same result."""
    arguments = TABLES[name][case]
    common = case in (WRONG_CELLS if name in CELLS else WRONG_SEQUENCES)
    if common and len(arguments) == 2 and "LSTM" not in name:
        arguments = (arguments[0], arguments[1][0])
    results = []
    for module in make(name, 5, 7):
        with torch.set_grad_enabled(grad):
            results.append(outcome(module, arguments, {}))
    (ours, got), (counterpart, expected) = results
    said = (NO_TENSOR_OF_A_CELL if name in CELLS else NO_TENSOR).get(case.removesuffix(", one step"))
    if counterpart is not None and said is not None:
        assert ours is TypeError
        assert got.startswith(said.format("h_0" if "LSTM" in name else "hx"))
        assert "expected a pair (h_0, c_0) of tensors" in got or "expected a tensor" in got
    elif counterpart is not None:
        assert (ours, got) == (counterpart, expected)
    else:
        assert ours is None, got
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b)


WRONG_CONSTRUCTIONS: list[tuple[tuple[Any, ...], dict[str, Any]]] = [
    ((), {}),
    ((5,), {}),
    ((5, 7), {"unknown": 1}),
    ((5, 7, 1), {"num_layers": 1}),
    ((5, 0), {}),
    ((0, 5), {}),
    ((5, -1), {}),
    ((5.0, 7), {}),
    ((5, 7.0), {}),
    (("5", 7), {}),
    ((5, 7, 0), {}),
    ((5, 7), {"bias": 1}),
    ((5, 7), {"batch_first": "yes"}),
    ((5, 7), {"dropout": 1.5}),
    ((5, 7), {"dropout": -0.5}),
    ((5, 7), {"dropout": True}),
    ((5, 7), {"dropout": "a"}),
    ((5, 7), {"proj_size": 7}),
    ((5, 7), {"proj_size": -1}),
    ((5, 7), {"proj_size": 0}),
    ((5, 7), {"nonlinearity": "sigmoid"}),
    ((5, 7, 1, "sigmoid"), {}),
    ((5, 7), {"device": "nowhere"}),
    ((5, 7), {"dtype": torch.int64}),
    ((5, 7), {"dtype": "float"}),
]


@pytest.mark.parametrize(("arguments", "keywords"), WRONG_CONSTRUCTIONS, ids=str)
@pytest.mark.parametrize("name", MODULES)
def test_wrong_constructions(name: str, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
    results = []
    for cls in MODULES[name]:
        try:
            results.append((None, repr(cls(*arguments, **keywords))))
        except Exception as error:
            results.append((type(error), str(error)))
    assert results[0] == results[1]


def test_an_unknown_nonlinearity_of_a_cell_is_refused_when_it_runs() -> None:
    messages = []
    for module in make("RNNCell", 5, 7, nonlinearity="sigmoid"):
        with pytest.raises(RuntimeError) as caught:
            module(torch.randn(3, 5))
        messages.append(str(caught.value))
    assert messages[0] == messages[1]


@pytest.mark.parametrize("name", SEQUENCES)
def test_warning_of_dropout_that_does_nothing(name: str) -> None:
    caught = []
    for cls in SEQUENCES[name]:
        with warnings.catch_warnings(record=True) as record:
            warnings.simplefilter("always")
            cls(5, 7, dropout=0.5)
        caught.append([(w.category, str(w.message)) for w in record])
    assert caught[0] == caught[1]
    assert len(caught[0]) == 1


@pytest.mark.parametrize("name", SEQUENCES)
def test_wrong_lengths_and_resets(name: str) -> None:
    ours, _ = make(name, 5, 7)
    for keywords, message in (
        ({"lengths": torch.tensor([1.0, 2, 3])}, "lengths: got torch.float32, expected an integer dtype"),
        ({"lengths": torch.tensor([1, 2])}, r"lengths: got \[2\], expected \[B\] = \[3\]"),
        ({"lengths": torch.tensor([1, 2, 5])}, "lengths: got values from 1 to 5, expected 0 to T = 4"),
        ({"lengths": torch.tensor([-1, 2, 4])}, "lengths: got values from -1 to 4"),
        ({"reset": torch.zeros(4, 3)}, "reset: got torch.float32, expected torch.bool"),
        ({"reset": torch.zeros(3, 4, dtype=torch.bool)}, r"reset: got \[3, 4\], expected \[T, B\] = \[4, 3\]"),
    ):
        with pytest.raises(ValueError, match=message):
            ours(X, **keywords)
    with pytest.raises(ValueError, match="lengths: got some beside a PackedSequence"):
        ours(PACKED, lengths=torch.tensor([4, 2, 1]))
    with pytest.raises(RuntimeError, match="must be equal to input_size"):  # torch's words for what is torch's
        ours(h(4, 3, 6), lengths=torch.tensor([1, 2, 3]))


# Calls that torch's checks let pass, and its kernels answer with numbers read past a buffer, or not at all.
def more_rows(module: nn.Module, name: str) -> None:
    """A weight of one row too many."""
    old = getattr(module, name)
    setattr(module, name, nn.Parameter(torch.ones(old.shape[0] + 1, *old.shape[1:])))


def packed(lengths: list[int], width: int = 5, sorted_: bool = True) -> PackedSequence:
    return pack_padded_sequence(h(max(lengths), len(lengths), width), lengths, enforce_sorted=sorted_)


def with_sizes(*sizes: int, dtype: torch.dtype = torch.int64) -> PackedSequence:
    return PackedSequence(h(7, 5), torch.tensor(sizes, dtype=dtype))


EQUAL = packed([4, 4, 4])
# A pair stands for (h, c), and for h alone where there is no c.
UNCHECKED: dict[str, tuple[Any, ...]] = {
    "packed, wrong width": (packed([4, 2, 1], 6),),
    "packed, equal lengths, wrong width": (packed([4, 4, 4], 6),),
    "packed, equal lengths, narrower": (packed([4, 4, 4], 4),),
    **{
        f"{kind}, hx of {what}": (input, (h(*size), h(*size)))
        for kind, input in (("packed", PACKED), ("equal lengths", EQUAL), ("unsorted", UNSORTED))
        for what, size in (
            ("a smaller batch", (2, 2, 7)),
            ("a batch of one", (2, 1, 7)),
            ("fewer rows", (1, 3, 7)),
            ("more rows", (3, 3, 7)),
            ("a smaller width", (2, 3, 6)),
            ("a larger width", (2, 3, 8)),
        )
    },
    "packed, hx of a larger batch": (PACKED, (h(2, 4, 7), h(2, 4, 7))),
    "packed, hx of four dimensions": (PACKED, (h(2, 1, 3, 7), h(2, 1, 3, 7))),
    "hx of a narrower dtype": (X, (h(2, 3, 7).half(), h(2, 3, 7).half())),
    "equal lengths, hx of a narrower dtype": (EQUAL, (h(2, 3, 7).half(), h(2, 3, 7).half())),
    "batch_sizes of fewer rows": (with_sizes(3, 2, 1),),
    "batch_sizes of more rows": (with_sizes(3, 3, 3),),
    "batch_sizes that grow": (with_sizes(2, 3, 2),),
    "batch_sizes below zero": (with_sizes(5, 3, -1),),
    "batch_sizes of another dtype": (with_sizes(3, 2, 2, dtype=torch.int32),),
    "no batch_sizes": (PackedSequence(h(7, 5), torch.zeros(0, dtype=torch.int64)),),
    "more indices than sequences": (PackedSequence(h(7, 5), torch.tensor([3, 2, 2]), torch.tensor([0, 2, 1, 3])),),
}
WAYS: dict[str, dict[str, Any]] = {
    "by itself": {},
    "torch": {"backend": "torch"},
    "reference": {"backend": "reference"},
    "traced": {},
    "a subclass": {},
}


class Passed(Tensor):
    """Of a type that only torch's own operators take."""


def fail(*_: Any, **__: Any) -> None:
    raise AssertionError("a kernel was reached")


@pytest.fixture
def no_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's and ours, with the arguments that were given."""

    class Kernels:
        lstm = gru = rnn_tanh = rnn_relu = lstm_cell = gru_cell = rnn_tanh_cell = rnn_relu_cell = staticmethod(fail)

    monkeypatch.setattr("torch.nn.modules.rnn._VF", Kernels)
    for backend in BACKENDS.values():
        for name in ("forward", "step"):
            monkeypatch.setattr(backend, name, fail)
    monkeypatch.setattr(BACKENDS["torch"], "stack", fail)


def call_broken(module: Any, way: str, input: Any, hx: Any, grad: bool) -> None:
    """Whatever the exception is, it is not that of `fail`."""
    if way == "a subclass":
        data = input.data if isinstance(input, PackedSequence) else input
        data = data.as_subclass(Passed)
        input = input._replace(data=data) if isinstance(input, PackedSequence) else data
    packed = isinstance(input, PackedSequence)

    def run(data: Tensor) -> Any:
        return module(input._replace(data=data) if packed else data, hx)

    call = partial(torch.jit.trace, run, check_trace=False) if way == "traced" else run
    with torch.set_grad_enabled(grad), pytest.raises((ValueError, RuntimeError, IndexError, TypeError)):
        call(input.data if packed else input)


@pytest.mark.usefixtures("no_kernel")
@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no_grad"])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("case", UNCHECKED)
@pytest.mark.parametrize("name", SEQUENCES)
def test_what_is_refused_reaches_no_kernel(name: str, case: str, way: str, grad: bool) -> None:
    input, *rest = UNCHECKED[case]
    hx = rest[0] if rest else None
    for options in ({}, {"dropout": 0.5}):
        ours, _ = make(name, 5, 7, 2, **options, extras=WAYS[way])
        call_broken(ours, way, input, hx if name == "LSTM" or hx is None else hx[0], grad)


@pytest.mark.usefixtures("no_kernel")
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", MODULES)
def test_weights_of_a_wrong_size_reach_no_kernel(name: str, way: str) -> None:
    for size in (7, 1):  # with one unit a row too many leaves torch's GRU a gate short
        ours, _ = make(name, 5, size)
        for weight in [key for key, _ in ours.named_parameters()]:
            for input in [h(3, 5)] if name in CELLS else [X, X[:1], X[:, 0], PACKED, EQUAL]:
                ours, _ = make(name, 5, size, extras=WAYS[way])
                more_rows(ours, weight)
                for grad in (True, False):
                    call_broken(ours, way, input, None, grad)


def test_what_torch_does_not_refuse_is_refused_in_our_words() -> None:
    ours, _ = make("LSTM", 5, 7, 2)
    for case, message in (
        ("equal lengths, hx of a smaller batch", r"h_0: got \[2, 2, 7\], expected \[L·R, B, P\] with \[2, 3\]"),
        ("packed, hx of fewer rows", r"h_0: got \[1, 3, 7\], expected \[L·R, B, P\] with \[2, 3\]"),
        ("equal lengths, hx of a larger width", r"h0: got \[2, 3, 8\], expected \[L·R, B, P\] = \[2, 3, 7\]"),
        ("packed, equal lengths, narrower", r"weights\[0\]: got \[28, 5\], expected \[28, 4\]"),
        ("hx of a narrower dtype", r"h0: got torch.float16 on cpu, expected x's torch.float32 on cpu"),
        ("batch_sizes that grow", r"input.batch_sizes: got \[2, 3, 2\], expected sizes that never grow"),
        ("batch_sizes of more rows", r"input.batch_sizes: got \[3, 3, 3\], expected"),
    ):
        with pytest.raises(ValueError, match=message):
            ours(*UNCHECKED[case])


@pytest.mark.parametrize("backend", [None, "torch", "reference"])
def test_rows_of_equal_lengths_may_come_in_three_dimensions(backend: str | None) -> None:
    """As they may to torch's LSTM, by whichever backend."""
    given = PackedSequence(torch.randn(4, 3, 5), torch.tensor([3, 3, 3, 3]))
    ours, counterpart = make("LSTM", 5, 7, extras={"backend": backend})
    for a, b in zip(flatten(ours(given)), flatten(counterpart(given)), strict=True):
        torch.testing.assert_close(a, b)


def test_dropout_takes_states_of_its_layers_alone() -> None:
    """Packed, in training, where the layers run one by one."""
    for name in SEQUENCES:
        ours, counterpart = make(name, 5, 7, 2, dropout=0.5)
        states = (h(4, 3, 7), h(4, 3, 7)) if name == "LSTM" else h(4, 3, 7)
        with pytest.raises((ValueError, RuntimeError)) as refused:
            ours(PACKED, states)
        if name != "LSTM":  # whose counterpart reads the first two rows
            with pytest.raises(RuntimeError) as expected:
                counterpart(PACKED, states)
            assert str(refused.value) == str(expected.value)


SPARSE = {"coo": Tensor.to_sparse, "csr": Tensor.to_sparse_csr, "mkldnn": Tensor.to_mkldnn}


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support")
@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no_grad"])
@pytest.mark.parametrize("layout", SPARSE)
@pytest.mark.parametrize("name", MODULES)
def test_sparse_tensors_meet_what_they_meet_in_torch(name: str, layout: str, grad: bool) -> None:
    x, state = (h(3, 5), h(3, 7)) if name in CELLS else (h(4, 3, 5), h(1, 3, 7))
    for which in ("input", "hx"):
        try:
            strange = SPARSE[layout](x if which == "input" else state)
        except RuntimeError:  # a layout that has no three dimensions
            continue
        hx = strange if which == "hx" else state
        given = (strange if which == "input" else x, (hx, hx) if "LSTM" in name else hx)
        with torch.set_grad_enabled(grad):
            (ours, got), (counterpart, expected) = (outcome(module, given, {}) for module in make(name, 5, 7))
        assert ours == counterpart
        if counterpart is not None:
            assert got == expected
        else:
            torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("name", SEQUENCES)
def test_a_reset_of_lists(name: str) -> None:
    for batch_first in (False, True):
        ours, _ = make(name, 5, 7, batch_first=batch_first)
        x = torch.randn(3, 4, 5) if batch_first else torch.randn(4, 3, 5)
        reset = torch.rand(x.shape[:2]) < 0.5
        for grad in (True, False):
            with torch.set_grad_enabled(grad):
                expected = flatten(ours(x, lengths=torch.tensor([4, 2, 3]), reset=reset))
                got = flatten(ours(x, lengths=[4, 2, 3], reset=reset.tolist()))
                assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
                alone = torch.randn(4, 5), torch.tensor([True, False, True, False])
                expected = flatten(ours(alone[0], reset=alone[1]))
                got = flatten(ours(alone[0], reset=alone[1].tolist()))
                assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    for wrong, message in (
        ([[True], [True, False]], "reset: got list, expected .*bool"),
        ([[0, 1, 0, 1]] * 3, "reset: got torch.int64, expected torch.bool"),
        ([[True] * 4] * 2, r"reset: got \[2, 4\], expected \[B, T\] = \[3, 4\], for batch_first is True"),
        ([True, False, True], r"reset: got \[3\], expected \[B, T\]"),
        ("yes", "reset: got str"),
    ):
        with pytest.raises(ValueError, match=message):
            ours(x, reset=wrong)


def test_no_lengths_of_no_sequences() -> None:
    """An empty list, of which torch makes floats, is as many lengths as an empty batch has."""
    ours, _ = make("GRU", 5, 7)
    y, h_n = ours(h(4, 0, 5), lengths=[], reset=[[]] * 4)
    assert (y.shape, h_n.shape) == ((4, 0, 7), (1, 0, 7))


def test_a_named_pair_of_states() -> None:
    states = namedtuple("states", "h c")
    ours, counterpart = make("LSTM", 5, 7)
    with pytest.raises(RuntimeError) as theirs:
        counterpart(X, states(h(1, 3, 6), h(1, 3, 7)))
    with pytest.raises(RuntimeError, match=re.escape(str(theirs.value))):
        ours(X, states(h(1, 3, 6), h(1, 3, 7)))
    right = h(1, 3, 7), h(1, 3, 7)
    for one, other in zip(flatten(ours(X, states(*right))), flatten(counterpart(X, right)), strict=True):
        torch.testing.assert_close(one, other)
