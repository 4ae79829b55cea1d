"""Cells of the literature as FlexRNN, by every backend, against a Python loop over the same step in float64."""

from __future__ import annotations

from typing import Any

import literature
import pytest
import torch
from plain_loop import Own, check, given, plain_loop
from tolerances import GRADCHECK
from torch import Tensor

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# Every option on an odd shape of its own.
OPTIONS: list[dict[str, Any]] = [
    {"H": 17},
    {"T": 1, "B": 5, "H": 3, "bias": False, "hx": False},
    {"B": 1, "D": 33, "H": 130, "hx": False},
    {"T": 6, "H": 9, "heads": 3, "bidirectional": True, "lengths": True},
    {"T": 4, "B": 33, "H": 7, "layers": 2, "reset": True},
    {"T": 66, "B": 3, "D": 1, "H": 19, "save": "recompute", "lengths": True},
    {"H": 34, "heads": 2, "layers": 2, "bidirectional": True, "lengths": True, "reset": True, "save": "recompute"},
    {"T": 3, "H": 8, "heads": 8, "bidirectional": True, "bias": False, "reset": True},
]


def options(first: int, number: int) -> list[Own]:
    """Every cell in every dtype with so many options, another one first for each."""
    return [
        Own(cell, **OPTIONS[(first + c + number * d + k) % len(OPTIONS)], dtype=dtype).fit()
        for c, cell in enumerate(literature.CELLS)
        for d, dtype in enumerate(DTYPES)
        for k in range(number)
    ]


@pytest.mark.parametrize("case", options(0, 2), ids=str)
def test_on_the_cpu(case: Own) -> None:
    """Every cell meets every option."""
    check(case, "cpu")


@pytest.mark.parametrize("case", [case for case in options(3, 1) if case.dtype == torch.float64], ids=str)
def test_by_the_reference_loop(case: Own) -> None:
    check(case._replace(save="gates"), "reference")


@pytest.mark.parametrize("cell", literature.CELLS)
def test_derivatives(cell: str) -> None:
    """First and second ones against differences."""
    case = Own(cell, T=2, B=2, D=2, H=2, heads=1 + len(cell) % 2, dtype=torch.float64)
    rnn, call = case.module(), given(case)
    weights, states = dict(rnn.named_parameters()), len(call.hx)

    def run(x: Tensor, *leaves: Tensor) -> tuple[Tensor, ...]:
        hx: Any = leaves[0] if states == 1 else leaves[:states]
        own = dict(zip(weights, leaves[states:], strict=True))
        y, after = torch.func.functional_call(rnn, own, (x, hx))
        return (y, after) if isinstance(after, Tensor) else (y, *after)

    leaves = [t.detach().requires_grad_() for t in (call.x, *call.hx, *weights.values())]
    assert torch.autograd.gradcheck(run, leaves, **GRADCHECK)
    assert torch.autograd.gradgradcheck(run, leaves, fast_mode=True, **GRADCHECK)


def test_the_loop_is_torchs() -> None:
    """The judge of all cells is itself right: of those that torch has."""
    for name, theirs in (("lstm", torch.nn.LSTM), ("gru", torch.nn.GRU), ("rnn_tanh", torch.nn.RNN)):
        case = Own(name, layers=2, bidirectional=True, dtype=torch.float64)
        rnn, call = case.module(), given(case)
        module = theirs(case.D, case.H, 2, bidirectional=True, dtype=torch.float64)
        module.load_state_dict(rnn.state_dict())
        y, after = module(call.x, call.hx[0] if len(call.hx) == 1 else tuple(call.hx))
        expected = [y, after] if isinstance(after, Tensor) else [y, *after]
        with torch.no_grad():
            for a, b in zip(plain_loop(rnn, call.x, call.hx, dict(rnn.named_parameters())), expected, strict=True):
                torch.testing.assert_close(a, b)


def test_the_cells_use_all_there_is() -> None:
    programs = [cell.program for cell in literature.CELLS.values()]
    used = {instruction.op for program in programs for instruction in program.forward.code}
    assert used >= {"exp", "softplus", "maximum", "minimum", "where", "sin", "erf", "relu", "div", "sigmoid", "tanh"}
    assert {program.apart for program in programs} >= {0, 1} and {len(p.states) for p in programs} >= {1, 2, 3, 4}
    assert {len(program.params) for program in programs} >= {0, 1, 2, 3, 4}
    assert {program.recurrent for program in programs} == {True, False} == {p.reads_h for p in programs}
