"""Kernels compiled ahead of time, for an architecture that need not be here, and what they take."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fused_rnn.cells import Cell
from fused_rnn.triton.backward import bwd_kernel
from fused_rnn.triton.device import activations_of
from fused_rnn.triton.forward import fwd_kernel
from fused_rnn.triton.launch import constants_backward, constants_forward, constants_plan, options
from fused_rnn.triton.tiles import ARCHITECTURES, Plan
from fused_rnn.triton.trips import trips

DTYPES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}

SIZES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class Report:
    """What the assembler said. spills: bytes of a thread that went to memory; shared: bytes of a program.

    trips: with a resident W_hh on NVIDIA, loads of a step's product that wait for each other.
    """

    registers: int
    spills: int
    shared: int
    trips: int = 0


def target(arch: str) -> GPUTarget:
    """sm_90 or gfx942 as Triton's target."""
    return GPUTarget("cuda", int(arch[3:]), 32) if arch.startswith("sm_") else GPUTarget("hip", arch, 64)


# Arguments that point to something else than the problem's dtype, and the constants without which they do not: what is
# absent a launch replaces by a tensor of that dtype. c of gates that are made again is kept wide.
FIXED: dict[str, tuple[str, ...]] = {
    "state": ("fp32", "HAS_STATE"),
    "cells": ("fp32", "HAS_C", "REPLAY"),
    "checkpoints": ("fp32", "CHECKPOINT"),
    "states": ("fp32", "HAS_C", "REPLAY"),
    "first_state": ("fp32", "HAS_C", "REPLAY"),
    "dh_state": ("fp32",),
    "dc_state": ("fp32", "HAS_C"),
    "lengths": ("i64", "HAS_LENGTHS"),
    "reset": ("i32", "HAS_RESET"),
    "counters": ("i32",),
}


def _pointers(kernel: Any, dtype: str, constants: Mapping[str, Any]) -> dict[str, str]:
    """The arguments of a kernel that are pointers, and to what; all others are integers or constants."""
    kinds = {}
    for name in kernel.arg_names:
        if name == "steps":
            return {name: f"*{kind}" for name, kind in kinds.items()}
        kind, *switches = FIXED.get(name, (DTYPES[dtype],))
        kinds[name] = kind if all(constants[switch] for switch in switches) else DTYPES[dtype]
    raise AssertionError("the kernels' first integer is called steps")


def compile_kernel(
    cell: Cell,
    dtype: str,
    precision: str,
    hidden: int,
    plan: Plan,
    arch: str,
    backward: bool,
    bound: int | None = None,
    **variant: bool,
) -> Any:
    """The compiled kernel of a plan. variant: save, checkpoint, replay (in backward: after it), lengths, reset, dy."""
    kernel = bwd_kernel if backward else fwd_kernel
    how = activations_of("half" if dtype != "float32" else precision, ARCHITECTURES[arch])
    if backward:
        constants = constants_backward(cell, hidden, SIZES[dtype], variant.get("dy", True))
    else:
        made = (variant.get(name, False) for name in ("save", "checkpoint", "replay"))
        constants = constants_forward(cell, hidden, SIZES[dtype], *made)
    lengths, reset = variant.get("lengths", False), variant.get("reset", False)
    constants |= constants_plan(plan, ARCHITECTURES[arch], lengths, reset, precision, how)
    pointers = _pointers(kernel, dtype, {"REPLAY": variant.get("replay", False), **constants})
    signature = {name: "constexpr" if name in constants else pointers.get(name, "i32") for name in kernel.arg_names}
    # As the JIT of Triton 3.6 has them, so that what is compiled here has the key of what a launch compiles.
    attributes = {name: [["tt.divisibility", 16]] for name in pointers}
    attributes |= {name: [] for name, value in constants.items() if isinstance(value, str)}
    places = {(kernel.arg_names.index(name),): said for name, said in attributes.items()}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=places)
    return triton.compile(source, target=target(arch), options=options(plan, arch, bound))


def report(kernel: Any, arch: str, hold: bool) -> Report:
    """What a compiled kernel takes. hold: its plan's."""
    if arch.startswith("sm_"):
        return _report_cuda(kernel, hold)
    text = kernel.asm["amdgcn"]

    def number(name: str) -> int:
        found = re.search(rf"\.{name}:\s+(\d+)", text)
        return int(found.group(1)) if found else 0

    # Scalar registers spill into lanes of vector registers, not into memory: what counts is the scratch of a lane.
    return Report(number("vgpr_count"), number("private_segment_fixed_size"), kernel.metadata.shared)


def _cuobjdump(kernel: Any, what: str) -> str:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        return subprocess.run([tool, what, file.name], capture_output=True, text=True, check=True).stdout


def _report_cuda(kernel: Any, hold: bool) -> Report:
    # A frame on the stack is a spill by another name: an array indexed at run time.
    usage = re.findall(r"(REG|STACK|LOCAL):(\d+)", _cuobjdump(kernel, "-res-usage"))
    found = {name: int(value) for name, value in usage}
    waits = trips(_cuobjdump(kernel, "-sass")) if hold else 0
    return Report(found["REG"], found["STACK"] + found["LOCAL"], kernel.metadata.shared, waits)
