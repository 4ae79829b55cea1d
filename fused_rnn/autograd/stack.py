"""A stack of layers that run side by side, as one torch.autograd.Function.

What passes from layer to layer is among its outputs, and so a second derivative finds its way: a backward that is
itself being differentiated goes through the layers one by one, each a LayerBackward. The gradients that those send to
the layers' inputs come back to this Function as gradients of its outputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from fused_rnn.autograd import Outputs, pull, together
from fused_rnn.call import BackwardCall, StackCall, all_or_none
from fused_rnn.cells import CELLS
from fused_rnn.checks import is_plain
from fused_rnn.dispatch import BACKENDS
from fused_rnn.gpu.wavefront import Kept, Pulled

_PLAIN = 7  # arguments of StackFunction before its tensors


def stack(backend: ModuleType, call: StackCall) -> tuple[Tensor, list[Sequence[Tensor]]]:
    """A stack by a backend's wavefront: y, and of each layer the states after."""
    layers, count = len(call.weights), len(CELLS[call.cell].states)
    if call.save == "none":
        outputs = backend.wavefront.forward(call)[0]
        return outputs[-1][0], [after for _, *after in outputs]
    own = [t for both in zip(call.states, call.weights, strict=True) for tensors in both for t in tensors]
    options = (call.cell, call.dropout, call.save, call.keep_hidden)
    args = (backend.NAME, layers, len(call.states[0]), *options, call.x, call.lengths, call.reset, *own)
    y, *rest = StackFunction.apply(*args)  # type: ignore[no-untyped-call]
    return y, [rest[first : first + count] for first in range(0, layers * count, count)]


def _call_of(backend: str, layers: int, given: int, *args: Any) -> StackCall:
    """A StackCall of StackFunction's arguments."""
    cell, dropout, save, keep_hidden, x, lengths, reset, *own = args
    each = _split(own, layers)
    weights, states = [tensors[given:] for tensors in each], [tensors[:given] for tensors in each]
    return StackCall(x, weights, states, lengths, reset, cell, dropout, save, keep_hidden)


def _split(flat: Sequence[Any], parts: int) -> list[Sequence[Any]]:
    """So many lists of equal length."""
    length = len(flat) // parts
    return [flat[part * length : (part + 1) * length] for part in range(parts)]


class StackFunction(Function):
    """A stack of layers of any cell, run as a wavefront. ::

        apply(backend, layers, states given of a layer, cell, dropout, save, keep_hidden, x, lengths, reset,
              *states and weights of each layer)
            → (y, *states after of each layer, *what enters each layer but the first)

    As in StackCall. Twice differentiable in x, states and weights; for eager calls without a torch.func transform.
    """

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Outputs:
        call = _call_of(*args)
        count = len(CELLS[call.cell].states)
        outputs, inputs, masks = BACKENDS[args[0]].wavefront.forward(call)
        *below, y = (output[0] for output in outputs)
        inputs = inputs or below
        saved, histories = [o[1 + count] for o in outputs], [h for o in outputs for h in o[2 + count : -1]]
        hidden = [*below, outputs[-1][-1] if call.keep_hidden else y]
        ctx.set_materialize_grads(False)
        # All go through save_for_backward, as LayerFunction's do.
        ctx.save_for_backward(*args[_PLAIN:], *inputs, *hidden, *saved, *histories, *masks)
        ctx.args, ctx.tensors = args[:_PLAIN], len(args) - _PLAIN
        return y, *(state for output in outputs for state in output[1 : 1 + count]), *inputs

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, *douts: Tensor | None) -> tuple[Any, ...]:
        backend, layers, given, cell, dropout, *_ = ctx.args
        count = len(CELLS[cell].states)
        tensors = ctx.saved_tensors
        call, rest = _call_of(*ctx.args, *tensors[: ctx.tensors]), list(tensors[ctx.tensors :])
        sizes = (layers - 1, layers, layers, layers * (count - 1), (layers - 1) * (dropout > 0))
        inputs, hidden, saved, histories, masks = ([rest.pop(0) for _ in range(size)] for size in sizes)
        kept = Kept([call.x, *inputs], hidden, saved, _split(histories, layers), masks)
        dafter, dys = _split(douts[: layers * count], layers), [*douts[layers * count :], dy]
        need_dx, needs = ctx.needs_input_grad[_PLAIN], _split(ctx.needs_input_grad[_PLAIN + 3 :], layers)
        # The layers from the last that a gradient reaches down to the first that wants one.
        reached = [n for n in range(layers) if any(d is not None for d in (dys[n], *dafter[n]))]
        wanted = [n for n in range(layers) if True in needs[n] or (need_dx and n == 0)]
        if not reached or not wanted or max(reached) < min(wanted):
            return (None,) * len(ctx.needs_input_grad)
        last, first = max(reached), min(wanted)
        dstates = [together(call.layer(n, kept.inputs[n]).state_shapes(), call.x, dafter[n]) for n in range(last + 1)]
        need_dw = [True in own[given:] for own in needs]
        gradients = [d for d in (dy, *douts) if d is not None]
        if torch.is_grad_enabled() or any(d is not None for d in dys[:-1]) or not is_plain(gradients):
            pulled = _one_by_one(backend, call, kept, dys, dstates, first, need_dx, need_dw)
        else:
            wavefront = BACKENDS[backend].wavefront
            pulled = wavefront.backward(call, kept, dys[last], dstates, first, need_dx, need_dw)
        flat: list[Tensor | None] = []
        for n in range(layers):
            _, states, weights = pulled[last - n] if first <= n <= last else (None, (), ())
            flat += [*all_or_none(states, given), *all_or_none(weights, len(needs[n]) - given)]
        return (*(None,) * _PLAIN, pulled[-1].dx if need_dx else None, None, None, *flat)


def _one_by_one(
    backend: str,
    call: StackCall,
    kept: Kept,
    dys: Sequence[Tensor | None],
    dstates: Sequence[Sequence[Tensor]],
    first: int,
    need_dx: bool,
    need_dw: Sequence[bool],
) -> list[Pulled]:
    """As Wavefront.backward, differentiable. dys: of what each layer hands to the next, of the last y's."""
    pulled, given = list[Pulled](), len(call.states[0])
    for place in reversed(range(first, len(dstates))):
        dy, above = dys[place], pulled[-1].dx if pulled else None
        if above is not None:
            dy = above if dy is None else dy + above
        if dy is not None and kept.masks and place < len(kept.masks):
            dy = dy * kept.masks[place] * call.scale
        own = call.layer(place, kept.inputs[place])
        of_layer = (kept.hidden[place], kept.saved[place], kept.histories[place])
        wants = (place > first or need_dx, need_dw[place])
        dx, *grads = pull(backend, BackwardCall(dy, dstates[place], *own[:5], *of_layer, *own[5:8], *wants))
        pulled.append(Pulled(dx, grads[:given], grads[given:]))
    return pulled
