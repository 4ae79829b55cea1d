"""One layer, all its directions, as torch.autograd.Function: the gradient of backends whose ops have none of their own.

backward runs the backend's. Where it is itself being differentiated (create_graph, torch.func), it is a Function too,
whose backward is the differentiable composite: the reference loop on the saved inputs, by torch.func.vjp twice. That is
correct, slow, and runs only where a second derivative is really taken.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from fused_rnn.call import BackwardCall, LayerCall
from fused_rnn.cells import CELLS
from fused_rnn.checks import in_transform
from fused_rnn.dispatch import BACKENDS
from fused_rnn.reference.gradient import backward_layer
from fused_rnn.reference.loop import without_autocast
from fused_rnn.transforms import vmap

Outputs = tuple[Tensor, ...]


def layer(backend: ModuleType, call: LayerCall) -> Sequence[Tensor]:
    """One layer by a backend: y, the states after, the sequences if asked for. The Function keeps what it takes."""
    if backend.DIFFERENTIABLE:
        call = call._replace(save="none")
    if call.save == "none":
        outputs: Sequence[Tensor] = backend.forward(call)
        return outputs
    count = len(call.spec.states)
    return function(backend.NAME, call)[: 1 + count + call.sequences * (count - 1)]


def made(outputs: Outputs, layout: Any, call: LayerCall) -> Outputs:
    """As `layer`, of an eager call that the `cpu` backend has run already, past the dispatcher: outputs are its op's.

    layout: if given, x and y are packed, by its `pad` and `pack`, and it has the `lengths`.
    """
    x, weights, states, lengths, reset, *options = call
    args = (outputs, layout, "cpu", len(states), *options, x, lengths, reset, *states, *weights)
    results: Outputs = super(Function, LayerFunction).apply(*args)  # type: ignore[no-untyped-call]
    return results


def function(backend: str, call: LayerCall) -> Outputs:
    """All outputs of the layer's forward op, by the Function."""
    x, weights, states, lengths, reset, *options = call
    args = (None, None, backend, len(states), *options, x, lengths, reset, *states, *weights)
    outputs: Outputs
    if torch.compiler.is_compiling():
        if in_transform():
            _keep_from_dynamo()
            return _untraced(*args)
        outputs = LayerFunction.apply(*args)  # type: ignore[no-untyped-call]
    elif in_transform():
        outputs = LayerFunction.apply(*args)  # type: ignore[no-untyped-call]
    else:
        # Without what apply costs where there is a setup_context: it binds its arguments by `inspect.signature` on each
        # call (26 of 38 µs, torch 2.13), to fill in defaults that there are not.
        outputs = super(Function, LayerFunction).apply(*args)  # type: ignore[no-untyped-call]
    return outputs


def _untraced(*args: Any) -> Outputs:
    outputs: Outputs = LayerFunction.apply(*args)  # type: ignore[no-untyped-call]
    return outputs


def _keep_from_dynamo() -> None:
    """Within a transform Dynamo would trace a Function's forward alone, and so lose its gradient. AOTAutograd, which
    runs Dynamo's graph under the transform, does not: hence `_untraced` is to stand in that graph as it is."""
    torch._dynamo.allow_in_graph(_untraced)  # here, for it takes the import of all of Dynamo


_keep_from_dynamo._dynamo_marked_constant = True  # type: ignore[attr-defined]  # called while Dynamo traces

# Arguments of LayerFunction before its tensors: those of `made`, backend, number of states, and a LayerCall's options.
_PLAIN = 9


def _call_of(args: Sequence[Any]) -> LayerCall:
    """A LayerCall of LayerFunction's arguments, or of what stands for each of them."""
    first = _PLAIN + 3 + args[3]
    x, lengths, reset = args[_PLAIN : _PLAIN + 3]
    return LayerCall(x, args[first:], args[_PLAIN + 3 : first], lengths, reset, *args[4:_PLAIN])


