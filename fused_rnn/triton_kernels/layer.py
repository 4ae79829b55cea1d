"""One layer, forward and backward: the products outside the loops, by torch.mm, around the launches of the loops."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fused_rnn.triton_kernels import launch
from fused_rnn.triton_kernels.cells import Cell
from fused_rnn.triton_kernels.launch import Layer
from fused_rnn.triton_kernels.tiles import CHECKPOINT_EVERY, Plan, replay


@dataclass(frozen=True)
class Weights:
    """Per recurrence: w_ih [G·H, D], w_hh [G·H, H], b_ih, b_hh [G·H] or none at all."""

    w_ih: list[Tensor]
    w_hh: list[Tensor]
    b_ih: list[Tensor]
    b_hh: list[Tensor]

    @classmethod
    def split(cls, flat: Sequence[Tensor], recurrences: int) -> Weights:
        count = len(flat) // recurrences
        columns = [list(flat[i::count]) for i in range(count)]
        return cls(*columns) if count == 4 else cls(*columns, [], [])

    def recurrent(self, gates: int) -> Tensor:
        """W_hh of all recurrences: [R, G, H, H], a view where there is but one."""
        hidden = self.w_hh[0].shape[1]
        w = self.w_hh[0].contiguous() if len(self.w_hh) == 1 else torch.stack(self.w_hh)
        return _aligned(w.view(len(self.w_hh), gates, hidden, hidden))

    def input_bias(self, r: int, cell: Cell) -> Tensor | None:
        """What is added before the cell: b_ih + b_hh, less the bias that the cell adds itself."""
        if not self.b_ih:
            return None
        if not cell.hidden_bias:
            return self.b_ih[r] + self.b_hh[r]
        hidden = self.b_hh[r].shape[0] // cell.gates
        bias = self.b_ih[r].clone()
        bias[:-hidden] += self.b_hh[r][:-hidden]
        return bias

    def hidden_bias(self, cell: Cell) -> Tensor:
        """b_hh of the last gate, [R, H]; zeros where there are no biases."""
        hidden, recurrences = self.w_hh[0].shape[1], len(self.w_hh)
        if not self.b_hh:
            return self.w_hh[0].new_zeros(recurrences, hidden)
        return torch.stack([b[-hidden:] for b in self.b_hh])


def _aligned(tensor: Tensor) -> Tensor:
    """Kernels are compiled for addresses that 16 divides; a view into the middle of a buffer may have another one."""
    tensor = tensor.contiguous()
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()


def _rows(x: Tensor, r: int, first: int, last: int) -> Tensor:
    """Steps first .. last - 1 of the input of recurrence r as a matrix [steps·B, D]. x: [T, B, D] or [T, B, R, D]."""
    part = x[first:last] if x.dim() == 3 else x[first:last, :, r]
    return part.reshape(-1, x.shape[-1])


def _input_product(x: Tensor, weights: Weights, cell: Cell, windows: Sequence[tuple[int, int]], hidden: int) -> Tensor:
    """x @ W_ih^T + b over each recurrence's window of time: [window, B, R, G, H]."""
    recurrences, length = len(windows), windows[0][1] - windows[0][0]
    gx = x.new_empty(length, x.shape[1], recurrences, cell.gates, hidden)
    biases = [weights.input_bias(r, cell) for r in range(recurrences)]
    if x.dim() == 3 and all(window == windows[0] for window in windows):
        w = weights.w_ih[0] if recurrences == 1 else torch.cat(weights.w_ih)
        rows, out = _rows(x, 0, *windows[0]), gx.view(-1, recurrences * cell.gates * hidden)
        if biases[0] is None:
            torch.mm(rows, w.t(), out=out)
        else:
            torch.addmm(torch.cat([b for b in biases if b is not None]), rows, w.t(), out=out)
        return gx
    flat = gx.view(-1, recurrences, cell.gates * hidden)
    for r, window in enumerate(windows):
        rows, bias = _rows(x, r, *window), biases[r]
        product = torch.mm(rows, weights.w_ih[r].t()) if bias is None else torch.addmm(bias, rows, weights.w_ih[r].t())
        flat[:, r] = product
    return gx


def _states(layer: Layer, state: Tensor | None, like: Tensor) -> Tensor:
    shape = (layer.recurrences, layer.batch, layer.hidden)
    return like.new_zeros(shape) if state is None else _aligned(state)


def _window(direction: int, steps: int, first: int, last: int) -> tuple[int, int]:
    """Steps first .. last - 1 in the recurrence's order, as a range of time."""
    return (first, last) if direction > 0 else (steps - last, steps - first)


