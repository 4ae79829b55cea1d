"""scripts/gpu_rehearse.py: a visit to a GPU, played through without one, and what it would find fault with."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
from gpu_scripts import script

from fused_rnn import ops


@pytest.mark.skipif(ops.MISSING is not None, reason=str(ops.MISSING))
@pytest.mark.skipif(shutil.which("g++") is None, reason="the emulator is compiled by g++")
@pytest.mark.timeout(1200)  # the first to need the emulator builds it, on a busy machine for minutes
def test_a_visit_in_which_things_go_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Both commands: kernels that are wrong, a program that hangs and a missing tool cost themselves alone."""
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # as other tests leave it
    found = script("gpu_rehearse").rehearse(sys.executable, None, tmp_path, ["ill"])
    assert found == [], capfd.readouterr().out
    stages = json.loads((tmp_path / "ill-first" / "summary.json").read_text())["stages"]
    said = {stage["stage"]: stage["said"] for stage in stages}
    assert said["smoke"].endswith("; not cuda gru tf32 grid, triton gru bf16 cooperative")
    logs = tmp_path / "trees" / "ill" / "build" / "gpu-work"
    for log in ("smoke.log", "again.log"):
        assert (logs / log).read_text().count("WRONG: error nan") == 2
    assert said["sanitize"] == "compute-sanitizer is not on the PATH"
    assert said["test"] == "1 passed, 0 failed, 0 skipped"
    assert said["profile"] == "1 of 1 points profiled"
    summary = (tmp_path / "ill-first" / "summary.txt").read_text()
    assert "quick-bf16 cuda training: " in summary and "lstm bf16 128 8 forward cluster" in summary


def test_a_tool_that_is_missing_takes_nothing_else_along(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("sleep", "ncu"):
        (tmp_path / "bin" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "bin" / name).touch(0o755)
    monkeypatch.setenv("PATH", f"/nowhere:{tmp_path / 'bin'}")
    path = script("gpu_rehearse").without(("ncu",), tmp_path / "links")
    assert shutil.which("ncu", path=path) is None
    assert shutil.which("sleep", path=path) is not None


def test_what_a_visit_has_no_room_for(tmp_path: Path) -> None:
    rehearsal = script("gpu_rehearse")
    plan = [stage.partition(":")[0] for stage in rehearsal.PLANS["green"]]

    def faults(statuses: dict[str, str], seconds: float = 1.0, status: int = 0) -> list[str]:
        stages = [{"stage": name, "status": statuses.get(name, "ok")} for name in plan]
        stages = [stage for stage in stages if stage["status"] != "left out"]
        (tmp_path / "summary.json").write_text(json.dumps({"stages": stages}))
        return list(rehearsal.faults("next", rehearsal.SCENES["well"], tmp_path, seconds, status))

    (tmp_path / "summary.txt").write_text("a line\n")
    assert faults({}) == []
    assert faults({"variants": "failed"}, status=1) == ["variants: failed, expected ok", "exit status 1"]
    assert faults({"sanitize": "left out"}) == ["sanitize: did not run, expected ok"]
    most = 240 * rehearsal.PATIENCE
    assert faults({}, seconds=most + 1) == [f"seconds: {most + 1}, of {most} at most"]
    (tmp_path / "summary.txt").write_text("a line\n" * 61)
    assert faults({}) == ["lines of the summary: 61, of 60 at most"]
    deep = tmp_path / "a" / "b" / "c"
    deep.mkdir(parents=True)
    for n in range(7):
        (deep / str(n)).touch()
    assert faults({})[:2] == ["files: 9, of 8 at most", "folders deep: 3, of 2 at most"]
