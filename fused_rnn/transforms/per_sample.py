"""Gradients of weights that N samples share, a gradient for each: vmap of grad.

One launch runs backward over all samples as one batch. What it gives the weights would be their sum; so it is asked for
the gradients of the gates, and the products that make gradients of weights of them are batched over the samples here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fused_rnn.cells import CELLS
from fused_rnn.reference.sequence import entering, zero_past_end


def supports(cell: str, weights: Sequence[Tensor], directions: Sequence[int], save: str) -> bool:
    """Not with a projection, whose gradient takes another exchange, nor where GRU's gates were not kept."""
    return save == "gates" and len(weights) // len(directions) in (2, 4)


def backward(
    op: Callable[..., list[Tensor]],
    n: int,
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
) -> list[Tensor]:
    """As fused_rnn::backward, of a batch of N·B rows; [dx, dh0, dc0] of that batch, then per weight [N, ...]."""
    kind = x.device.type
    with torch.autocast(kind, enabled=False):
        count, (steps, rows) = len(weights) // len(directions), x.shape[:2]
        width = weights[0].shape[0]
        # With the identity for W_ih, the gradient of the input product is what comes out as x's.
        one = torch.eye(width, dtype=x.dtype, device=x.device)
        nothing = x.new_zeros(steps, rows, len(directions), width)
        through = [one if k % count == 0 else w for k, w in enumerate(weights)]
        dgates, dh0, dc0 = op(
            dy, dh_n, dc_n, nothing, through, h0, c0, lengths, reset, hidden, saved, cells, cell, directions, save,
            True, False,
        )  # fmt: skip
        each = [dgates[:, :, r] for r in range(len(directions))]
        dx = x.new_empty(0)
        if need_dx:
            parts = [torch.matmul(d, weights[r * count]) for r, d in enumerate(each)]
            dx = torch.stack(parts, 2) if x.dim() == 4 else torch.stack(parts).sum(0) if len(parts) > 1 else parts[0]
        x = zero_past_end(x, lengths)
        outputs = [dx, dh0, dc0]
        hidden = hidden.unflatten(2, (len(directions), -1))
        for r, d in enumerate(each):
            recurrent = d
            if cell == "gru":  # its reset gate multiplies the recurrent side of the last gate
                units = width // CELLS[cell].gates
                recurrent = torch.cat([d[..., :-units], d[..., -units:] * saved[:, :, r, 0]], -1)
            own = hidden[:, :, r]
            before = entering(own, torch.zeros_like(own[0]) if h0 is None else h0[r], lengths, reset, directions[r])
            outputs += [_product(d, x if x.dim() == 3 else x[:, :, r], n), _product(recurrent, before, n)]
            if count == 4:
                outputs += [_sum(d, n), _sum(recurrent, n)]
        return outputs


def _split(t: Tensor, n: int) -> Tensor:
    """[T, N·B, ·] → [N, T·B, ·]."""
    apart: Tensor = t.unflatten(1, (n, -1))
    return apart.movedim(1, 0).flatten(1, 2)


def _product(d: Tensor, by: Tensor, n: int) -> Tensor:
    return torch.bmm(_split(d, n).transpose(1, 2), _split(by, n))


def _sum(d: Tensor, n: int) -> Tensor:
    each: Tensor = d.sum(0).unflatten(0, (n, -1))
    return each.sum(1)
