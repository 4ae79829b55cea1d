"""The process around the kernels: torch.set_num_threads, fork, many Python threads."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from cases import Case, inputs
from oracle import by_backend, by_reference, by_torch, require
from tolerances import assert_as_good_as_torch

from .after_fork import NARROW, WIDE


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


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_works_after_fork() -> None:
    """Worker threads do not survive a fork: a child of a process that used them must not wait for them."""
    require("cpu", WIDE)
    program = Path(__file__).with_name("after_fork.py")
    quiet = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONWARNINGS": "ignore"}
    quiet["PYTHONPATH"] = os.pathsep.join(map(str, (program.parents[2], program.parents[1] / "common")))
    done = subprocess.run(
        [sys.executable, str(program)], env=quiet, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("the child has the same results") == 2
