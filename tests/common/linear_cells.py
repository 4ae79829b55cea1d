"""Cells that are linear in their states, without W_hh: what chunks of time can run side by side."""

from __future__ import annotations

from typing import Any

import literature
import torch

import fused_rnn


@fused_rnn.cell(recurrent=False, gates=4, states=("h", "c"))
def sru(x: Any, r: Any, s: Any, p: Any) -> Any:
    """Without what its gates read of c."""
    f, out = torch.sigmoid(x[0]), torch.sigmoid(x[1])
    c = f * s.c + (1 - f) * x[2]
    return out * torch.tanh(c) + (1 - out) * x[3], c


@fused_rnn.cell(recurrent=False, gates=1, params=("u",))
def linear_indrnn(x: Any, r: Any, s: Any, p: Any) -> Any:
    return x[0] + p.u * s.h


@fused_rnn.cell(recurrent=False, gates=3, states=("h", "c", "m"), params=("a",))
def many(x: Any, r: Any, s: Any, p: Any) -> Any:
    """h read out of two states before the step and after it; of one the factor is chosen, and one is divided."""
    chosen = x[0] > 0
    c = torch.where(chosen, 1.0, -1.0) * s.c + torch.where(chosen, 0.0, x[1]) - 0.5 * s.c
    return c * x[2] + s.m, c, torch.relu(x[2]) - (s.m + x[0]) / (1 + p.a * p.a)


@fused_rnn.cell(recurrent=False, gates=1, states=("h", "c"))
def forgets(x: Any, r: Any, s: Any, p: Any) -> Any:
    return s.h * torch.cos(x[0]), x[0]


@fused_rnn.cell(recurrent=False, gates=2, states=("h", "c"))
def restarts(x: Any, r: Any, s: Any, p: Any) -> Any:
    """None: what is chosen is the state itself, and what is not is forgotten even where it is not finite."""
    c = torch.where(x[0] > 0, x[1], s.c + x[1])
    return torch.tanh(c), c


@fused_rnn.cell(recurrent=False, gates=2, states=("h", "c", "d"))
def delays(x: Any, r: Any, s: Any, p: Any) -> Any:
    """h read out of a state of the step before, of which the step after this one knows nothing."""
    d = s.d * torch.cos(x[0])
    return d + s.c, x[1], d


SCANS = {c.name: c for c in (literature.min_gru, literature.min_lstm, sru, linear_indrnn, many, forgets)}
