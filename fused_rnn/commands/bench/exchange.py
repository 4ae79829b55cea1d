"""Times of the exchanges between multiprocessors, by benchmarks/exchange.cu, which is compiled for the GPU at hand."""

from __future__ import annotations

import json
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import torch

SOURCE = Path(__file__).resolve().parents[3] / "benchmarks" / "exchange.cu"
COMPILE_S, RUN_S = 120.0, 60.0

Exchanges = tuple[tuple[str, int, float], ...]  # (kind, members, seconds a round)


@cache
def measure_exchanges() -> Exchanges:
    """Seconds of a round of each kind and size of team on the current GPU. () where there is no nvcc, or no checkout.

    Raises RuntimeError if the program does not compile or run.
    """
    nvcc = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
    if nvcc is None or not SOURCE.exists():
        return ()
    major, minor = torch.cuda.get_device_capability()
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "exchange"
        architecture = f"-arch=sm_{major}{minor}{'a' * (major == 9)}"
        flags = ["-std=c++17", "-O3", "--expt-relaxed-constexpr", architecture]
        _call([nvcc, *flags, str(SOURCE), "-o", str(program)], COMPILE_S)
        said = _call([str(program)], RUN_S)
    return read(said)


def read(said: str) -> Exchanges:
    """The program's lines on rounds of a word; slices are for whoever reads them himself."""
    rows = [row for row in map(json.loads, said.splitlines()) if row["kind"] != "slices"]
    return tuple((str(row["kind"]), int(row["members"]), float(row["seconds"])) for row in rows)


def _call(command: list[str], seconds: float) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=seconds)
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"{command[0]} did not end within {seconds:.0f} s") from None
    if done.returncode != 0:
        raise RuntimeError(f"{command[0]}: {(done.stderr or done.stdout).strip()}")
    return done.stdout
