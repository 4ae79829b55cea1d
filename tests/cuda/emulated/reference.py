"""What the loops compute, written as plainly as PyTorch allows: step by step, gradients by autograd.

In float64 it is the reference; in the loops' own dtype its error says what an error of theirs may be.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

Tensors = dict[str, Tensor]


def to_tf32(v: Tensor) -> Tensor:
    """float32 rounded to 10 bits of mantissa, ties away from zero, as cvt.rna.tf32 does."""
    return ((v.detach().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


class _ProductInTf32(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(w)
        return torch.einsum("bk,guk->bgu", to_tf32(h), to_tf32(w))

    @staticmethod
    def backward(ctx: Any, d: Tensor) -> tuple[Tensor, None]:
        (w,) = ctx.saved_tensors
        return torch.einsum("bgu,guk->bk", to_tf32(d), to_tf32(w)), None


def _step(
    cell: str, a: Tensor, rec: Tensor, bias: Tensor, probe: Tensor, h: Tensor, c: Tensor
) -> tuple[Tensor, Tensor]:
    if cell == "lstm":
        i, f, g, o = (a + rec).unbind(1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        return o.sigmoid() * c.tanh(), c
    if cell == "gru":
        r, z = (a[:, 0] + rec[:, 0]).sigmoid(), (a[:, 1] + rec[:, 1]).sigmoid()
        n = (a[:, 2] + r * (rec[:, 2] + bias + probe)).tanh()
        return n + z * (h - n), c
    a = (a + rec)[:, 0]
    return a.tanh() if cell == "rnn_tanh" else a.relu(), c


def run(cell: str, given: Tensors, backwards: list[bool], dtype: torch.dtype, tf32: bool = False) -> Tensors:
    """A loop's results forward and backward, and the states that entered each step in the recurrence's own order."""
    gx, w, bias, h0, c0 = (given[name].to(dtype).requires_grad_() for name in ("gx", "w", "bias", "h0", "c0"))
    lengths, reset = given["lengths"], given["reset"]
    steps, batch, recurrences, _, units = gx.shape
    probe = torch.zeros(steps, batch, recurrences, units, dtype=dtype, requires_grad=True)  # finds da_nh of GRU
    ys, hs, cs, entered = [], [], [], []
    for r in range(recurrences):
        h, c, y = h0[r], c0[r], [torch.empty(0)] * steps
        order = range(steps - 1, -1, -1) if backwards[r] else range(steps)
        entered.append([])
        for t in order:
            entered[r].append((c if cell == "lstm" else h).detach())
            keep = (reset[t] == 0).to(dtype)[:, None]
            alive = (t < lengths)[:, None]
            rec = _ProductInTf32.apply(h * keep, w[r]) if tf32 else torch.einsum("bk,guk->bgu", h * keep, w[r])
            h_new, c_new = _step(cell, gx[t, :, r], rec, bias[r], probe[t, :, r], h * keep, c * keep)
            h, c = torch.where(alive, h_new, h), torch.where(alive, c_new, c)
            y[t] = torch.where(alive, h_new, torch.zeros_like(h_new))
        ys.append(torch.stack(y))
        hs.append(h)
        cs.append(c)
    y, h_n, c_n = torch.stack(ys, 2), torch.stack(hs), torch.stack(cs)
    loss = (y * given["dy"].to(dtype)).sum() + (h_n * given["dh"].to(dtype)).sum()
    if cell == "lstm":
        loss = loss + (c_n * given["dc"].to(dtype)).sum()
    d = torch.autograd.grad(loss, [gx, h0, c0, probe], allow_unused=True, materialize_grads=True)
    dgates = torch.cat([d[0][:, :, :, 2:], d[0][:, :, :, :2], d[3][:, :, :, None]], 3) if cell == "gru" else d[0]
    found = {"y": y, "h_n": h_n, "dgates": dgates, "dh0": d[1]}
    if cell == "lstm":
        found |= {"c_n": c_n, "dc0": d[2]}
    if cell in ("lstm", "gru"):
        found["entered"] = torch.stack([torch.stack(each) for each in entered], 1)  # [T, R, B, H]
    return {name: t.detach() for name, t in found.items()}


def leave_the_kink(given: Tensors, backwards: list[bool], dtype: torch.dtype) -> None:
    """Moves gx where a relu's argument is so near to 0 that rounding would decide whether a gradient passes at all."""
    gx, margin = given["gx"], 0.1
    for r, is_reverse in enumerate(backwards):
        h = given["h0"][r]
        order = range(gx.shape[0])
        for t in reversed(order) if is_reverse else order:
            rec = torch.where(given["reset"][t, :, None] == 0, h, 0.0) @ given["w"][r, 0].T
            a = gx[t, :, r, 0] + rec
            moved = gx[t, :, r, 0] + torch.where(a < 0, -2 * margin, 2 * margin)
            gx[t, :, r, 0] = torch.where(a.abs() < margin, moved, gx[t, :, r, 0]).to(dtype).double()
            h = torch.where((t < given["lengths"])[:, None], (gx[t, :, r, 0] + rec).relu(), h)
