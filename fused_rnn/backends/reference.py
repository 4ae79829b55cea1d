"""The plain PyTorch loop: slow, obvious, differentiable any number of times, in forward mode too, on any device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from fused_rnn.call import BackwardCall, LayerCall
from fused_rnn.cells import CELLS, is_program, unknown
from fused_rnn.reference.gradient import backward_layer
from fused_rnn.reference.loop import run_layer, without_autocast

if TYPE_CHECKING:
    from fused_rnn.problem import Problem

NAME = "reference"
DIFFERENTIABLE = True  # forward is made of differentiable torch operations and needs no Function around it
stack = wavefront = None  # layers.run runs the layers one by one


def supports(problem: Problem) -> str | None:
    """None if this backend can run the problem, else the reason it cannot."""
    if not is_program(problem.cell) and (reason := unknown(problem.cell, CELLS)) is not None:
        return reason
    if problem.needs_grad and problem.save == "recompute" and not problem.forward_ad:  # which nothing else has
        return "it keeps what autograd keeps; save='recompute' goes with cpu, cuda and triton"
    return None


def forward(call: LayerCall) -> list[Tensor]:
    """One layer; result as of the op fused_rnn::forward, with nothing in what it keeps."""
    with without_autocast(call.x):  # the matrix products would fall back into 16 bit
        outputs = run_layer(call)
    if call.save != "none":
        nothing = [call.x.new_empty(0) for _ in call.spec.states]  # saved, and a history for each state but h
        if call.sequences and call.save == "gates":
            nothing = nothing[:1]
        outputs += [*nothing, outputs[0].clone() if call.keep_hidden else call.x.new_empty(0)]
    return outputs


def backward(call: BackwardCall) -> list[Tensor]:
    """One layer's gradients by running it again; result as of the op fused_rnn::backward."""
    with without_autocast(call.x):
        dx, *grads = backward_layer(call.dy, call.dstates, call.layer, call.dsequences)
    count = len(call.layer.spec.states)
    given = grads[:count] if call.states else []
    return [dx if call.need_dx else call.x.new_empty(0), *given, *(grads[count:] if call.need_dw else [])]


def step(x: Tensor, weights: Sequence[Tensor], states: Sequence[Tensor], cell: str) -> list[Tensor]:
    """One step: x [B, D], states [B, ·] or () for zeros → the states after. Differentiable."""
    call = LayerCall(x.unsqueeze(0), weights, [s.unsqueeze(0) for s in states], None, None, cell, (1,))
    with without_autocast(x):
        _, *after = run_layer(call)
    return [s.squeeze(0).clone() for s in after]  # no views, as those of other backends


def describe(problem: Problem) -> str:
    """What would run, in a line."""
    return (
        f"a Python loop over time, {problem.recurrences} recurrence(s) a layer, one torch call per operation and step"
    )
