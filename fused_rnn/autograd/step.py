"""A step of a cell that has been run already as torch.autograd.Function: a layer's of one step, without its output."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.autograd import Function

from fused_rnn.autograd import Outputs, pull, together
from fused_rnn.call import BackwardCall
from fused_rnn.cells import CELLS


def made(outputs: Outputs, cell: str, x: Tensor, states: Sequence[Tensor], weights: Sequence[Tensor]) -> Outputs:
    """The states after an eager step that the `cpu` backend has run, past the dispatcher.

    outputs: those states and what is kept for backward, as of a layer of one step. x: [B, D].  states: [B, H] or ().
    """
    results: Outputs = super(Function, StepFunction).apply(outputs, cell, len(states), x, *states, *weights)  # type: ignore[no-untyped-call]
    return results


class StepFunction(Function):
    """apply(outputs, cell, number of states, x, *states, *weights) → the states after. Twice differentiable, as
    LayerFunction."""

    @staticmethod
    def forward(*args: Any) -> Outputs:
        outputs: Outputs = args[0][: len(CELLS[args[1]].states)]
        return outputs

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        outputs, cell, given, *tensors = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*outputs[len(output) :], *tensors)
        ctx.call = (cell, given)

    @staticmethod
    def backward(ctx: Any, *douts: Tensor | None) -> tuple[Any, ...]:
        cell, given = ctx.call
        count, needs = len(douts), ctx.needs_input_grad
        if all(d is None for d in douts):
            return (None,) * len(needs)
        saved, *kept = ctx.saved_tensors
        histories, hidden, x, rest = kept[: count - 1], kept[count - 1], kept[count], kept[count + 1 :]
        states, weights = [s.unsqueeze(0) for s in rest[:given]], rest[given:]
        dstates = together([(hidden.size(1), hidden.size(2))] * count, x, douts)
        need_dw = True in needs[4 + given :]
        dx, *grads = pull(
            "cpu",
            BackwardCall(
                None, [d.unsqueeze(0) for d in dstates], x.unsqueeze(0), weights, states, None, None, hidden, saved,
                histories, cell, (1,), "gates", needs[3], need_dw,
            ),
        )  # fmt: skip
        dweights = grads[given:] if need_dw else [None] * len(weights)
        return (
            None,
            None,
            None,
            dx.squeeze(0) if needs[3] else None,
            *[g.squeeze(0) for g in grads[:given]],
            *dweights,
        )
