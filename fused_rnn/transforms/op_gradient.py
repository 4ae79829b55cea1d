"""The gradient of a forward op by itself: the layer runs again, this time keeping its gates, and then backward.

The modules do not need it: fused_rnn.autograd's Functions call the ops and keep what backward reads. What torch.export
and torch.jit.trace make holds the op alone, with nothing kept, as inference wants it, and so does what functionalize
runs; without this, training it would leave out every gradient that has to pass the op.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Op = Callable[..., list[Tensor]]


def register(name: str, forward: Op, backward: Op, library: torch.library.Library | None = None) -> None:
    """Give the op `forward`, registered as `name`, a gradient by `backward`. Differentiable once."""

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        x, weights, h0, c0, lengths, reset, cell, directions, _, _ = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, h0, c0, lengths, reset, *weights)
        ctx.call = (cell, directions)

    def pull(ctx: Any, grads: Sequence[Tensor | None]) -> tuple[Any, ...]:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError(f"{name}: an op by itself is differentiable once; differentiate the module instead")
        x, h0, c0, lengths, reset, *weights = ctx.saved_tensors
        cell, directions = ctx.call
        layer = (x, weights, h0, c0, lengths, reset)
        outputs = without_gradient(forward, *layer, cell, directions, "gates", False)
        dc_n = grads[2] if cell == "lstm" else None
        need_dx, need_dw = ctx.needs_input_grad[0], any(ctx.needs_input_grad[1])
        dx, dh0, dc0, *dweights = without_gradient(
            backward, grads[0], grads[1], dc_n, *layer, outputs[0], *outputs[-3:-1], cell, directions, "gates",
            need_dx, need_dw,
        )  # fmt: skip
        states = (None if h0 is None else dh0, None if c0 is None else dc0)
        return (dx if need_dx else None, dweights or [None] * len(weights), *states, *[None] * 6)

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


def without_gradient(op: Op, *args: Any) -> list[Tensor]:
    """op(*args) past the gradient above, which takes 15 µs to find that nobody asks for it. A trace has to see it."""
    if torch.compiler.is_compiling() or _is_recorded():
        return op(*args)
    with torch._C._AutoDispatchBelowAutograd():
        return op(*args)
