"""What the loops compute, as plainly as PyTorch allows: the cells' own steps over time, gradients by autograd.

In float64 it is the reference; in the loops' own dtype its error says what an error of theirs may be.
"""

from __future__ import annotations

from typing import Any

import torch
from cuda_cases import rounded
from torch import Tensor
from torch.overrides import TorchFunctionMode

from fused_rnn.cells import CELLS

Tensors = dict[str, Tensor]


class _ProductInTf32(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(w)
        return torch.einsum("bk,guk->bgu", rounded(h.detach()), rounded(w.detach()))

    @staticmethod
    def backward(ctx: Any, d: Tensor) -> tuple[Tensor, None]:
        (w,) = ctx.saved_tensors
        return torch.einsum("bgu,guk->bk", rounded(d), rounded(w)), None


class _Probed(TorchFunctionMode):
    """A step's products with blocks of its own matrices, in their order: each has a probe, which finds its gradient."""

    def __init__(self, probes: list[Tensor]) -> None:
        self.probes = probes

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        return made + self.probes.pop(0) if func is torch.nn.functional.linear else made


def run(cell: str, given: Tensors, backwards: list[bool], dtype: torch.dtype, tf32: bool = False) -> Tensors:
    """A loop's results forward and backward, and the states that entered each step in the recurrence's own order.

    given: gx, w, bias, params, dy; matrices, mask0, ..; of each state s0, s1, .. at the start, ds0, .. the gradient at
    the end, dq1, .. that over time; lengths, reset.
    """
    spec = CELLS[cell]
    own = {name: t.to(dtype).requires_grad_() for name, t in given.items() if name not in ("lengths", "reset")}
    gx, w, states = own["gx"], own.get("w"), [own[f"s{i}"] for i in range(len(spec.states))]
    params = own.get("params", torch.zeros(len(backwards), 0, gx.shape[-1]))
    # A tensor for each sequence, whose gradients are a param's that its units give.
    each = [params[r].unsqueeze(1).expand(-1, gx.shape[1], -1) for r in range(len(backwards))]
    steps, batch, recurrences, gates, units = gx.shape
    joined = gates - spec.apart
    program = spec.program
    blocks = [int(i.value) for i in program.forward.code if i.op == "product"] if program is not None else []
    probes = torch.zeros(steps, batch, recurrences, spec.blocks, units, dtype=dtype, requires_grad=True)
    # Finds the gradients of the recurrent side of the gates whose two sides enter the cell apart.
    probe = torch.zeros(steps, batch, recurrences, spec.apart, units, dtype=dtype, requires_grad=True)
    ys, ends, entered, sequences = [], [], [], []
    for r in range(recurrences):
        now, y, all_states = [s[r] for s in states], [torch.empty(0)] * steps, [torch.empty(0)] * steps
        entered.append([])
        for t in range(steps - 1, -1, -1) if backwards[r] else range(steps):
            entered[r].append(torch.stack([s.detach() for s in now]))
            keep, alive = (given["reset"][t] == 0).to(dtype)[:, None], (t < given["lengths"])[:, None]
            entering = [s * keep for s in now]
            x, sides = list(gx[t, :, r].unbind(1)), list[Tensor]()
            if w is not None:
                h = entering[0]
                rec = _ProductInTf32.apply(h, w[r]) if tf32 else torch.einsum("bk,guk->bgu", h, w[r])
                sides = list(rec.unbind(1))
            for i in range(spec.apart):
                sides[joined + i] = sides[joined + i] + own["bias"][r, i] + probe[t, :, r, i]
            more = []
            if spec.staged or spec.masks:
                masks = [own[f"mask{k}"][r] for k in range(spec.masks)]
                matrices = [w.flatten(0, 1) for w in own["matrices"][r].split(spec.matrices)] if spec.matrices else []
                more = [matrices, [mask[t if len(mask) > 1 else 0] for mask in masks]]
            with _Probed([probes[t, :, r, k] for k in blocks]):
                after = spec.step(x, sides, entering, [*each[r]], *more)
            now = [torch.where(alive, new, old) for new, old in zip(after, now, strict=True)]
            y[t] = torch.where(alive, after[0], torch.zeros_like(after[0]))
            all_states[t] = torch.stack([torch.where(alive, s, torch.zeros_like(s)) for s in after])
        ys.append(torch.stack(y))
        sequences.append(torch.stack(all_states, 1))
        ends.append(torch.stack(now))
        entered[r] = torch.stack(entered[r])
    y, last, over_time = torch.stack(ys, 2), torch.stack(ends, 1), torch.stack(sequences, 3)
    loss = (y * own["dy"]).sum() + sum((end * own[f"ds{i}"]).sum() for i, end in enumerate(last))
    loss = loss + sum((s * own[f"dq{i}"]).sum() for i, s in enumerate(over_time) if f"dq{i}" in own)
    wanted = [gx, probe, *states, probes, *(each if params.numel() else [])]
    d = torch.autograd.grad(loss, wanted, allow_unused=True, materialize_grads=True)
    of_blocks = d[2 + len(states)]
    found = {"y": y, "dgates": torch.cat([d[0][:, :, :, joined:], d[0][:, :, :, :joined], d[1], of_blocks], 3)}
    if params.numel():
        found["dparams"] = torch.stack(d[3 + len(states) :]).transpose(1, 2)  # [R, B, NP, H]
    for i, end in enumerate(last):
        found |= {f"end{i}": end, f"d{i}": d[2 + i], f"entered{i}": torch.stack(entered, 2)[:, i]}  # [T, R, B, H]
        found[f"sequence{i}"] = over_time[i]
    return {name: t.detach() for name, t in found.items()}


def leave_the_kink(given: Tensors, backwards: list[bool], dtype: torch.dtype) -> None:
    """Moves gx where a relu's argument is so near to 0 that rounding would decide whether a gradient passes at all."""
    gx, margin = given["gx"], 0.1
    for r, is_reverse in enumerate(backwards):
        h = given["s0"][r]
        order = range(gx.shape[0])
        for t in reversed(order) if is_reverse else order:
            rec = torch.where(given["reset"][t, :, None] == 0, h, 0.0) @ given["w"][r, 0].T
            a = gx[t, :, r, 0] + rec
            moved = gx[t, :, r, 0] + torch.where(a < 0, -2 * margin, 2 * margin)
            gx[t, :, r, 0] = torch.where(a.abs() < margin, moved, gx[t, :, r, 0]).to(dtype).double()
            h = torch.where((t < given["lengths"])[:, None], (gx[t, :, r, 0] + rec).relu(), h)
