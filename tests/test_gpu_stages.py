"""scripts/gpu.py without a GPU: stages are bounded in time, their outcome is told and written."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

SCRIPT = Path(__file__).parent.parent / "scripts" / "gpu.py"


@pytest.fixture
def gpu() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gpu_stages", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_outcomes(gpu: ModuleType, tmp_path: Path) -> None:
    good = gpu.run("good", [sys.executable, "-c", "print('all well')"], tmp_path, 60)
    assert (good.status, good.said) == ("ok", "all well")
    assert (tmp_path / "good.log").read_text() == "all well\n"
    bad = gpu.run("bad", [sys.executable, "-c", "raise SystemExit('it broke')"], tmp_path, 60)
    assert (bad.status, bad.said) == ("failed", "it broke")


def test_a_stage_that_takes_too_long_may_still_write_what_it_has(gpu: ModuleType, tmp_path: Path) -> None:
    program = """
import time
try:
    print("begun")
    time.sleep(60)
except KeyboardInterrupt:
    print("so far")
"""
    late = gpu.run("late", [sys.executable, "-c", program], tmp_path, 3)
    assert late.status == "timed out"
    assert late.said == "so far"
    assert late.seconds < 30


def _without_a_machine(gpu: ModuleType, monkeypatch: pytest.MonkeyPatch, out: Path, statuses: dict[str, str]) -> int:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a card")
    for stage in gpu.STAGES:
        outcome = gpu.Result(stage, statuses.get(stage, "ok"), 1.0, "")
        monkeypatch.setattr(gpu, stage, lambda *_, outcome=outcome: [outcome])
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--out", str(out)])
    return int(gpu.main())


def test_the_summary_comes_last(
    gpu: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _without_a_machine(gpu, monkeypatch, tmp_path, {"sanitize": "failed"}) == 1
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith("a card, torch ")
    assert [line.split()[:2] for line in printed[2:]] == [
        ["build", "ok"], ["test", "ok"], ["sanitize", "failed"], ["bench", "ok"],
    ]  # fmt: skip
    stages = json.loads((tmp_path / "summary.json").read_text())["stages"]
    assert [stage["stage"] for stage in stages] == list(gpu.STAGES)
    assert _without_a_machine(gpu, monkeypatch, tmp_path, {}) == 0


def test_nothing_follows_a_build_that_failed(
    gpu: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _without_a_machine(gpu, monkeypatch, tmp_path, {"build": "failed"}) == 1
    assert len(capsys.readouterr().out.splitlines()) == 3


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so() -> None:
    done = subprocess.run([sys.executable, str(SCRIPT), "test"], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "torch finds no GPU here" in done.stderr
