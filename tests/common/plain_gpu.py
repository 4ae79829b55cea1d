"""A GPU backend's loops in plain PyTorch: what fused_rnn.gpu.loops.Loops means, as a program; and a backend of them.

Step by step and recurrence by recurrence; backward by autograd through one step's cell.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from fused_rnn import dispatch
from fused_rnn.gpu import op
from fused_rnn.gpu.loops import Layer, Loops
from fused_rnn.reference.sequence import entering


class Own(NamedTuple):
    """Of a recurrence at a time: params [H], the blocks of its matrices [H, H], masks [B, H]."""

    params: Sequence[Tensor]
    blocks: Any
    masks: Sequence[Tensor]

    @classmethod
    def of(cls, params: Any, matrices: Any, masks: Sequence[Tensor], r: int, t: int) -> Own:
        own = [mask[r, t if mask.shape[1] > 1 else 0] for mask in masks]
        return cls(() if params is None else params[r], () if matrices is None else matrices[r], own)


class PlainLoops:
    """Step by step and recurrence by recurrence; backward by autograd through one step's cell."""

    def __init__(self, layer: Layer) -> None:
        self.layer, self.cell = layer, layer.cell

    def _places(self, window: tuple[int, int]) -> Iterator[tuple[int, int, int, Tensor, Tensor]]:
        """(r, t, t's place in a window's buffer, which rows run it, which of those the state before reaches)."""
        layer, (first, last) = self.layer, window
        for r, direction in enumerate(layer.directions):
            for step in range(first, last):
                t = step if direction > 0 else layer.steps - 1 - step
                base = first if direction > 0 else layer.steps - last
                every = torch.ones(layer.batch, 1, dtype=torch.bool)
                valid = every if layer.lengths is None else (t < layer.lengths).unsqueeze(-1)
                live = valid if layer.reset is None else valid & (layer.reset[t] == 0).unsqueeze(-1)
                yield r, t, t - base, valid, live

    def _step(self, gx: Tensor, gh: Any, before: list[Tensor], own: Own) -> tuple[Tensor, ...]:
        """The states after, from gates [B, G, H] and the states before."""
        more = ([own.blocks.flatten(0, 1)] if len(own.blocks) else [], own.masks) if self.cell.program else ()
        return self.cell.step(gx.unbind(1), () if gh is None else gh.unbind(1), before, own.params, *more)

    def _kept(self, gx: Tensor, gh: Any, before: list[Tensor], own: Own) -> Tensor:
        """Of LSTM its activated gates, of GRU r, z, n and n's recurrent side: [B, S, H]."""
        if self.cell.program:
            gates = gx if gh is None else gx + gh
            joined = self.cell.gates - self.cell.apart
            a = gates.unbind(1) if not self.cell.apart else (*gates[:, :joined].unbind(1), *gx[:, joined:].unbind(1))
            a = [*a, *gh[:, joined:].unbind(1)] if self.cell.apart else a
            kept = self.cell.program.forward.run([*a, *before, *own.params, *own.masks], own.blocks)[1]
            return torch.stack([v.expand(gx.shape[0], gx.shape[2]) for v in kept], 1)
        if not self.cell.apart:
            i, f, g, o = (gx + gh).unbind(1)
            return torch.stack([i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()], 1)
        r, z = ((gx + gh)[:, k].sigmoid() for k in range(2))
        return torch.stack([r, z, (gx[:, 2] + r * gh[:, 2]).tanh(), gh[:, 2]], 1)

    def _recurrent(self, h: Tensor, w: Any, bias: Any, r: int) -> Any:
        return None if w is None else self._biased(torch.einsum("bk,gnk->bgn", h, w[r]), bias, r)

    def _biased(self, gh: Tensor, bias: Any, r: int) -> Tensor:
        if bias is not None:
            gh[:, -self.cell.apart :] += bias[r]
        return gh

    def forward(
        self, *, gx: Tensor, w: Any, bias: Any, params: Any, h0: Tensor, carried: list[Tensor], y: Tensor, h_n: Tensor,
        saved: Any, histories: list[Tensor], checkpoints: list[Tensor], every: int,
        matrices: Any = None, masks: Sequence[Tensor] = (),
    ) -> None:  # fmt: skip
        h_n.copy_(h0)
        others = carried[self.cell.reads_h :]
        for step in range(self.layer.steps):
            if step % every == 0:
                for checkpoint, state in zip(checkpoints, others, strict=False):
                    checkpoint[step // every] = state
            for r, t, _, valid, live in self._places((step, step + 1)):
                before, own = [s[r] * live for s in (h_n, *others)], Own.of(params, matrices, masks, r, t)
                gh = self._recurrent(before[0], w, bias, r)
                for state, new in zip((h_n, *others), self._step(gx[t, :, r], gh, before, own), strict=True):
                    state[r] = torch.where(valid, new, state[r])
                y[t, :, r] = h_n[r] * valid
                if saved is not None and self.cell.saved:
                    saved[t, :, r] = self._kept(gx[t, :, r], gh, before, own) * valid.unsqueeze(-1)
                for history, state in zip(histories, others, strict=False):
                    history[t, :, r] = state[r] * valid
        if self.cell.reads_h:
            carried[0].copy_(h_n)

    def replay(
        self, *, gx: Tensor, given: Any, bias: Any, params: Any, h0: Tensor, hidden: Tensor, carried: list[Tensor],
        saved: Tensor, histories: list[Tensor], window: tuple[int, int],
        matrices: Any = None, masks: Sequence[Tensor] = (),
    ) -> None:  # fmt: skip
        for r, t, at, valid, live in self._places(window):
            gh = None if given is None else self._biased(given[at, :, r].clone(), bias, r)
            h = entering(hidden[:, :, r], h0[r], self.layer.lengths, self.layer.reset, self.layer.directions[r])[t]
            before, own = [h, *(s[r] * live for s in carried)], Own.of(params, matrices, masks, r, t)
            if self.cell.saved:
                saved[at, :, r] = self._kept(gx[at, :, r], gh, before, own) * valid.unsqueeze(-1)
            after = self._step(gx[at, :, r], gh, before, own)
            for state, new, history in zip(carried, after[1:], histories, strict=True):
                state[r] = torch.where(valid, new, state[r])
                history[at, :, r] = state[r] * valid

    def backward(
        self, *, dy: Any, dsequences: list[Tensor], w: Any, params: Any, states: list[Tensor], first: list[Tensor],
        saved: Any, dgates: Tensor, dstates: list[Tensor], dparams: Any, window: tuple[int, int] | None = None,
        matrices: Any = None, masks: Sequence[Tensor] = (),
    ) -> None:  # fmt: skip
        layer, window = self.layer, window or (0, self.layer.steps)
        gates = slice(self.cell.apart, self.cell.apart + self.cell.gates)  # the recurrent sides
        for r, t, at, valid, live in reversed(list(self._places(window))):
            step = t if layer.directions[r] > 0 else layer.steps - 1 - t
            before, after = [], []
            for k, (history, begins) in enumerate(zip(states, first, strict=True)):
                here = at if k else t  # of h there is all of time
                if step == (window[0] if k else 0):
                    state = begins[r]
                else:
                    state = history[here - layer.directions[r], :, r]
                if layer.directions[r] < 0 and layer.lengths is not None:
                    state = torch.where((t + 1 >= layer.lengths).unsqueeze(-1), begins[r], state)
                before.append(state * live)
                after.append(history[here, :, r])
            d_after = [d[r] for d in dstates]
            for k, d_output in enumerate([dy, *dsequences]):
                if d_output is not None:
                    d_after[k] = d_after[k] + torch.where(valid, d_output[t, :, r], 0)
            own = Own.of(params, matrices, masks, r, t)
            d, d_before, dp = self._pull(d_after, saved if saved is None else saved[at, :, r], before, after, own)
            d = torch.where(valid.unsqueeze(-1), d, 0)
            dgates[t, :, r] = d
            if dparams is not None:
                dparams[r] += torch.where(valid.unsqueeze(-1), torch.stack(dp, 1), 0)
            if w is not None:
                d_before[0] = d_before[0] + torch.einsum("bgn,gnk->bk", d[:, gates], w[r])
            for dstate, new in zip(dstates, d_before, strict=True):
                dstate[r] = torch.where(valid, new * live, dstate[r])

    def _pull(
        self, d_after: list[Tensor], kept: Any, before: list[Tensor], after: list[Tensor], own: Own
    ) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """Gradients of the gates and products [B, G + apart + N, H]; of the states before by the formula alone; of the
        params."""
        name, dh, program = self.cell.name, d_after[0], self.cell.program
        if program:
            values = () if kept is None else kept.unbind(1)
            given = [*values, *before, *after, *own.params, *own.masks, *d_after]
            groups = program.backward.run(given, own.blocks, dh.shape[1])
            gates, states, vectors, *products = ([v.expand(dh.shape) for v in group] for group in groups)
            return torch.stack(sum(products, gates), 1), states, vectors
        if name == "lstm":
            (i, f, g, o), c = kept.unbind(1), after[1]
            dc = d_after[1] + dh * o * (1 - c.tanh() ** 2)
            d = [dc * g * i * (1 - i), dc * before[1] * f * (1 - f), dc * i * (1 - g * g), dh * c.tanh() * o * (1 - o)]
            return torch.stack(d, 1), [torch.zeros_like(dh), dc * f], []
        if name == "gru":
            r, z, n, hn = kept.unbind(1)
            dn = dh * (1 - z) * (1 - n * n)
            d = [dn, dn * hn * r * (1 - r), dh * (before[0] - n) * z * (1 - z), dn * r]
            return torch.stack(d, 1), [dh * z], []
        slope = 1 - after[0] * after[0] if name == "rnn_tanh" else (after[0] > 0).to(dh.dtype)
        return (dh * slope).unsqueeze(1), [torch.zeros_like(dh)], []


def make(layer: Layer, x: Tensor, backward: bool) -> Loops:
    return PlainLoops(layer)


@contextmanager
def plain_backend(wavefront: Any = None) -> Iterator[None]:
    """A backend of the name "plain"."""
    if not hasattr(torch.ops.fused_rnn, "plain_forward"):
        op.define("plain", make, ("CPU",))
    plain = SimpleNamespace(
        NAME="plain",
        DIFFERENTIABLE=False,
        stack=None,
        wavefront=wavefront,
        supports=lambda problem: None,
        forward=lambda call: torch.ops.fused_rnn.plain_forward.default(*call),
        backward=lambda call: torch.ops.fused_rnn.plain_backward.default(*call),
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(dispatch.BACKENDS, "plain", plain)
        dispatch._choose_cached.cache_clear()
        yield
    dispatch._choose_cached.cache_clear()
