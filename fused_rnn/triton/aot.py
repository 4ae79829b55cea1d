"""Kernels compiled ahead of time, for an architecture that need not be here, and what they take."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fused_rnn.cells import Cell
from fused_rnn.triton.backward import bwd_kernel
from fused_rnn.triton.compile import (
    constants_backward,
    constants_forward,
    constants_scan,
    constants_schedule,
    constants_stages,
    last_stage,
    options,
)
from fused_rnn.triton.device import activation_of
from fused_rnn.triton.forward import fwd_kernel
from fused_rnn.triton.scan import scan_bwd_kernel, scan_fwd_kernel
from fused_rnn.triton.schedule import Schedule
from fused_rnn.triton.target import ARCHITECTURES
from fused_rnn.triton.trips import LINE, trips

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


Pointers = dict[str, str | tuple[str, ...]]


def _pointers(kernel: Any, cell: Cell, dtype: str, constants: Mapping[str, Any]) -> Pointers:
    """The arguments of a kernel that are pointers, and to what: all before `steps`. A tuple has one for each state.

    What is absent a launch replaces by a tensor of the problem's dtype, or leaves out of a tuple. The history of gates
    that are made again is kept wide.
    """
    others, replay = len(cell.states) - 1, constants["REPLAY"]
    states = cell.carried if kernel is scan_fwd_kernel else 1 + others
    own, wide = f"*{DTYPES[dtype]}", "*fp32"
    history = (wide if replay else own,) * others
    every: Pointers = {
        "carried": (wide,) * (others if replay else cell.carried),
        "histories": history if constants.get("SAVE") or constants.get("SEQUENCES") else (),
        "checkpoints": (wide,) * others if constants.get("CHECKPOINT") else (),
        "states": (own, *history),
        "first": (own, *history),
        "dstates": (wide,) * len(cell.states),
        "entering": wide,
        "sums": (wide,) * states,
        "products": (wide,) * states,
        "dsequences": (own,) * others if constants.get("SEQUENCES") else (),
        "masks": (own,) * cell.masks,
        "shared": (wide, own, own) if constants["STAGED"] else (),
        "dparams": wide if constants.get("DP") else own,
        "lengths": "*i64" if constants["HAS_LENGTHS"] else own,
        "reset": "*i32" if constants["HAS_RESET"] else own,
        "counters": "*i32",
    }
    names = kernel.arg_names[: kernel.arg_names.index("steps")]
    return {name: every.get(name, own) for name in names}


def compile_kernel(
    cell: Cell,
    dtype: str,
    precision: str,
    hidden: int,
    schedule: Schedule,
    arch: str,
    backward: bool,
    variant: Collection[str] = (),
    bound: int | None = None,
) -> Any:
    """A schedule's compiled kernel.

    variant: of save, checkpoint, sequences, replay (in backward: after it), lengths, reset; masks, which are over time;
        chunked for the loop in chunks of time, scan for what comes before it.
    """
    scan = "scan" in variant
    loop, before = (bwd_kernel, scan_bwd_kernel) if backward else (fwd_kernel, scan_fwd_kernel)
    kernel = before if scan else loop
    over_time = ("masks" in variant,) * cell.masks
    activation = activation_of("half" if dtype != "float32" else precision, ARCHITECTURES[arch])
    if backward:
        constants = constants_backward(cell, hidden, SIZES[dtype], True, True, over_time)
    else:
        save, checkpoint, replay = (name in variant for name in ("save", "checkpoint", "replay"))
        constants = constants_forward(cell, hidden, SIZES[dtype], save, checkpoint, replay, over_time)
    masks = ("lengths" in variant, "reset" in variant)
    constants |= constants_schedule(schedule, ARCHITECTURES[arch], *masks, precision, activation)
    stage = last_stage(cell, backward) if schedule.loop == "stepwise" else -1
    how = (schedule, ARCHITECTURES[arch], precision, backward, stage)
    constants |= constants_stages(cell, hidden, constants["ALIGN"], *how)
    constants["CHUNKED"] = "chunked" in variant
    if scan:
        constants |= constants_scan(cell, backward)
    asked = {"REPLAY": "replay" in variant, "SEQUENCES": "sequences" in variant}
    pointers = _pointers(kernel, cell, dtype, asked | constants)
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    signature = {name: "constexpr" if name in constants else pointers.get(name, "i32") for name in kernel.arg_names}
    # As the JIT of Triton 3.6 has them, so that what is compiled here has the key of what a launch compiles.
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}
    for at, name in enumerate(kernel.arg_names):
        pointer = pointers.get(name)
        if isinstance(pointer, tuple):
            attributes |= {(at, j): [["tt.divisibility", 16]] for j in range(len(pointer))}
        elif pointer is not None:
            attributes[at,] = [["tt.divisibility", 16]]
        elif isinstance(constants.get(name), str):
            attributes[at,] = []
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=target(arch), options=options(schedule, arch, bound))


def report(kernel: Any, arch: str, hold: bool) -> Report:
    """What a compiled kernel takes. hold: its schedule's."""
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


def instructions(kernel: Any) -> int:
    """How many there are in the machine code, on NVIDIA."""
    return len(LINE.findall(_cuobjdump(kernel, "-sass")))


def _report_cuda(kernel: Any, hold: bool) -> Report:
    # A frame on the stack is a spill by another name: an array indexed at run time.
    usage = re.findall(r"(REG|STACK|LOCAL):(\d+)", _cuobjdump(kernel, "-res-usage"))
    found = {name: int(value) for name, value in usage}
    waits = trips(_cuobjdump(kernel, "-sass")) if hold else 0
    return Report(found["REG"], found["STACK"] + found["LOCAL"], kernel.metadata.shared, waits)
