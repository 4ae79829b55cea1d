"""torch's own kernels (oneDNN and ATen on a CPU, cuDNN on a GPU): the whole stack in one call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import _VF, Tensor
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from fused_rnn.call import BackwardCall, LayerCall
from fused_rnn.cells import unknown

if TYPE_CHECKING:
    from fused_rnn.problem import Problem

NAME = "torch"
DIFFERENTIABLE = True
wavefront = None  # cuDNN has its own

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
    if problem.sequences:
        return "torch's kernels return h alone over time"
    if problem.reset:
        return "torch's kernels know no reset"
    if problem.needs_grad and problem.save == "recompute":
        return "torch's kernels keep all their gates; save='recompute' goes with cpu, cuda and triton"
    if problem.forward_ad:
        return "oneDNN's and cuDNN's kernels have no forward-mode derivative"
    return None


def stack(
    x: Tensor,
    weights: Sequence[Tensor],
    states: Sequence[Tensor],
    lengths: Tensor | None,
    cell: str,
    num_layers: int,
    recurrences: int,
    dropout: float,
    training: bool,
) -> list[Tensor]:
    """A whole stack: x [T, B, D], states [L·R, B, ·] or () for zeros → y [T, B, R·P] and the states after.

    Differentiable as often as torch's kernels are (oneDNN's LSTM: once). On a GPU cuDNN takes weights that lie in one
    chunk of memory, as torch.nn's and our modules' do; others it copies into one at each call, and warns.
    """
    if x.is_cuda and torch.is_autocast_enabled("cuda"):  # or cuDNN's rule casts once more, to float16
        with torch.autocast("cuda", enabled=False):
            return stack(x, weights, states, lengths, cell, num_layers, recurrences, dropout, training)
    call = LayerCall(x, weights[: len(weights) // num_layers], (), lengths, None, cell, (1,) * recurrences)
    if states:
        states = [s.contiguous() for s in states]  # cuDNN refuses others
    else:
        states = [x.new_zeros(num_layers * rows, batch, width) for rows, batch, width in call.state_shapes()]
    # cuDNN refuses a backward in eval mode; without dropout the mode has no other say.
    training = training or (x.is_cuda and dropout == 0 and torch.is_grad_enabled())
    tail = (list(weights), call.kinds.bias, num_layers, dropout, training, recurrences == 2)
    if lengths is None or x.shape[1] == 0:
        return list(_STACKS[cell](x, _one_or_all(states), *tail, False))
    # A pack holds no empty sequence: such a one runs one step, on zeros, and its result is put aside below.
    empty = (lengths == 0).unsqueeze(-1)
    packed = pack_padded_sequence(x.masked_fill(empty, 0), lengths.clamp(min=1).cpu(), enforce_sorted=False)
    assert packed.sorted_indices is not None and packed.unsorted_indices is not None
    ordered = [s.index_select(1, packed.sorted_indices) for s in states]
    data, *after = _STACKS[cell](packed.data, packed.batch_sizes, _one_or_all(ordered), *tail)
    y, _ = pad_packed_sequence(packed._replace(data=data), total_length=x.shape[0])
    after = [s.index_select(1, packed.unsorted_indices) for s in after]
    after = [torch.where(empty, old, new) for old, new in zip(states, after, strict=True)]
    return [y.masked_fill(empty, 0), *after]


def _one_or_all(states: Sequence[Tensor]) -> Tensor | Sequence[Tensor]:
    return states[0] if len(states) == 1 else states


def forward(call: LayerCall) -> list[Tensor]:
    """One layer; result as of the op fused_rnn::forward, with nothing in what it keeps."""
    if tuple(call.directions) not in ((1,), (1, -1)) or call.x.dim() != 3 or call.reset is not None:
        raise NotImplementedError(
            "torch's kernels run a layer forward or in both directions, on one input [T, B, D], with no reset"
        )
    outputs = stack(
        call.x, call.weights, call.states, call.lengths, call.cell, 1, call.recurrences, dropout=0.0, training=False
    )
    if call.save != "none":
        nothing = [call.x.new_empty(0) for _ in call.spec.states]  # saved, and a history for each state but h
        outputs += [*nothing, outputs[0].clone() if call.keep_hidden else call.x.new_empty(0)]
    return outputs


def backward(call: BackwardCall) -> list[Tensor]:
    """One layer's gradients by running it again; result as of the op fused_rnn::backward."""
    with torch.enable_grad():
        x, *rest = (t.detach().requires_grad_() for t in (call.x, *call.states, *call.weights))
        states, weights = rest[: len(call.states)], rest[len(call.states) :]
        outputs = forward(call.layer._replace(x=x, states=states, weights=weights, save="none"))
    given = [(o, g) for o, g in zip(outputs, (call.dy, *call.dstates), strict=False) if g is not None]
    dx, *grads = torch.autograd.grad([o for o, _ in given], [x, *rest], [g for _, g in given])
    return [dx if call.need_dx else x.new_empty(0), *(grads if call.need_dw else grads[: len(states)])]


def step(x: Tensor, weights: Sequence[Tensor], states: Sequence[Tensor], cell: str) -> list[Tensor]:
    """One step: x [B, D], states [B, H] or () for zeros → the states after. Differentiable."""
    call = LayerCall(x.unsqueeze(0), weights, (), None, None, cell, (1,))
    states = states or [x.new_zeros(shape[1:]) for shape in call.state_shapes()]
    after = _STEPS[cell](x, _one_or_all(states), *call.each[0][:4])
    return [after] if isinstance(after, Tensor) else list(after)


def describe(problem: Problem) -> str:
    """What would run, in a line."""
    if problem.device != "cpu":
        return f"torch.{problem.cell.split('_')[0]} on {problem.device}"
    onednn = problem.cell == "lstm" and torch.backends.mkldnn.is_available() and problem.dtype != torch.float64
    return f"torch.{problem.cell.split('_')[0]}: {'oneDNN' if onednn else 'one ATen call per operation and step'}"
