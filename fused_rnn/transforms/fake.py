"""What the ops of a layer return, by shape and dtype alone: their fake kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fused_rnn.call import BackwardCall, LayerCall


def same_device(x: Tensor, *others: Tensor | None) -> None:
    """A real call with one argument on the meta device ends up in a fake kernel: it must not be answered."""
    for t in others:
        if t is not None and t.device != x.device:
            raise RuntimeError(f"fused_rnn: got tensors on {x.device} and on {t.device}, expected all on one device")


def forward(*args: Any) -> list[Tensor]:
    """A layer's forward: [y, states after, sequences], and what it keeps: [saved, histories, hidden]."""
    call = LayerCall(*args)
    x = call.x
    same_device(x, *call.weights, *call.states, call.lengths, call.reset)
    y = x.new_empty(*x.shape[:2], call.recurrences * call.width)
    outputs = [y, *(x.new_empty(shape) for shape in call.state_shapes())]
    if call.sequences:
        outputs += [x.new_empty(shape) for shape in call.sequence_shapes()]
    if call.save == "none":
        return outputs
    saved, histories, dtype = call.kept_shapes()
    if call.sequences and call.save == "gates":
        histories = []
    hidden = torch.empty_like(y) if call.keep_hidden else x.new_empty(0)
    return [*outputs, x.new_empty(saved), *(x.new_empty(shape, dtype=dtype) for shape in histories), hidden]


def backward(*args: Any) -> list[Tensor]:
    """A layer's backward: [dx, gradients of the states given, of the weights]."""
    call = BackwardCall(*args)
    x = call.x
    tensors = (
        call.dy,
        *call.dstates,
        *call.dsequences,
        *call.states,
        call.lengths,
        call.reset,
        call.hidden,
        call.saved,
    )
    same_device(x, *tensors, *call.histories, *call.weights)
    dx = x.new_empty(x.shape if call.need_dx else 0)
    states = [x.new_empty(state.shape) for state in call.states]
    if not call.need_dw:
        return [dx, *states]
    is_mask = call.layer.kinds.is_mask
    return [dx, *states, *(w.new_empty(0 if is_mask(k) else w.shape) for k, w in enumerate(call.weights))]


def step(*args: Any) -> list[Tensor]:
    """One step: the states after."""
    x, weights, states, cell = args
    call = LayerCall(x.unsqueeze(0), weights, states, None, None, cell, (1,))
    same_device(x, *weights, *states)
    return [x.new_empty(shape[1:]) for shape in call.state_shapes()]
