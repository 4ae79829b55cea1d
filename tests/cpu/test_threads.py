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


VARIED = [  # each with work for three threads or more
    *(WIDE._replace(cell=cell, lengths=True, reset=True, bidirectional=True) for cell in ("lstm", "gru")),
    Case("lstm", T=40, B=25, D=33, H=100, proj=33, lengths=True, save="recompute"),
    NARROW._replace(lengths=True, B=5),
    NARROW._replace(H=400),
    Case("lstm", T=64, B=1, D=128, H=400, proj=130, hx=False, bias=False),
    Case("rnn_tanh", T=3, B=5, D=700, H=900),  # few rows of dx
    Case("gru", T=1, B=16, D=600, H=600, reset=True),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", [WIDE, NARROW, *VARIED], ids=str)
def test_the_number_of_threads_does_not_change_a_bit(case: Case, dtype: torch.dtype) -> None:
    """So a team may be smaller than asked, where others keep the cores busy."""
    case = case._replace(dtype=dtype)
    require("cpu", case)
    given = inputs(case)
    torch.set_num_threads(1)
    alone = by_backend(case, given, "cpu")
    for n in (2, 3, 5):
        torch.set_num_threads(n)
        for name, value in by_backend(case, given, "cpu").items():
            assert torch.equal(value, alone[name]), f"{name}, {n} threads"


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
                for name, value in one.items():
                    assert torch.equal(value, other[name]), name


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
