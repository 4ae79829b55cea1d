"""Kernels of users' cells and of narrow weights: compiled by NVRTC for the device at first use, and kept on disk.

A file is named by all that went into it, and never changes.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache, lru_cache, partial
from pathlib import Path
from typing import Any

import torch

from fused_rnn.cells import CELLS, Cell
from fused_rnn.cuda import module, nvrtc, plans, printer
from fused_rnn.cuda.printer import Kernel
from fused_rnn.gpu.files import cache_folder, replace
from fused_rnn.plan import PRECISIONS, fewer_blocks, stages_of

# (cell, kernel, whether with gradients of sequences, device) → what a loop of the module is given as `loaded`.
Load = Callable[[Cell, Kernel, bool, int], int]

_OPTIONS = ("-std=c++17", "--device-as-default-execution-space", "--ptxas-options=-v")
_LARGEST = 12  # with so many blocks fewer one is left in registers, of any tile; FMA lanes have 3 at most
_ALL = 100  # with so many none is: csrc/cuda/tiles.h's kAllBlocks
_emulated: Load | None = None
_lock = threading.Lock()
_loaded: dict[tuple[Any, ...], int] = {}


class Spills(Exception):
    """A kernel has not the registers that it needs."""


@contextmanager
def emulating(load: Load) -> Iterator[None]:
    """Kernels for the module that stands in fused_rnn._cuda's place: for tests."""
    global _emulated
    before, _emulated = _emulated, load
    try:
        yield
    finally:
        _emulated = before


def loader() -> Load | None:
    """What stands in the place of NVRTC and the driver, if anything does."""
    return _emulated


def refusal() -> str | None:
    """Why the kernels that the module does not have cannot be had, or None."""
    if module.emulates():
        return None if _emulated is not None else "the emulator has the kernels of built-in cells alone"
    if (reason := nvrtc.missing()) is not None:
        return reason
    if headers() is None:
        return "the sources of its kernels were not installed with it"
    return None


@cache
def headers() -> Path | None:
    """The folder of csrc's headers: in an installed package, or beside it where it was built in place."""
    package = Path(__file__).parents[1]
    for folder in (package / "csrc", package.parent / "csrc"):
        if (folder / "nvrtc" / "cmath").exists():
            return folder
    return None


@cache
def _content(folder: Path) -> bytes:
    """What stands for all headers in a file's name."""
    found = hashlib.sha256()
    for part in ("cells", "cuda", "cuda/primitives", "nvrtc"):
        for path in sorted(path for path in (folder / part).iterdir() if path.suffix in (".h", "")):
            if path.is_file():
                found.update(path.name.encode() + path.read_bytes())
    return found.digest()


def compiled(cell: Cell, kernel: Kernel, sequences: bool, arch: int) -> nvrtc.Compiled:
    """A kernel's machine code, compiled or found. arch: 90 for sm_90."""
    folder = headers()
    if folder is None:
        raise RuntimeError(refusal())
    source = printer.source(printer.definition(cell, sequences=sequences, late=kernel.by_stages), [kernel])
    options = [*_OPTIONS, f"--gpu-architecture={nvrtc.target(arch)}"]
    if os.environ.get("FUSED_RNN_CUDA_DEBUG") == "1":  # waits that end: setup.py
        options.append("-DFUSED_RNN_BOUNDED_SPINS")
    key = hashlib.sha256(repr((source, options, nvrtc.version())).encode() + _content(folder)).hexdigest()
    path = cache_folder() / f"{key}.kernel"
    if (found := _read(path)) is not None:
        return found
    includes = [f"--include-path={folder}", f"--include-path={folder / 'nvrtc'}"]
    made = nvrtc.compiled(source, kernel.name("Printed"), options + includes)
    with suppress(OSError):  # a folder that cannot be written to costs time alone
        _write(path, made)
    return made


def _read(path: Path) -> nvrtc.Compiled | None:
    """What an earlier process has left."""
    try:
        head, _, image = path.read_bytes().partition(b"\n")
        told = json.loads(head)
        if told["bytes"] == len(image):
            return nvrtc.Compiled(told["name"], image, told["spills"])
    except (OSError, ValueError, KeyError, TypeError):  # nor is every JSON a dict
        pass
    return None


