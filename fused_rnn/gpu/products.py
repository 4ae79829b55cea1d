"""The products outside the loops: of the input, of the gradients of the gates, over all of time or a window of it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fused_rnn.call import Weights
from fused_rnn.cells import Cell
from fused_rnn.gpu.loops import Layer
from fused_rnn.reference.sequence import entering, zero_past_end


def _rows(x: Tensor, r: int, first: int, last: int) -> Tensor:
    """Steps first .. last - 1 of the input of recurrence r as a matrix [steps·B, D]. x: [T, B, D] or [T, B, R, D]."""
    part = x[first:last] if x.dim() == 3 else x[first:last, :, r]
    return part.reshape(-1, x.shape[-1])


def input_product(
    gx: Tensor,
    x: Tensor,
    weights: Sequence[Weights],
    biases: Sequence[Tensor | None],
    windows: Sequence[tuple[int, int]],
) -> None:
    """gx [window, B, R, G, H] = x @ W_ih^T + b over each recurrence's window of time.

    biases: of each recurrence, as `input_bias` has it.
    """
    recurrences = len(windows)
    if x.dim() == 3 and all(window == windows[0] for window in windows):
        w = weights[0].w_ih if recurrences == 1 else torch.cat([w.w_ih for w in weights])
        rows, out = _rows(x, 0, *windows[0]), gx.view(-1, w.shape[0])
        whole = [b for b in biases if b is not None]
        if whole:
            torch.addmm(whole[0] if recurrences == 1 else torch.cat(whole), rows, w.t(), out=out)
        else:
            torch.mm(rows, w.t(), out=out)
        return
    flat = gx.flatten(3).flatten(0, 1)
    for r, window in enumerate(windows):
        rows, bias = _rows(x, r, *window), biases[r]
        w = weights[r].w_ih.t()
        product = torch.mm(rows, w) if bias is None else torch.addmm(bias, rows, w)
        flat[:, r] = product


def recurrent_product(
    layer: Layer, weights: Sequence[Weights], windows: Sequence[tuple[int, int]], h0: Tensor, hidden: Tensor
) -> Tensor:
    """h_{t-1} @ W_hh^T over each recurrence's window of time, of an h that is known: [window, B, R, G, H]."""
    length = windows[0][1] - windows[0][0]
    product = h0.new_empty(length, layer.batch, layer.recurrences, layer.cell.gates, layer.hidden)
    for r, (window, w) in enumerate(zip(windows, weights, strict=True)):
        before = entering(hidden[:, :, r], h0[r], layer.lengths, layer.reset, layer.directions[r], *window)
        own = torch.mm(before.flatten(0, 1), w.w_hh.t())
        product[:, :, r] = own.view(length, layer.batch, layer.cell.gates, layer.hidden)
    return product


def window_of(direction: int, steps: int, first: int, last: int) -> tuple[int, int]:
    """Steps first .. last - 1 in the recurrence's order, as a range of time."""
    return (first, last) if direction > 0 else (steps - last, steps - first)


def _apart(w: Tensor, cell: Cell, to_front: bool) -> Tensor:
    """Rows of gates as dgates' input side has them, in which the last gates that are apart come first; or back."""
    if not cell.apart:
        return w
    rows = w.shape[0] // cell.gates * cell.apart
    split = w.shape[0] - rows if to_front else rows
    return torch.cat([w[split:], w[:split]])


def input_side(weights: Sequence[Weights], cell: Cell) -> list[Tensor]:
    """Every recurrence's W_ih with its rows in dgates' order."""
    return [_apart(w.w_ih, cell, to_front=True) for w in weights]


def input_gradient(dx: Tensor, w_ih: Sequence[Tensor], cell: Cell, dgates: Tensor) -> None:
    """dx = dgates @ W_ih, summed over the recurrences where they share x. dx: contiguous, dgates: [T, B, R, DG, H], of
    any steps; w_ih: as `input_side` has them."""
    recurrences, units = dgates.shape[2], dgates.shape[4]
    flat = dgates.view(-1, recurrences, cell.gradients * units)[:, :, : cell.gates * units]
    if dx.dim() == 4:
        each = dx.view(-1, recurrences, dx.shape[3])
        for r in range(recurrences):
            each[:, r] = torch.mm(flat[:, r], w_ih[r])
        return
    out = dx.view(flat.shape[0], -1)
    # A product for each: sums of twice the length round worse, which in 16 bits is less than what is rounded between.
    if not cell.apart and dx.dtype.itemsize == 2 and recurrences > 1:
        torch.mm(flat.reshape(flat.shape[0], -1), torch.cat(list(w_ih)), out=out)
        return
    torch.mm(flat[:, 0], w_ih[0], out=out)
    for r in range(1, recurrences):
        out.addmm_(flat[:, r], w_ih[r])


def recurrent_side(dgates: Tensor, cell: Cell, r: int) -> Tensor:
    """What acts on W_hh of recurrence r: [T, B, G·H], a view."""
    return dgates[:, :, r, cell.apart : cell.apart + cell.gates].flatten(2)


def weight_gradients(
    layer: Layer, x: Tensor, weights: Sequence[Weights], h_first: Tensor, hidden: Tensor, dgates: Tensor
) -> list[list[Tensor]]:
    """Per recurrence [w_ih, w_hh, b_ih, b_hh], those that there are. No atomics: one product each.

    hidden: [T, B, R, P].
    """
    cell = layer.cell
    x = zero_past_end(x, layer.lengths)
    outputs = []
    for r in range(layer.recurrences):
        input_side = dgates[:, :, r, : cell.gates].flatten(0, 1).flatten(1)
        recurrent = recurrent_side(dgates, cell, r)
        own = [_apart(torch.mm(input_side.t(), _rows(x, r, 0, layer.steps)), cell, to_front=False)]
        if cell.recurrent:
            own.append(_recurrent_gradient(layer, r, recurrent, h_first[r], hidden[:, :, r]))
        if weights[r].b_ih is not None:
            own.append(_apart(input_side.sum(0), cell, to_front=False))
        if weights[r].b_hh is not None:
            own.append(recurrent.sum((0, 1)) if cell.apart else own[-1].clone())
        outputs.append(own)
    return outputs


def matrix_gradients(layer: Layer, dgates: Tensor, operands: Tensor, r: int) -> list[Tensor]:
    """Of the matrices beside W_hh of recurrence r, one product each. operands: [T, B, R, S, H], the first of S are what
    the matrices multiplied; zeros past a sequence's end."""
    cell, outputs = layer.cell, list[Tensor]()
    first = cell.gates + cell.apart
    for j, blocks in enumerate(cell.matrices):
        d = dgates[:, :, r, first : first + blocks].flatten(2).flatten(0, 1)
        outputs.append(torch.mm(d.t(), operands[:, :, r, j].flatten(0, 1)))
        first += blocks
    return outputs


def _recurrent_gradient(layer: Layer, r: int, dgates: Tensor, h_first: Tensor, hidden: Tensor) -> Tensor:
    """Of W_hh of recurrence r. dgates: [T, B, G·H], h_first: [B, P], hidden: [T, B, P]."""
    before = entering(hidden, h_first, layer.lengths, layer.reset, layer.directions[r])
    before = zero_past_end(before, layer.lengths)  # where gradients are 0, and NaN times that is NaN
    return torch.mm(dgates.flatten(0, 1).t(), before.flatten(0, 1))
