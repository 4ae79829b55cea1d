"""Every instruction set that was built and that this processor has, not only the one that is chosen by itself."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from cases import Case
from oracle import require

from fused_rnn import ops

ROOT = Path(__file__).parents[2]
NAMES = ops._C.available_isas().split(", ") if ops.MISSING is None else []
# Tails of every kind (batches of 1, 3, 33, sizes of 3, 17, 130), each dtype. No H = 1: one sum is one sample, and by
# which of two implementations it is rounded better is luck.
SELECTION = "test_cpu and (T2-B33-D33-H3 or T2-B1-D1-H130 or T6-B3-D4-H17-bfloat16)"


def run(isa: str, program: str) -> subprocess.CompletedProcess[str]:
    """Python in a process of its own: the choice is made once, when the first kernel is asked for."""
    environment = os.environ | {"FUSED_RNN_ISA": isa}
    command = [sys.executable, "-c", program]
    return subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("isa", NAMES[1:])
def test_all_of_them_are_right(isa: str) -> None:
    """The first of the names is the one that all other tests run with."""
    files = ["tests/test_functional.py", "tests/test_nonfinite.py"]
    arguments = ["-q", "-p", "no:cacheprovider", *files, "-k", f"{SELECTION} or test_an_infinity or test_no_size"]
    done = run(
        isa, f"import sys, pytest; from fused_rnn import _C; print(_C.isa()); sys.exit(pytest.main({arguments}))"
    )
    assert done.returncode == 0, done.stdout
    assert done.stdout.splitlines()[0] == isa
    assert "passed" in done.stdout
    assert "skipped" not in done.stdout.splitlines()[-1]


@pytest.mark.parametrize("isa", NAMES[1:])
def test_programs_by_all_of_them(isa: str) -> None:
    files = ["tests/cpu/test_programs.py", "tests/cpu/test_program_functions.py"]
    selection = "test_of_one or test_of_more or many_go_together or test_any_counts or built_in"
    arguments = ["-q", "-p", "no:cacheprovider", *files, "-k", selection]
    done = run(isa, f"import sys, pytest; sys.exit(pytest.main({arguments}))")
    assert done.returncode == 0, done.stdout
    assert "passed" in done.stdout


@pytest.mark.parametrize("isa", NAMES[1:])
def test_stages_by_all_of_them(isa: str) -> None:
    selection = (
        "other_sizes or lanes_past or divide_the_units or the_sequence or test_results_and_gradients and not recompute"
    )
    arguments = ["-q", "-p", "no:cacheprovider", "tests/cpu/test_stages.py", "-k", selection]
    done = run(isa, f"import sys, pytest; sys.exit(pytest.main({arguments}))")
    assert done.returncode == 0, done.stdout
    assert "passed" in done.stdout


@pytest.mark.parametrize("isa", NAMES[1:])
def test_blocks_by_all_of_them(isa: str) -> None:
    selection = "whole_matrices or not_finite or large or padding or the_sequence"
    arguments = ["-q", "-p", "no:cacheprovider", "tests/cpu/test_diagonal.py", "-k", selection]
    done = run(isa, f"import sys, pytest; sys.exit(pytest.main({arguments}))")
    assert done.returncode == 0, done.stdout
    assert "passed" in done.stdout


def test_an_unknown_name_is_an_error() -> None:
    require("cpu", Case("lstm"))
    done = run("sse9", "from fused_rnn import _C; print(_C.isa())")
    assert done.returncode != 0
    assert "FUSED_RNN_ISA=sse9: this build on this processor runs" in done.stderr
