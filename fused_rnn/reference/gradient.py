"""The gradient of the reference loop, itself differentiable: reference's backward, every backend's double backward."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fused_rnn.cells import CELLS
from fused_rnn.reference.loop import run_layer


def backward_layer(
    dy: Tensor | None,
    dh_n: Tensor | None,
    dc_n: Tensor | None,
    x: Tensor,
    weights: Sequence[Tensor],
    h0: Tensor | None,
    c0: Tensor | None,
    lengths: Tensor | None,
    reset: Tensor | None,
    cell: str,
    directions: Sequence[int],
) -> list[Tensor]:
    """Gradients of `run_layer`, arguments as there; dy [T, B, R·P], dh_n [R, B, P], dc_n [R, B, H], None for zero.

    Returns [dx, dh0, (dc0 where the cell has c), one per weight].
    Differentiable any number of times in every tensor; works under vmap.
    """
    spec, recurrences, batch = CELLS[cell], len(directions), x.shape[1]
    hidden, width = weights[1].shape[0] // spec.gates, weights[1].shape[1]
    states = [x.new_zeros(recurrences, batch, width) if h0 is None else h0]
    if spec.has_c:
        states.append(x.new_zeros(recurrences, batch, hidden) if c0 is None else c0)

    def run(x: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        h0, c0, weights = tensors[0], tensors[1] if spec.has_c else None, tensors[len(states) :]
        return tuple(t for t in run_layer(x, weights, h0, c0, lengths, reset, cell, directions) if t is not None)

    # vjp rather than autograd.grad: a tensor that stands for two arguments (tied weights) gets a gradient for each.
    outputs, pull = torch.func.vjp(run, x, *states, *weights)[:2]
    given = (dy, dh_n, dc_n)[: len(outputs)]
    return list(pull(tuple(torch.zeros_like(o) if g is None else g for o, g in zip(outputs, given, strict=True))))
