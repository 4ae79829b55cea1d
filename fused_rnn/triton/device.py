"""Where a tensor's kernels run, and in what precision: what plans are made from. Imports no Triton."""

from __future__ import annotations

import importlib.util
import os
import sys
from functools import cache

import torch
from torch import Tensor

from fused_rnn.gpu.precision import tf32_allowed
from fused_rnn.triton.tiles import ARCHITECTURES, INTERPRETER, KIB, Device

CELLS = ("lstm", "gru", "rnn_tanh", "rnn_relu")  # cells.KERNELS, which needs Triton
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


def device_of(tensor: Tensor) -> Device:
    """The tensor's device as the planner sees it."""
    if tensor.device.type == "cpu":
        return INTERPRETER
    return device_at(tensor.device.index)


@cache
def device_at(index: int) -> Device:
    """The GPU of this number."""
    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip is not None:
        arch = properties.gcnArchName.split(":")[0]
    else:
        arch = f"sm_{properties.major}{properties.minor}"
    known = ARCHITECTURES.get(arch, Device(arch, 0, 64 * KIB))
    shared = getattr(properties, "shared_memory_per_block_optin", known.shared) or known.shared
    return Device(arch, properties.multi_processor_count, shared)


def kind_of(dtype: torch.dtype, device: Device) -> str:
    """How products are taken: tiles.Shape's kind."""
    if dtype != torch.float32:
        return "half"
    return "tf32" if device.nvidia and tf32_allowed() else "ieee"


def precision_of(kind: str, device: Device) -> str:
    """The kernels' PRECISION."""
    if device is INTERPRETER:
        return "interpreter"
    return "tf32" if kind == "tf32" else "ieee"


def activations_of(kind: str, device: Device) -> str:
    """The kernels' HOW: pointwise.py says what each is."""
    return "float32" if kind != "half" else "mufu" if device.nvidia else "half"
