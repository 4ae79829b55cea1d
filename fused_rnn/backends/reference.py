"""The plain PyTorch loop: slow, obvious, differentiable any number of times, in forward mode too, on any device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from fused_rnn.cells import CELLS, unknown
from fused_rnn.reference.gradient import backward_layer
from fused_rnn.reference.loop import run_layer, without_autocast

if TYPE_CHECKING:
    from fused_rnn.problem import Problem

NAME = "reference"
DIFFERENTIABLE = True  # forward is made of differentiable torch operations and needs no Function around it
stack = None  # functional runs the layers one by one


def supports(problem: Problem) -> str | None:
    """None if this backend can run the problem, else the reason it cannot."""
    if (reason := unknown(problem.cell, CELLS)) is not None:
        return reason
    if problem.needs_grad and problem.save == "recompute":
        return "it keeps what autograd keeps; save='recompute' needs the cpu backend"
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
    """One layer; arguments and result as those of the op fused_rnn::forward, with nothing in `saved` and `cells`."""
    with without_autocast(x):  # the matrix products would fall back into 16 bit
        y, h_n, c_n = run_layer(x, weights, h0, c0, lengths, reset, cell, directions)
    outputs = [y, h_n] if c_n is None else [y, h_n, c_n]
    if save != "none":
        outputs += [x.new_empty(0), x.new_empty(0), y.clone() if keep_hidden else x.new_empty(0)]
    return outputs


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
    """One layer's gradients by running it again; arguments and result as those of the op fused_rnn::backward."""
    with without_autocast(x):
        dx, dh0, *rest = backward_layer(dy, dh_n, dc_n, x, weights, h0, c0, lengths, reset, cell, directions)
    none = x.new_empty(0)
    dc0 = rest.pop(0) if CELLS[cell].has_c else none
    states = (none if h0 is None else dh0, none if c0 is None else dc0)
    return [dx if need_dx else none, *states, *(rest if need_dw else [])]


def step(x: Tensor, h: Tensor | None, c: Tensor | None, weights: Sequence[Tensor], cell: str) -> list[Tensor]:
    """One step: x [B, D], h [B, P], c [B, H], None for zeros → [h'] or [h', c']. Differentiable."""
    with without_autocast(x):
        h, c = (t if t is None else t.unsqueeze(0) for t in (h, c))
        _, h_n, c_n = run_layer(x.unsqueeze(0), weights, h, c, None, None, cell, (1,))
    return [s.squeeze(0).clone() for s in (h_n, c_n) if s is not None]  # no views, as those of other backends


def describe(problem: Problem) -> str:
    """What would run, in a line."""
    return (
        f"a Python loop over time, {problem.recurrences} recurrence(s) a layer, one torch call per operation and step"
    )
