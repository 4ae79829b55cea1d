"""Everything that needs a GPU, stage by stage: `make gpu`, `make gpu-build`, gpu-test, gpu-sanitize, gpu-bench.

    python scripts/gpu.py [build] [test] [sanitize] [bench] [--out build/gpu] [--minutes 8]

Builds in place, for this machine's GPU unless TORCH_CUDA_ARCH_LIST says otherwise, with the Python that runs it:
nothing is installed and nothing is fetched. Each stage is stopped after --minutes. Under --out: a log for each stage,
JUnit XML of the tests, the bench's result files, summary.json; the summary is also printed, last. Exits with 1 if a
stage failed.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
STAGES = ("build", "test", "sanitize", "bench")
TOOLS = ("memcheck", "racecheck", "synccheck")
KERNELS = "kns=fused_rnn"  # by a part of their names; torch's own kernels are not under test


class Result(NamedTuple):
    stage: str
    status: str  # "ok", "failed", "timed out"
    seconds: float
    said: str


def run(name: str, command: list[str], out: Path, seconds: float, **environment: str) -> Result:
    """A command with its log; interrupted when its time is up, so that it can still write what it has."""
    began, log = time.monotonic(), out / f"{name}.log"
    print(f"--- {name}: {' '.join(command)}", flush=True)
    with log.open("w") as stream:
        child = subprocess.Popen(
            command, cwd=ROOT, env={**os.environ, "PYTHONUNBUFFERED": "1", **environment}, stdout=stream,
            stderr=subprocess.STDOUT, start_new_session=True,
            # A shell's background jobs ignore the interrupt, and so would their children.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )  # fmt: skip
        status = "ok"
        for patience, sent in ((seconds, signal.SIGINT), (20, signal.SIGKILL), (None, None)):
            try:
                status = status if child.wait(patience) == 0 or status != "ok" else "failed"
                break
            except subprocess.TimeoutExpired:
                status = "timed out"
                os.killpg(child.pid, sent or signal.SIGKILL)
    lines = log.read_text(errors="replace").strip().splitlines()
    return Result(name, status, time.monotonic() - began, lines[-1][:100] if lines else "")


def architecture() -> str:
    import torch

    major, minor = torch.cuda.get_device_capability()
    return f"{major}.{minor}" + ("a" if major == 9 else "")


def build(out: Path, seconds: float) -> list[Result]:
    chosen = os.environ.get("TORCH_CUDA_ARCH_LIST") or architecture()
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    result = run("build", command, out, seconds, FUSED_RNN_CUDA="1", TORCH_CUDA_ARCH_LIST=chosen)
    info = run("info", [sys.executable, "-m", "fused_rnn", "info"], out, 60)
    return [result._replace(said=f"for {chosen}") if result.status == "ok" else result, info._replace(said="")]


def test(out: Path, seconds: float) -> list[Result]:
    junit = out / "tests.xml"
    junit.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", f"--junitxml={junit}", *pytest_arguments()]
    result = run("test", command, out, seconds)
    if not junit.exists():
        return [result]
    suite = next(ET.parse(junit).getroot().iter("testsuite")).attrib
    said = ", ".join(f"{suite.get(name, 0)} {name}" for name in ("tests", "failures", "errors", "skipped"))
    return [result._replace(said=said)]


def pytest_arguments() -> list[str]:
    return os.environ.get("PYTEST_ARGS", "").split()


def sanitize(out: Path, seconds: float) -> list[Result]:
    if shutil.which("compute-sanitizer") is None:
        return [Result("sanitize", "failed", 0.0, "compute-sanitizer is not on the PATH")]
    cases = [sys.executable, "scripts/gpu_sanitize.py"]
    results = []
    for tool in TOOLS:
        command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", "--kernel-name", KERNELS, *cases]
        result = run(f"sanitize-{tool}", command, out, seconds / len(TOOLS))
        log = (out / f"sanitize-{tool}.log").read_text(errors="replace")
        said = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: .*", log)
        results.append(result._replace(said=said[-1] if said else result.said))
    return results


def bench(out: Path, seconds: float) -> list[Result]:
    chosen = os.environ.get("BENCH_ARGS", "").split() or ["--dtype", "bf16", "--dtype", "tf32", "--no-memory"]
    dtypes = max(1, chosen.count("--dtype"))
    minutes = ["--minutes", f"{0.8 * seconds / 60 / dtypes:.2f}"] if "--minutes" not in chosen else []
    command = [sys.executable, "-m", "fused_rnn", "bench", "--device", "cuda", "--out", str(out / "bench")]
    return [run("bench", [*command, *minutes, *chosen], out, seconds)]


def table(results: list[Result]) -> str:
    rows = [("stage", "status", "seconds", ""), *((r.stage, r.status, f"{r.seconds:.0f}", r.said) for r in results)]
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    return "\n".join(
        f"{row[0]:<{widths[0]}}  {row[1]:<{widths[1]}}  {row[2]:>{widths[2]}}  {row[3]}".rstrip() for row in rows
    )


def main() -> int:
    parser = argparse.ArgumentParser(prog="gpu", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("stages", nargs="*", help=f"of {', '.join(STAGES)}; all where none is named")
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT") or ROOT / "build" / "gpu"))
    parser.add_argument("--minutes", type=float, default=8.0, help="of a stage at most")
    chosen = parser.parse_args()
    unknown = set(chosen.stages) - set(STAGES)
    if unknown:
        parser.error(f"stages: got {', '.join(sorted(unknown))}, expected some of {', '.join(STAGES)}")
    import torch

    if not torch.cuda.is_available():
        print("gpu: torch finds no GPU here (python -m fused_rnn info says more)", file=sys.stderr)
        return 1
    out = chosen.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    results: list[Result] = []
    functions = {"build": build, "test": test, "sanitize": sanitize, "bench": bench}
    for stage in chosen.stages or STAGES:
        results += functions[stage](out, 60 * chosen.minutes)
        if stage == "build" and results[0].status != "ok":
            break  # what follows would run something else
    machine = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "cuda": torch.version.cuda}
    summary = {**machine, "stages": [result._asdict() for result in results]}
    name = "summary" if not chosen.stages else "-".join(["summary", *chosen.stages])
    (out / f"{name}.json").write_text(json.dumps(summary, indent=1) + "\n")
    print(f"{machine['gpu']}, torch {machine['torch']}\n{table(results)}")
    return 0 if all(result.status == "ok" for result in results) else 1


if __name__ == "__main__":
    sys.exit(main())