def _write(path: Path, made: nvrtc.Compiled) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    head = json.dumps({"name": made.name, "spills": made.spills, "bytes": len(made.image)}).encode()
    replace(path, head + b"\n" + made.image)


def _load(cell: Cell, kernel: Kernel, sequences: bool, device: int, may_spill: bool = False) -> int:
    loops = module.loaded()
    made = compiled(cell, kernel, sequences, loops.device(device).arch)
    if made.spills and kernel.tiles and not may_spill:
        raise Spills
    loaded: int = loops.load(made.image, made.name)
    return loaded


_load_as_it_is = partial(_load, may_spill=True)


def loaded(cell: Cell, kernel: Kernel, device: int, sequences: bool = False, may_spill: bool = False) -> int:
    """A kernel, for `loaded` of the module's loops on the current device; 0 where the module has it."""
    if cell.program is None and kernel.narrow is None:
        return 0
    load = _emulated or (_load_as_it_is if may_spill else _load)
    key = (module.loaded(), load, cell.name, kernel, sequences, device)
    with _lock:
        if key not in _loaded:
            _loaded[key] = load(cell, kernel, sequences, device)
        return _loaded[key]


def planned(
    cell: Cell, device: int, sizes: tuple[int, ...], sequences: bool = False, narrow: str | None = None
) -> tuple[Any | None, int]:
    """The plan of a loop, or None where it runs a step at a time, and its kernel, as `loaded` gives it.

    sizes: as fused_rnn.plan.make has them.  sequences: backward, with gradients of the other states over time.
    narrow: forward, what W_hh is kept in.
    """
    if not cell.recurrent:
        return None, 0
    if cell.program is None and narrow is None:
        return None if sequences else plans.choose(device, *sizes), 0
    return _find((module.loaded(), _emulated, plans.forced()), cell.name, device, sizes, sequences, narrow)


@lru_cache(maxsize=4096)
def _find(
    now: tuple[Any, ...], name: str, device: int, sizes: tuple[int, ...], sequences: bool, narrow: str | None
) -> tuple[Any | None, int]:
    """A kernel for a known team, if there is one for the problem; where it spills, a general one. Where that spills it
    leaves a part of its weights to shared memory, by the plan that is then the best.

    now: what else it depends on.
    """
    cell = CELLS[name]
    precision, backward, kind = PRECISIONS[sizes[0]], bool(sizes[1]), ("persistent_fwd", "persistent_bwd")[sizes[1]]
    first, last = fewer_blocks(cell, precision, backward), 2 if precision == "ieee" else _LARGEST
    stages = stages_of(cell, backward)
    tries = [(True, 0)] * (first == 0) + [(False, fewer) for fewer in range(first, max(first, last) + 1, 2)]
    tries += [(False, _ALL)] * cell.staged
    found = None
    for known, fewer in tries:
        plan = plans.choose(device, *sizes, known=known, fewer=fewer, narrow=narrow, stages=stages)
        if plan is None:
            break
        if known and plan.shape < 0:
            continue
        found = plan, Kernel(kind, precision, plan.rows // 8, fewer, plan.shape, narrow)
        with suppress(Spills):
            return plan, loaded(cell, found[1], device, sequences)
    if cell.staged and found is not None:  # which is faster than a step at a time
        return found[0], loaded(cell, found[1], device, sequences, may_spill=True)
    return None, 0


def pointwise(cell: Cell, loop: str, dtype: torch.dtype, device: int) -> int:
    """Likewise the kernel that runs a step at a time. loop: "Forward" or "Backward"."""
    kind = "fwd" if loop == "Forward" else "bwd"
    number = {torch.bfloat16: "bf16", torch.float16: "f16", torch.float64: "f64"}.get(dtype, "ieee")
    return loaded(cell, Kernel(f"{'stages' if cell.staged else 'pointwise'}_{kind}", number), device)
