"""Cells that the package does not have take a header and a descriptor each: no loop and no op knows them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fused_rnn import ops
from fused_rnn.call import CHECKPOINT_EVERY
from fused_rnn.cells import CELLS

ROOT = Path(__file__).parent.parent.parent
TRIAL = ROOT / "tests/trial_cell"
pytestmark = pytest.mark.skipif(ops.MISSING is not None, reason=str(ops.MISSING))


def test_both_languages_describe_the_same_cells() -> None:
    numbers = [cell["number"] for cell in ops._C.cells()]
    assert len(set(numbers)) == len(numbers)
    described = {cell["name"]: cell for cell in ops._C.cells()}
    built_in = {name: cell for name, cell in CELLS.items() if cell.program is None}
    assert described.keys() == built_in.keys()
    names = ("name", "gates", "saved", "apart", "reads_h", "projects", "recurrent")
    for name, cell in built_in.items():
        expected = {key: getattr(cell, key) for key in names}
        expected |= {"number": described[name]["number"], "states": list(cell.states), "params": len(cell.params)}
        assert described[name] == expected


def test_both_languages_keep_checkpoints_alike() -> None:
    assert ops._C.CHECKPOINT_EVERY == CHECKPOINT_EVERY


def run(*command: str, **environment: str) -> str:
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | environment
    done = subprocess.run([sys.executable, *command], env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


@pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="the sources are not here")
def test_cells_from_outside(tmp_path: Path) -> None:
    """Compiled for the oldest processors alone, and in a hurry."""
    build = ("setup.py", "-q", "build_ext", f"--build-lib={tmp_path}", f"--build-temp={tmp_path}")
    header = str(TRIAL / "cells.h")
    run(*build, FUSED_RNN_MORE_CELLS=header, FUSED_RNN_ISAS="baseline", CXXFLAGS="-O1 -w", FUSED_RNN_CUDA="0")
    (extension,) = tmp_path.glob("fused_rnn/_C*")
    assert run(str(TRIAL / "compare.py"), str(extension)) == "60 problems agree, by baseline\n"
