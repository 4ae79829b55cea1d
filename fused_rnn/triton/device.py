"""Where a tensor's kernels run, and in what precision: what schedules are made from. Imports no Triton."""

from __future__ import annotations

import importlib.util
import os
import sys
from functools import cache

import torch
from torch import Tensor

from fused_rnn.gpu.precision import tf32_allowed
from fused_rnn.triton.target import ARCHITECTURES, INTERPRETER, KIB, Target

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
OLDEST = (8, 0)  # compute capability: 16-bit and TF32 tensor cores, asynchronous copies


def installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def interpreting() -> bool:
    """Whether the kernels are, or would be, run by Triton's interpreter, which runs them on the cpu."""
    kernels = sys.modules.get("fused_rnn.triton.forward")
    if kernels is not None:  # decided when they were first imported, whatever the environment says now
        return type(kernels.fwd_kernel).__name__ == "InterpretedFunction"
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")


def refusal(device: str) -> str | None:
    """Why tensors on this type of device cannot be run, or None."""
    if not installed():
        return "Triton is not installed (pip install triton)"
    if interpreting():
        return (
            None
            if device == "cpu"
            else f"Triton runs in its interpreter, which takes tensors on the cpu, not on {device}"
        )
    if device != "cuda":
        return (
            f"it runs tensors on a CUDA or ROCm GPU, not on {device}"
            " (on the cpu in Triton's interpreter alone, TRITON_INTERPRET=1)"
        )
    if not torch.cuda.is_available():
        return "torch sees no GPU"
    if torch.version.hip is None and torch.cuda.get_device_capability() < OLDEST:
        found = "{}.{}".format(*torch.cuda.get_device_capability())
        return f"it needs compute capability {OLDEST[0]}.{OLDEST[1]}, this GPU has {found}"
    return None


def target_of(tensor: Tensor) -> Target:
    """The tensor's device as the planner sees it."""
    if tensor.device.type == "cpu":
        return INTERPRETER
    return target_at(tensor.device.index)


@cache
def target_at(index: int) -> Target:
    """The GPU of this number."""
    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip is not None:
        arch = properties.gcnArchName.split(":")[0]
    else:
        arch = f"sm_{properties.major}{properties.minor}"
    known = ARCHITECTURES.get(arch, Target(arch, 0, 64 * KIB))
    shared = getattr(properties, "shared_memory_per_block_optin", known.shared) or known.shared
    return Target(arch, properties.multi_processor_count, shared)


def kind_of(dtype: torch.dtype, target: Target) -> str:
    """How products are taken: Shape's kind."""
    if dtype != torch.float32:
        return "half"
    return "tf32" if target.nvidia and tf32_allowed() else "ieee"


def precision_of(kind: str, target: Target) -> str:
    """The kernels' PRECISION."""
    if target is INTERPRETER:
        return "interpreter"
    return "tf32" if kind == "tf32" else "ieee"


def activation_of(kind: str, target: Target) -> str:
    """The kernels' ACTIVATION: pointwise.py says what each is."""
    return "float32" if kind != "half" else "mufu" if target.nvidia else "half"
