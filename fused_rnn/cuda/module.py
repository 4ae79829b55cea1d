"""The compiled loops, the module fused_rnn._cuda: whether this build has it, and which devices it cannot run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from typing import Any

import torch

_cuda: Any
MISSING: str | None
try:
    _cuda, MISSING = import_module("fused_rnn._cuda"), None
except ImportError as error:
    _cuda = None
    MISSING = (
        f"this build has no CUDA kernels ({error}): install with FUSED_RNN_CUDA=1 where nvcc is;"
        " the triton backend needs no build"
    )

_emulated: Any = None  # stands for _cuda, and takes tensors on the cpu
_OLDEST = 80


def loaded() -> Any:
    """The module to call."""
    return _cuda if _emulated is None else _emulated


@contextmanager
def emulating(module: Any) -> Iterator[None]:
    """Another module in the place of fused_rnn._cuda, one that runs the loops on the cpu: for tests."""
    global _emulated
    before, _emulated = _emulated, module
    try:
        yield
    finally:
        _emulated = before


def emulates() -> bool:
    """Whether another module stands in its place."""
    return _emulated is not None


def device_index(device: torch.device) -> int:
    return 0 if device.type == "cpu" else int(torch.cuda.current_device() if device.index is None else device.index)


def where(index: int) -> str:
    """On what the loops of this device would run, in words."""
    return "CUDA loops in the emulator" if _emulated is not None else f"CUDA loops on sm_{loaded().device(index).arch}"


def refusal(device: str) -> str | None:
    """Why tensors on this type of device cannot be run, or None."""
    if _emulated is not None:
        return None if device == "cpu" else f"its emulator takes tensors on the cpu, not on {device}"
    if device != "cuda":
        return f"it runs tensors on a CUDA GPU, not on {device}"
    if torch.version.hip is not None:
        return "this torch is built for ROCm, whose GPUs the triton backend runs"
    if MISSING is not None:
        return MISSING
    if not torch.cuda.is_available():
        return "torch sees no GPU"
    return refusal_of_gpu(torch.cuda.current_device())


@cache
def refusal_of_gpu(index: int) -> str | None:
    """Why the GPU of this number cannot be run, or None."""
    try:
        arch = loaded().device(index).arch
    except RuntimeError as error:  # a driver too old for the runtime that the module was built with
        return f"{error}; the torch backend runs what cuDNN knows"
    if arch < _OLDEST:
        return f"GPU {index} is an sm_{arch}, older than sm_{_OLDEST}: the torch backend runs what cuDNN knows"
    built = loaded().ARCHITECTURES
    if not has_code_for(arch, built):
        return (
            f"this build has code for {built}, and GPU {index} is an sm_{arch}: install with"
            f' TORCH_CUDA_ARCH_LIST="{arch // 10}.{arch % 10}"; the triton and torch backends run it as it is'
        )
    return None


def has_code_for(arch: int, architectures: str) -> bool:
    """Whether code for these architectures ("8.0 9.0a 12.0+PTX") runs on a GPU of this one (90 for sm_90).

    Machine code runs on its own and later minor versions of one major; of a name with a letter on that one alone. PTX,
    which the driver compiles, runs on everything later, and with a letter on that one alone.
    """
    for name in architectures.replace(";", " ").split():
        number, _, ptx = name.partition("+")
        exact = not number[-1].isdigit()
        major, minor = (int(part) for part in (number[:-1] if exact else number).split("."))
        code = 10 * major + minor
        if arch == code or (not exact and arch > code and (bool(ptx) or arch // 10 == major)):
            return True
    return False


# What torch.compiler.assume_constant_result does, without the import of all of Dynamo that it costs: an answer of the
# environment, which is not to be traced.
refusal._dynamo_marked_constant = True  # type: ignore[attr-defined]
