"""The gradient of the reference loop, itself differentiable: reference's backward, every backend's double backward."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fused_rnn.call import LayerCall, all_or_none, is_absent
from fused_rnn.reference.loop import run_layer


def backward_layer(
    dy: Tensor | None, dstates: Sequence[Tensor], call: LayerCall, dsequences: Sequence[Tensor] = ()
) -> list[Tensor]:
    """Gradients of `run_layer`: [dx, one for each of the cell's states, one per weight].

    dy: [T, B, R·P], None for zero.  dstates: of the states after, () for zero.  dsequences: of their sequences, () for
    zero, or one of shape [0].
    Differentiable any number of times in every tensor; works under vmap.
    """
    states = call.initial()

    def run(x: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        states_in, weights = tensors[: len(states)], tensors[len(states) :]
        return tuple(run_layer(call._replace(x=x, states=states_in, weights=weights, sequences=bool(dsequences))))

    # vjp rather than autograd.grad: a tensor that stands for two arguments (tied weights) gets a gradient for each.
    outputs, pull = torch.func.vjp(run, call.x, *states, *call.weights)[:2]
    over_time = (None if is_absent(d) else d for d in dsequences)
    given = (dy, *all_or_none(dstates, len(states)), *over_time)
    return list(pull(tuple(torch.zeros_like(o) if g is None else g for o, g in zip(outputs, given, strict=True))))
