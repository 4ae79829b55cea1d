"""One layer, forward and backward, whole or stretch by stretch: the products around a backend's loops."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import cycle
from typing import Any

import torch
from torch import Tensor

from fused_rnn.call import BackwardCall, LayerCall, Weights, all_or_none, wide
from fused_rnn.gpu import projection
from fused_rnn.gpu.loops import Layer, Loops
from fused_rnn.gpu.products import (
    input_gradient,
    input_product,
    input_side,
    matrix_gradients,
    recurrent_product,
    weight_gradients,
    window_of,
)
from fused_rnn.gpu.weights import aligned, beside, input_bias, params, recurrent, recurrent_bias


def _wide(layer: Layer, like: Tensor, states: Sequence[Tensor | None]) -> list[Tensor]:
    """States [R, B, H] in the accumulation dtype, in memory of their own: the loops write to them. None for zeros."""
    if not states:
        return []
    shape = (layer.recurrences, layer.batch, layer.hidden)
    count = math.prod(shape)
    rows = like.new_zeros(len(states), (count + 3) // 4 * 4, dtype=wide(like.dtype))  # 16 divides each one's address
    made = [row[:count].view(shape) for row in rows.unbind()]
    return [m if state is None else m.copy_(state) for m, state in zip(made, states, strict=True)]


class Forward:
    """One layer's forward: all of its memory, then `run` for each window in turn, then its outputs.

    windows: stretches of steps that make up all of time, in their order; more than one where there is one recurrence,
    forward in time, no projection and no mask. What `run` itself allocates is used by nobody else.
    """

    def __init__(
        self, layer: Layer, call: LayerCall, weights: Sequence[Weights], windows: Sequence[tuple[int, int]]
    ) -> None:
        cell, steps, batch, hidden, recurrences = layer.cell, layer.steps, layer.batch, layer.hidden, layer.recurrences
        x, more = call.x, len(cell.states) - 1
        self.layer, self.call, self.weights = layer, call, weights
        self.biases = [input_bias(w, cell) for w in weights]
        longest = max(last - first for first, last in windows)
        self.gx = x.new_empty(longest, batch, recurrences, cell.gates, hidden)
        self.h0 = call.states[0] if call.states else None
        zeros = self.h0 is None or call.kinds.projects
        self.h = x.new_zeros(recurrences, batch, hidden) if self.h0 is None or zeros else aligned(self.h0)
        # A loop may not write where it reads h0, another member of a team may still have to.
        self.after = cycle([torch.empty_like(self.h) for _ in windows[:2]])
        self.carried = _wide(layer, x, all_or_none(call.states, 1 + more)[not cell.reads_h :])
        self.y = x.new_empty(steps, batch, recurrences * hidden)  # as it leaves: a view may not be changed in place
        self.m = self.y.view(steps, batch, recurrences, hidden)
        saved_shape, shapes, dtype = call.kept_shapes()
        self.saved, self.histories, self.checkpoints = None, list[Tensor](), list[Tensor]()
        if call.save == "gates" or call.sequences:
            self.histories = [x.new_empty(shape) for shape in call.sequence_shapes()]
        if call.save == "gates":
            self.saved = x.new_empty(saved_shape)
        elif call.save == "recompute":
            # Rows that no step fills are zero, so that equal calls give equal results.
            self.checkpoints = [x.new_zeros(shape, dtype=dtype) for shape in shapes]
        self.told: dict[str, Any] = {
            "w": recurrent(weights, cell), "bias": recurrent_bias(weights, cell), "params": params(weights),
            "carried": self.carried, "checkpoints": self.checkpoints, "every": call.every, **beside(weights),
        }  # fmt: skip

    def run(self, loops: Loops, first: int, last: int) -> None:
        """Steps first .. last - 1. loops: of a layer of these steps alone."""
        gx = self.gx[: last - first]
        input_product(gx, self.call.x, self.weights, self.biases, [(first, last)] * self.layer.recurrences)
        if self.h0 is not None and self.call.kinds.projects:
            projection.enter(self.layer, gx, self.h0, self.weights)
        h_n, saved = next(self.after), None if self.saved is None else self.saved[first:last]
        loops.forward(
            gx=gx, h0=self.h, y=self.m[first:last], h_n=h_n, saved=saved,
            histories=[history[first:last] for history in self.histories], **self.told,
        )  # fmt: skip
        self.h = h_n

    def outputs(self) -> list[Tensor]:
        """As the op: [y, states after, sequences], and what is kept for backward, if anything."""
        call, x, y, h_n = self.call, self.call.x, self.y, self.h
        if call.kinds.projects:
            y, h_n = projection.leave(self.layer, self.m, self.h0, self.weights)
        outputs = [y, h_n, *(state.to(x.dtype, copy=True) for state in self.carried[self.layer.cell.reads_h :])]
        if call.sequences:
            outputs += self.histories
        if call.save == "none":
            return outputs
        kept = self.checkpoints if call.save == "recompute" else [] if call.sequences else self.histories
        hidden_copy = y.clone() if call.keep_hidden else x.new_empty(0)
        return [*outputs, x.new_empty(0) if self.saved is None else self.saved, *kept, hidden_copy]


class Backward:
    """One layer's backward: all of its memory, then `run` for each window from the last to the first, then its outputs.

    windows: as in Forward.  dy and dx, [T, B, ·] or None, are read and written by `run`, window by window.
    """

    def __init__(
        self, layer: Layer, call: BackwardCall, weights: Sequence[Weights], windows: Sequence[tuple[int, int]]
    ) -> None:
        cell, steps, batch, units, recurrences = layer.cell, layer.steps, layer.batch, layer.hidden, layer.recurrences
        x, projects = call.x, call.layer.kinds.projects
        self.layer, self.call, self.weights = layer, call, weights
        self.initial = [aligned(state) for state in call.layer.initial()]
        self.hidden = aligned(call.hidden).view(steps, batch, recurrences, -1)
        self.dy = None if call.dy is None else aligned(call.dy).view(self.hidden.shape)
        self.dh_n, *dmore = all_or_none(call.dstates, len(cell.states))
        dm, dm_n = self.dy, self.dh_n  # gradients of what the loops put out
        if projects:
            dm = None if self.dy is None else projection.pull(self.dy, weights)
            dm_n = None if self.dh_n is None else projection.pull(self.dh_n.transpose(0, 1), weights).transpose(0, 1)
        self.dgates = x.new_empty(steps, batch, recurrences, cell.gradients, units)
        self.dstates, self.dparams = _wide(layer, x, [dm_n, *dmore]), None
        if cell.params and call.need_dw:
            self.dparams = x.new_zeros(recurrences, batch, len(cell.params), units, dtype=wide(x.dtype))
        self.dx = torch.empty_like(x) if call.need_dx else x.new_empty(0)
        self.w_ih = input_side(weights, cell) if call.need_dx else []
        self.m = x.new_empty(steps, batch, recurrences, units) if projects and call.need_dw else None
        self.made_again = call.save == "recompute" and bool(cell.saved or call.histories)
        self.operands = call.saved  # what the cell's own matrices multiplied, first of all that is saved
        if self.made_again and cell.matrices and call.need_dw:
            self.operands = x.new_empty(steps, batch, recurrences, len(cell.matrices), units)
        self.beside = beside(weights)
        if self.m is not None and not self.made_again:
            self.m.copy_(projection.unprojected(call.saved, call.histories[0], x.dtype))
        # What enters each window; of h what entered the first.
        self.entering = {0: self.initial}
        for first, _ in windows:
            if first > 0:
                befores = (history[first - 1 : first].view_as(self.initial[1]) for history in call.histories)
                self.entering[first] = [self.initial[0], *map(aligned, befores)]
        self.told: dict[str, Any] = {
            "dy": dm, "dsequences": [aligned(d) for d in call.dsequences], "w": recurrent(weights, cell),
            "params": params(weights), "dgates": self.dgates, "dstates": self.dstates, "dparams": self.dparams,
            **self.beside,
        }  # fmt: skip

    def run(self, loops: Loops, first: int, last: int) -> None:
        """Steps first .. last - 1. loops: of the whole layer."""
        call = self.call
        if self.made_again:
            self._by_chunks(loops)
        else:
            loops.backward(
                states=[self.hidden, *(history[first:last] for history in call.histories)], first=self.entering[first],
                saved=call.saved[first:last] if self.layer.cell.saved else None, window=(first, last), **self.told,
            )  # fmt: skip
        if call.need_dx:
            input_gradient(self.dx[first:last], self.w_ih, self.layer.cell, self.dgates[first:last])

    def outputs(self) -> list[Tensor]:
        """As the op: [dx, gradients of the states given, of the weights if they are wanted]."""
        layer, call, weights, x = self.layer, self.call, self.weights, self.call.x
        dh0, dw_hr = self.dstates[0], list[Tensor]()
        if call.layer.kinds.projects:
            dh0, dw_hr = projection.gradients(layer, self.dy, self.dh_n, weights, self.dgates, self.m)
        dinitial = [d.to(x.dtype, copy=True) for d in (dh0, *self.dstates[1:])] if call.states else []
        outputs = [self.dx, *dinitial]
        if call.need_dw:
            for r, each in enumerate(weight_gradients(layer, x, weights, self.initial[0], self.hidden, self.dgates)):
                outputs += [*each, *dw_hr[r : r + 1], *matrix_gradients(layer, self.dgates, self.operands, r)]
                if self.dparams is not None:
                    outputs += [d.sum(0).to(x.dtype) for d in self.dparams[r].unbind(1)]
                outputs += [x.new_empty(0) for _ in weights[r].masks]
        return outputs

    def _by_chunks(self, loops: Loops) -> None:
        """save="recompute": from the end, gates are made again by one product a chunk, then run backward over."""
        layer, call, weights, hidden, m = self.layer, self.call, self.weights, self.hidden, self.m
        cell, steps, batch, units, recurrences = layer.cell, layer.steps, layer.batch, layer.hidden, layer.recurrences
        x, h0, every = call.x, self.initial[0], call.layer.every
        biases, bias = [input_bias(w, cell) for w in weights], recurrent_bias(weights, cell)
        for first in range((steps - 1) // every * every, -1, -every):
            last = min(first + every, steps)
            windows = [window_of(direction, steps, first, last) for direction in layer.directions]
            gx = x.new_empty(last - first, batch, recurrences, cell.gates, units)
            input_product(gx, x, weights, biases, windows)
            given = recurrent_product(layer, weights, windows, h0, hidden) if cell.recurrent else None
            saved = x.new_empty(last - first, batch, recurrences, cell.saved, units)
            # Histories are kept wide here: they are made from a wide checkpoint and live no longer than the chunk.
            histories = [x.new_empty(*saved.shape[:3], units, dtype=wide(x.dtype)) for _ in call.histories]
            states = [aligned(history[first // every]) for history in call.histories]
            loops.replay(
                gx=gx, given=given, bias=bias, params=self.told["params"], h0=h0, hidden=hidden,
                carried=[state.clone() for state in states], saved=saved, histories=histories, window=(first, last),
                **self.beside,
            )  # fmt: skip
            for r, window in enumerate(windows):
                if self.operands is not call.saved:
                    self.operands[slice(*window), :, r] = saved[:, :, r, : len(cell.matrices)]
                if m is not None:
                    m[slice(*window), :, r] = projection.unprojected(saved[:, :, r], histories[0][:, :, r], x.dtype)
            loops.backward(
                states=[hidden, *histories], first=[h0, *states], saved=saved if cell.saved else None,
                window=(first, last), **self.told,
            )  # fmt: skip
