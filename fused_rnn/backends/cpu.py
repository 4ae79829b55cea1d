"""The fused C++ loops (csrc/cpu), by way of the ops."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fused_rnn import ops
from fused_rnn.cells import unknown
from fused_rnn.cells.program import is_program
from fused_rnn.transforms.op_gradient import without_gradient

if TYPE_CHECKING:
    from fused_rnn.call import BackwardCall, LayerCall
    from fused_rnn.problem import Problem

NAME = "cpu"
DIFFERENTIABLE = False  # the ops have no autograd of their own: fused_rnn.autograd's Functions wrap them
stack = wavefront = None  # layers.run runs the layers one by one
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def _unknown(cell: str) -> str | None:
    """Why there is no loop for a cell; None where there is one."""
    if cell in ops.CELLS:
        return None
    return _refusal(cell) if is_program(cell) else unknown(cell, ops.CELLS)


@lru_cache(maxsize=4096)
def _ask(cell: str) -> str | None:
    reason: str | None = ops._C.refusal(cell)
    return reason


def _refusal(cell: str) -> str | None:
    """Why the loops cannot run a cell that is a program; None where they can."""
    return _ask(cell)


_refusal._dynamo_marked_constant = True  # type: ignore[attr-defined]  # as torch.compiler.assume_constant_result


def supports(problem: Problem) -> str | None:
    """None if this backend can run the problem, else the reason it cannot."""
    if ops.MISSING is not None:
        return ops.MISSING
    if problem.device not in ("cpu", "meta"):  # meta: shapes alone, by the fake kernels
        return f"it runs tensors on the cpu, these are on {problem.device}"
    if problem.dtype not in DTYPES:
        return f"it knows float32, float64, bfloat16 and float16, not {problem.dtype}"
    if (reason := _unknown(problem.cell)) is not None:
        return reason
    if problem.hidden_size == 0:
        return "it has no loop over no hidden units"
    if problem.forward_ad:
        return "it has no forward-mode derivative"
    if problem.functionalized:
        return "torch.func.functionalize has no rule for its gradient"
    return None


def forward(call: LayerCall) -> list[Tensor]:
    """One layer: the op fused_rnn::forward."""
    with without_gradient():
        if torch.is_autocast_enabled("cpu"):  # torch operations inside the op would be recast
            with torch.autocast("cpu", enabled=False):
                return ops.forward(*call)
        return ops.forward(*call)


def backward(call: BackwardCall) -> list[Tensor]:
    """One layer's gradients: the op fused_rnn::backward."""
    with without_gradient():
        if torch.is_autocast_enabled("cpu"):
            with torch.autocast("cpu", enabled=False):
                return ops.backward(*call)
        return ops.backward(*call)


def step(x: Tensor, weights: Sequence[Tensor], states: Sequence[Tensor], cell: str) -> list[Tensor]:
    """One step: x [B, D], states [B, ·] or () for zeros → the states after; no gradient. The op fused_rnn::step."""
    return ops.step(x, weights, states, cell)


def describe(problem: Problem) -> str:
    """What would run, in a line."""
    kept = f", keeping {problem.save} for backward" if problem.needs_grad else ""
    isa = "" if ops.MISSING else f" ({ops._C.isa()})"
    return f"one fused C++ loop{isa} over time a layer, {problem.recurrences} recurrence(s) in it{kept}"