class LayerFunction(Function):
    """One layer of any cell. ::

        apply(outputs or None, layout or None, backend, number of states, cell, directions, save, keep_hidden,
              sequences, x, lengths, reset, *states, *weights)
            → (y, *states after, *sequences, saved, *histories, hidden), of `made` without what is kept

    Inputs and outputs as in LayerCall. Twice differentiable in x, states and weights; works under torch.func.vmap; has
    no forward-mode derivative.
    """

    @staticmethod
    def forward(*args: Any) -> Outputs:
        outputs: Outputs | None = args[0]
        if outputs is None:
            return tuple(BACKENDS[args[2]].forward(_call_of(args)))
        return outputs[: 1 + len(CELLS[args[4]].states)]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        made, layout, backend, given, cell, directions, save, keep_hidden, sequences, x, lengths, reset, *rest = inputs
        first = 1 + len(CELLS[cell].states)
        last = first + sequences * (first - 2)
        kept = output[last:] if made is None else made[last:]
        saved, *histories, hidden = kept
        if sequences and save == "gates":
            histories = output[first:last]
        if made is None:
            ctx.mark_non_differentiable(*kept)
        ctx.set_materialize_grads(False)
        # All go through save_for_backward: a weight (or y, where there is no copy of it) changed in place must raise.
        ctx.save_for_backward(x, lengths, reset, hidden if keep_hidden else output[0], saved, *histories, *rest)
        ctx.call = (layout, backend, given, cell, tuple(directions), save, sequences)

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, *douts: Tensor | None) -> tuple[Any, ...]:
        layout, backend, given, cell, directions, save, sequences = ctx.call
        x, lengths, reset, hidden, saved, *rest = ctx.saved_tensors
        if layout is not None:
            x, dy, lengths = layout.pad(x), None if dy is None else layout.pad(dy), layout.lengths
        spec = CELLS[cell]
        count = len(spec.states)
        last = count - 1 + given
        states, weights, needs = rest[count - 1 : last], rest[last:], ctx.needs_input_grad
        need_dx, need_dw = needs[_PLAIN], True in needs[_PLAIN + 3 + given :]
        dstates: Sequence[Tensor] = ()
        dsequences: Sequence[Tensor] = ()
        if any(d is not None for d in douts[:count]):
            layer = LayerCall(x, weights, states, lengths, reset, cell, directions)
            dstates = together(layer.state_shapes(), x, douts[:count])
        if sequences and any(d is not None for d in douts[count : 2 * count - 1]):
            absent = x.new_empty(0)
            dsequences = [absent if d is None else d for d in douts[count : 2 * count - 1]]
        if dy is None and not dstates and not dsequences:
            return (None,) * len(needs)
        histories, options = rest[: count - 1], (cell, directions, save, need_dx, need_dw)
        saved_call = (x, weights, states, lengths, reset, hidden, saved, histories, *options, dsequences)
        dx, *grads = pull(backend, BackwardCall(dy, dstates, *saved_call))
        if not need_dw:
            grads += [None] * len(weights)
        elif spec.masks:
            each = len(weights) // len(directions)
            for end in range(given + each, len(grads) + 1, each):
                grads[end - spec.masks : end] = [None] * spec.masks
        if layout is not None and need_dx:
            dx = layout.pack(dx, not torch.is_grad_enabled())
        return (*[None] * _PLAIN, dx if need_dx else None, None, None, *grads)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Outputs, tuple[int | None, ...]]:
        """Itself, on a larger batch or with more recurrences. Made by torch (generate_vmap_rule), it would compute the
        weights' gradients sample by sample where their sum is asked for."""
        call, dims = _call_of(args), _call_of((*args[:4], *in_dims[4:]))

        def op(*call: Any) -> list[Tensor]:
            return list(function(args[2], LayerCall(*call)))

        outputs, out_dims = vmap.rule(op, vmap.forward)(info, dims, *call)
        return tuple(outputs), tuple(out_dims)


