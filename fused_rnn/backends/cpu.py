"""The fused C++ loops (csrc/cpu), by way of the ops."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fused_rnn import ops

if TYPE_CHECKING:
    from fused_rnn.problem import Problem

NAME = "cpu"
DIFFERENTIABLE = False  # the ops have no autograd of their own: fused_rnn.autograd's Functions wrap them
stack = None  # functional runs the layers one by one
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def supports(problem: Problem) -> str | None:
    """None if this backend can run the problem, else the reason it cannot."""
    if ops.MISSING is not None:
        return ops.MISSING
    if problem.device not in ("cpu", "meta"):  # meta: shapes alone, by the fake kernels
        return f"it runs tensors on the cpu, these are on {problem.device}"
    if problem.dtype not in DTYPES:
        return f"it knows float32, float64, bfloat16 and float16, not {problem.dtype}"
    if problem.forward_ad:
        return "it has no forward-mode derivative"
    return None


def forward(
    x: Tensor,
    weights: Sequence[Tensor],
    h0: Tensor | None,
    c0: Tensor | None,
    lengths: Tensor | None,
    reset: Tensor | None,
    cell: str,
    directions: Sequence[int],
    save: str,
    keep_hidden: bool,
) -> list[Tensor]:
    """One layer: the op fused_rnn::forward."""
    if torch.is_autocast_enabled("cpu"):  # or a matrix product inside the op would be recast
        with torch.autocast("cpu", enabled=False):
            return ops.forward(x, weights, h0, c0, lengths, reset, cell, directions, save, keep_hidden)
    return ops.forward(x, weights, h0, c0, lengths, reset, cell, directions, save, keep_hidden)


def backward(
    dy: Tensor | None,
    dh_n: Tensor | None,
    dc_n: Tensor | None,
    x: Tensor,
    weights: Sequence[Tensor],
    h0: Tensor | None,
    c0: Tensor | None,
    lengths: Tensor | None,
    reset: Tensor | None,
    hidden: Tensor,
    saved: Tensor,
    cells: Tensor,
    cell: str,
    directions: Sequence[int],
    save: str,
    need_dx: bool,
    need_dw: bool,
) -> list[Tensor]:
    """One layer's gradients: the op fused_rnn::backward."""
    kept = (hidden, saved, cells)
    if torch.is_autocast_enabled("cpu"):
        with torch.autocast("cpu", enabled=False):
            return ops.backward(
                dy, dh_n, dc_n, x, weights, h0, c0, lengths, reset, *kept, cell, directions, save, need_dx, need_dw
            )
    return ops.backward(
        dy, dh_n, dc_n, x, weights, h0, c0, lengths, reset, *kept, cell, directions, save, need_dx, need_dw
    )


def step(x: Tensor, h: Tensor, c: Tensor | None, weights: Sequence[Tensor], cell: str) -> list[Tensor]:
    """One step: x [B, D], h [B, P], c [B, H] → [h'] or [h', c']. The op fused_rnn::step, which has no gradient."""
    return ops.step(x, h, c, weights, cell)


def describe(problem: Problem) -> str:
    """What would run, in a line."""
    kept = f", keeping {problem.save} for backward" if problem.needs_grad else ""
    return f"one fused C++ loop over time a layer, {problem.recurrences} recurrence(s) in it{kept}"
