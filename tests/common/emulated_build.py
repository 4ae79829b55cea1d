"""Builds the CUDA loops over the emulator: csrc/cuda, compiled by g++ into a module that takes tensors on the cpu.

With every kernel for the tests of the backend, a minute of one core the first time; with one cell's in one precision
for those of the loops alone, which sanitizers watch and mistakes are planted in. Object files are kept in
build/cuda_emulated under the hash of all that went into them.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import subprocess
import sysconfig
import threading
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import product
from pathlib import Path
from typing import NamedTuple

import torch

ROOT = Path(__file__).parents[2]
CSRC = ROOT / "csrc"
CACHE = ROOT / "build" / "cuda_emulated"
CXX = os.environ.get("CXX", "g++")
FLAGS = ["-std=c++17", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-unknown-pragmas"]
FLAGS += ["-fno-strict-aliasing"]  # a kernel of a known width reads a Loop as a LoopOf<width>
DEFINES = ["-DFUSED_RNN_EMULATE", "-DFUSED_RNN_MODULE=_emulated"]

SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
FLAVOURS: dict[str, list[str]] = {
    "plain": ["-O2", "-g0"],
    "asan": ["-O1", "-g1", *SANITIZE],
    # The emulator, not libtsan, answers to the calls.
    "races": ["-O1", "-g1", "-DFUSED_RNN_EMULATE_RACES", "-fsanitize=thread"],
}
PRECISIONS = ("bf16", "f16", "tf32", "ieee", "f64")
PLAIN = ("cuda/run.cpp", "cuda/plan.cpp", "cuda/kernels.cpp", "cuda/rows.cu", "cuda/join.cu", "emulated/launch.cpp")


def formulas(*headers: Path) -> dict[str, str]:
    """The registered cells' names and C++ types, of csrc/cells and of further headers."""
    files = [*sorted((CSRC / "cells").glob("*.h")), *headers]
    types = [name for file in files for name in re.findall(r"^FUSED_RNN_CELL\(\d+, (\w+)\)", file.read_text(), re.M)]
    return {re.sub(r"(?<!^)(?=[A-Z])", "_", name).lower(): name for name in types}


CELLS = formulas()

# The kernels that are not in a module: their places in the table stay empty. Weak: the module's come first.
ABSENT = """
#include "cells/all.h"
#include "cuda/kernels.h"
namespace fused_rnn::cuda {{
{kernels}
}}
"""
ABSENT_KERNEL = "template <> __attribute__((weak)) Kernels kernels_of<{}, Precision::{}>() {{ return {{}}; }}"


class Instance(NamedTuple):
    cell: str
    precision: str
    smallest: bool = False  # the smallest tile's kernels alone: a third of the time
    narrow: str = ""  # forward kernels alone, of W_hh in fewer bytes
    shapes: int = -1  # bits of the places of known teams whose kernels it has, five times the rest of the smallest: all


def _run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, " ".join(command) + "\n" + done.stderr
    return done.stdout


@cache
def _ours(source: Path, csrc: Path) -> frozenset[Path]:
    """A source and each header of ours that it includes."""
    found = {source}
    for name in re.findall(r'^#include "(.+)"', source.read_text(), re.M):
        places = [place / name for place in (source.parent, csrc) if (place / name).exists()]
        found.update(*(_ours(place.resolve(), csrc) for place in places[:1]))
    return frozenset(found)


def _object(csrc: Path, source: Path, flags: list[str], more: Path | None = None) -> Path:
    """The object file of a source, by all of our text that is in it, and by the command."""
    includes = [f"-I{csrc}"]
    if source.name == "python.cpp":
        # pybind11's headers come with torch.
        includes += [
            f"-isystem{place}" for place in (sysconfig.get_paths()["include"], Path(torch.__file__).parent / "include")
        ]
    ours = [*sorted(_ours(source.resolve(), csrc.resolve())), *([] if more is None else [more])]
    key = hashlib.sha256(repr([CXX, FLAGS, DEFINES, flags, includes[1:]]).encode())
    for path in ours:
        key.update(path.read_bytes())
    made = CACHE / f"{source.stem}-{key.hexdigest()[:20]}.o"
    with made.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # several test processes want one object
        if not made.exists():
            unfinished = made.with_suffix(".unfinished")
            given = [] if more is None else [f'-DFUSED_RNN_MORE_CELLS="{more}"']
            command = [CXX, *FLAGS, *DEFINES, *flags, *given, *includes, "-x", "c++", "-c", str(source)]
            _run([*command, "-o", str(unfinished)])
            unfinished.replace(made)
    return made


def _text(name: str, text: str) -> Path:
    path = CACHE / f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:20]}.cpp"
    if not path.exists():
        unfinished = _unfinished(path)
        unfinished.write_text(text)
        unfinished.replace(path)
    return path


def _unfinished(path: Path) -> Path:
    """Where this thread writes it."""
    return path.with_suffix(f".{os.getpid()}-{threading.get_ident()}")


def module(
    flavour: str, instances: Iterable[Instance] | None = None, csrc: Path = CSRC, more: Path | None = None
) -> Path:
    """The shared library of a flavour.

    instances: whose kernels it has, None for all.  csrc: the sources, or a copy of them with a mistake.  more: a header
    with further cells.
    """
    CACHE.mkdir(parents=True, exist_ok=True)
    flags, types = FLAVOURS[flavour], formulas(*([] if more is None else [more]))
    every = [Instance(*one) for one in product(types, PRECISIONS)]
    instances = every if instances is None else list(instances)
    there = {instance[:2] for instance in instances}
    absent = [ABSENT_KERNEL.format(types[one.cell], one.precision) for one in every if one[:2] not in there]
    units = [(csrc / "cuda" / "python.cpp", ["-O0"])]
    for one in instances:
        defines = [f"-DFUSED_RNN_FORMULA={types[one.cell]}", f"-DFUSED_RNN_PRECISION={one.precision}"]
        defines += ["-DFUSED_RNN_SMALLEST_TILE"] * one.smallest
        defines += [f"-DFUSED_RNN_NARROW={one.narrow}"] * bool(one.narrow)
        defines += [f"-DFUSED_RNN_KNOWN_SHAPES={one.shapes}"] * (one.shapes != -1)
        units.append((csrc / "cuda" / "instantiate.cu", [*flags, *defines]))
    units += [(csrc / name, flags) for name in PLAIN]
    units.append((_text("absent", ABSENT.format(kernels="\n".join(absent))), ["-O0"]))
    with ThreadPoolExecutor(min(2, len(os.sched_getaffinity(0)))) as pool:
        objects = list(pool.map(lambda unit: _object(csrc, *unit, more), units))
    key = hashlib.sha256(" ".join(path.name for path in objects).encode()).hexdigest()[:20]
    made = CACHE / f"{flavour}-{key}.so"
    if not made.exists():
        unfinished = _unfinished(made)
        link = SANITIZE if flavour == "asan" else []
        _run([CXX, "-shared", *link, *map(str, objects), "-o", str(unfinished)])
        unfinished.replace(made)
    return made


def environment(flavour: str) -> dict[str, str]:
    """Of a process that loads such a library: a sanitizer's runtime must come before all else."""
    own = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    if flavour != "asan":
        return own
    runtimes = [_run([CXX, f"-print-file-name=lib{name}.so"]).strip() for name in ("asan", "ubsan")]
    # Python itself leaks; a redzone of 256 bytes also stops an access that strides over the smallest one.
    return {
        **own,
        "LD_PRELOAD": " ".join(runtimes),
        "ASAN_OPTIONS": "detect_leaks=0:redzone=256:max_redzone=2048",
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }
