"""What of a layer's weights goes into the loops and into the products around them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fused_rnn.call import Weights
from fused_rnn.cells import Cell


def aligned(tensor: Tensor) -> Tensor:
    """Kernels are compiled for addresses that 16 divides; a view into the middle of a buffer may have another one."""
    tensor = tensor.contiguous()
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()


def recurrent(weights: Sequence[Weights], cell: Cell) -> Tensor | None:
    """What a loop multiplies by, if anything: [R, G, H, H], a view where there is one W_hh and no projection."""
    if not cell.recurrent:
        return None
    each = [w.w_hh if w.w_hr is None else torch.mm(w.w_hh, w.w_hr) for w in weights]
    hidden = each[0].shape[1]
    whole = each[0].contiguous() if len(each) == 1 else torch.stack(each)
    return aligned(whole.view(len(each), cell.gates, hidden, hidden))


def input_bias(w: Weights, cell: Cell) -> Tensor | None:
    """What is added before the cell: b_ih + b_hh, less the part of b_hh that enters the cell apart."""
    if w.b_hh is None:
        alone: Tensor | None = w.b_ih
        return alone
    if not cell.apart:
        both: Tensor = w.b_ih + w.b_hh
        return both
    joined = w.b_hh.shape[0] // cell.gates * (cell.gates - cell.apart)
    bias: Tensor = w.b_ih.clone()
    bias[:joined] += w.b_hh[:joined]
    return bias


def recurrent_bias(weights: Sequence[Weights], cell: Cell) -> Tensor | None:
    """b_hh of the gates that are apart, [R, apart, H], zeros if there are no biases; None if no gate is apart."""
    if not cell.apart:
        return None
    hidden = weights[0].w_hh.shape[1]
    if weights[0].b_hh is None:
        zeros: Tensor = weights[0].w_ih.new_zeros(len(weights), cell.apart, hidden)
        return zeros
    return torch.stack([w.b_hh.view(cell.gates, hidden)[-cell.apart :] for w in weights])


def params(weights: Sequence[Weights]) -> Tensor | None:
    """The cell's vectors of one number per unit, [R, NP, H]; None where it has none."""
    each = [torch.stack(w.params) for w in weights if w.params]
    return torch.stack(each) if each else None


def beside(weights: Sequence[Weights]) -> dict[str, Any]:
    """What few cells have beside W_hh, as loops are told it; nothing of what a cell has none of."""
    told: dict[str, Any] = {}
    if weights[0].matrices:
        hidden = weights[0].matrices[0].shape[1]
        each = [torch.cat(w.matrices) if len(w.matrices) > 1 else w.matrices[0] for w in weights]
        whole = each[0].contiguous() if len(each) == 1 else torch.stack(each)
        told["matrices"] = aligned(whole.view(len(each), -1, hidden, hidden))
    if weights[0].masks:
        told["masks"] = [aligned(torch.stack(_as_long(own))) for own in zip(*(w.masks for w in weights), strict=True)]
    return told


def _as_long(masks: Sequence[Tensor]) -> list[Tensor]:
    """Masks of all recurrences, all over time if one of them is."""
    longest = max(mask.shape[0] for mask in masks)
    return [mask.expand(longest, -1, -1) for mask in masks]
