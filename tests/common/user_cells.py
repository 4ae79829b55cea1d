"""Cells as a user writes them, and the plain loop over their steps, one sequence at a time."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

import fused_rnn


@fused_rnn.cell(gates=4, states=("h", "c"))
def lstm(x: Any, r: Any, s: Any, p: Any) -> Any:
    i, f, g, o = (a + b for a, b in zip(x, r, strict=True))
    c = torch.sigmoid(f) * s.c + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(c), c


@fused_rnn.cell(gates=3)
def gru(x: Any, r: Any, s: Any, p: Any) -> Any:
    reset, z = torch.sigmoid(x[0] + r[0]), torch.sigmoid(x[1] + r[1])
    n = torch.tanh(x[2] + reset * r[2])
    return (1 - z) * n + z * s.h


@fused_rnn.cell(gates=1, params=("a",))
def leaky(x: Any, r: Any, s: Any, p: Any) -> Any:
    return s.h + p.a * (torch.tanh(x[0] + r[0]) - s.h)


@fused_rnn.cell(gates=1, params=("u",), recurrent=False)
def indrnn(x: Any, r: Any, s: Any, p: Any) -> Any:
    return torch.relu(x[0] + p.u * s.h)


@fused_rnn.cell(gates=1, states=("h", "m", "k"), params=("a", "b"))
def chain(x: Any, r: Any, s: Any, p: Any) -> Any:
    m = p.a * s.m + x[0] + r[0]
    k = p.b * s.k + m
    return torch.tanh(k), m, k


USER_CELLS = {cell.name: cell for cell in (lstm, gru, leaky, indrnn, chain)}


def dense(w_hh: Tensor, gates: int) -> Tensor:
    """weight_hh of N heads as the matrix [G·H, H] that it stands for."""
    if w_hh.dim() == 2:
        return w_hh
    by_gate = w_hh.unflatten(1, (gates, -1)).unbind(1)
    return torch.cat([torch.block_diag(*each) for each in by_gate])


def _one(
    module: Any, x: Tensor, states: Sequence[Tensor], suffix: str, reset: Tensor | None
) -> tuple[list[Tensor], Sequence[Tensor]]:
    """One direction over one sequence [T, D], states [H] each."""
    cell, over_time = module.cell, []

    def weight(name: str) -> Any:
        return getattr(module, name + suffix, None)

    p = SimpleNamespace(**{name: weight(f"{name}_l") for name in cell.params})
    w_hh, b_ih, b_hh = weight("weight_hh_l"), weight("bias_ih_l"), weight("bias_hh_l")
    for t in range(x.shape[0]):
        if reset is not None and bool(reset[t]):
            states = [torch.zeros_like(s) for s in states]
        sides = torch.nn.functional.linear(x[t], weight("weight_ih_l"), b_ih).chunk(cell.gates)
        r = None
        if w_hh is not None:
            r = torch.nn.functional.linear(states[0], dense(w_hh, cell.gates), b_hh).chunk(cell.gates)
        after = cell.step(sides, r, SimpleNamespace(**dict(zip(cell.states, states, strict=True))), p)
        states = after if isinstance(after, tuple) else (after,)
        over_time.append(states)
    return [torch.stack(each) for each in zip(*over_time, strict=True)] if over_time else [], states


def plain_loop(
    module: Any,
    x: Tensor,
    hx: Sequence[Tensor] | None = None,
    lengths: Sequence[int] | None = None,
    reset: Tensor | None = None,
) -> tuple[list[Tensor], list[Tensor]]:
    """x [T, B, D], hx of [L·R, B, H] → the sequences of all states of the last layer [T, B, R·H], the states after."""
    count, hidden, sides = len(module.cell.states), module.hidden_size, 1 + module.bidirectional
    steps, batch = x.shape[:2]
    finals: list[list[Tensor]] = [[] for _ in range(count)]
    for layer in range(module.num_layers):
        outputs = []
        for side in range(sides):
            rows: list[list[Tensor]] = []
            after = []
            for b in range(batch):
                long = steps if lengths is None else int(lengths[b])
                own = x[:long, b]
                r = None if reset is None else reset[:long, b]
                if side:
                    own, r = own.flip(0), None if r is None else r.flip(0)
                states = (
                    [x.new_zeros(hidden)] * count if hx is None else [state[layer * sides + side, b] for state in hx]
                )
                over_time, last = _one(module, own, states, f"{layer}" + "_reverse" * side, r)
                over_time = [s.flip(0) if side else s for s in over_time] or [x.new_zeros(0, hidden)] * count
                rows.append([torch.cat([s, s.new_zeros(steps - long, hidden)]) for s in over_time])
                after.append(last)
            outputs.append([torch.stack(each, 1) for each in zip(*rows, strict=True)])
            for k in range(count):
                finals[k].append(torch.stack([last[k] for last in after]))
        sequences = [torch.cat(each, -1) for each in zip(*outputs, strict=True)]
        x = sequences[0]
    return sequences, [torch.stack(each) for each in finals]
