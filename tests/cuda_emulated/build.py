"""Builds the CUDA loops over the emulator: the module of csrc/cuda/python.cpp with the kernels of one cell and number.

Object files are kept in build/cuda_emulated under the hash of all that went into them.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sysconfig
from pathlib import Path
from typing import NamedTuple

import torch

ROOT = Path(__file__).parent.parent.parent
CACHE = ROOT / "build" / "cuda_emulated"
CXX = os.environ.get("CXX", "g++")
FLAGS = ["-std=c++17", "-O1", "-g1", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-unknown-pragmas"]
DEFINES = ["-DFUSED_RNN_EMULATE", "-DFUSED_RNN_MODULE=_emulated"]

SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
FLAVOURS: dict[str, list[str]] = {
    "plain": [],
    "asan": SANITIZE,
    "races": ["-DFUSED_RNN_EMULATE_RACES", "-fsanitize=thread"],  # the emulator, not libtsan, answers to the calls
}
NUMBERS = ("bf16", "f16", "tf32", "ieee", "f64")
CELLS = {"lstm": "Lstm", "gru": "Gru", "rnn_tanh": "RnnTanh", "rnn_relu": "RnnRelu"}

# The kernels that are not in an instance: their places in the table stay empty. Weak: the instance's come first.
ABSENT = (
    """
#include "cells/gru.h"
#include "cells/lstm.h"
#include "cells/rnn.h"
#include "cuda/kernels.h"
namespace fused_rnn::cuda {
"""
    + "".join(
        f"template <> __attribute__((weak)) Kernels kernels_of<{formula}, Precision::{number}>() {{ return {{}}; }}\n"
        for formula in CELLS.values()
        for number in NUMBERS
    )
    + "}\n"
)

# Of a planted mistake, the smallest tile's kernels alone: a third of the time.
SMALLEST = """
#include "cells/gru.h"
#include "cells/lstm.h"
#include "cells/rnn.h"
#include "cuda/instantiate.h"
namespace fused_rnn::cuda {{
template <>
Kernels kernels_of<{formula}, Precision::{number}>() {{
  using Policy = PolicyOf<Precision::{number}>::Type;
  return {{{{&persistent_fwd_kernel<{formula}, Policy, 1>}},
          {{&persistent_bwd_kernel<{formula}, Policy, 1>}},
          &pointwise_fwd_kernel<{formula}, Policy::Storage, Policy::Math>,
          &pointwise_bwd_kernel<{formula}, Policy::Storage, Policy::Math>}};
}}
}}  // namespace fused_rnn::cuda
"""


class Instance(NamedTuple):
    cell: str
    number: str
    smallest: bool = False


def _run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, " ".join(command) + "\n" + done.stderr
    return done.stdout


def _includes(csrc: Path) -> list[str]:
    own = [f"-I{csrc}", f"-I{sysconfig.get_paths()['include']}"]
    return [*own, f"-I{Path(torch.__file__).parent / 'include'}"]  # pybind11's headers


def _object(csrc: Path, source: Path, flags: list[str]) -> Path:
    """The object file of a source, by its own text, that of each of our headers it includes, and the flags."""
    command = [CXX, *FLAGS, *DEFINES, *flags, *_includes(csrc), "-x", "c++"]
    found = _run([*command, "-MM", str(source)]).replace("\\\n", " ").split()[1:]
    ours = sorted(Path(name).resolve() for name in found)
    key = hashlib.sha256(repr([CXX, FLAGS, DEFINES, flags]).encode())
    for path in ours:
        if path.is_relative_to(csrc) or path == source:
            key.update(path.read_bytes())
    made = CACHE / f"{source.stem}-{key.hexdigest()[:20]}.o"
    if not made.exists():
        unfinished = made.with_suffix(f".{os.getpid()}")
        _run([*command, "-c", str(source), "-o", str(unfinished)])
        unfinished.replace(made)
    return made


def _text(name: str, text: str) -> Path:
    path = CACHE / f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:20]}.cpp"
    if not path.exists():
        path.write_text(text)
    return path


def module(flavour: str, instance: Instance, csrc: Path = ROOT / "csrc") -> Path:
    """The shared library of a flavour. csrc: the sources, or a copy of them with a mistake."""
    CACHE.mkdir(parents=True, exist_ok=True)
    flags, formula = FLAVOURS[flavour], CELLS[instance.cell]
    number = f"-DFUSED_RNN_PRECISION={instance.number}"
    if instance.smallest:
        kernels = _object(csrc, _text("smallest", SMALLEST.format(formula=formula, number=instance.number)), flags)
    else:
        kernels = _object(csrc, csrc / "cuda" / "instantiate" / f"{instance.cell}.cu", [*flags, number])
    objects = [kernels]
    for name in ("cuda/run", "cuda/plan", "cuda/kernels", "emulated/launch"):
        objects.append(_object(csrc, csrc / f"{name}.cpp", flags))
    objects.append(_object(csrc, csrc / "cuda" / "python.cpp", ["-O0"]))
    objects.append(_object(csrc, _text("absent", ABSENT), ["-O0"]))
    key = hashlib.sha256(" ".join(path.name for path in objects).encode()).hexdigest()[:20]
    made = CACHE / f"{flavour}-{instance.cell}-{instance.number}-{key}.so"
    if not made.exists():
        unfinished = made.with_suffix(f".{os.getpid()}")
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
