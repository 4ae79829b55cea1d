"""What was built, what can run here and why the rest cannot: `python -m fused_rnn info`, the head of a bug report."""

from __future__ import annotations

import platform

import torch

import fused_rnn
from fused_rnn import missing, ops
from fused_rnn.commands.machine import cpu_isa, cpu_model, kernels_isa
from fused_rnn.cuda import module as cuda
from fused_rnn.dispatch import BACKENDS
from fused_rnn.problem import Problem


def collect() -> dict[str, dict[str, str]]:
    """Facts by section: versions, machine, extension, then the backends for each kind of device."""
    facts = {"versions": _versions(), "machine": _machine(), "extension": _extension()}
    facts["CUDA kernels"] = _cuda_kernels()
    for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        facts[f"backends, {device} tensors"] = _backends(device)
    return facts


def as_text() -> str:
    """The facts as aligned lines; needs neither click nor rich."""
    lines = []
    for section, facts in collect().items():
        width = max(map(len, facts))
        lines += [section, *(f"  {name:<{width}}  {value}" for name, value in facts.items()), ""]
    return "\n".join(lines).rstrip()


def _versions() -> dict[str, str]:
    return {
        "fused_rnn": f"{fused_rnn.__version__}, from {missing.PACKAGE}",
        "cells": ", ".join(fused_rnn.list_cells()),
        "torch": torch.__version__,
        "Python": platform.python_version(),
        "CUDA in torch": torch.version.cuda or "none",
    }


def _machine() -> dict[str, str]:
    facts = {
        "system": f"{platform.system()} {platform.machine()}",
        "CPU": cpu_model(),
        "torch's CPU kernels": cpu_isa(),
        "threads": str(torch.get_num_threads()),
    }
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            major, minor = torch.cuda.get_device_capability(index)
            facts[f"GPU {index}"] = f"{torch.cuda.get_device_name(index)} (sm_{major}{minor})"
    else:
        facts["GPU"] = "none that torch can use"
    return facts


def _extension() -> dict[str, str]:
    if ops._C is None:
        return {"loaded": f"no: {ops.MISSING}"}
    return {"loaded": "yes", "instruction set in use": kernels_isa(), "this processor can run": ops._C.available_isas()}


def _cuda_kernels() -> dict[str, str]:
    if cuda.MISSING is not None:
        return {"built": f"no: {cuda.MISSING}"}
    return {"built": "yes", "for": cuda.loaded().ARCHITECTURES}


def _backends(device: str) -> dict[str, str]:
    """Each backend's answer to an ordinary problem: one LSTM layer in float32, trained."""
    problem = Problem(
        cell="lstm", dtype=torch.float32, device=device, single_step=False, batch=8, input_size=128, hidden_size=128,
        width=128, layers=1, recurrences=1, bias=True, needs_grad=True, forward_ad=False, save="gates",
        lengths=False, reset=False,
    )  # fmt: skip
    reasons = {name: backend.supports(problem) for name, backend in BACKENDS.items()}
    return {
        name: f"available: {BACKENDS[name].describe(problem)}" if reason is None else f"not available: {reason}"
        for name, reason in reasons.items()
    }
