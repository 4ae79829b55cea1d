"""The examples that need more than one process, as a user starts them."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from itertools import islice
from pathlib import Path

import pytest
import torch

import fused_rnn
from fused_rnn.demo.char_lm import Characters, CharLM, Trainee, corpus, windows

ROOT = Path(__file__).parent.parent


def run(*command: str, seconds: int = 120) -> str:
    """What `python` with these arguments prints. All of its processes are gone when this returns."""
    process = subprocess.Popen(
        [sys.executable, *command],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        out, errors = process.communicate(timeout=seconds)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
    assert process.returncode == 0, out + errors
    return out


@pytest.fixture(scope="module")
def losses_of_one_process() -> list[float]:
    text = corpus()
    characters = Characters(text)
    torch.manual_seed(0)
    trainee = Trainee(CharLM(fused_rnn.LSTM, len(characters)))
    for window in islice(windows(characters.encode(text)), 2):
        trainee.step(*window)
    return trainee.losses


@pytest.mark.skipif(
    not (torch.distributed.is_available() and torch.distributed.is_gloo_available()),
    reason="this torch was built without torch.distributed or gloo",
)
@pytest.mark.parametrize("option", ["--ddp", "--fsdp"])
def test_torchrun(option: str, losses_of_one_process: list[float], tmp_path: Path) -> None:
    """The printed losses, which have four digits, are those of one process on the whole batch."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    out = run(*launcher, "examples/distributed.py", option, "--steps", "2", "--out", str(tmp_path / "checkpoint"))
    losses = [float(loss) for loss in re.findall(r"step \d+  loss ([\d.]+)", out)]
    assert losses == pytest.approx(losses_of_one_process, abs=1.5e-4)
    assert re.search(r"loaded \d+ parameters from", out)
