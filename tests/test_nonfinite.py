"""An infinity or a NaN among the inputs reaches what it reaches in torch: values, gradients, and nothing beside it."""

from __future__ import annotations

import pytest
import torch
from cases import DTYPES, Case
from nonfinite import assert_as_in_torch, option_cases, spoiled, with_nan, with_silence
from oracle import by_backend, forward, require

import fused_rnn
from fused_rnn.cells import CELLS

CASES = [case for dtype in DTYPES for case in option_cases(dtype)]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_an_infinity(case: Case) -> None:
    require("cpu", case)
    assert_as_in_torch(case, with_silence(case), lambda case, given: by_backend(case, given, "cpu"))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_nan(case: Case) -> None:
    require("cpu", case)
    assert_as_in_torch(case, with_nan(case), lambda case, given: by_backend(case, given, "cpu"))


@pytest.mark.parametrize("hidden", [1, 3, 15, 16, 17, 33, 130])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cell", CELLS)
def test_no_size_turns_it_into_more(cell: str, dtype: torch.dtype, hidden: int) -> None:
    """What stands beside the units in a kernel's tile takes part in no sum."""
    case = Case(cell, T=6, B=20, D=hidden, H=hidden, dtype=dtype)
    require("cpu", case)
    given = with_silence(case) if cell != "rnn_relu" else with_nan(case)
    with torch.no_grad():
        y, *_ = forward(case, given, "cpu")
    expected = torch.zeros(case.B, dtype=torch.bool)
    expected[1] = cell == "rnn_relu"
    assert spoiled(y).tolist() == expected.tolist()


@pytest.mark.parametrize("weights", [None, "bf16", "int8"])
@pytest.mark.parametrize("cell", ["LSTM", "GRU", "RNN"])
def test_a_stream(cell: str, weights: str | None) -> None:
    require("cpu", Case("lstm"))
    x = torch.randn(5, 2, 9)
    x[1, 0] = 0
    x[1, 0, 4] = -torch.inf
    stream = getattr(fused_rnn, cell)(9, 17).stream(2, weights=weights)
    assert torch.stack([stream.step(x_t) for x_t in x]).isfinite().all()
