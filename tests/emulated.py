"""The CUDA loops over the emulator: csrc/cuda compiled by g++ into a module like fused_rnn._cuda, for cpu tensors.

Built once for a state of the sources, into build/emulated; a minute of one core the first time.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import os
import subprocess
import sysconfig
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from fused_rnn import dispatch
from fused_rnn.cuda import module, plans

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "csrc"
NAME = "_emulated"
# Optimised where the time goes; -w, since the sources are compiled with warnings elsewhere.
FLAGS = ["-std=c++17", "-O2", "-g0", "-fPIC", "-fvisibility=hidden", "-w"]
DEFINES = ["-DFUSED_RNN_EMULATE", f"-DFUSED_RNN_MODULE={NAME}"]
NUMBERS = ("bf16", "f16", "tf32", "ieee", "f64")
PLAIN = ("cuda/python.cpp", "cuda/run.cpp", "cuda/plan.cpp", "cuda/kernels.cpp", "emulated/launch.cpp")


def _includes() -> list[str]:
    places = [SOURCE, Path(torch.__file__).parent / "include", sysconfig.get_paths()["include"]]
    return [f"-I{place}" for place in places]


def _units() -> Iterator[tuple[str, list[str]]]:
    """Source files with what each is compiled with besides."""
    for cell in sorted((SOURCE / "cuda/instantiate").glob("*.cu")):
        for number in NUMBERS:
            yield f"cuda/instantiate/{cell.name}", [f"-DFUSED_RNN_PRECISION={number}"]
    yield from ((source, []) for source in PLAIN)


def _hash() -> str:
    parts = ("cells", "cuda", "emulated", "emulator")
    files = [p for part in parts for p in sorted((SOURCE / part).rglob("*")) if p.is_file()]
    text = hashlib.sha256(str((FLAGS, DEFINES, NUMBERS, PLAIN, torch.__version__, sysconfig.get_platform())).encode())
    for path in [*files, SOURCE / "params.h", SOURCE / "pybind.h"]:
        text.update(path.read_bytes())
    return text.hexdigest()[:16]


def _build(folder: Path) -> Path:
    """The module's file, made if it is not there."""
    made = folder / f"{NAME}{sysconfig.get_config_var('EXT_SUFFIX')}"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # several test processes want one module
        if made.exists():
            return made

        def compile_one(unit: tuple[str, list[str]]) -> str:
            source, defines = unit
            target = folder / ("-".join([source.replace("/", "-"), *(d.split("=")[1] for d in defines)]) + ".o")
            command = ["g++", *FLAGS, *DEFINES, *defines, *_includes(), "-x", "c++", "-c", str(SOURCE / source)]
            done = subprocess.run([*command, "-o", str(target)], capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr
            return str(target)

        with ThreadPoolExecutor(min(2, len(os.sched_getaffinity(0)))) as pool:
            objects = list(pool.map(compile_one, _units()))
        partial = made.with_suffix(".partial")
        subprocess.run(["g++", "-shared", *objects, "-o", str(partial)], check=True)
        partial.rename(made)
    return made


@cache
def emulated() -> ModuleType:
    """The module, imported."""
    made = _build(ROOT / "build" / "emulated" / _hash())
    spec = importlib.util.spec_from_file_location(NAME, made)
    assert spec is not None
    assert spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


@contextmanager
def on_the_emulator(seed: int = 0, **forced: Any) -> Iterator[ModuleType]:
    """The "cuda" backend runs tensors on the cpu, by plans with these parts. seed: the order in which threads run."""
    loaded = emulated()
    loaded.seed(seed)
    dispatch._choose_cached.cache_clear()  # what it remembers of the cpu holds no longer
    try:
        with module.emulating(loaded), plans.override(**forced):
            yield loaded
    finally:
        dispatch._choose_cached.cache_clear()
