"""The first launches on a GPU: each kernel once, forward and backward, with a time limit.

    python scripts/gpu_smoke.py [cuda] [triton] [--seconds 40] [--at-once 8]
    python scripts/gpu_smoke.py --only 'cuda lstm bf16 grid' ...

The kernels of a cell and a type share a process, whose start takes longer than they do; after one that hangs or
crashes a new process goes on with those behind it.

First of all what the CUDA kernels are made of, each instruction and barrier by itself: nvcc compiles
tests/emulator/primitives_test.cpp. A kernel that hangs, that reads where it must not, or that computes something else
is thus named, and the others go on: run by scripts/gpu.py. It is no test of accuracy: the bounds here only tell a
number from garbage. Exits with 1 if one kernel failed.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import groupby
from pathlib import Path
from typing import IO

from gpu import PACK, ROOT, architecture

sys.path.insert(0, str(ROOT))  # a checkout built in place, with nothing installed

# ‖ours - reference‖ / ‖reference‖ over all results, float64 by the same inputs. ReLU's gradient has a step: where a
# unit rounds to the other side of zero all of its gradient is another, so there this says less.
GARBAGE = {"bf16": 5e-2, "f16": 1e-2, "tf32": 1e-2, "ieee": 1e-4, "f64": 1e-9}
RELU = 10
PRIMITIVES = "cuda primitives"
PACKED = PACK / "primitives"


def compile_primitives(program: Path, target: str) -> None:
    source = ROOT / "tests" / "emulator" / "primitives_test.cpp"
    subprocess.run(["nvcc", "-x", "cu", "-std=c++17", "-I", ROOT / "csrc", target, source, "-o", program], check=True)


def primitives(seconds: float = 20.0) -> str:
    """Runs the test of the primitives, packed or compiled here; says which are not what the emulator makes of them."""
    with tempfile.TemporaryDirectory() as folder:
        program = PACKED
        if not program.exists():
            program = Path(folder, "primitives")
            print("compiler", flush=True)
            compile_primitives(program, "-arch=sm_" + architecture().replace(".", ""))
        print("program", flush=True)
        held, wrong, end = _said(program, seconds)
        for name in wrong:  # after an error of the GPU all others fail, too: each by itself
            alone = _said(program, seconds, name)
            held += alone[0]
            wrong = {**wrong, name: alone[1].get(name, "")}
    complaints = [f"{name}: {what}" for name, what in wrong.items() if what]
    if complaints or end:
        return "WRONG: " + "; ".join([*complaints, *[f"{end}, behind {held[-1] if held else 'the start'}"] * bool(end)])
    return f"error none in {len(held)}"


def _said(program: Path, seconds: float, *names: str) -> tuple[list[str], dict[str, str], str]:
    """Of the tests of a program: those that held, those that failed with why, and why it did not come to its end."""
    try:
        said = subprocess.run([program, *names], capture_output=True, timeout=seconds, check=False).stdout
        end = "" if said else "it said nothing"
    except subprocess.TimeoutExpired as late:
        said, end = late.stdout or b"", f"hung after {seconds:.0f} s"
    lines = said.decode().splitlines()
    failed = [line.removeprefix("FAILED").strip().partition(": ") for line in lines if line.startswith("FAILED")]
    return [line.split()[1] for line in lines if line.startswith("ok")], {name: why for name, _, why in failed}, end


def one(name: str, device: str = "cuda") -> str:
    """Runs a kernel here; says where it is, so that who waits knows where it stayed. Returns its error, in words."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # which deterministic mode wants
    import gpu_cases as cases
    import torch

    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    kernel = cases.Kernel(*name.split())
    torch.use_deterministic_algorithms(True)  # torch.empty gives NaN: what is not written cannot pass
    given = cases.given(kernel, "gates", device)
    with cases.forced(kernel):
        print("forward", flush=True)
        y = cases.forward(kernel, given, kernel.backend)
        wait()
        print("backward", flush=True)
        results = [y.detach(), *cases.backward(given, y)]
        wait()
    print("reference", flush=True)
    wide = given.double()
    y = cases.forward(kernel, wide, "reference")
    expected = [y.detach(), *cases.backward(wide, y)]
    pairs = zip(results, expected, strict=True)
    errors = torch.stack([(a.double() - b).norm() / b.norm().clamp_min(1e-30) for a, b in pairs])
    worst = float(errors.max())  # NaN where there is one
    bound = GARBAGE[kernel.number] * (RELU if kernel.cell == "rnn_relu" else 1)
    return f"error {worst:.1e}" if worst <= bound else f"WRONG: error {worst:.1e}"


