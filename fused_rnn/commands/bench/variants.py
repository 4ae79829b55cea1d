"""How a module is called where a point departs from a plain batch: torch.nn as its users must, ours as they may."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from fused_rnn.commands.bench.grid import RESETS, Point

Forward = Callable[[], Tensor]


def forward(point: Point, module: nn.Module, x: Tensor, hx: Any, ours: bool) -> Forward:
    """The call that gives the outputs, everything that differs from a plain one inside it. ours: a fused_rnn module."""
    if point.variant == "ragged":
        return _packed(point, module, x, hx)
    if point.variant == "lengths":
        return _with_lengths(point, module, x, hx) if ours else _padded(point, module, x, hx)
    if point.variant == "resets":
        reset = resets(point)
        if ours:
            given = reset.to(x.device)
            return lambda: module(x, hx, reset=given)[0]
        return _segments(module, x, hx, reset)
    return lambda: module(x, hx)[0]


def rows(point: Point, y: Tensor) -> Tensor:
    """Of [T, B, ...] what the outputs have: all, or of a packed sequence its steps."""
    return y if point.variant != "ragged" else y.flatten(0, 1)[: sum(point.lengths or ())]


def resets(point: Point) -> Tensor:
    """[T, B] bool: the same at a point every time."""
    generator = torch.Generator().manual_seed(point.T * point.B)
    return torch.rand(point.T, point.B, generator=generator, device="cpu") < RESETS


def _packed(point: Point, module: nn.Module, x: Tensor, hx: Any) -> Forward:
    lengths = torch.tensor(point.lengths, device="cpu")
    return lambda: module(pack_padded_sequence(x, lengths), hx)[0].data


def _padded(point: Point, module: nn.Module, x: Tensor, hx: Any) -> Forward:
    lengths = torch.tensor(point.lengths, device="cpu")
    return lambda: pad_packed_sequence(module(pack_padded_sequence(x, lengths), hx)[0], total_length=point.T)[0]


def _with_lengths(point: Point, module: nn.Module, x: Tensor, hx: Any) -> Forward:
    lengths = torch.tensor(point.lengths, device=x.device)
    return lambda: module(x, hx, lengths=lengths)[0]


def _segments(module: nn.Module, x: Tensor, hx: Any, reset: Tensor) -> Forward:
    """torch.nn knows no reset: a call for each stretch between two of them, whose state is masked before."""
    steps = x.shape[0]
    starts = [0, *(t for t in range(1, steps) if bool(reset[t].any()))]
    ends = [*starts[1:], steps]
    keeps = [(~reset[t]).to(x.device, x.dtype).unsqueeze(-1) for t in starts]

    def run() -> Tensor:
        outputs, state = [], hx
        for first, last, keep in zip(starts, ends, keeps, strict=True):
            if isinstance(state, tuple):
                state = (state[0] * keep, state[1] * keep)
            elif state is not None:
                state = state * keep
            y, state = module(x[first:last], state)
            outputs.append(y)
        return torch.cat(outputs)

    return run
