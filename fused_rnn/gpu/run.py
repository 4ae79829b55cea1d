"""One layer, forward and backward: the products outside the loops around a backend's loops."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fused_rnn.call import BackwardCall, LayerCall, Weights, all_or_none, wide
from fused_rnn.gpu import projection
from fused_rnn.gpu.loops import Layer, Loops
from fused_rnn.gpu.products import input_gradient, input_product, recurrent_product, weight_gradients, window_of
from fused_rnn.gpu.weights import aligned, params, recurrent, recurrent_bias


def _wide(layer: Layer, like: Tensor, states: Sequence[Tensor | None]) -> list[Tensor]:
    """States [R, B, H] in the accumulation dtype, in memory of their own: the loops write to them. None for zeros."""
    if not states:
        return []
    shape = (layer.recurrences, layer.batch, layer.hidden)
    count = math.prod(shape)
    rows = like.new_zeros(len(states), (count + 3) // 4 * 4, dtype=wide(like.dtype))  # 16 divides each one's address
    made = [row[:count].view(shape) for row in rows.unbind()]
    return [m if state is None else m.copy_(state) for m, state in zip(made, states, strict=True)]


def forward(layer: Layer, loops: Loops, call: LayerCall, weights: Sequence[Weights]) -> list[Tensor]:
    """As the op: [y, states after, sequences], and what is kept for backward, if anything."""
    cell, steps, batch, hidden, recurrences = layer.cell, layer.steps, layer.batch, layer.hidden, layer.recurrences
    x, projects, more = call.x, call.kinds.projects, len(cell.states) - 1
    gx = input_product(x, weights, cell, [(0, steps)] * recurrences, hidden)
    h0 = call.states[0] if call.states else None
    if projects and h0 is not None:
        projection.enter(layer, gx, h0, weights)
    h_first = x.new_zeros(recurrences, batch, hidden) if projects or h0 is None else aligned(h0)
    carried = _wide(layer, x, all_or_none(call.states, 1 + more)[not cell.reads_h :])
    y = x.new_empty(steps, batch, recurrences * hidden)  # as it leaves: a view may not be changed in place
    m = y.view(steps, batch, recurrences, hidden)
    h_n = torch.empty_like(h_first)
    saved_shape, shapes, dtype = call.kept_shapes()
    saved, histories, checkpoints = None, [], []
    if call.save == "gates" or call.sequences:
        histories = [x.new_empty(shape) for shape in call.sequence_shapes()]
    if call.save == "gates":
        saved = x.new_empty(saved_shape)
    elif call.save == "recompute":
        # Rows that no step fills are zero, so that equal calls give equal results.
        checkpoints = [x.new_zeros(shape, dtype=dtype) for shape in shapes]
    loops.forward(
        gx=gx, w=recurrent(weights, cell), bias=recurrent_bias(weights, cell), params=params(weights), h0=h_first,
        carried=carried, y=m, h_n=h_n, saved=saved, histories=histories, checkpoints=checkpoints, every=call.every,
    )  # fmt: skip
    if projects:
        y, h_n = projection.leave(layer, m, h0, weights)
    outputs = [y, h_n, *(state.to(x.dtype, copy=True) for state in carried[cell.reads_h :])]
    if call.sequences:
        outputs += histories
    if call.save == "none":
        return outputs
    kept = checkpoints if call.save == "recompute" else [] if call.sequences else histories
    hidden_copy = y.clone() if call.keep_hidden else x.new_empty(0)
    return [*outputs, x.new_empty(0) if saved is None else saved, *kept, hidden_copy]


def backward(layer: Layer, loops: Loops, call: BackwardCall, weights: Sequence[Weights]) -> list[Tensor]:
    """As the op: [dx, gradients of the states given, of the weights if they are wanted]."""
    cell, steps, batch, units, recurrences = layer.cell, layer.steps, layer.batch, layer.hidden, layer.recurrences
    x, projects = call.x, call.layer.kinds.projects
    initial = [aligned(state) for state in call.layer.initial()]
    hidden = aligned(call.hidden).view(steps, batch, recurrences, -1)
    dy = None if call.dy is None else aligned(call.dy).view(hidden.shape)
    dh_n, *dmore = all_or_none(call.dstates, len(cell.states))
    dm, dm_n = dy, dh_n  # gradients of what the loops put out
    if projects:
        dm = None if dy is None else projection.pull(dy, weights)
        dm_n = None if dh_n is None else projection.pull(dh_n.transpose(0, 1), weights).transpose(0, 1)
    dsequences = [aligned(d) for d in call.dsequences]
    dgates = x.new_empty(steps, batch, recurrences, cell.gradients, units)
    dstates, dparams = _wide(layer, x, [dm_n, *dmore]), None
    if cell.params and call.need_dw:
        dparams = x.new_zeros(recurrences, batch, len(cell.params), units, dtype=wide(x.dtype))
    m = x.new_empty(steps, batch, recurrences, units) if projects and call.need_dw else None
    gradients = (dm, dsequences, dgates, dstates, dparams)
    if call.save == "recompute" and (cell.saved or call.histories):
        _backward_by_chunks(layer, loops, call, weights, initial, hidden, gradients, m)
    else:
        if m is not None:
            m.copy_(projection.unprojected(call.saved, call.histories[0], x.dtype))
        loops.backward(
            dy=dm, dsequences=dsequences, w=recurrent(weights, cell), params=params(weights),
            states=[hidden, *call.histories], first=initial, saved=call.saved if cell.saved else None, dgates=dgates,
            dstates=dstates, dparams=dparams,
        )  # fmt: skip

    dh0, dw_hr = dstates[0], list[Tensor]()
    if projects:
        dh0, dw_hr = projection.gradients(layer, dy, dh_n, weights, dgates, m)
    dinitial = [d.to(x.dtype, copy=True) for d in (dh0, *dstates[1:])] if call.states else []
    outputs = [input_gradient(x, weights, cell, dgates) if call.need_dx else x.new_empty(0), *dinitial]
    if call.need_dw:
        for r, each in enumerate(weight_gradients(layer, x, weights, initial[0], hidden, dgates)):
            outputs += [*each, *dw_hr[r : r + 1]]
            if dparams is not None:
                outputs += [d.sum(0).to(x.dtype) for d in dparams[r].unbind(1)]
    return outputs


def _backward_by_chunks(
    layer: Layer,
    loops: Loops,
    call: BackwardCall,
    weights: Sequence[Weights],
    initial: list[Tensor],
    hidden: Tensor,
    gradients: tuple[Tensor | None, list[Tensor], Tensor, list[Tensor], Tensor | None],
    m: Tensor | None,
) -> None:
    """save="recompute": chunk by chunk from the end, gates are made again by one product, then run backward over.

    gradients: dy, dsequences, dgates, dstates and dparams, as `Loops.backward` takes them.
    """
    dy, dsequences, dgates, dstates, dparams = gradients
    cell, steps, batch, units, recurrences = layer.cell, layer.steps, layer.batch, layer.hidden, layer.recurrences
    x, h0, every = call.x, initial[0], call.layer.every
    w, bias, vectors = recurrent(weights, cell), recurrent_bias(weights, cell), params(weights)
    for first in range((steps - 1) // every * every, -1, -every):
        last = min(first + every, steps)
        windows = [window_of(direction, steps, first, last) for direction in layer.directions]
        gx = input_product(x, weights, cell, windows, units)
        given = recurrent_product(layer, weights, windows, h0, hidden) if cell.recurrent else None
        saved = x.new_empty(last - first, batch, recurrences, cell.saved, units)
        # Histories are kept wide here: they are made from a wide checkpoint and live no longer than the chunk.
        histories = [x.new_empty(*saved.shape[:3], units, dtype=wide(x.dtype)) for _ in call.histories]
        states = [aligned(history[first // every]) for history in call.histories]
        loops.replay(
            gx=gx, given=given, bias=bias, params=vectors, h0=h0, hidden=hidden,
            carried=[state.clone() for state in states], saved=saved, histories=histories, window=(first, last),
        )  # fmt: skip
        if m is not None:
            for r, window in enumerate(windows):
                m[slice(*window), :, r] = projection.unprojected(saved[:, :, r], histories[0][:, :, r], x.dtype)
        loops.backward(
            dy=dy, dsequences=dsequences, w=w, params=vectors, states=[hidden, *histories], first=[h0, *states],
            saved=saved if cell.saved else None, dgates=dgates, dstates=dstates, dparams=dparams, window=(first, last),
        )  # fmt: skip
