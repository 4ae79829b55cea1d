"""The process around the kernels: torch.set_num_threads, fork, many Python threads."""

from __future__ import annotations

import multiprocessing
import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from cases import Case, Inputs, inputs
from judge import by_backend, by_reference, by_torch, forward, require
from tolerances import assert_as_good_as_torch
from torch import Tensor

# Enough work for the kernels to share it out, by the batch and by the hidden units.
WIDE = Case("lstm", T=16, B=64, D=32, H=64)
NARROW = Case("gru", T=16, B=1, D=128, H=257)


@pytest.mark.parametrize("case", [WIDE, NARROW], ids=str)
@pytest.mark.parametrize("save", ["gates", "recompute"])
def test_any_number_of_threads_is_right(case: Case, save: str) -> None:
    case = case._replace(save=save)
    require("cpu", case)
    given = inputs(case)
    reference, torchs = by_reference(case, given), by_torch(case, given)
    for n in (1, 2, 3, 5):
        torch.set_num_threads(n)
        assert_as_good_as_torch(by_backend(case, given, "cpu"), torchs, reference)


def test_many_python_threads() -> None:
    """Calls at the same time, each with its own result; none waits for another for ever."""
    require("cpu", WIDE)
    problems = [inputs(case, seed) for seed, case in enumerate([WIDE, NARROW] * 4)]
    kinds = [WIDE, NARROW] * 4
    expected = [by_backend(case, given, "cpu") for case, given in zip(kinds, problems, strict=True)]
    with ThreadPoolExecutor(8) as pool:
        for _ in range(3):
            results = list(pool.map(lambda pair: by_backend(*pair, "cpu"), zip(kinds, problems, strict=True)))
            for one, other in zip(results, expected, strict=True):
                # Another thread than the main one may have other helpers, and so another order of its sums.
                for name, value in one.items():
                    torch.testing.assert_close(
                        value, other[name], rtol=1e-4, atol=1e-5 * float(other[name].abs().max())
                    )


def _forward_and_backward(case: Case, given: Inputs, leaves: list[Tensor]) -> list[Tensor]:
    outputs = forward(case, given, "cpu")
    return [*outputs, *torch.autograd.grad(outputs, leaves, given.dout)]


def _in_child(case: Case, given: Inputs, leaves: list[Tensor], queue: Any) -> None:
    queue.put([t.tolist() for t in _forward_and_backward(case, given, leaves)])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork.*:DeprecationWarning")
@pytest.mark.parametrize("case", [WIDE, NARROW], ids=str)
def test_works_after_fork(case: Case) -> None:
    """Worker threads do not survive a fork: a child of a process that used them must not wait for them.

    Only our kernels run in the child. torch's own parallel operations do wait there, so all tensors are made before,
    and none is filled with NaN.
    """
    require("cpu", case)
    torch.utils.deterministic.fill_uninitialized_memory = False
    torch.set_num_threads(2)
    given = inputs(case)
    leaves = [t.requires_grad_() for t in (given.x, *given.hx, *given.weights)]
    expected = _forward_and_backward(case, given, leaves)
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_in_child, args=(case, given, leaves, queue), daemon=True)
    child.start()
    try:
        results = queue.get(timeout=30)
        child.join(timeout=10)
    finally:
        child.kill()
    assert child.exitcode == 0
    for value, one in zip(results, expected, strict=True):
        torch.testing.assert_close(torch.tensor(value).view_as(one), one)
