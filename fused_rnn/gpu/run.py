"""One layer, forward and backward: the products outside the loops around a backend's loops."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fused_rnn.gpu import projection
from fused_rnn.gpu.loops import Layer, Loops, wide
from fused_rnn.gpu.products import input_gradient, input_product, weight_gradients, window_of
from fused_rnn.gpu.weights import Weights, aligned
from fused_rnn.reference.sequence import entering

# Steps whose gates are made again at a time under save="recompute", and between which LSTM's c is kept.
CHECKPOINT_EVERY = 64


def checkpoint_rows(steps: int) -> int:
    """Of the tensor that keeps c: one more than needed, for torch.compile takes a size that may be 1 for a constant."""
    return steps // CHECKPOINT_EVERY + 2


def _states(layer: Layer, state: Tensor | None, like: Tensor, width: int) -> Tensor:
    return like.new_zeros(layer.recurrences, layer.batch, width) if state is None else aligned(state)


def _wide(layer: Layer, like: Tensor, *states: Tensor | None) -> list[Tensor]:
    """States [R, B, H] in the accumulation dtype, in memory of their own: the loops write to them."""
    shape = (layer.recurrences, layer.batch, layer.hidden)
    count = math.prod(shape)
    rows = like.new_zeros(len(states), (count + 3) // 4 * 4, dtype=wide(like.dtype))  # 16 divides each one's address
    made = [row[:count].view(shape) for row in rows.unbind()]
    return [m if state is None else m.copy_(state) for m, state in zip(made, states, strict=True)]


def forward(
    layer: Layer,
    loops: Loops,
    x: Tensor,
    weights: Weights,
    h0: Tensor | None,
    c0: Tensor | None,
    save: str,
    keep_hidden: bool,
) -> list[Tensor]:
    """As the op: [y, h_n] (+ [c_n]), with `save` other than none also [saved, cells, hidden]."""
    cell, steps, batch, hidden, recurrences = layer.cell, layer.steps, layer.batch, layer.hidden, layer.recurrences
    gates, recompute = save == "gates", save == "recompute"
    gx = input_product(x, weights, cell, [(0, steps)] * recurrences, hidden)
    if weights.w_hr and h0 is not None:
        projection.enter(layer, gx, h0, weights)
    h_first = _states(layer, None if weights.w_hr else h0, x, hidden)
    state = _wide(layer, x, c0 if cell.has_c else h0)[0] if cell.has_state else None
    y = x.new_empty(steps, batch, recurrences * hidden)  # as it leaves: a view may not be changed in place
    m = y.view(steps, batch, recurrences, hidden)
    h_n = torch.empty_like(h_first)
    saved = x.new_empty(steps, batch, recurrences, cell.stored, hidden) if gates else None
    cells = x.new_empty(steps, batch, recurrences, hidden) if gates and cell.has_c else None
    checkpoints = None
    if recompute and cell.has_c:
        # Rows that no step fills are zero, so that equal calls give equal results.
        checkpoints = x.new_zeros(checkpoint_rows(steps), recurrences, batch, hidden, dtype=wide(x.dtype))
    loops.forward(
        gx=gx, w=weights.recurrent(cell), bias=weights.hidden_bias(cell), h0=h_first, state=state, y=m, h_n=h_n,
        saved=saved, cells=cells, checkpoints=checkpoints, every=CHECKPOINT_EVERY,
    )  # fmt: skip
    if weights.w_hr:
        y, h_n = projection.leave(layer, m, h0, weights)
    outputs = [y, h_n]
    if cell.has_c and state is not None:
        outputs.append(state.to(x.dtype, copy=True))
    if save == "none":
        return outputs
    # Three tensors, never one of them twice: an op's results may not alias.
    kept = (saved if gates else checkpoints, cells, y.clone() if keep_hidden else None)
    return [*outputs, *(x.new_empty(0) if t is None else t for t in kept)]


def backward(
    layer: Layer,
    loops: Loops,
    dy: Tensor | None,
    dh_n: Tensor | None,
    dc_n: Tensor | None,
    x: Tensor,
    weights: Weights,
    h0: Tensor | None,
    c0: Tensor | None,
    hidden: Tensor,
    saved: Tensor,
    cells: Tensor,
    save: str,
    need_dx: bool,
    need_dw: bool,
) -> list[Tensor]:
    """As the op: [dx, dh0, dc0], then one gradient per weight if need_dw."""
    cell, steps, batch, units, recurrences = layer.cell, layer.steps, layer.batch, layer.hidden, layer.recurrences
    h_first = _states(layer, h0, x, weights.w_hh[0].shape[1])
    hidden = aligned(hidden).view(steps, batch, recurrences, -1)
    dy = None if dy is None else aligned(dy).view(hidden.shape)
    dm, dm_n = dy, dh_n  # gradients of what the loops put out
    if weights.w_hr:
        dm = None if dy is None else projection.pull(dy, weights)
        dm_n = None if dh_n is None else projection.pull(dh_n.transpose(0, 1), weights).transpose(0, 1)
    dgates = x.new_empty(steps, batch, recurrences, cell.gradients, units)
    dh, *rest = _wide(layer, x, dm_n, dc_n) if cell.has_c else _wide(layer, x, dm_n)
    dc = rest[0] if cell.has_c else None
    m = x.new_empty(steps, batch, recurrences, units) if weights.w_hr and need_dw else None
    if save == "recompute" and cell.stored:
        _backward_by_chunks(layer, loops, x, weights, h_first, hidden, saved, dm, dgates, dh, dc, m)
    else:
        states, first_state = hidden, h_first
        if cell.has_c:
            the_same_zeros = h0 is None and c0 is None and h_first.shape[2] == units
            states, first_state = cells, h_first if the_same_zeros else _states(layer, c0, x, units)
        if m is not None:
            m.copy_(projection.unprojected(saved, cells, x.dtype))
        loops.backward(
            dy=dm, w=weights.recurrent(cell), states=states, first_state=first_state,
            saved=saved if cell.stored else None, dgates=dgates, dh=dh, dc=dc,
        )  # fmt: skip

    if weights.w_hr:
        dh0, dw_hr = projection.gradients(layer, dy, dh_n, weights, dgates, m)
    else:
        dh0, dw_hr = dh, []
    dh0 = x.new_empty(0) if h0 is None else dh0.to(x.dtype, copy=True)
    dc0 = x.new_empty(0) if c0 is None or dc is None else dc.to(x.dtype, copy=True)
    outputs = [input_gradient(x, weights, cell, dgates) if need_dx else x.new_empty(0), dh0, dc0]
    if need_dw:
        for r, each in enumerate(weight_gradients(layer, x, weights, h_first, hidden, dgates)):
            outputs += [*each, *dw_hr[r : r + 1]]
    return outputs


def _backward_by_chunks(
    layer: Layer,
    loops: Loops,
    x: Tensor,
    weights: Weights,
    h0: Tensor,
    hidden: Tensor,
    checkpoints: Tensor,
    dy: Tensor | None,
    dgates: Tensor,
    dh: Tensor,
    dc: Tensor | None,
    m: Tensor | None,
) -> None:
    """save="recompute": chunk by chunk from the end, gates are made again by one product, then run backward over."""
    cell, steps, batch, units, recurrences = layer.cell, layer.steps, layer.batch, layer.hidden, layer.recurrences
    w, bias = weights.recurrent(cell), weights.hidden_bias(cell)
    for first in range((steps - 1) // CHECKPOINT_EVERY * CHECKPOINT_EVERY, -1, -CHECKPOINT_EVERY):
        last = min(first + CHECKPOINT_EVERY, steps)
        windows = [window_of(direction, steps, first, last) for direction in layer.directions]
        gx = input_product(x, weights, cell, windows, units)
        given = torch.empty_like(gx)
        for r, window in enumerate(windows):
            before = entering(hidden[:, :, r], h0[r], layer.lengths, layer.reset, layer.directions[r], *window)
            product = torch.mm(before.flatten(0, 1), weights.w_hh[r].t())
            given.view(-1, recurrences, cell.gates * units)[:, r] = product
        saved = x.new_empty(last - first, batch, recurrences, cell.stored, units)
        # c is kept wide here: it is made from a wide checkpoint and lives no longer than the chunk.
        cells = x.new_empty(*saved.shape[:3], units, dtype=wide(x.dtype)) if cell.has_c else None
        state = aligned(checkpoints[first // CHECKPOINT_EVERY]) if cell.has_c else None
        loops.replay(
            gx=gx, given=given, bias=bias, h0=h0, hidden=hidden, state=None if state is None else state.clone(),
            saved=saved, cells=cells, window=(first, last),
        )  # fmt: skip
        if m is not None and cells is not None:
            for r, window in enumerate(windows):
                m[slice(*window), :, r] = projection.unprojected(saved[:, :, r], cells[:, :, r], x.dtype)
        states, first_state = (hidden, h0) if cells is None or state is None else (cells, state)
        loops.backward(
            dy=dy, w=w, states=states, first_state=first_state, saved=saved, dgates=dgates, dh=dh, dc=dc,
            window=(first, last),
        )  # fmt: skip