def _entering(layer: Layer, hidden: Tensor, h0: Tensor, r: int, first: int, last: int) -> Tensor:
    """h_{t-1} as the product of step t saw it, for times first .. last - 1: [.., B, H]. hidden: [T, B, R, H]."""
    backwards, steps = layer.directions[r] < 0, layer.steps
    lead = h0[r].unsqueeze(0)
    if backwards:
        before = hidden[first + 1 : last + 1, :, r]
        before = torch.cat([before, lead]) if last == steps else before.clone()
        if layer.lengths is not None:
            t = torch.arange(first, last, device=hidden.device).unsqueeze(1)
            before = torch.where((t == layer.lengths - 1).unsqueeze(-1), lead, before)
    else:
        before = hidden[max(first - 1, 0) : last - 1, :, r]
        before = torch.cat([lead, before]) if first == 0 else before.clone()
    if layer.reset is not None:
        before.masked_fill_((layer.reset[first:last] != 0).unsqueeze(-1), 0)
    return before


def forward(
    layer: Layer,
    plan: Plan,
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
    w = weights.recurrent(cell.gates)
    gx = _input_product(x, weights, cell, [(0, steps)] * recurrences, hidden)
    h_first = _states(layer, h0, x)
    state = w  # stands for what the kernel does not touch
    if cell.has_state:
        first = c0 if cell.has_c else h0
        state = torch.zeros(h_first.shape, dtype=torch.float32, device=x.device)
        if first is not None:
            state.copy_(first)
    y = x.new_empty(steps, batch, recurrences * hidden)
    h_n = torch.empty_like(h_first)
    empty = x.new_empty(0)
    saved = x.new_empty(steps, batch, recurrences, cell.stored, hidden) if gates else empty
    cells = x.new_empty(steps, batch, recurrences, hidden) if gates and cell.has_c else empty
    checkpoints = empty
    if recompute and cell.has_c:
        chunks = -(-steps // CHECKPOINT_EVERY)
        checkpoints = state.new_empty(chunks, recurrences, batch, hidden)
    launch.run_forward(
        layer, plan, gx=gx, w=w, bias=weights.hidden_bias(cell) if cell.hidden_bias else w, h0=h_first, state=state,
        y=y, h_n=h_n,
        saved=saved, cells=cells, checkpoints=checkpoints, every=CHECKPOINT_EVERY, save=gates,
    )  # fmt: skip
    outputs = [y, h_n, state.to(x.dtype, copy=True)] if cell.has_c else [y, h_n]
    if save == "none":
        return outputs
    # Three tensors, never one of them twice: an op's results may not alias.
    kept = (saved if gates else checkpoints, cells, y if keep_hidden else empty)
    return [*outputs, *(t.clone() if t is y else t if t.numel() else torch.empty_like(t) for t in kept)]


def backward(
    layer: Layer,
    plan: Plan,
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
    w = weights.recurrent(cell.gates)
    h_first = _states(layer, h0, x)
    hidden = _aligned(hidden)
    dy = None if dy is None else _aligned(dy)
    dgates = x.new_empty(steps, batch, recurrences, cell.gradients, units)
    shape = (recurrences, batch, units)
    dh = torch.zeros(shape, dtype=torch.float32, device=x.device)
    if dh_n is not None:
        dh.copy_(dh_n)
    dc = dh
    if cell.has_c:
        dc = torch.zeros_like(dh)
        if dc_n is not None:
            dc.copy_(dc_n)
    shared = {"dy": dy, "w": w, "dgates": dgates, "dh": dh, "dc": dc}
    if save == "recompute" and cell.stored:
        _backward_by_chunks(
            layer, plan, x, weights, h_first, hidden.view(steps, batch, recurrences, units), saved, shared
        )
    else:
        states, first_state = (cells, _states(layer, c0, x)) if cell.has_c else (hidden, h_first)
        launch.run_backward(layer, plan, states=states, first_state=first_state, saved=saved, **shared)

    dc0 = dc.to(x.dtype, copy=True) if cell.has_c else x.new_empty(0)
    outputs = [_input_gradient(x, weights, cell, dgates) if need_dx else x.new_empty(0), dh.to(x.dtype, copy=True), dc0]
    if need_dw:
        if (
            layer.lengths is not None
        ):  # past a sequence's end x may be anything, NaN too, which no zero in dgates undoes
            past = torch.arange(steps, device=x.device).unsqueeze(1) >= layer.lengths
            x = x.masked_fill(past.view(steps, batch, *[1] * (x.dim() - 2)), 0)
        outputs += _weight_gradients(
            layer, x, weights, h0, h_first, hidden.view(steps, batch, recurrences, units), dgates
        )
    return outputs


def _backward_by_chunks(
    layer: Layer,
    plan: Plan,
    x: Tensor,
    weights: Weights,
    h0: Tensor,
    hidden: Tensor,
    checkpoints: Tensor,
    shared: dict[str, Any],
) -> None:
    """save="recompute": chunk by chunk from the end, gates are made again by one product, then run backward over."""
    cell, steps, batch, units = layer.cell, layer.steps, layer.batch, layer.hidden
    counters = launch.new_counters(layer, plan, x.device)
    empty = x.new_empty(0)
    for first in range((steps - 1) // CHECKPOINT_EVERY * CHECKPOINT_EVERY, -1, -CHECKPOINT_EVERY):
        last = min(first + CHECKPOINT_EVERY, steps)
        windows = [_window(direction, steps, first, last) for direction in layer.directions]
        gx = _input_product(x, weights, cell, windows, units)
        given = torch.empty_like(gx)
        for r, window in enumerate(windows):
            entering = _entering(layer, hidden, h0, r, *window).view(-1, units)
            given.view(-1, layer.recurrences, cell.gates * units)[:, r] = torch.mm(entering, weights.w_hh[r].t())
        saved = x.new_empty(last - first, batch, layer.recurrences, cell.stored, units)
        # LSTM's c is kept in float32 here: it is made from a float32 checkpoint and lives no longer than the chunk.
        cells = x.new_empty(*saved.shape[:3], units, dtype=torch.float32) if cell.has_c else empty
        state = checkpoints[first // CHECKPOINT_EVERY] if cell.has_c else torch.zeros_like(shared["dh"])
        launch.run_forward(
            layer, replay(units), gx=gx, given=given, w=gx,
            bias=weights.hidden_bias(cell) if cell.hidden_bias else gx, h0=h0, state=state.clone(), y=hidden, h_n=h0,
            saved=saved, cells=cells, checkpoints=empty, window=(first, last), save=True,
        )  # fmt: skip
        states, first_state = (cells, state) if cell.has_c else (hidden, h0)
        launch.run_backward(
            layer,
            plan,
            states=states,
            first_state=first_state,
            saved=saved,
            counters=counters,
            window=(first, last),
            **shared,
        )


def _recurrent_side(cell: Cell) -> slice:
    return slice(cell.gradients - cell.gates, cell.gradients)


def _input_gradient(x: Tensor, weights: Weights, cell: Cell, dgates: Tensor) -> Tensor:
    """dgates @ W_ih, summed over the recurrences where they share x."""
    recurrences, units = dgates.shape[2], dgates.shape[4]
    flat = dgates.view(-1, recurrences, cell.gradients * units)[:, :, : cell.gates * units]
    # The input side of dgates has the last gate first where the cell keeps its recurrent bias: see gru.py.
    w_ih = [_last_gate_first(w, cell) for w in weights.w_ih]
    if x.dim() == 4:
        dx = torch.empty(flat.shape[0], recurrences, x.shape[3], dtype=x.dtype, device=x.device)
        for r in range(recurrences):
            dx[:, r] = torch.mm(flat[:, r], w_ih[r])
        return dx.view(x.shape)
    if cell.gradients == cell.gates:
        return torch.mm(flat.reshape(flat.shape[0], -1), w_ih[0] if recurrences == 1 else torch.cat(w_ih)).view(x.shape)
    dx = torch.mm(flat[:, 0], w_ih[0])
    for r in range(1, recurrences):
        dx.addmm_(flat[:, r], w_ih[r])
    return dx.view(x.shape)


def _last_gate_first(w: Tensor, cell: Cell) -> Tensor:
    if cell.gradients == cell.gates:
        return w
    split = w.shape[0] - w.shape[0] // cell.gates
    return torch.cat([w[split:], w[:split]])


def _last_gate_last(dw: Tensor, cell: Cell) -> Tensor:
    if cell.gradients == cell.gates:
        return dw
    split = dw.shape[0] // cell.gates
    return torch.cat([dw[split:], dw[:split]])


def _weight_gradients(
    layer: Layer, x: Tensor, weights: Weights, h0: Tensor | None, h_first: Tensor, hidden: Tensor, dgates: Tensor
) -> list[Tensor]:
    """In the order of the flat list: per recurrence w_ih, w_hh, (b_ih, b_hh). No atomics: one product each."""
    cell, steps = layer.cell, layer.steps
    outputs = []
    for r, direction in enumerate(layer.directions):
        input_side = dgates[:, :, r, : cell.gates].flatten(0, 1).flatten(1)
        recurrent = dgates[:, :, r, _recurrent_side(cell)].flatten(2)  # [T, B, G·H], a view
        dw_ih = _last_gate_last(torch.mm(input_side.t(), _rows(x, r, 0, steps)), cell)
        plain = layer.reset is None and (h0 is None or layer.lengths is None or direction > 0)
        if plain:
            # h_{t-1} is y one step off, not a copy; what is left is the first step, which saw h0.
            later, before = (recurrent[1:], hidden[:-1, :, r]) if direction > 0 else (recurrent[:-1], hidden[1:, :, r])
            dw_hh = torch.mm(later.flatten(0, 1).t(), before.flatten(0, 1))
            if h0 is not None:
                dw_hh.addmm_(recurrent[0 if direction > 0 else steps - 1].t(), h_first[r])
        else:
            entering = _entering(layer, hidden, h_first, r, 0, steps)
            dw_hh = torch.mm(recurrent.flatten(0, 1).t(), entering.flatten(0, 1))
        outputs += [dw_ih, dw_hh]
        if weights.b_ih:
            db_ih = _last_gate_last(input_side.sum(0), cell)
            outputs += [db_ih, recurrent.sum((0, 1)) if cell.gradients != cell.gates else db_ih.clone()]
    return outputs