def pull(backend: str, call: BackwardCall) -> Sequence[Any]:
    """One layer's gradients by a backend, differentiable where they are being differentiated."""
    # torch.compile has no double backward, but within what it compiles torch.func has.
    if not (torch.is_grad_enabled() and (in_transform() or not torch.compiler.is_compiling())):
        gradients: Sequence[Any] = BACKENDS[backend].backward(call)
        return gradients
    kept = (call.dy, call.x, call.lengths, call.reset, call.hidden, call.saved, *call.histories)
    counts = (len(call.dstates), len(call.dsequences), len(call.states))
    options = (call.cell, call.directions, call.save, call.need_dx, call.need_dw)
    tensors = (*kept, *call.dstates, *call.dsequences, *call.states, *call.weights)
    outputs: Outputs = LayerBackward.apply(backend, *counts, *options, *tensors)  # type: ignore[no-untyped-call]
    return outputs


def together(shapes: Sequence[Any], x: Tensor, gradients: Sequence[Tensor | None]) -> list[Tensor]:
    """Gradients of these shapes: all of them, or none."""
    if all(d is None for d in gradients):
        return []
    return [x.new_zeros(shape) if d is None else d for d, shape in zip(gradients, shapes, strict=True)]


class LayerBackward(Function):
    """The backward of one layer as a Function: the backend's kernels forward, the reference composite backward. ::

        apply(backend, numbers of dstates, dsequences, states, cell, directions, save, need_dx, need_dw, *tensors)
            → (dx, *gradients of the states given, *gradients of the weights)

    tensors: dy, x, lengths, reset, hidden, saved, the histories, dstates, dsequences, states and weights.
    """

    generate_vmap_rule = True

    @staticmethod
    def _call(args: Sequence[Any]) -> BackwardCall:
        dcount, scount, given, cell = args[1:5]
        dy, x, lengths, reset, hidden, saved, *rest = args[9:]
        lists = []
        for count in (len(CELLS[cell].states) - 1, dcount, scount, given):
            lists.append(rest[:count])
            rest = rest[count:]
        histories, dstates, dsequences, states = lists
        kept = (hidden, saved, histories)
        return BackwardCall(dy, dstates, x, rest, states, lengths, reset, *kept, *args[4:9], dsequences)  # type: ignore[call-arg]

    @staticmethod
    def forward(*args: Any) -> Outputs:
        return tuple(BACKENDS[args[0]].backward(LayerBackward._call(args)))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        call = LayerBackward._call(inputs)
        ctx.set_materialize_grads(False)
        gradients = (*call.dstates, *call.dsequences)
        ctx.save_for_backward(call.dy, call.x, call.lengths, call.reset, *gradients, *call.states, *call.weights)
        ctx.call = inputs[1:9]

    @staticmethod
    def backward(ctx: Any, *ddgrads: Tensor | None) -> tuple[Any, ...]:
        dcount, scount, given, cell, directions, _, need_dx, need_dw = ctx.call
        dy, x, lengths, reset, *rest = ctx.saved_tensors
        differentiable = [dy, x, *rest]  # dy, x, dstates, dsequences, states, weights
        present = [i for i, t in enumerate(differentiable) if t is not None]
        more = len(CELLS[cell].states) - 1

        def first(*tensors: Tensor) -> list[Tensor]:
            full: list[Any] = [None] * len(differentiable)
            for i, t in zip(present, tensors, strict=True):
                full[i] = t
            dy, x, *rest = full
            dstates, dsequences, rest = rest[:dcount], rest[dcount : dcount + scount], rest[dcount + scount :]
            call = LayerCall(x, rest[given:], rest[:given], lengths, reset, cell, directions)
            dx, *grads = backward_layer(dy, dstates, call, dsequences)
            return [dx, *(grads[: more + 1] if given else []), *grads[more + 1 :]]

        with without_autocast(x):
            outputs, pull = torch.func.vjp(first, *(differentiable[i] for i in present))[:2]
            # Those of forward's outputs that are placeholders (dx, the weights not asked for) got no gradient.
            ddx, *ddrest = ddgrads
            weights = len(rest) - dcount - scount - given
            asked = [ddx if need_dx else None, *ddrest[:given], *(ddrest[given:] if need_dw else [None] * weights)]
            grads = pull([torch.zeros_like(o) if g is None else g for o, g in zip(outputs, asked, strict=True)])
        full: list[Any] = [None] * len(differentiable)
        for i, g in zip(present, grads, strict=True):
            full[i] = g
        return (*[None] * 9, full[0], full[1], *[None] * (4 + more), *full[2:])
