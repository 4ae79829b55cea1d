"""Cells that see all units of a row, with matrices of their own, and with masks: what the tests of stages run.

STAGED: as a user writes them.  MASKED: names of programs, whose masks no user gives.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F

import fused_rnn
from fused_rnn.flex.compile import Shape, program_of


@fused_rnn.cell(gates=1, params=("gain", "shift"))
def layer_norm(x: Any, r: Any, s: Any, p: Any) -> Any:
    return torch.tanh(x[0] + F.layer_norm(r[0], r[0].shape[-1:], p.gain, p.shift))


@fused_rnn.cell(gates=2, states=("h", "c"), params=("gain",))
def rms_norm(x: Any, r: Any, s: Any, p: Any) -> Any:
    """Of what the step has made: the second stage is not the last."""
    f, g = torch.sigmoid(x[0] + r[0]), torch.tanh(x[1] + r[1])
    c = f * s.c + (1 - f) * g
    return F.rms_norm(c, c.shape[-1:], p.gain, 1e-5), c


@fused_rnn.cell(gates=4, states=("h", "c"), params=tuple(f"{side}_{gate}" for side in "xr" for gate in "ifgo"))
def layer_norm_lstm(x: Any, r: Any, s: Any, p: Any) -> Any:
    """Both sides normed over all gates together; then c, with numbers of the row as states after."""

    def normed(gates: Any) -> Any:
        mean = sum(g.mean(-1, keepdim=True) for g in gates) / 4
        far = [g - mean for g in gates]
        scale = torch.rsqrt(sum((g * g).mean(-1, keepdim=True) for g in far) / 4 + 1e-5)
        return [g * scale for g in far]

    gains = [getattr(p, name) for name in layer_norm_lstm.params]
    sides = zip(normed(x), gains[:4], normed(r), gains[4:], strict=True)
    i, f, g, o = (a * gain + b * other for a, gain, b, other in sides)
    c = torch.sigmoid(f) * s.c + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(F.layer_norm(c, c.shape[-1:])), c


@fused_rnn.cell(gates=3, matrices={"u": (1, "H")})
def reset_before(x: Any, r: Any, s: Any, p: Any, m: Any) -> Any:
    """Cho et al. 2014: the reset gate before the product."""
    z, reset = torch.sigmoid(x[0] + r[0]), torch.sigmoid(x[1] + r[1])
    return (1 - z) * torch.tanh(x[2] + m.u(reset * s.h)) + z * s.h


@fused_rnn.cell(gates=1, states=("h", "energy"), matrices={"u": (2, "H"), "v": (1, "H")})
def deep(x: Any, r: Any, s: Any, p: Any, m: Any) -> Any:
    """Two products one behind the other, and a number of the row for a state."""
    a = torch.tanh(x[0] + r[0])
    b, c = m.u(a)
    h = torch.tanh(b + torch.sigmoid(c) * s.h + 0.1 * s.energy)
    return m.v(h) + h, (h * h).mean(-1, keepdim=True).expand_as(h)


@fused_rnn.cell(gates=2, recurrent=False, params=("u",))
def unit_norm(x: Any, r: Any, s: Any, p: Any) -> Any:
    """Without W_hh."""
    h = p.u * s.h + torch.sigmoid(x[0]) * x[1]
    return h / (1 + torch.linalg.vector_norm(h, dim=-1, keepdim=True))


STAGED: dict[str, Any] = {
    "layer_norm": layer_norm, "rms_norm": rms_norm, "layer_norm_lstm": layer_norm_lstm, "reset_before": reset_before,
    "deep": deep, "unit_norm": unit_norm,
}  # fmt: skip


def _dropped(x: Any, r: Any, s: Any, p: Any, m: Any, masks: Any) -> Any:
    """An LSTM's h masked on its way to W_hh, and zoneout of c: the mask is the share of c that stays."""
    i, f, g, o = (a + b for a, b in zip(x, r, strict=True))
    c = torch.sigmoid(f) * s[2] + torch.sigmoid(i) * torch.tanh(g)
    c = masks[1] * s[2] + (1 - masks[1]) * c
    h = torch.sigmoid(o) * torch.tanh(c)
    return h * masks[0], h, c


def _masked_product(x: Any, r: Any, s: Any, p: Any, m: Any, masks: Any) -> Any:
    """Masks before a second product and behind a norm, with a param."""
    a = torch.tanh(x[0] + r[0]) * masks[0]
    return p[0] * F.layer_norm(m[0](a), a.shape[-1:]) * masks[1] + masks[2] * s[0]


_SHAPES = {
    "dropped": (_dropped, Shape(4, ("hm", "h", "c"), masks=("drop", "zone"))),
    "masked_product": (_masked_product, Shape(1, ("h",), ("gain",), True, (("u", 1),), ("a", "b", "c"))),
}
MASKED: dict[str, str] = {name: program_of(name, step, step, shape).text for name, (step, shape) in _SHAPES.items()}
