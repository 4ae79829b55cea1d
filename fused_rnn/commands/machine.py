"""Which machine, which versions, which commit: what a number is worth nothing without."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import time
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import fused_rnn
from fused_rnn import ops


def cpu_model() -> str:
    """The processor's name as the system gives it; the architecture where it gives none."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def cpu_isa() -> str:
    """The widest instruction set torch's own kernels use here."""
    return torch.backends.cpu.get_cpu_capability()


def caches() -> dict[str, int]:
    """Bytes of the first core's caches for data, {"L1": …, "L2": …}, the nearest first; {} where nothing says so."""
    found = {}
    for index in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        kind, level, size = ((index / name).read_text().strip() for name in ("type", "level", "size"))
        if kind != "Instruction" and (known := re.fullmatch(r"(\d+)([KM]?)", size)):
            found[f"L{level}"] = int(known[1]) << {"": 0, "K": 10, "M": 20}[known[2]]
    return found


def crowded(threads: int, seconds: float = 0.5) -> str | None:
    """Why several threads cannot be measured now, in words: other processes use their cores. None where none is told.

    The thread that has to wait for its core holds up all others at every step, torch.nn's more than ours.
    """
    if threads < 2 or not Path("/proc/stat").exists():
        return None
    idle, all_ = _ticks()
    time.sleep(seconds)
    later_idle, later_all = _ticks()
    cores = len(os.sched_getaffinity(0))
    free = cores * (later_idle - idle) / max(1, later_all - all_)
    if free > threads - 0.5:
        return None
    return (
        f"Of {cores} cores {free:.1f} are free of other work, and {threads} threads wait for the slowest of them: no"
        " verdict. Take --threads 1, or measure again when the machine is quiet."
    )


def _ticks() -> tuple[int, int]:
    """What all cores together have spent idle, and in all."""
    numbers = [int(word) for word in Path("/proc/stat").read_text().splitlines()[0].split()[1:]]
    return sum(numbers[3:5]), sum(numbers[:8])


def kernels_isa() -> str:
    """The instruction set our own kernels use here; "none" where they were not built."""
    return "none" if ops._C is None else str(ops._C.isa())


def commit() -> str:
    """The short hash of the checkout this package lies in, "+" appended if it has changes; "" outside of one."""
    here = Path(__file__).resolve().parents[2]
    if not (here / "csrc").is_dir():  # installed, and what lies around it may be somebody else's checkout
        return ""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(here), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        return done.stdout.strip() if done.returncode == 0 else ""

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", "fused_rnn", "csrc", "setup.py")
        head = git("rev-parse", "--short=12", "HEAD")
    except FileNotFoundError:
        return ""
    return head + ("+" if head and changed else "")


COMMITTED = Path("benchmarks/results")  # of a checkout: what its tables are made of
OUT = Path("bench-out")  # what runs write, unless told otherwise


def folder(device: str, root: Path = COMMITTED) -> Path:
    """Where results of this machine lie under a root: cpu, or a folder named after the GPU."""
    if device == "cpu" or not torch.cuda.is_available():
        return root / device
    name = re.sub(r"^(nvidia|amd)[ -]", "", torch.cuda.get_device_name().lower())
    return root / re.sub(r"[^a-z0-9]+", "-", name).strip("-")


def make_ignored(root: Path) -> None:
    """Make a folder that git leaves alone, in whoever's checkout it comes to lie."""
    root.mkdir(parents=True, exist_ok=True)
    note = root / ".gitignore"
    if not note.exists():
        note.write_text("*\n", encoding="utf-8")


def describe(device: str) -> dict[str, Any]:
    """What identifies a run, JSON-ready. device: "cpu" or "cuda"."""
    facts: dict[str, Any] = {
        "device": device,
        "device_name": cpu_model() if device == "cpu" else torch.cuda.get_device_name(),
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "caches": caches(),
        "isa": cpu_isa(),
        "kernels": kernels_isa(),
        "fused_rnn": fused_rnn.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "commit": commit(),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%MZ"),
    }
    if device == "cuda":
        facts |= {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
        facts |= {"driver": _driver(), "triton": _version("triton")}
        found = torch.cuda.get_device_properties(torch.cuda.current_device())
        facts |= {"capability": f"{found.major}.{found.minor}", "multiprocessors": found.multi_processor_count}
        facts["clocks"] = _clocks()
    return facts


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def _driver() -> str:
    return _nvidia_smi("driver_version")


def _clocks() -> str:
    """Of the multiprocessors and the memory, now and at most."""
    return _nvidia_smi("clocks.sm,clocks.max.sm,clocks.mem,clocks.max.mem")


def _nvidia_smi(query: str) -> str:
    """What nvidia-smi says of the first GPU; "" where it is not there."""
    command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return ""
    return done.stdout.strip().splitlines()[0] if done.returncode == 0 and done.stdout.strip() else ""
