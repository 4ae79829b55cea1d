"""What docs/deploying.md says beyond its own blocks: pools, forks, packages run from Python and C++, the figures."""

from __future__ import annotations

import json
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fused_rnn
from fused_rnn import ops

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs/deploying.md"
EXAMPLES = ROOT / "examples/deploying"
needs_kernels = pytest.mark.skipif(ops.MISSING is not None, reason=str(ops.MISSING))
needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")


def block(language: str, containing: str) -> str:
    """The one block of the page that holds this text."""
    found = re.findall(rf"^```{language}\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    (one,) = [text for text in found if containing in text]
    return str(one)


def run(*command: str | Path, folder: Path = ROOT, seconds: int = 300) -> str:
    done = subprocess.run(
        [str(part) for part in command],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"},
        capture_output=True,
        text=True,
        check=False,
        timeout=seconds,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


# ---- threads and processes ----


def test_a_thread_has_the_number_of_threads_that_was_set() -> None:
    torch.set_num_threads(1)
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(torch.get_num_threads).result() == 1


@pytest.mark.parametrize("how", ["spawn", "fork"])
def test_the_pool(how: str) -> None:
    if how == "fork" and not hasattr(os, "fork"):
        pytest.skip("this system has no fork")
    out = run(sys.executable, EXAMPLES / "pool.py", *(["--fork"] if how == "fork" else []))
    assert out == f"{how}: 4 requests answered\n"


# ---- fork ----


def in_a_child(work: Callable[[], bool], seconds: int = 60) -> None:
    """Forks; `work` is true there, and ends in time."""
    child = os.fork()
    if child == 0:
        signal.alarm(seconds)
        try:
            os._exit(0 if work() else 1)
        except BaseException:
            os._exit(2)
    assert os.waitpid(child, 0)[1] == 0


FORKS = """
import sys, torch, fused_rnn
from tests.docs.test_deploying import forks
forks()
"""


def forks() -> None:
    """The page's claims, in order, in a process whose threads have run: torch's pool, ours, and a backward."""
    torch.set_num_threads(2)
    model = nn.ModuleDict({"rnn": fused_rnn.LSTM(256, 512), "head": nn.Linear(512, 512)})
    lstm, x, dy = model["rnn"], torch.randn(16, 64, 256), torch.ones(16, 64, 512)
    stream = lstm.stream(64)
    outs = torch.empty(2, 64, 512)

    def gradient() -> torch.Tensor:
        return torch.autograd.grad(lstm(x)[0], [lstm.weight_hh_l0], dy)[0]

    def whole() -> torch.Tensor:
        loss = model["head"](lstm(x)[0]).square().mean()
        return torch.autograd.grad(loss, list(model.parameters()))[0]

    y, dw, all_of_it = lstm(x)[0].detach(), gradient(), whole()
    first = stream.step(x[0], out=outs[0]).tolist()
    kept = stream.state_dict()

    def same(a: torch.Tensor, b: torch.Tensor) -> bool:
        torch.set_num_threads(1)  # for the comparison, which is torch's
        return torch.allclose(a, b, rtol=1e-4, atol=1e-6 * float(b.abs().max()))

    def modules() -> bool:
        with torch.no_grad():
            found = lstm(x)[0]
        return same(found, y)

    def streams() -> bool:
        stream.reset()
        made = lstm.stream(64)
        again = stream.step(x[0], out=outs[1]).tolist()
        return again == first and made.step(x[0]).tolist() == first

    def one_thread() -> bool:
        torch.set_num_threads(1)
        return same(whole(), all_of_it)

    in_a_child(modules)
    in_a_child(lambda: same(gradient(), dw))
    in_a_child(streams)
    in_a_child(one_thread)
    assert all(torch.equal(a, b) for a, b in zip(kept.values(), stream.state_dict().values(), strict=True))
    print("every child was right")


@needs_fork
@needs_kernels
def test_what_happens_on_fork() -> None:
    assert run(sys.executable, "-c", FORKS) == "every child was right\n"


# ---- in TorchScript's place ----


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn = fused_rnn.GRU(16, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y, _ = self.rnn(x)
        return y


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("record", [torch.jit.script, lambda model: torch.jit.trace(model, torch.randn(5, 2, 16))])
def test_torchscript_needs_nothing_of_ours(record: Callable[[nn.Module], Any], tmp_path: Path) -> None:
    """It records torch's operators: any length, in a process without the package."""
    model, x = Model().eval(), torch.randn(9, 3, 16)
    torch.jit.save(record(model), tmp_path / "model.pt")
    torch.save((x, model(x).detach()), tmp_path / "numbers.pt")
    program = """
import sys, torch
x, y = torch.load("numbers.pt")
torch.testing.assert_close(torch.jit.load("model.pt")(x), y)
assert "fused_rnn" not in sys.modules
"""
    run(sys.executable, "-c", program, folder=tmp_path)


# ---- packages ----


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """gru.pt2, as the page makes it."""
    folder = tmp_path_factory.mktemp("package")
    run(sys.executable, "-c", block("python", "aoti_compile_and_package"), folder=folder)
    return folder / "gru.pt2"


def line_for(steps: int) -> str:
    """What a program that runs the package prints."""
    return rf"T={steps} sum -?\d+\.\d{{6}}"


@pytest.mark.compile
@needs_kernels
@pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is nowhere")
def test_a_package_runs_from_python_and_from_cpp(package: Path) -> None:
    program = f"import sys\nassert 'fused_rnn' not in sys.modules\n{block('python', 'aoti_load_package')}"
    from_python = run(sys.executable, "-c", program, ops._C.__file__, package)
    assert re.fullmatch(line_for(50) + r"\n", from_python)
    if not sysconfig.get_config_var("Py_ENABLE_SHARED"):
        pytest.skip("this Python has no shared library")
    folder = package.parent
    shutil.copy(EXAMPLES / "serve.cpp", folder)
    script = f'python() {{ "{sys.executable}" "$@"; }}\nset -e\n{block("sh", "g++")}'
    from_cpp = run("bash", "-c", script, folder=folder)
    assert re.fullmatch(line_for(5) + r"\n" + line_for(50) + r"\n", from_cpp)
    assert from_python in from_cpp


# ---- the figures ----


def test_the_page_has_the_committed_figures() -> None:
    pytest.importorskip("rich", reason="pip install '.[cli]'")
    found = runpy.run_path(str(EXAMPLES / "latency.py"))
    results = json.loads((ROOT / "benchmarks/results/examples/latency.json").read_text())
    between = PAGE.read_text().split(found["BEGIN"])[1].split(found["END"])[0]
    assert between.strip() == found["tables"](results)


@needs_kernels
@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="this system has no /proc/self/smaps_rollup")
def test_latency_measures(tmp_path: Path) -> None:
    page, file = tmp_path / "page.md", tmp_path / "results.json"
    page.write_text("above\n<!-- latency:begin -->\nold\n<!-- latency:end -->\nbelow\n")
    command = [sys.executable, EXAMPLES / "latency.py", "--steps", "1000", "--json", file, "--page", page]
    out = run(*command)
    results = json.loads(file.read_text())
    assert len(results["step_us"]) == 12
    for row in results["step_us"]:
        assert 0 < row["p50"] <= row["p99"] <= row["p99.9"]
    assert 0 < results["worker_mib"]["fork"] < results["worker_mib"]["spawn"]
    assert page.read_text() == f"above\n<!-- latency:begin -->\n\n{out}\n<!-- latency:end -->\nbelow\n"
