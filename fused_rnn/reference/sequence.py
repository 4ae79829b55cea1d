"""What the steps of a sequence see: where it is over, and the state that entered each."""

from __future__ import annotations

import torch
from torch import Tensor


def past_end(lengths: Tensor, steps: int) -> Tensor:
    """[T, B] bool: where a sequence is over. lengths: [B]."""
    return torch.arange(steps, device=lengths.device).unsqueeze(1) >= lengths


def zero_past_end(x: Tensor, lengths: Tensor | None) -> Tensor:
    """x [T, B, ...], zeros past each sequence's end: it may be NaN there, which no zero among the gradients undoes."""
    if lengths is None:
        return x
    past = past_end(lengths, x.shape[0])
    return x.masked_fill(past.view(*past.shape, *[1] * (x.dim() - 2)), 0)


def entering(
    hidden: Tensor,
    h0: Tensor,
    lengths: Tensor | None,
    reset: Tensor | None,
    direction: int,
    first: int = 0,
    last: int | None = None,
) -> Tensor:
    """h_{t-1} as the product of step t saw it, for times first .. last - 1: [.., B, P], which may be a view.

    hidden: [T, B, P], the outputs of one recurrence.  h0: [B, P].  lengths: [B].  reset: [T, B], not zero where it is.
    """
    steps = hidden.shape[0]
    last = steps if last is None else last
    lead = h0.unsqueeze(0)
    if direction > 0:
        before = hidden[max(first - 1, 0) : last - 1]
        before = torch.cat([lead, before]) if first == 0 else before
    else:
        before = hidden[first + 1 : last + 1]
        before = torch.cat([before, lead]) if last == steps else before
        if lengths is not None:
            t = torch.arange(first, last, device=hidden.device).unsqueeze(1)
            before = torch.where((t == lengths - 1).unsqueeze(-1), lead, before)
    return before if reset is None else before.masked_fill((reset[first:last] != 0).unsqueeze(-1), 0)
