"""NVRTC, the compiler in every CUDA build of torch, by ctypes: from a source to machine code, on any machine."""

from __future__ import annotations

import ctypes
import os
import re
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch


class Compiled(NamedTuple):
    """One kernel. name: its symbol.  image: machine code.  spills: bytes that a thread's registers do not hold."""

    name: str
    image: bytes
    spills: int


def _candidates() -> Iterator[str]:
    """Where the library may lie: named by the environment, in torch's wheels, in a toolkit, where the loader looks."""
    named = os.environ.get("FUSED_RNN_NVRTC")
    if named:
        yield named
        return
    major = (torch.version.cuda or "").partition(".")[0]
    soname = f"libnvrtc.so.{major}" if major else "libnvrtc.so.*"
    site = Path(torch.__file__).parent
    folders = [site / "lib", *sorted(site.parent.glob("nvidia/*/lib"))]
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    for folder in [*folders, Path(home, "lib64"), Path(home, "targets/x86_64-linux/lib")]:
        for path in sorted(folder.glob(soname)):
            yield str(path)
    if major:
        yield soname


@cache
def _library() -> tuple[Any, str]:
    """The library, or None and the reason."""
    reason = "there is no libnvrtc beside torch, nor where the loader looks (FUSED_RNN_NVRTC names it)"
    for path in _candidates():
        try:
            for builtins in sorted(
                Path(path).parent.glob("libnvrtc-builtins.so*")
            ):  # which it would look for elsewhere
                ctypes.CDLL(str(builtins))
            return ctypes.CDLL(path), ""
        except OSError as error:
            reason = f"{path} cannot be loaded: {error}"
    return None, reason


def missing() -> str | None:
    """Why nothing can be compiled, or None."""
    library, reason = _library()
    return None if library is not None else f"kernels that are not built in are compiled by NVRTC, and {reason}"


@cache
def version() -> tuple[int, int]:
    major, minor = ctypes.c_int(), ctypes.c_int()
    _ask("nvrtcVersion", ctypes.byref(major), ctypes.byref(minor))
    return major.value, minor.value


@cache
def target(arch: int) -> str:
    """What to compile for: the device's architecture (90 for sm_90), or the latest that its major version runs."""
    count = ctypes.c_int()
    _ask("nvrtcGetNumSupportedArchs", ctypes.byref(count))
    known = (ctypes.c_int * count.value)()
    _ask("nvrtcGetSupportedArchs", known)
    runs = [one for one in known if one // 10 == arch // 10 and one <= arch]
    if not runs:
        raise RuntimeError(
            f"NVRTC {'.'.join(map(str, version()))} knows no sm_{arch}: a newer torch brings a newer one"
        )
    return "sm_90a" if max(runs) == 90 else f"sm_{max(runs)}"


def _ask(function: str, *arguments: Any) -> None:
    library, reason = _library()
    if library is None:
        raise RuntimeError(reason)
    result = getattr(library, function)(*arguments)
    if result:
        library.nvrtcGetErrorString.restype = ctypes.c_char_p
        raise RuntimeError(f"{function}: {library.nvrtcGetErrorString(result).decode()}")


def _text(program: Any, what: str) -> bytes:
    """The log, or the machine code."""
    size = ctypes.c_size_t()
    _ask(f"nvrtcGet{what}Size", program, ctypes.byref(size))
    text = ctypes.create_string_buffer(size.value)
    _ask(f"nvrtcGet{what}", program, text)
    return text.raw


def compiled(source: str, expression: str, options: Sequence[str]) -> Compiled:
    """The kernel that a C++ expression names. Raises RuntimeError with the compiler's words."""
    program = ctypes.c_void_p()
    _ask("nvrtcCreateProgram", ctypes.byref(program), source.encode(), b"cell.cu", 0, None, None)
    try:
        _ask("nvrtcAddNameExpression", program, expression.encode())
        told = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
        try:
            _ask("nvrtcCompileProgram", program, len(options), told)
        except RuntimeError as error:
            raise RuntimeError(f"{error}\n{_text(program, 'ProgramLog').decode(errors='replace')}") from None
        log = _text(program, "ProgramLog").decode(errors="replace")
        name = ctypes.c_char_p()
        _ask("nvrtcGetLoweredName", program, expression.encode(), ctypes.byref(name))
        spills = sum(map(int, re.findall(r"(\d+) bytes spill (?:stores|loads)", log)))
        return Compiled((name.value or b"").decode(), _text(program, "CUBIN"), spills)
    finally:
        _ask("nvrtcDestroyProgram", ctypes.byref(program))