def these(names: list[str]) -> None:
    """Runs kernels here, and prints of each its name, where it is, and after "= " what became of it."""
    for name in names:
        print(name, flush=True)
        try:
            said = primitives() if name == PRIMITIVES else one(name)
        except (RuntimeError, ValueError, NotImplementedError, subprocess.CalledProcessError) as error:
            # A kernel's own assertion, on stderr, says more than what torch makes of it.
            print((str(error).strip() or repr(error)).splitlines()[0], file=sys.stderr, flush=True)
            sys.exit(1)  # what comes after an error of the GPU says nothing
        print(f"= {said}", flush=True)


def launched(command: list[str], names: list[str], seconds: float) -> Iterator[tuple[str, str]]:
    """Each kernel with what became of it, a hang and a crash in words, too. command: `these`, the names to follow."""
    while names:
        with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as errors:
            child = subprocess.Popen([*command, *names], stdout=out, stderr=errors)
            lines, hung = _outcomes(child, out, seconds)
            errors.seek(0)
            complaints = [line.strip() for line in errors.read().splitlines() if line.strip()]
        ended = [line.removeprefix("= ") for line in lines if line.startswith("= ")]
        yield from zip(names, ended, strict=False)
        if len(ended) == len(names):
            return
        where = "start" if not lines or lines[-1] in names or lines[-1].startswith("= ") else lines[-1]
        if hung:
            yield names[len(ended)], f"HUNG: still in {where} after {seconds:.0f} s"
        else:
            why = [line for line in complaints if "Assertion" in line][:1] or complaints[-1:]
            yield names[len(ended)], f"FAILED in {where}: {why[0][:200] if why else f'exit status {child.returncode}'}"
        names = names[len(ended) + 1 :]


def _outcomes(child: subprocess.Popen[bytes], out: IO[str], seconds: float) -> tuple[list[str], bool]:
    """The lines of a process, and whether it was killed because none of its kernels ended for so many seconds."""
    ended, since = 0, time.monotonic()
    while True:
        over = child.poll() is not None
        out.seek(0)
        lines = out.read().splitlines()
        if over:
            return lines, False
        if (count := sum(line.startswith("= ") for line in lines)) > ended:
            ended, since = count, time.monotonic()
        if time.monotonic() - since > seconds:
            child.kill()
            with suppress(subprocess.TimeoutExpired):  # a driver may take its time over a kernel that hangs
                child.wait(10)
            return lines, True
        time.sleep(0.05)


def first_product() -> float:
    """Seconds. On a machine that has just started, libraries come from a cold disk: not on any kernel's time."""
    import torch

    began = time.monotonic()
    torch.mm(*torch.ones(2, 64, 64, device="cuda", dtype=torch.bfloat16)).sum().item()
    return time.monotonic() - began


def main() -> int:
    parser = argparse.ArgumentParser(prog="gpu_smoke", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("backends", nargs="*", default=["cuda", "triton"], metavar="cuda|triton")
    parser.add_argument("--only", action="append", help="a kernel; no other, each in a process of its own")
    parser.add_argument("--these", nargs="+", help="kernels, to be run here")
    parser.add_argument("--seconds", type=float, default=40.0, help="for a kernel at most")
    parser.add_argument("--at-once", type=int, default=max(1, os.cpu_count() or 2), help="processes")
    chosen = parser.parse_args()
    if chosen.these:
        these(chosen.these)
        return 0
    import gpu_cases as cases
    import torch

    clusters = torch.cuda.get_device_capability() >= (9, 0)
    groups = [[PRIMITIVES]] if "cuda" in chosen.backends else []
    for backend in chosen.backends:
        kernels = sorted(cases.kernels(backend, clusters), key=lambda kernel: kernel[:3])
        groups += [[str(kernel) for kernel in group] for _, group in groupby(kernels, key=lambda kernel: kernel[:3])]
    if chosen.only:
        groups = [[name] for name in chosen.only]
    print(f"torch's first product took {first_product():.0f} s", flush=True)
    began, bad = time.monotonic(), []

    def run(names: list[str]) -> None:
        for name, said in launched([sys.executable, __file__, "--these"], names, chosen.seconds):
            print(f"{name:<32} {said}", flush=True)
            if not said.startswith("error "):
                bad.append(name)

    with ThreadPoolExecutor(chosen.at_once) as pool:
        list(pool.map(run, groups))
    count = sum(map(len, groups))
    print(f"{count - len(bad)} of {count} kernels ran, in {time.monotonic() - began:.0f} s", end="")
    print("; not " + ", ".join(sorted(bad)) if bad else "")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
