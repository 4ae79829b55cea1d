"""Wrong arguments meet the exception, and the message, that they meet in torch.nn, which is asked for it."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence
from twins import CELLS, MODULES, SEQUENCES, flatten, make


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
    (ours, got), (twin, expected) = results
    if twin is not None:
        assert (ours, got) == (twin, expected)
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


def test_no_lengths_of_no_sequences() -> None:
    """An empty list, of which torch makes floats, is as many lengths as an empty batch has."""
    ours, _ = make("GRU", 5, 7)
    y, h_n = ours(h(4, 0, 5), lengths=[])
    assert (y.shape, h_n.shape) == ((4, 0, 7), (1, 0, 7))
