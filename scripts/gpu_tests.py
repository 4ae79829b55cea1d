"""The tests with the marker gpu, in several processes at a time: run by scripts/gpu.py.

    python scripts/gpu_tests.py --out FOLDER [--minutes 8] [--lane cuda ...] [PYTEST'S ARGUMENTS]

A test that hangs is ended after a minute and a test that loses the GPU's context ends its process; the next process
goes on with the tests after it. Each process has a file of results (gpu_pytest.py) and a log. Exits with 1 if a test
failed.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
SECONDS = 60  # for a test
SILENT = 60  # and for a start; a process whose main thread never lets go of the interpreter does not end itself
# Files with tests that need a GPU, named one by one: others import what a machine with a GPU may lack. And in how many
# processes they run: Triton's spend their time in its compiler.
LANES = {
    "cuda": (("tests/cuda/test_gpu.py",), 2),
    "programs": (("tests/cuda/test_gpu_programs.py", "tests/cuda/test_gpu_narrow.py"), 5),
    "autocast": (("tests/test_autocast.py",), 1),
    "emulator": (("tests/emulator/test_emulator.py",), 1),
    "bench": (("tests/commands/test_bench.py", "tests/commands/test_bench_gpu.py"), 1),
    "triton": (
        (
            *(
                f"tests/triton/test_{name}.py"
                for name in ("gpu", "loops", "backend", "programs", "trial_cell", "stages", "scan")
            ),
            "tests/flex/test_cells_on_triton.py",
            "tests/flex/test_field_on_triton.py",
        ),
        10,
    ),
}


class Outcome(NamedTuple):
    """A test's: "passed", "failed" or "skipped"; text: why it failed or was skipped."""

    test: str
    outcome: str
    seconds: float
    text: str


def read(out: Path) -> list[Outcome]:
    """What is known of every test that began, from whatever is there."""
    found = {}
    for path in sorted(out.glob("*.jsonl")):
        for line in path.read_text().splitlines():
            event = json.loads(line)
            if "test" in event:
                found[event["test"]] = Outcome(**event)
    return list(found.values())


def unfinished(out: Path) -> list[str]:
    """The processes that did not come to their end."""
    names = [path.stem for path in sorted(out.glob("*.jsonl"))]
    return [name for name in names if '"finished": true' not in (out / f"{name}.jsonl").read_text()]


def counts(outcomes: list[Outcome]) -> str:
    """In a line."""
    kinds = [o.outcome for o in outcomes]
    return ", ".join(f"{kinds.count(kind)} {kind}" for kind in ("passed", "failed", "skipped"))


def write_junit(outcomes: list[Outcome], path: Path) -> None:
    kinds = [o.outcome for o in outcomes]
    numbers = {"tests": len(kinds), "failures": kinds.count("failed"), "errors": 0, "skipped": kinds.count("skipped")}
    suite = ET.Element("testsuite", {"name": "gpu", **{name: str(number) for name, number in numbers.items()}})
    for o in outcomes:
        file, _, name = o.test.partition("::")
        case = ET.SubElement(suite, "testcase", classname=file, name=name, time=f"{o.seconds:.3f}")
        if o.outcome != "passed":
            kind = "failure" if o.outcome == "failed" else "skipped"
            printable = "".join(c for c in o.text if c.isprintable() or c in "\n\t")
            ET.SubElement(case, kind, message=printable.strip().split("\n")[-1]).text = printable
    ET.ElementTree(suite).write(path, encoding="utf-8", xml_declaration=True)


def run(name: str, files: tuple[str, ...], share: str, out: Path, end: float, arguments: list[str]) -> None:
    """One process after the other, until the files' share of tests is through or no test more begins."""
    results, log = out / f"{name}.jsonl", out / f"{name}.log"
    results.touch()
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]),
        "FUSED_RNN_GPU_RESULTS": str(results),
        "FUSED_RNN_GPU_SHARE": share,
    }
    command = [sys.executable, "-m", "pytest", "-p", "gpu_pytest", "-p", "no:cacheprovider", "-m", "gpu", "-v"]
    command += ["--tb=short", f"--timeout={SECONDS}", "--timeout-method=thread", *arguments, *files]
    began, begun = -1, 0
    while time.monotonic() < end and name in unfinished(out) and began != begun:
        with log.open("a") as stream:
            child = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=stream, stderr=subprocess.STDOUT)
            wait(child, results, SECONDS + SILENT, end)
        began, begun = begun, results.read_text().count('"test"')


def wait(child: subprocess.Popen[bytes], written: Path, silent: float, end: float = math.inf) -> bool:
    """Until it ends; or ends it, and is False, when time is up or it has written nothing there for so many seconds."""
    while child.poll() is None:
        time.sleep(0.5)
        if time.monotonic() > end or time.time() - written.stat().st_mtime > silent:
            child.kill()
            with suppress(subprocess.TimeoutExpired):  # a driver may take its time over a kernel that hangs
                child.wait(10)
            return False
    return True


def main() -> int:
    parser = argparse.ArgumentParser(prog="gpu_tests", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--lane", action="append", choices=list(LANES), help="and no other")
    chosen, arguments = parser.parse_known_args()
    out = chosen.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    for old in (*out.glob("*.jsonl"), *out.glob("*.log")):
        old.unlink()
    end = time.monotonic() + 60 * chosen.minutes
    lanes = {name: LANES[name] for name in chosen.lane or LANES}
    with ThreadPoolExecutor(sum(shares for _, shares in lanes.values())) as pool:
        for lane, (files, shares) in lanes.items():
            for k in range(shares):
                pool.submit(run, f"{lane}-{k}", files, f"{k}/{shares}", out, end, arguments)
    outcomes, late = read(out), unfinished(out)
    failed = [o for o in outcomes if o.outcome == "failed"]
    for o in failed:
        print(f"--- {o.test}\n{o.text}\n")
    for o in failed:
        print(f"FAILED {o.test}: {(o.text.strip() or '?').splitlines()[-1][:120]}")
    slowest = sorted(outcomes, key=lambda o: -o.seconds)[:5]
    print("slowest: " + ", ".join(f"{o.test} {o.seconds:.0f} s" for o in slowest))
    print(counts(outcomes) + (f"; not to their end: {', '.join(late)}" if late else ""))
    return 1 if late or failed else 0


if __name__ == "__main__":
    sys.exit(main())
