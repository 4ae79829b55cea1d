"""The reference loop over time: plain differentiable PyTorch, slow and obvious.

It judges every backend, and it is what a second derivative differentiates.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch.nn.functional import linear

from fused_rnn.cells import CELLS, Spec
from fused_rnn.reference.sequence import zero_past_end


def without_autocast(x: Tensor) -> AbstractContextManager[None]:
    """A context in which operations on x's device keep their dtype."""
    if x.is_meta or not torch.is_autocast_enabled(x.device.type):
        return nullcontext()
    return torch.autocast(x.device.type, enabled=False)


def weights_per_recurrence(weights: Sequence[Tensor], recurrences: int) -> list[list[Tensor | None]]:
    """The flat list as one [w_ih, w_hh, b_ih, b_hh, w_hr] per recurrence, None for a bias or projection it lacks."""
    count = len(weights) // recurrences
    split: list[list[Tensor | None]] = []
    for r in range(recurrences):
        w = list(weights[r * count : (r + 1) * count])
        biases = w[2:4] if count >= 4 else [None, None]
        split.append([w[0], w[1], *biases, w[-1] if count in (3, 5) else None])
    return split


def run_layer(
    x: Tensor,
    weights: Sequence[Tensor],
    h0: Tensor | None,
    c0: Tensor | None,
    lengths: Tensor | None,
    reset: Tensor | None,
    cell: str,
    directions: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Run one layer, all its R = len(directions) recurrences, over all of time.

    x: [T, B, D], or [T, B, R, D] with an input per recurrence.
    weights: per recurrence w_ih [G·H, D], w_hh [G·H, P], (b_ih, b_hh [G·H]), (w_hr [P, H]).
    h0: [R, B, P], c0: [R, B, H], None for zeros.  lengths: [B] int64, reset: [T, B] bool, or None.
    directions: +1 or -1 each.
    Returns y [T, B, R·P], h_n [R, B, P] and c_n [R, B, H] (None unless the cell has c), in x's dtype; 16-bit types
    compute in float32.
    Differentiable any number of times, in forward mode too, in x, weights, h0 and c0; works under vmap.
    """
    dtype, spec = x.dtype, CELLS[cell]
    if dtype in (torch.bfloat16, torch.float16):
        x, h0, c0 = x.float(), h0 if h0 is None else h0.float(), c0 if c0 is None else c0.float()
        weights = [w.float() for w in weights]
    x = zero_past_end(x, lengths)
    ys, hs, cs = [], [], []
    for r, w in enumerate(weights_per_recurrence(weights, len(directions))):
        y, h, c = _run_recurrence(
            x if x.dim() == 3 else x[:, :, r],
            w,
            None if h0 is None else h0[r],
            None if c0 is None else c0[r],
            lengths,
            reset,
            spec,
            directions[r],
        )
        ys.append(y)
        hs.append(h)
        if c is not None:
            cs.append(c)
    y = ys[0] if len(ys) == 1 else torch.cat(ys, -1)
    return y.to(dtype), torch.stack(hs).to(dtype), torch.stack(cs).to(dtype) if cs else None


def _run_recurrence(
    x: Tensor,
    w: Sequence[Tensor | None],
    h: Tensor | None,
    c: Tensor | None,
    lengths: Tensor | None,
    reset: Tensor | None,
    spec: Spec,
    direction: int,
) -> tuple[Tensor, Tensor, Tensor | None]:
    w_ih, w_hh, b_ih, b_hh, w_hr = w
    assert w_ih is not None and w_hh is not None
    (steps, batch), hidden = x.shape[:2], w_hh.shape[0] // spec.gates
    gates_x = linear(x, w_ih, b_ih)
    if h is None:
        h = x.new_zeros(batch, w_hh.shape[1])
    if c is None and spec.has_c:
        c = x.new_zeros(batch, hidden)
    outputs: list[Tensor] = []
    for t in range(steps) if direction > 0 else range(steps - 1, -1, -1):
        h_in, c_in = h, c
        over = None if lengths is None else (t >= lengths).unsqueeze(-1)
        # What stands still enters no step: the gradient of zero that comes back, times a NaN in it, would be one.
        for gone in (over, None if reset is None else reset[t].unsqueeze(-1)):
            if gone is not None:
                h_in = h_in.masked_fill(gone, 0)
                c_in = None if c_in is None else c_in.masked_fill(gone, 0)
        h_new, c_new = spec.step(gates_x[t], linear(h_in, w_hh, b_hh), h_in, c_in)
        if w_hr is not None:
            h_new = linear(h_new, w_hr)
        if over is None:
            h, c = h_new, c_new
            outputs.append(h)
        else:
            # Past its end a sequence's state stands still. A reverse loop meets those steps first, and so enters the
            # last valid one with h0.
            h = torch.where(over, h, h_new)
            c = None if c is None or c_new is None else torch.where(over, c, c_new)
            outputs.append(h_new.masked_fill(over, 0))
    if direction < 0:
        outputs.reverse()
    return torch.stack(outputs), h, c
