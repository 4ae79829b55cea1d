"""torch's own kernels (oneDNN and ATen on a CPU, cuDNN on a GPU): the whole stack in one call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import _VF, Tensor
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from fused_rnn.cells import unknown

if TYPE_CHECKING:
    from fused_rnn.problem import Problem

NAME = "torch"
DIFFERENTIABLE = True

_STACKS: dict[str, Callable[..., Any]] = {
    "lstm": _VF.lstm,
    "gru": _VF.gru,
    "rnn_tanh": _VF.rnn_tanh,
    "rnn_relu": _VF.rnn_relu,
}
_STEPS: dict[str, Callable[..., Any]] = {
    "lstm": _VF.lstm_cell,
    "gru": _VF.gru_cell,
    "rnn_tanh": _VF.rnn_tanh_cell,
    "rnn_relu": _VF.rnn_relu_cell,
}


def supports(problem: Problem) -> str | None:
    """None if this backend can run the problem, else the reason it cannot."""
    if (reason := unknown(problem.cell, _STACKS)) is not None:
        return reason
    if problem.reset:
        return "torch's kernels know no reset"
    if problem.needs_grad and problem.save == "recompute":
        return "torch's kernels keep all their gates; save='recompute' needs the cpu backend"
    if problem.forward_ad:
        return "oneDNN's and cuDNN's kernels have no forward-mode derivative"
    return None


def stack(
    x: Tensor,
    weights: Sequence[Tensor],
    h0: Tensor | None,
    c0: Tensor | None,
    lengths: Tensor | None,
    cell: str,
    num_layers: int,
    recurrences: int,
    dropout: float,
    training: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """A whole stack: x [T, B, D], h0 [L·R, B, P], c0 [L·R, B, H] → y [T, B, R·P], h_n, c_n (LSTM, else None).

    Differentiable as often as torch's kernels are (oneDNN's LSTM: once). On a GPU cuDNN takes weights that lie in one
    chunk of memory, as torch.nn's and our modules' do; others it copies into one at each call, and warns.
    """
    if x.is_cuda and torch.is_autocast_enabled("cuda"):  # or cuDNN's rule casts once more, to float16
        with torch.autocast("cuda", enabled=False):
            return stack(x, weights, h0, c0, lengths, cell, num_layers, recurrences, dropout, training)
    rows, batch, count = num_layers * recurrences, x.shape[1], len(weights) // (num_layers * recurrences)
    # cuDNN refuses states that are not contiguous.
    states = [x.new_zeros(rows, batch, weights[1].shape[1]) if h0 is None else h0.contiguous()]
    if cell == "lstm":
        states.append(x.new_zeros(rows, batch, weights[1].shape[0] // 4) if c0 is None else c0.contiguous())
    # cuDNN refuses a backward in eval mode; without dropout the mode has no other say.
    training = training or (x.is_cuda and dropout == 0 and torch.is_grad_enabled())
    tail = (list(weights), count >= 4, num_layers, dropout, training, recurrences == 2)
    if lengths is None or batch == 0:
        y, *after = _STACKS[cell](x, states if cell == "lstm" else states[0], *tail, False)
    else:
        # A pack holds no empty sequence: such a one runs one step, on zeros, and its result is put aside below.
        empty = (lengths == 0).unsqueeze(-1)
        packed = pack_padded_sequence(x.masked_fill(empty, 0), lengths.clamp(min=1).cpu(), enforce_sorted=False)
        assert packed.sorted_indices is not None and packed.unsorted_indices is not None
        ordered = [s.index_select(1, packed.sorted_indices) for s in states]
        data, *after = _STACKS[cell](packed.data, packed.batch_sizes, ordered if cell == "lstm" else ordered[0], *tail)
        y, _ = pad_packed_sequence(packed._replace(data=data), total_length=x.shape[0])
        y = y.masked_fill(empty, 0)
        after = [s.index_select(1, packed.unsorted_indices) for s in after]
        after = [torch.where(empty, old, new) for old, new in zip(states, after, strict=True)]
    return y, after[0], after[1] if cell == "lstm" else None


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
    if tuple(directions) not in ((1,), (1, -1)) or x.dim() != 3 or reset is not None:
        raise NotImplementedError(
            "torch's kernels run a layer forward or in both directions, on one input [T, B, D], with no reset"
        )
    y, h_n, c_n = stack(x, weights, h0, c0, lengths, cell, 1, len(directions), 0.0, False)
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
    with torch.enable_grad():
        x, *weights = (t.detach().requires_grad_() for t in (x, *weights))
        h0, c0 = (None if t is None else t.detach().requires_grad_() for t in (h0, c0))
        outputs = forward(x, weights, h0, c0, lengths, reset, cell, directions, "none", False)
    given = [(o, g) for o, g in zip(outputs, (dy, dh_n, dc_n), strict=False) if g is not None]
    states = [t for t in (h0, c0) if t is not None]
    dx, *rest = torch.autograd.grad([o for o, _ in given], [x, *states, *weights], [g for _, g in given])
    dh0, dc0 = (x.new_empty(0) if t is None else rest.pop(0) for t in (h0, c0))
    return [dx if need_dx else x.new_empty(0), dh0, dc0, *(rest if need_dw else [])]


def step(x: Tensor, h: Tensor | None, c: Tensor | None, weights: Sequence[Tensor], cell: str) -> list[Tensor]:
    """One step: x [B, D], h [B, H], c [B, H], None for zeros → [h'] or [h', c']. Differentiable."""
    w_ih, w_hh, *biases = weights
    b_ih, b_hh = biases or (None, None)
    h = x.new_zeros(x.shape[0], w_hh.shape[1]) if h is None else h
    if cell == "lstm":
        return list(_STEPS[cell](x, (h, torch.zeros_like(h) if c is None else c), w_ih, w_hh, b_ih, b_hh))
    return [_STEPS[cell](x, h, w_ih, w_hh, b_ih, b_hh)]


def describe(problem: Problem) -> str:
    """What would run, in a line."""
    if problem.device != "cpu":
        return f"torch.{problem.cell.split('_')[0]} on {problem.device}"
    onednn = problem.cell == "lstm" and torch.backends.mkldnn.is_available() and problem.dtype != torch.float64
    return f"torch.{problem.cell.split('_')[0]}: {'oneDNN' if onednn else 'one ATen call per operation and step'}"
