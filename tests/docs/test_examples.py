"""The examples that need several processes or other packages: what they claim holds."""

from __future__ import annotations

import importlib.util
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from side_by_side import Side
from text import RATE, Characters, CharLM, Windows, corpus, loss_of
from tolerances import assert_same_formula

import fused_rnn

ROOT = Path(__file__).parents[2]


def run(*command: str, seconds: int = 120) -> str:
    """What `python` with these arguments prints. All of its processes are gone when this returns."""
    code, out, errors = outcome(*command, seconds=seconds)
    assert code == 0, out + errors
    return out


def outcome(*command: str, seconds: int = 120) -> tuple[int, str, str]:
    """Likewise with the exit code before and the errors after it."""
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
    return process.returncode, out, errors


@pytest.fixture(scope="module")
def losses_of_one_process() -> list[float]:
    characters = Characters()
    windows = Windows(characters.encode(corpus()[0]))
    torch.manual_seed(0)
    side = Side(CharLM(fused_rnn.LSTM, len(characters)), RATE)
    for step in range(2):
        side.step(lambda model, step, state: loss_of(model, *windows[step], state), step, RATE)
    return side.losses


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


@pytest.fixture
def ppo(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """examples/recurrent_ppo.py with smaller rollouts."""
    spec = importlib.util.spec_from_file_location("recurrent_ppo", ROOT / "examples" / "recurrent_ppo.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "recurrent_ppo", module)  # where dataclass looks for its annotations
    spec.loader.exec_module(module)
    for name, value in {"ENVS": 6, "STEPS": 40, "HIDDEN": 16}.items():
        setattr(module, name, value)
    return module


@pytest.mark.parametrize("cell", ["LSTM", "GRU"])
@pytest.mark.parametrize("resets", [0.0, 0.1, 1.0])
def test_ways_to_unroll_a_policy_agree(ppo: ModuleType, cell: str, resets: float) -> None:
    results = {}
    reset = torch.rand(ppo.STEPS, ppo.ENVS) < resets
    x = torch.randn(ppo.STEPS, ppo.ENVS, 2, dtype=torch.float64)
    for name in ppo.UNROLLS:
        torch.manual_seed(0)
        policy = ppo.Policy(cell, name).double()
        start = torch.randn(2, 1, ppo.ENVS, ppo.HIDDEN, dtype=torch.float64)
        logits, values, state = policy(x, tuple(start) if cell == "LSTM" else start[0], reset)
        loss = (logits.square().sum() + values.square().sum()) + sum(s.sum() for s in state)
        results[name] = [logits, values, *state, *torch.autograd.grad(loss, list(policy.parameters()))]
    for name in ("loop", "segments"):
        for ours, theirs in zip(results["fused"], results[name], strict=True):
            assert_same_formula(ours, theirs)


def test_recurrent_ppo_gives_the_returns_of_the_loop(ppo: ModuleType) -> None:
    """Episode for episode, as long as rounding has not tipped an action: 13 updates at the example's own sizes."""
    pytest.importorskip("gymnasium", reason="gymnasium is not installed: pip install 'fused_rnn[test]'")
    returns = {name: ppo.train(name, updates=4, dtype=torch.float64) for name in ppo.UNROLLS}
    assert len(returns["fused"]) > ppo.ENVS
    assert returns["fused"] == returns["loop"] == returns["segments"]


def test_recurrent_ppo_says_that_it_has_not_solved() -> None:
    pytest.importorskip("gymnasium", reason="gymnasium is not installed: pip install 'fused_rnn[test]'")
    code, out, errors = outcome("examples/recurrent_ppo.py", "--updates", "1")
    assert code == 1
    assert re.fullmatch(r" +2048 steps   return +[\d.]+ .*\n", out)
    assert errors == "not solved in 1 updates: the last 100 episodes average less than 475\n"


def test_what_counts_as_solved(ppo: ModuleType) -> None:
    assert ppo.is_solved([0.0] * 9 + [475.0] * 100)
    assert not ppo.is_solved([475.0] * 99)
    assert not ppo.is_solved([475.0] * 99 + [474.0])


# Runs a script in a process that cannot import what is named first.
WITHOUT = """
import runpy, sys
absent, script, *sys.argv[1:] = sys.argv[1:]
sys.path.insert(0, script.rpartition("/")[0])
absent = absent.split(",")
sys.modules.update(dict.fromkeys(absent))
import importlib.util
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name in absent else find(name, *rest)
runpy.run_path(script, run_name="__main__")
"""


@pytest.mark.parametrize(
    ("script", "arguments", "absent", "said"),
    [
        ("packages.py", (), "sb3_contrib,gluonts,lightning", "sb3_contrib, gluonts, lightning"),
        ("packages.py", ("gluonts",), "gluonts,lightning,numpy", "gluonts, lightning, numpy"),
        ("packages.py", ("pytorch-forecasting",), "pandas,lightning,pytorch_forecasting", "pandas"),
        ("recurrent_ppo.py", (), "gymnasium", "gymnasium"),
    ],
)
def test_an_example_says_what_to_install(script: str, arguments: tuple[str, ...], absent: str, said: str) -> None:
    code, out, errors = outcome("-c", WITHOUT, absent, f"examples/{script}", *arguments)
    assert code == 1
    assert out == ""
    assert "Traceback" not in errors
    sentence = errors.splitlines()[-1]  # before it torch itself may warn that there is no numpy
    named, _, remedy = sentence.partition(" not installed: ")
    assert named.startswith(f"{script}: ")
    assert set(said.split(", ")) <= set(named.removeprefix(f"{script}: ").removesuffix(" is").split(", "))
    assert remedy.startswith("pip install ")
