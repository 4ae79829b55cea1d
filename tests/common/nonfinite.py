"""Inputs with an infinity or a NaN in them, and what is to come of these."""

from __future__ import annotations

from collections.abc import Callable

import torch
from cases import Case, Inputs, inputs
from oracle import Results, by_reference, by_torch
from tolerances import assert_as_good_as_torch
from torch import Tensor

from fused_rnn.cells import CELLS


def option_cases(dtype: torch.dtype) -> list[Case]:
    """Every cell with an odd H, which no kernel's tile ends with; an LSTM with a projection, too."""
    cases = [Case(cell, T=6, D=5, layers=2, bidirectional=True, dtype=dtype) for cell in CELLS]
    cases += [Case(cell, T=6, D=5, dtype=dtype, hx=False, save="recompute") for cell in CELLS]
    return [*cases, Case("lstm", T=6, D=5, proj=7, dtype=dtype), Case("gru", T=1, D=5, hx=False, dtype=dtype)]


def with_silence(case: Case) -> Inputs:
    """One feature of one row is -inf, as the logarithm of silence is: it saturates the gates, and all goes on."""
    given = inputs(case)
    given.x[case.T // 2, 1] = 0
    given.x[case.T // 2, 1, case.D // 2] = -torch.inf
    return given


def with_nan(case: Case) -> Inputs:
    """One feature of one row is NaN."""
    given = inputs(case)
    given.x[case.T // 2, 1, case.D // 2] = torch.nan
    return given


def assert_as_in_torch(case: Case, given: Inputs, run: Callable[[Case, Inputs], Results]) -> None:
    """Infinite or NaN where the reference is, and as good as torch elsewhere."""
    ours, torchs, reference = (by(case, given) for by in (run, by_torch, by_reference))
    assert any(not value.isfinite().all() for value in reference.values())
    assert_as_good_as_torch(ours, torchs, reference)


def spoiled(y: Tensor) -> Tensor:
    """Which sequences of y [T, B, ...] have something that is not finite."""
    return ~y.isfinite().transpose(0, 1).flatten(1).all(1)
