"""scripts/gpu.py and its stages without a GPU: bounded in time, their outcome told and written, whatever kernels do."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tarfile
import time
import xml.etree.ElementTree as ET
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from gpu_scripts import SCRIPTS, script

import fused_rnn
from fused_rnn.commands.bench.grid import Point
from fused_rnn.commands.bench.measure import Timing
from fused_rnn.commands.bench.results import Results, time_row

SCRIPT = SCRIPTS / "gpu.py"


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    module = script("gpu")
    monkeypatch.setattr(module, "WORK", tmp_path / "work")
    (tmp_path / "work").mkdir()
    return module


# --- a stage


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


# --- all stages


def _without_a_machine(
    gpu: ModuleType, monkeypatch: pytest.MonkeyPatch, out: Path, statuses: dict[str, str], *arguments: str
) -> int:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a card")
    for stage in gpu.STAGES:
        outcome = gpu.Result(stage, statuses.get(stage, "ok"), 1.0, "")
        monkeypatch.setattr(gpu, stage, lambda *_, outcome=outcome: [outcome])
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--out", str(out), *arguments])
    return int(gpu.main())


def test_the_summary_comes_last(
    gpu: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert _without_a_machine(gpu, monkeypatch, out, {"sanitize": "failed"}) == 1
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith("a card, torch ")
    assert [line.split()[:2] for line in printed[2:]] == [
        [stage, "failed" if stage == "sanitize" else "ok"] for stage in gpu.ALL
    ]
    assert (out / "summary.txt").read_text().splitlines() == printed
    stages = json.loads((out / "summary.json").read_text())["stages"]
    assert [stage["stage"] for stage in stages] == list(gpu.ALL)
    assert _without_a_machine(gpu, monkeypatch, out, {}) == 0


def test_the_library_is_found_where_nothing_is_installed(tmp_path: Path) -> None:
    """Else the summary fails, and with it all that a visit brings home."""
    program = f"import sys; sys.path.insert(0, {str(SCRIPTS)!r}); import gpu; print(str(gpu.ROOT) in sys.path)"
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout == "True\n"


def test_a_summary_that_fails_is_left_out(gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: Path) -> list[str]:
        raise ModuleNotFoundError("No module named 'fused_rnn'")

    monkeypatch.setattr(gpu, "ratios_measured", fail)
    assert gpu.figures(tmp_path) == ["no figures: ModuleNotFoundError(\"No module named 'fused_rnn'\")"]


def test_the_summary_has_the_first_figures(gpu: ModuleType, tmp_path: Path) -> None:
    assert gpu.figures(tmp_path) == []
    (tmp_path / "steps").mkdir()
    row = {
        "cell": "lstm", "number": "bf16", "H": 512, "B": 8, "way": "forward", "exchange": "cluster", "members": 16,
        "micros": 1.5, "gigahertz": 2.0, "cycles": {"product": 400.0, "cell": 2600.0},
    }  # fmt: skip
    (tmp_path / "steps" / "steps.json").write_text("\n".join(json.dumps({**row, "B": b}) for b in range(99)) + "\n")
    (tmp_path / "bench").mkdir()
    results, rows = Results([{"device": "cuda"}]), []
    for B, theirs in ((8, 20e-6), (64, 80e-6)):
        point = Point("LSTM", "inference", "bf16", 32, B, 128)
        for provider, seconds in (("torch", theirs), ("cuda", 10e-6)):
            rows.append(time_row(point, provider, Timing(seconds, seconds, seconds, 5), 0))
    results.replace(rows)
    results.save(tmp_path / "bench" / "quick-bf16.json")
    lines = gpu.figures(tmp_path)
    assert lines[1].split() == ["lstm", "bf16", "512", "0", "forward", "cluster", "16", "1.50", "3000", "/", "3000"]
    assert lines[-1] == "  quick-bf16 cuda inference: 4.00 (2.00) of 2 points"
    assert len(lines) <= 45
    (tmp_path / "bench" / "quick-tf32.json").write_text("{")
    assert gpu.figures(tmp_path)[0].startswith("no figures: ")


def test_nothing_follows_a_build_that_failed(
    gpu: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (gpu.WORK / "build.log").write_text("nvcc said no\n")
    assert _without_a_machine(gpu, monkeypatch, tmp_path / "out", {"build": "failed"}) == 1
    printed = capsys.readouterr().out.splitlines()
    assert printed[:2] == ["--- the end of build.log", "nvcc said no"]
    assert len(printed) == 5


def test_a_few_files_come_back_while_a_stage_still_runs(
    gpu: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """What is killed with its machine has left the logs so far."""
    out = tmp_path / "out"
    monkeypatch.setattr(gpu, "PACK_EVERY", 0.05)
    report = gpu.Report(gpu.WORK, out, {"gpu": "a card", "torch": "2", "cuda": "13"})

    def test(work: Path, seconds: float) -> list[Any]:
        (work / "tests").mkdir()
        event = {"test": "t.py::one", "outcome": "passed", "seconds": 1, "text": ""}
        (work / "tests" / "cuda-0.jsonl").write_text("{")  # as it is while it is being written
        report.over.wait(0.3)
        (work / "tests" / "cuda-0.jsonl").write_text(json.dumps(event) + "\n")
        (out / "tests.xml").unlink(missing_ok=True)
        while not (out / "tests.xml").exists():
            report.over.wait(0.05)
        assert "test   running" in (out / "summary.txt").read_text()
        return [gpu.Result("test", "ok", seconds, "")]

    monkeypatch.setattr(gpu, "test", test)
    report.results.append(gpu.Result("build", "ok", 1.0, ""))
    report.stage("test", 5.0)
    report.close()
    assert ET.parse(out / "tests.xml").getroot().attrib["tests"] == "1"
    with tarfile.open(out / "results.tar.gz") as archive:
        assert "gpu/tests/cuda-0.jsonl" in archive.getnames()
    names = {path.name for path in out.iterdir()}
    modules = {path.name for path in Path(fused_rnn.__file__).parent.glob("_*.so") if path.stat().st_size < gpu.LARGEST}
    assert names == {"summary.txt", "summary.json", "tests.xml", "results.tar.gz", *modules}
    assert len(names) <= 8


def test_all_stages_end_in_time(gpu: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    given = []
    assert _without_a_machine(gpu, monkeypatch, tmp_path / "out", {}, "test", "bench", "--total", "0.5") == 1
    stages = json.loads((tmp_path / "out" / "summary.json").read_text())["stages"]
    assert [stage["status"] for stage in stages] == ["no time left"] * 2
    monkeypatch.setattr(gpu, "bench", lambda work, seconds: given.append(seconds) or [])
    monkeypatch.setattr(sys, "argv", ["gpu.py", "bench", "--total", "2", "--out", str(tmp_path / "out")])
    gpu.main()
    assert 80 < given[0] <= 95


def test_a_plan_bounds_each_of_its_stages(
    gpu: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Both together take a quarter of an hour, the start of the machine included."""
    seconds = {name: sum(int(stage.partition(":")[2]) for stage in plan) for name, plan in gpu.PLANS.items()}
    assert seconds["first"] <= 540 and seconds["green"] <= 240 and seconds["red"] <= 240
    given: dict[str, float] = {}
    assert _without_a_machine(gpu, monkeypatch, tmp_path / "out", {}, "first") == 0
    capsys.readouterr()
    for name in gpu.STAGES:
        monkeypatch.setattr(
            gpu, name, lambda _, seconds, name=name: given.update({name: seconds}) or [gpu.Result(name, "ok", 1.0, "")]
        )
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--out", str(tmp_path / "out"), "first", "build:77"])
    assert gpu.main() == 0
    assert given == {**{k: float(v) for k, _, v in (s.partition(":") for s in gpu.PLANS["first"])}, "build": 77.0}
    monkeypatch.setattr(sys, "argv", ["gpu.py", "frist"])
    with pytest.raises(SystemExit):
        gpu.main()
    assert "stages: got frist, expected some of build, " in capsys.readouterr().err


