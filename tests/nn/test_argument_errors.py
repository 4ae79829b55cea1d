"""Mistakes in the arguments that torch.nn has not, or given in their stead: each error names the argument, says what it
got and what was expected, and knows the remedy where there is one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import FUNCTIONS as OF_CELL
from counterparts import CELLS, SEQUENCES, make
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

from fused_rnn import checks, functional

np = pytest.importorskip("numpy")

X = torch.ones(4, 3, 5)
PACKED = pack_padded_sequence(X, [4, 2, 1])
UNSORTED = pack_padded_sequence(X, [2, 4, 1], enforce_sorted=False)
LENGTHS = {
    "tensor": torch.tensor([4, 2, 1]),
    "int32": torch.tensor([4, 2, 1], dtype=torch.int32),
    "list": [4, 2, 1],
    "array": np.array([4, 2, 1]),
}


def message(error: type[Exception], call: Callable[[], Any]) -> str:
    """What a call says, the same with and without gradients."""
    said = set()
    for grad in (True, False):
        with torch.set_grad_enabled(grad), pytest.raises(error) as caught:
            call()
        said.add(str(caught.value))
    assert len(said) == 1
    return said.pop()


@pytest.mark.parametrize("input", [X, PACKED, UNSORTED], ids=["padded", "packed", "unsorted"])
@pytest.mark.parametrize("kind", LENGTHS)
@pytest.mark.parametrize("name", SEQUENCES)
def test_lengths_by_position(name: str, kind: str, input: Any) -> None:
    ours, _ = make(name, 5, 7)
    said = message((TypeError, ValueError), lambda: ours(input, LENGTHS[kind]))  # type: ignore[arg-type]
    assert said.endswith("; lengths are given by name: lengths=")
    assert said.startswith(("hx: got ", "h0: got ", "h_0: got "))


@pytest.mark.parametrize("name", SEQUENCES)
def test_reset_by_position(name: str) -> None:
    ours, _ = make(name, 5, 7)
    for reset in (torch.zeros(4, 3, dtype=torch.bool), np.zeros((4, 3), dtype=bool)):
        said = message((TypeError, ValueError), lambda reset=reset: ours(X, reset))  # type: ignore[misc]
        assert said.endswith("; reset is given by name: reset=")


@pytest.mark.parametrize("name", SEQUENCES)
def test_a_state_is_not_taken_for_lengths(name: str) -> None:
    ours, _ = make(name, 5, 7)
    for hx in (torch.ones(7), torch.ones(1, 3, 7).long(), "zeros", 1.0, (), (torch.ones(1), torch.ones(1)), {}):
        said = message(Exception, lambda hx=hx: ours(X, hx))  # type: ignore[misc]
        assert "given by name" not in said


@pytest.mark.parametrize("name", CELLS)
def test_a_cell_has_no_lengths_to_speak_of(name: str) -> None:
    ours, _ = make(name, 5, 7)
    for hx in ([1, 2, 3], torch.tensor([1, 2, 3])):
        assert "lengths" not in message(Exception, lambda hx=hx: ours(torch.ones(3, 5), hx))  # type: ignore[misc]


STATES: dict[str, tuple[Any, str, str]] = {  # what is given, what an LSTM says, what the others do
    "numbers": ([0.0, 0.0, 0.0], "hx: got a list of 3, expected a pair", "hx: got list, expected a tensor [1, 3, 7]"),
    "two numbers": ([0.0, 0.0], "h_0: got 0.0, expected a tensor [1, 3, 7]", "hx: got list, expected a tensor"),
    "a number": (0, "hx: got 0, expected a pair (h_0, c_0) of tensors", "hx: got 0, expected a tensor [1, 3, 7]"),
    "an array": (np.ones((1, 3, 7)), "hx: got ndarray, expected a pair", "hx: got ndarray, expected a tensor"),
    "arrays": ((np.ones((1, 3, 7)),) * 2, "h_0: got ndarray, expected a tensor", "hx: got tuple, expected a tensor"),
    "a string": ("zeros", "hx: got str, expected a pair", "hx: got str, expected a tensor"),
    "a dict": ({"h": X}, "hx: got dict, expected a pair", "hx: got dict, expected a tensor"),
}


@pytest.mark.parametrize("backend", [None, "torch", "reference"])
@pytest.mark.parametrize("case", STATES)
@pytest.mark.parametrize("name", SEQUENCES)
def test_states_that_are_no_tensors(name: str, case: str, backend: str | None) -> None:
    ours, _ = make(name, 5, 7, extras={"backend": backend})
    given, lstm, others = STATES[case]
    for input in (X, PACKED):
        assert message(TypeError, lambda input=input: ours(input, given)).startswith(  # type: ignore[misc]
            lstm if name == "LSTM" else others
        )


@pytest.mark.parametrize("name", SEQUENCES)
def test_inputs_that_are_no_tensors(name: str) -> None:
    ours, _ = make(name, 5, 7)
    for input, what in ((X.numpy(), "ndarray"), (X.tolist(), "list"), ((X, LENGTHS["tensor"]), "tuple")):
        said = message(TypeError, lambda input=input: ours(input))  # type: ignore[misc]
        assert said == f"input: got {what}, expected a tensor"


BOOLS = "expected bools, one for each step of each sequence"
RESETS: dict[str, tuple[Any, str]] = {
    "True": (True, f"reset: got True, {BOOLS}"),
    "0": (0, f"reset: got 0, {BOOLS}"),
    "a float": (0.5, f"reset: got 0.5, {BOOLS}"),
    "an object": (object(), f"reset: got object, {BOOLS}"),
    "int": (torch.zeros(4, 3, dtype=torch.int64), "reset: got torch.int64, expected torch.bool, as .bool() makes"),
    "float": (torch.zeros(4, 3), "reset: got torch.float32, expected torch.bool, as .bool() makes"),
    "an array of int": (np.zeros((4, 3), int), "reset: got torch.int64, expected torch.bool, as .bool() makes"),
    "[B, T]": (torch.zeros(3, 4, dtype=torch.bool), "reset: got [3, 4], expected [T, B] = [4, 3]"),
    "[T]": ([True] * 4, "reset: got [4], expected [T, B] = [4, 3]"),
    "[T, B, 1]": (torch.zeros(4, 3, 1, dtype=torch.bool), "reset: got [4, 3, 1], expected [T, B] = [4, 3]"),
    "a bool tensor": (torch.tensor(True), "reset: got [], expected [T, B] = [4, 3]"),
}


@pytest.mark.parametrize("case", RESETS)
@pytest.mark.parametrize("name", SEQUENCES)
def test_resets(name: str, case: str) -> None:
    ours, _ = make(name, 5, 7)
    reset, expected = RESETS[case]
    for input in (X, PACKED, UNSORTED):
        said = message(ValueError, lambda input=input: ours(input, reset=reset))  # type: ignore[misc]
        assert said.startswith(expected)
    weights = [w.detach() for w in ours.parameters()]
    layers = OF_CELL[ours._fused_cell]
    assert message(ValueError, lambda: layers(X, weights, reset=reset)).startswith(expected)


@pytest.mark.parametrize("name", SEQUENCES)
def test_a_reset_says_which_layout_was_expected(name: str) -> None:
    ours, _ = make(name, 5, 7, batch_first=True)
    reset = torch.zeros(4, 3, dtype=torch.bool)
    for input in (X.transpose(0, 1), pack_padded_sequence(X.transpose(0, 1), [4, 2, 1], batch_first=True)):
        said = message(ValueError, lambda input=input: ours(input, reset=reset))  # type: ignore[misc]
        assert said == "reset: got [4, 3], expected [B, T] = [3, 4], for batch_first is True"
        ours(input, reset=reset.t())
    said = message(ValueError, lambda: ours(X[:, 0], reset=reset))
    assert said == "reset: got [4, 3], expected [T] = [4], of unbatched input"


WRONG_LENGTHS: dict[str, tuple[Any, str]] = {
    "a number": (3, "lengths: got a single number, expected [B] = [3]"),
    "floats": (torch.tensor([4.0, 2, 1]), "lengths: got torch.float32, expected an integer dtype, as .long() makes"),
    "a list of floats": ([4.0, 2.0, 1.0], "lengths: got torch.float32, expected an integer dtype"),
    "an array of floats": (np.ones(3), "lengths: got torch.float64, expected an integer dtype, as .long() makes"),
    "a mask": (X[..., 0] > 0, "lengths: got torch.bool, expected an integer dtype, as a mask's sum over time has"),
    "a string": ("abc", "lengths: got str, expected [B] integers"),
    "ragged": ([[4], [2, 1]], "lengths: got list, expected [B] integers"),
    "a hole": ([4, None, 1], "lengths: got list, expected [B] integers"),
    "a set": ({4, 2, 1}, "lengths: got set, expected [B] integers"),
    "too large": ([2**70, 1, 1], "lengths: got list, expected [B] integers"),
}


@pytest.mark.parametrize("case", WRONG_LENGTHS)
@pytest.mark.parametrize("name", SEQUENCES)
def test_lengths(name: str, case: str) -> None:
    ours, _ = make(name, 5, 7)
    lengths, expected = WRONG_LENGTHS[case]
    assert message(ValueError, lambda: ours(X, lengths=lengths)).startswith(expected)
    layers = OF_CELL[ours._fused_cell]
    weights = [w.detach() for w in ours.parameters()]
    assert message(ValueError, lambda: layers(X, weights, lengths=lengths)).startswith(expected)


def test_lengths_of_unbatched_input() -> None:
    ours, _ = make("GRU", 5, 7)
    said = message(ValueError, lambda: ours(X[:, 0], lengths=[4, 2]))
    assert said == "lengths: got [2], expected [], of unbatched input"
    said = message(ValueError, lambda: ours(X[:, 0], lengths="all"))
    assert said.startswith("lengths: got str, expected [B] integers")
    for lengths in (3, [3], torch.tensor(3), np.array(3)):
        assert not ours(X[:, 0], lengths=lengths)[0][3].any()


W = {"lstm": [torch.ones(28, 5), torch.ones(28, 7)], "gru": [torch.ones(21, 5), torch.ones(21, 7)]}
FUNCTIONS: dict[str, tuple[Callable[[], Any], str]] = {
    "lengths by position": (
        lambda: functional.lstm(X, W["lstm"], LENGTHS["tensor"]),  # type: ignore[arg-type]
        "hx: got a tensor [3], expected a pair (h0, c0) of tensors; lengths are given by name: lengths=",
    ),
    "a pair of one": (
        lambda: functional.lstm(X, W["lstm"], (X,)),  # type: ignore[arg-type]
        "hx: got a tuple of 1, expected a pair (h0, c0) of tensors",
    ),
    "a cell's number": (
        lambda: functional.lstm_cell(X[0], 0.0, W["lstm"]),  # type: ignore[arg-type]
        "hx: got 0.0, expected a pair (h, c) of tensors",
    ),
    "a cell's pair": (
        lambda: functional.gru_cell(X[0], (X, X), W["gru"]),  # type: ignore[arg-type]
        "h: got tuple, expected a tensor [B, H]",
    ),
    "a cell's arguments swapped": (
        lambda: functional.gru_cell(X[0], W["gru"], None),  # type: ignore[arg-type]
        "weights: got None, expected a sequence of tensors",
    ),
    "an array": (lambda: functional.gru(X.numpy(), W["gru"]), "x: got ndarray, expected a tensor"),
    "a list": (lambda: functional.gru_cell([1.0], None, W["gru"]), "x: got list, expected a tensor"),  # type: ignore
    "a weight alone": (
        lambda: functional.gru(X, W["gru"][0]),  # type: ignore[arg-type]
        "weights: got a tensor [21, 5], expected a sequence of tensors",
    ),
    "a state_dict": (
        lambda: functional.gru(X, nn.GRU(5, 7).state_dict()),  # type: ignore[arg-type]
        "weights: got OrderedDict, expected a sequence of tensors",
    ),
    "weights of numpy": (
        lambda: functional.gru(X, [w.numpy() for w in W["gru"]]),  # type: ignore[misc]
        "weights[0]: got ndarray, expected a tensor",
    ),
}


@pytest.mark.parametrize("case", FUNCTIONS)
def test_functions(case: str) -> None:
    call, expected = FUNCTIONS[case]
    assert message(TypeError, call) == expected


def test_lengths_in_the_place_of_a_functions_state() -> None:
    said = message(ValueError, lambda: functional.gru(X, W["gru"], LENGTHS["tensor"]))  # type: ignore[arg-type]
    assert said == "h0: got [3], expected [L·R, B, P] = [1, 3, 7]; lengths are given by name: lengths="


def test_what_an_argument_is_called() -> None:
    for value, name in ((X, "a tensor [4, 3, 5]"), (None, "None"), (True, "True"), (2, "2"), ((), "tuple")):
        assert checks.kind(value) == name


def test_a_compiled_module_says_the_same() -> None:
    ours, _ = make("LSTM", 5, 7)

    def call(x: Tensor) -> Any:
        return ours(x, torch.ones(1, 3, 7))

    with pytest.raises(Exception, match=r"hx: got a tensor \[1, 3, 7\], expected a pair"):
        torch.compile(call, backend="eager")(X)
