"""The gradient of a forward op by itself: the layer runs again, this time keeping its gates, and then backward.

The modules do not need it: fused_rnn.autograd's Functions call the ops and keep what backward reads. What torch.export
and torch.jit.trace make holds the op alone, with nothing kept, as inference wants it, and so does what functionalize
runs; without this, training it would leave out every gradient that has to pass the op.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from fused_rnn.call import LayerCall, all_or_none

Op = Callable[..., list[Tensor]]


def register(name: str, forward: Op, backward: Op, library: torch.library.Library | None = None) -> None:
    """Give the op `forward`, registered as `name`, a gradient by `backward`. Differentiable once."""

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        call = LayerCall(*inputs)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(call.x, call.lengths, call.reset, *call.states, *call.weights)
        ctx.call = (len(call.states), call.cell, call.directions, call.sequences)

    def pull(ctx: Any, grads: Sequence[Tensor | None]) -> tuple[Any, ...]:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError(f"{name}: an op by itself is differentiable once; differentiate the module instead")
        x, lengths, reset, *rest = ctx.saved_tensors
        given, cell, directions, sequences = ctx.call
        call = LayerCall(x, rest[given:], rest[:given], lengths, reset, cell, directions, "gates")
        with without_gradient():
            y, *others = forward(*call)
        count = len(call.spec.states)
        saved, *histories, _ = others[count:]
        douts = [torch.zeros_like(s) if d is None else d for s, d in zip(others, grads[1 : count + 1], strict=False)]
        need_dx, need_dw = ctx.needs_input_grad[0], any(ctx.needs_input_grad[1])
        with without_gradient():
            more = zip(histories, grads[count + 1 :], strict=False)
            dsequences = [torch.zeros_like(s) if d is None else d for s, d in more] if sequences else []
            kept = (y, saved, histories)
            dx, *dtensors = backward(grads[0], douts, *call[:5], *kept, *call[5:8], need_dx, need_dw, dsequences)
        dweights = call.kinds.without_masks(all_or_none(dtensors[given:], len(call.weights)))
        return (dx if need_dx else None, dweights, dtensors[:given], *[None] * 7)

    torch.library.register_autograd(name, pull, setup_context=setup_context, lib=library)


def functionalizes() -> bool:
    """Whether torch.func.functionalize is under way. It has no rule for autograd's Functions, whosever they are."""
    levels = torch._C._functorch.get_interpreter_stack() or ()
    return any(level.key() == torch._C._functorch.TransformType.Functionalize for level in levels)


functionalizes._dynamo_marked_constant = True  # type: ignore[attr-defined]  # as checks.in_transform


def is_jit_tracing() -> bool:
    """Whether torch.jit.trace is recording."""
    return not torch.compiler.is_compiling() and torch._C._is_tracing()


def stands_alone() -> bool:
    """Whether a layer that needs a gradient is to be the op by itself: where a Function cannot be recorded."""
    return torch.compiler.is_exporting() if torch.compiler.is_compiling() else _is_recorded()


def _is_recorded() -> bool:
    return torch._C._is_tracing() or (torch._C._are_functorch_transforms_active() and functionalizes())


def without_gradient() -> AbstractContextManager[None]:
    """A context in which an op is called past the gradient above, which takes 15 µs to find that nobody asks for it.
    A trace has to see it."""
    if torch.compiler.is_compiling() or _is_recorded():
        return nullcontext()
    below: AbstractContextManager[None] = torch._C._AutoDispatchBelowAutograd()
    return below