def test_what_comes_next_depends_on_the_smoke(gpu: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def stages() -> list[str]:
        _without_a_machine(gpu, monkeypatch, tmp_path / "out", {}, "next")
        return [s["stage"] for s in json.loads((tmp_path / "out" / "summary.json").read_text())["stages"]]

    names = {plan: [stage.partition(":")[0] for stage in gpu.PLANS[plan]] for plan in ("green", "red")}
    assert stages() == names["green"]
    log = gpu.WORK / "smoke.log"
    log.write_text("cuda lstm bf16 cta  error 8e-3\n101 of 101 kernels ran, in 22 s\n")
    assert stages() == names["green"]
    bad = [f"cuda gru bf16 way{n}" for n in range(20)]  # more than a summary's line has room for
    log.write_text(f"...\n81 of 101 kernels ran, in 22 s; not {', '.join(bad)}\n")
    assert stages() == names["red"]
    monkeypatch.undo()
    asked: list[list[str]] = []
    monkeypatch.setattr(gpu, "PACK", tmp_path / "pack")
    monkeypatch.setattr(gpu, "run", lambda name, command, *_: asked.append(command) or gpu.Result(name, "ok", 1.0, ""))
    gpu.again(log.parent, 60)
    assert asked[0][2:] == [argument for name in bad for argument in ("--only", name)]


def test_what_was_packed_is_unpacked(gpu: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(gpu, "PACK", tmp_path / "pack")
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    monkeypatch.setattr(gpu, "TRITON_CACHE", tmp_path / "there" / "cache")
    (nothing,) = gpu.unpack(tmp_path, 60)
    assert nothing.status == "failed" and "make gpu-pack" in nothing.said
    for folder in ("pack/variants/other", "fused_rnn", "scripts", "cache"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "pack" / "_cuda.so").write_text("ours")
    (tmp_path / "pack" / "variants" / "other" / "_cuda.so").write_text("theirs")
    (tmp_path / "cache" / "kernel").touch()
    (tmp_path / "fused_rnn" / "_cuda.so").write_text("loaded here")
    (tmp_path / "loaded").hardlink_to(tmp_path / "fused_rnn" / "_cuda.so")
    with tarfile.open(tmp_path / "pack" / "triton.tar.gz", "w:gz") as archive:
        archive.add(tmp_path / "cache", "cache")
    monkeypatch.setattr(gpu, "run", lambda name, command, work, seconds, tree=tmp_path: gpu.Result(
        name, "ok", 1.0, (tree / "fused_rnn" / "_cuda.so").read_text()))  # fmt: skip
    assert [(r.stage, r.said) for r in gpu.unpack(tmp_path, 60)] == [("unpack", "ours")]
    assert (tmp_path / "loaded").read_text() == "loaded here"  # written over it would crash who has it loaded
    assert (tmp_path / "there" / "cache" / "kernel").exists()
    assert [(r.stage, r.said) for r in gpu.steps(tmp_path, 60)] == [("steps", "ours"), ("steps-other", "theirs")]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so() -> None:
    done = subprocess.run([sys.executable, str(SCRIPT), "test"], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "torch finds no GPU here" in done.stderr


# --- modules that were built elsewhere


def test_modules_for_another_machine(tmp_path: Path) -> None:
    """By an interpreter that has no torch: setup.py is told where the headers are."""
    torch_there, out = tmp_path / "site" / "torch", tmp_path / "out"
    (torch_there / "include").mkdir(parents=True)
    (torch_there / "lib").mkdir()
    (torch_there / "include" / "marked").touch()
    (tmp_path / "setup.py").write_text(
        "import os, sys\n"
        "from pathlib import Path\n"
        "assert Path(os.environ['FUSED_RNN_TORCH'], 'include/marked').exists()\n"
        "assert os.environ['FUSED_RNN_CUDA'] == '1'\n"
        "made = Path(sys.argv[sys.argv.index('-b') + 1], 'fused_rnn')\n"
        "made.mkdir(parents=True)\n"
        "for name in ('_C', '_cuda'):\n"
        "    (made / f'{name}.so').write_text(os.environ['FUSED_RNN_CUDA_DEBUG'])\n"
    )
    made = script("gpu_prebuild").build(sys.executable, torch_there, out, tree=tmp_path)
    there = {path.relative_to(out).as_posix(): path.read_text() for path in out.rglob("*.so")}
    assert there == {"_C.so": "0", "_cuda.so": "0", "debug/_cuda.so": "1"}
    assert sorted(made) == sorted(out / name for name in there)


# --- the stage of tests


TESTS = """
import os, sys, time
import pytest, torch

pytestmark = pytest.mark.gpu

def test_passes(): pass
def test_fails(): assert 1 == 2, "one is not two"
def test_hangs(): time.sleep(60)
def test_after_the_hang(): pass
def test_crashes(): os._exit(139)
def test_illegal_access(monkeypatch):
    torch.cuda.is_initialized = lambda: True
    def lost(): raise RuntimeError("CUDA error: an illegal memory access was encountered")
    torch.cuda.synchronize = lost
    lost()
@pytest.mark.skip(reason="one GPU")
def test_skips(): pass
def test_last(): assert not torch.cuda.is_initialized()
"""


@pytest.mark.slow
def test_tests_that_hang_or_lose_the_gpu_cost_themselves_alone(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gpu_tests = script("gpu_tests")
    file, out = tmp_path / "test_kernels.py", tmp_path / "out"
    file.write_text(TESTS)
    monkeypatch.setattr(gpu_tests, "LANES", {"kernels": ((str(file),), 2)})
    monkeypatch.setattr(gpu_tests, "SECONDS", 3)
    monkeypatch.setattr(sys, "argv", ["gpu_tests.py", "--out", str(out), "--minutes", "5", "-W", "ignore"])
    assert gpu_tests.main() == 1
    outcomes = {o.test.partition("::test_")[2]: o for o in gpu_tests.read(out)}
    assert {name: o.outcome for name, o in outcomes.items()} == {
        "passes": "passed", "fails": "failed", "hangs": "failed", "after_the_hang": "passed", "crashes": "failed",
        "illegal_access": "failed", "skips": "skipped", "last": "passed",
    }  # fmt: skip
    assert "one is not two" in outcomes["fails"].text
    assert outcomes["hangs"].text.startswith("died: ") and outcomes["crashes"].text.startswith("died: ")
    assert "an illegal memory access" in outcomes["illegal_access"].text
    assert gpu_tests.unfinished(out) == []
    printed = capsys.readouterr().out.splitlines()
    assert printed[-1] == "3 passed, 4 failed, 1 skipped"
    assert len([line for line in printed[-6:] if line.startswith("FAILED ")]) == 4
    gpu_tests.write_junit(list(outcomes.values()), tmp_path / "tests.xml")
    suite = ET.parse(tmp_path / "tests.xml").getroot()
    assert (suite.attrib["tests"], suite.attrib["failures"], suite.attrib["skipped"]) == ("8", "4", "1")
    assert len(suite.findall("testcase/failure")) == 4


def test_a_process_that_is_silent_is_ended(tmp_path: Path) -> None:
    """One whose main thread waits for the GPU and does not let go of the interpreter cannot end itself."""
    gpu_tests, results = script("gpu_tests"), tmp_path / "cuda-0.jsonl"
    results.touch()
    child = subprocess.Popen([sys.executable, "-c", "import ctypes; ctypes.PyDLL(None).sleep(60)"])
    assert not gpu_tests.wait(child, results, 2, time.monotonic() + 60)
    assert child.wait(10) == -signal.SIGKILL


def test_tests_that_cannot_be_collected_are_told(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gpu_tests = script("gpu_tests")
    (tmp_path / "test_broken.py").write_text("import a_package_that_is_not_there\n")
    monkeypatch.setattr(gpu_tests, "LANES", {"broken": ((str(tmp_path / "test_broken.py"),), 1)})
    monkeypatch.setattr(sys, "argv", ["gpu_tests.py", "--out", str(tmp_path / "out"), "--minutes", "5"])
    assert gpu_tests.main() == 1
    assert capsys.readouterr().out.splitlines()[-1] == "0 passed, 0 failed, 0 skipped; not to their end: broken-0"
    assert "a_package_that_is_not_there" in (tmp_path / "out" / "broken-0.log").read_text()


def test_every_file_that_needs_a_gpu_is_named() -> None:
    """But for mutations, which are the interpreter's: one of them may hang a GPU."""
    tests = SCRIPTS.parent / "tests"
    others = set(tests.rglob("test_*.py")) - {Path(__file__), tests / "triton/test_mutations.py"}
    marks = ("pytest.mark.gpu", "= MARKS", "*MARKS")
    marked = {path for path in others if any(mark in path.read_text() for mark in marks)}
    lanes = script("gpu_tests").LANES.values()
    assert {str(path.relative_to(SCRIPTS.parent)) for path in marked} == {file for files, _ in lanes for file in files}


@pytest.mark.slow
def test_files_that_need_a_gpu_import_little() -> None:
    """A machine with a GPU has what benchmarks/GPU.md says; what else `make test` installs may be missing there."""
    files = [str(SCRIPTS.parent / file) for named, _ in script("gpu_tests").LANES.values() for file in named]
    missing = ("expecttest", "gymnasium", "hypothesis", "onnx", "onnxruntime", "sybil")
    program = (
        f"import sys; sys.modules.update(dict.fromkeys({missing}))\n"
        f"import pytest; sys.exit(pytest.main(['--collect-only', '-q', '-p', 'no:cacheprovider', *{files!r}]))"
    )
    # hypothesis' plugin for pytest, which is loaded where it is installed, cannot do without it.
    environment = os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTEST_PLUGINS": "pytest_timeout"}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stdout


# --- the sanitizers and the benchmark


@pytest.fixture
def sanitizer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A compute-sanitizer that runs nothing, and finds something in its second tool."""
    program = tmp_path / "bin" / "compute-sanitizer"
    program.parent.mkdir()
    program.write_text(
        "#!/bin/sh\n"
        "echo '17 of 100 ran; next: cuda lstm bf16 cluster rows=8'\n"
        'case "$2" in racecheck) echo "========= RACECHECK SUMMARY: 1 hazard displayed"; exit 9;;\n'
        'synccheck) echo "all 100 cases ran";; esac\n'
        "echo ========= ERROR SUMMARY: 0 errors\n"
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent), prepend=":")


@pytest.fixture
def profiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An ncu that profiles nothing, and fails for GRUs; it leaves its arguments in a file."""
    program = tmp_path / "bin" / "ncu"
    program.parent.mkdir()
    program.write_text(
        "#!/bin/sh\n"
        'if [ "$1" = --import ]; then echo "pages of $(basename $2)"; exit; fi\n'
        f'echo "$@" >> {tmp_path}/asked\n'
        'case "$*" in *GRU*) exit 5;; esac\n'
        'while [ "$1" != -o ]; do shift; done; echo report > "$2"\n'
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent), prepend=":")
    return tmp_path


def test_the_worst_points_are_profiled(
    gpu: ModuleType, monkeypatch: pytest.MonkeyPatch, profiler: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from fused_rnn.commands.bench.grid import Point
    from tests.commands.test_bench_gpu import row, some_results

    module, out = script("gpu_profile"), gpu.WORK
    results = some_results()
    for cell, micros in (("LSTM", 400), ("GRU", 900), ("RNN", 200)):
        point = Point(cell, "training", "bf16", 128, 64, 512)
        results.replace([row(point, "torch", 300), row(point, "cuda", micros), row(point, "auto", 300)])
    results.save(out / "bench" / "bf16.json")
    monkeypatch.setattr(sys, "argv", ["gpu_profile.py", "--results", str(out / "bench"), "--out", str(out)])
    assert module.main() == 1  # one of them failed
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "0.33 of torch.nn's speed: GRU training bf16 T=128 B=64 H=512"
    assert said[1].startswith("not profiled: ")
    assert said[2:] == ["0.75 of torch.nn's speed: LSTM training bf16 T=128 B=64 H=512", "1 of 2 points profiled"]
    pages = (out / "profile-1.txt").read_text()
    assert pages == "LSTM training bf16 T=128 B=64 H=512\npages of profile-1.ncu-rep\n"
    asked = (profiler / "asked").read_text()
    assert "--clock-control none" in asked  # the clocks of a machine that others use, too
    assert module.worst([results], "triton", 2) == []


@pytest.mark.usefixtures("sanitizer")
def test_sanitizers_say_what_they_found_and_how_far_they_came(gpu: ModuleType) -> None:
    found = {result.stage: (result.status, result.said) for result in gpu.sanitize(gpu.WORK, 60)}
    so_far = "17 of 100 ran; next: cuda lstm bf16 cluster rows=8"
    assert found == {
        "sanitize-memcheck": ("ok", f"ERROR SUMMARY: 0 errors; {so_far}"),
        "sanitize-racecheck": ("failed", f"RACECHECK SUMMARY: 1 hazard displayed; {so_far}"),
        "sanitize-synccheck": ("ok", "ERROR SUMMARY: 0 errors; all 100 cases ran"),
    }


@pytest.mark.parametrize(("stage", "dtypes", "variants"), [("bench", 3, 1), ("variants", 1, 6), ("triton", 1, 1)])
def test_the_benchmarks_are_quick_ones(
    stage: str, dtypes: int, variants: int, gpu: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their arguments are ones that the command line takes."""
    from fused_rnn.commands.cli import cli

    commands, plans = [], []
    monkeypatch.setattr(gpu, "run", lambda name, command, *_, **__: commands.append(command) or name)
    getattr(gpu, stage)(gpu.WORK, 480.0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("fused_rnn.commands.bench.run.execute", lambda plan, console: plans.append(plan))
    done = CliRunner().invoke(cli, commands[0][3:], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    assert (plans[0].grid, plans[0].dtypes, plans[0].memory) == ("quick-cuda", ("bf16", "tf32", "fp16")[:dtypes], False)
    assert len(plans[0].variants) == variants
    assert plans[0].budget_s == pytest.approx(0.8 * 480 / dtypes, abs=0.5)
    assert plans[0].out == gpu.WORK / "bench"
