"""A W_hh that is N blocks on a diagonal: [G·H, H/N], in row g·H + u what unit u reads of its own block's units.

What this gives to a unit is of its block alone: a NaN elsewhere in h does not reach it, as 0·NaN of zeros would.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear


def recurrent_side(h: Tensor, w_hh: Tensor, b_hh: Tensor | None, gates: int, blocks: int) -> Tensor:
    """W_hh h + b_hh: [B, G·H]. h: [B, P]."""
    return linear(h, w_hh, b_hh) if blocks == 1 else of_blocks(h, by_block(w_hh, gates, blocks), b_hh)


def by_block(w_hh: Tensor, gates: int, blocks: int) -> Tensor:
    """What each block multiplies by, [N, G, H/N, H/N]."""
    return w_hh.view(gates, blocks, -1, w_hh.shape[1]).transpose(0, 1).contiguous()


def of_blocks(h: Tensor, each: Tensor, b_hh: Tensor | None) -> Tensor:
    """`recurrent_side` of what `by_block` makes."""
    blocks, gates, units = each.shape[:3]
    made = torch.bmm(h.view(-1, blocks, units).transpose(0, 1), each.flatten(1, 2).transpose(1, 2))
    side = made.view(blocks, -1, gates, units).permute(1, 2, 0, 3).flatten(1)
    return side if b_hh is None else side + b_hh


def dense(w_hh: Tensor, gates: int, blocks: int) -> Tensor:
    """The whole matrix, [G·H, H], with its zeros."""
    units = w_hh.shape[1]
    each = w_hh.reshape(gates, blocks, units, units).movedim(1, -1)
    return torch.diag_embed(each, dim1=1, dim2=3).reshape(-1, blocks * units)


def cut(whole: Tensor, gates: int, blocks: int) -> Tensor:
    """The blocks of a whole matrix: `dense` back, and its gradient."""
    units = whole.shape[1] // blocks
    each = whole.reshape(gates, blocks, units, blocks, units).diagonal(dim1=1, dim2=3)
    made: Tensor = each.movedim(-1, 1).reshape(-1, units)
    return made


def by_gate(w_hh: Tensor, gates: int) -> Tensor:
    """A module's weight_hh, [N, G·H/N, H/N], rows of a block gate by gate, as a recurrence has it."""
    made: Tensor = w_hh.unflatten(1, (gates, -1)).transpose(0, 1).flatten(0, 2)
    return made
