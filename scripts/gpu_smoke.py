"""The first launches on a GPU: each kernel once, forward and backward, in a process of its own with a time limit.

    python scripts/gpu_smoke.py [cuda] [triton] [--seconds 40] [--at-once 8]
    python scripts/gpu_smoke.py --one 'cuda lstm bf16 grid'

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
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))  # a checkout built in place, with nothing installed

# ‖ours - reference‖ / ‖reference‖ over all results, float64 by the same inputs.
GARBAGE = {"bf16": 5e-2, "f16": 1e-2, "tf32": 1e-2, "ieee": 1e-4, "f64": 1e-9}
PRIMITIVES = "cuda primitives"


def primitives(seconds: float = 20.0) -> str:
    """Compiles the test of the primitives and runs it; says which are not what the emulator takes them for."""
    import torch

    major, minor = torch.cuda.get_device_capability()
    with tempfile.TemporaryDirectory() as folder:
        program, source = Path(folder, "primitives"), ROOT / "tests" / "emulator" / "primitives_test.cpp"
        target = f"-arch=sm_{major}{minor}" + "a" * (major == 9)
        print("compiler", flush=True)
        subprocess.run(
            ["nvcc", "-x", "cu", "-std=c++17", "-I", ROOT / "csrc", target, source, "-o", program], check=True
        )
        print("program", flush=True)
        try:
            said = subprocess.run([program], capture_output=True, timeout=seconds, check=False).stdout
            end = "" if said else "it said nothing"
        except subprocess.TimeoutExpired as late:
            said, end = late.stdout or b"", f"hung after {seconds:.0f} s"
    lines = said.decode().splitlines()
    held = [line.split()[1] for line in lines if line.startswith("ok")]
    wrong = [line.removeprefix("FAILED").strip() for line in lines if line.startswith("FAILED")]
    if wrong or end:
        return "WRONG: " + "; ".join([*wrong, *[f"{end}, behind {held[-1] if held else 'the start'}"] * bool(end)])
    return f"error none in {len(held)}"


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
    return f"error {worst:.1e}" if worst <= GARBAGE[kernel.number] else f"WRONG: error {worst:.1e}"


def launched(command: list[str], seconds: float) -> str:
    """What a process that runs one kernel says; a hang and a crash in words, too."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=False)
    except subprocess.TimeoutExpired as late:
        said = late.stdout.decode().split() if late.stdout else ["start"]
        return f"HUNG: still in {said[-1]} after {seconds:.0f} s"
    lines = done.stdout.splitlines() or ["start"]
    if done.returncode == 0:
        return lines[-1]
    # A kernel's own assertion says more than what torch makes of it: which thread, and what it waited for.
    said = [line.strip() for line in done.stderr.splitlines()]
    why = [line for line in said if "Assertion" in line][:1] or [line for line in said if "rror" in line][-1:]
    return f"FAILED in {lines[-1]}: {why[0][:200] if why else f'exit status {done.returncode}'}"


def first_product() -> float:
    """Seconds. On a machine that has just started, libraries come from a cold disk: not on any kernel's time."""
    import torch

    began = time.monotonic()
    torch.mm(*torch.ones(2, 64, 64, device="cuda", dtype=torch.bfloat16)).sum().item()
    return time.monotonic() - began


def main() -> int:
    parser = argparse.ArgumentParser(prog="gpu_smoke", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("backends", nargs="*", default=["cuda", "triton"], metavar="cuda|triton")
    parser.add_argument("--one", help="a kernel, to be run here")
    parser.add_argument("--seconds", type=float, default=40.0, help="for a kernel at most")
    parser.add_argument("--at-once", type=int, default=max(1, (os.cpu_count() or 2) // 2), help="processes")
    chosen = parser.parse_args()
    if chosen.one:
        print(primitives() if chosen.one == PRIMITIVES else one(chosen.one))
        return 0
    import gpu_cases as cases
    import torch

    clusters = torch.cuda.get_device_capability() >= (9, 0)
    names = [PRIMITIVES] if "cuda" in chosen.backends else []
    names += [str(kernel) for backend in chosen.backends for kernel in cases.kernels(backend, clusters)]
    print(f"torch's first product took {first_product():.0f} s", flush=True)
    began, bad = time.monotonic(), []
    with ThreadPoolExecutor(chosen.at_once) as pool:
        outcomes = pool.map(lambda name: launched([sys.executable, __file__, "--one", name], chosen.seconds), names)
        for name, said in zip(names, outcomes, strict=True):
            print(f"{name:<32} {said}", flush=True)
            if not said.startswith("error "):
                bad.append(name)
    print(f"{len(names) - len(bad)} of {len(names)} kernels ran, in {time.monotonic() - began:.0f} s", end="")
    print("; not " + ", ".join(bad) if bad else "")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
