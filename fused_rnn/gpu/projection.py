"""A projected LSTM by loops that know no projection.

With m_t = o tanh(c) the output before the projection, y_t = W_hr m_t, and what the gates of step t get of it is
W_hh W_hr m_{t-1}: a plain recurrence of m, with the product of the two matrices for its W_hh. No m stands behind h0:
W_hh h0 is added to the input product of a row's first step. More arithmetic in the loop than by the projection, and no
second exchange a step.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fused_rnn.call import Weights, wide
from fused_rnn.gpu.loops import Layer
from fused_rnn.gpu.products import recurrent_side
from fused_rnn.reference.sequence import zero_past_end


def _first(layer: Layer, r: int) -> tuple[Any, ...]:
    """Index of the first step of every row of recurrence r, into [T, B, ...]."""
    if layer.directions[r] > 0:
        return (0,)
    return (layer.steps - 1,) if layer.lengths is None else _ends(layer.lengths)


def _last(layer: Layer, r: int) -> tuple[Any, ...]:
    """Likewise of the last step."""
    if layer.directions[r] < 0:
        return (0,)
    return (layer.steps - 1,) if layer.lengths is None else _ends(layer.lengths)


def _ends(lengths: Tensor) -> tuple[Tensor, Tensor]:
    return (lengths - 1).clamp_min(0), torch.arange(lengths.shape[0], device=lengths.device)


def _unless_reset(layer: Layer, r: int, value: Tensor) -> Tensor:
    """value [B, ...], zero where a row's first step forgets what enters it."""
    if layer.reset is None:
        return value
    return value.masked_fill((layer.reset[_first(layer, r)] != 0).unsqueeze(-1), 0)


def _where_empty(layer: Layer, state: Tensor | None, else_: Tensor) -> Tensor:
    """else_ [B, P], or `state` (None for zeros) in rows that have no step at all."""
    if layer.lengths is None:
        return else_
    return torch.where((layer.lengths == 0).unsqueeze(-1), torch.zeros_like(else_) if state is None else state, else_)


def enter(layer: Layer, gx: Tensor, h0: Tensor, weights: Sequence[Weights]) -> None:
    """Add what h0 [R, B, P] gives to the gates, to gx [T, B, R, G, H]."""
    flat = gx.flatten(3)
    for r, w in enumerate(weights):
        flat[:, :, r][_first(layer, r)] += _unless_reset(layer, r, torch.mm(h0[r], w.w_hh.t()))


def leave(layer: Layer, m: Tensor, h0: Tensor | None, weights: Sequence[Weights]) -> tuple[Tensor, Tensor]:
    """y [T, B, R·P] and h_n [R, B, P] from m [T, B, R, H]."""
    recurrences, width = layer.recurrences, weights[0].w_hr.shape[0]
    whole = m.new_empty(*m.shape[:2], recurrences * width)
    y = whole.view(*m.shape[:3], width)
    h_n = m.new_empty(recurrences, layer.batch, width)
    for r, w in enumerate(weights):
        y[:, :, r] = torch.mm(m[:, :, r].flatten(0, 1), w.w_hr.t()).view(*m.shape[:2], width)
        h_n[r] = _where_empty(layer, None if h0 is None else h0[r], y[:, :, r][_last(layer, r)])
    return whole, h_n


def pull(dy: Tensor, weights: Sequence[Weights]) -> Tensor:
    """dy [..., R, P], its places behind the projection, to m's [..., R, H]."""
    dm = dy.new_empty(*dy.shape[:-1], weights[0].w_hr.shape[1])
    for r, w in enumerate(weights):
        dm[..., r, :] = torch.mm(dy[..., r, :].reshape(-1, dy.shape[-1]), w.w_hr).view(*dy.shape[:-2], -1)
    return dm


def unprojected(saved: Tensor, cells: Tensor, dtype: torch.dtype) -> Tensor:
    """m of any steps, from their gates [..., S, H] and c [..., H]."""
    return (saved[..., 3, :].to(wide(dtype)) * cells.to(wide(dtype)).tanh()).to(dtype)


def gradients(
    layer: Layer, dy: Tensor | None, dh_n: Tensor | None, weights: Sequence[Weights], dgates: Tensor, m: Tensor | None
) -> tuple[Tensor, list[Tensor]]:
    """dh0 [R, B, P], and dw_hr of each recurrence where m [T, B, R, H] is given. dy: [T, B, R, P], dh_n: [R, B, P]."""
    dh0, dw_hr = [], []
    for r, w in enumerate(weights):
        # What step t sends back to the output that entered it.
        sent = torch.mm(recurrent_side(dgates, layer.cell, r).flatten(0, 1), w.w_hh).view(*dgates.shape[:2], -1)
        if layer.reset is not None:
            sent.masked_fill_((layer.reset != 0).unsqueeze(-1), 0)
        ending = None if dh_n is None else dh_n[r]
        dh0.append(_where_empty(layer, ending, sent[_first(layer, r)]))
        if m is None:
            continue
        total = torch.zeros_like(sent) if dy is None else dy[:, :, r].clone()
        if layer.directions[r] > 0:
            total[:-1] += sent[1:]
        else:
            total[1:] += sent[:-1]
        if ending is not None:
            total[_last(layer, r)] += ending
        total = zero_past_end(total, layer.lengths)
        dw_hr.append(torch.mm(total.flatten(0, 1).t(), m[:, :, r].flatten(0, 1)))
    return torch.stack(dh0), dw_hr
