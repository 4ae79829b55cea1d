"""Whether ours is as good as torch's, by the rule of tests/tolerances.py, also where values are no ordinary numbers."""

from __future__ import annotations

import tolerances
import torch
from torch import Tensor

from .run import Results

# The loops take denormal numbers for zero (csrc/cpu/layout.h), as products of bfloat16 pairs do by their definition; up to
# so many of them are lost in a sum. float16, whose denormals are float32's ordinary numbers, keeps its own.
FLUSHED = 2.0**14


def compare(ours: Results, torchs: Results, wide: Results) -> str | None:
    """What is wrong with ours, in a line, or None. wide: float64, of the same inputs."""
    if ours.keys() != torchs.keys():
        return f"results: {', '.join(ours)}; torch's: {', '.join(torchs)}"
    for name, mine in ours.items():
        wrong = _compare(mine, torchs[name], wide[name])
        if wrong:
            return f"{name}: {wrong}"
    return None


def _compare(ours: Tensor, torchs: Tensor, wide: Tensor) -> str | None:
    if ours.shape != torchs.shape:
        return f"{list(ours.shape)}, torch {list(torchs.shape)}"
    if not ours.is_floating_point():
        return None if torch.equal(ours, torchs) else "differs from torch's"
    # Where rounding decides whether torch overflows (it rounds after every operation, ours after the last), there is
    # no right answer: its two dtypes must agree on what a value is before ours must agree with them.
    kinds = [_kind(t) for t in (ours, torchs, wide)]
    agreed = kinds[1] == kinds[2]
    strange = agreed & (kinds[0] != kinds[1])
    if bool(strange.any()):
        place = strange.nonzero()[0].tolist()
        at = tuple(place)
        return f"{int(strange.sum())} of {ours.numel()} values, as at {place}: {ours[at]:.4g}, torch {torchs[at]:.4g}"
    numbers = agreed & (kinds[1] == 0)
    mine, theirs, exact = ours[numbers], torchs[numbers], wide[numbers]
    if mine.numel() == 0:
        return None
    made, may = tolerances.error(mine, exact), allowed(theirs, exact)
    if made <= may:
        return None
    return f"error {made:.3g}, allowed {may:.3g}, torch {tolerances.error(theirs, exact):.3g}, scale {exact.abs().max():.3g}"


def allowed(torchs: Tensor, exact: Tensor) -> float:
    """tolerances.allowed, and an ulp is no less than the distance of two denormal numbers."""
    info = torch.finfo(torchs.dtype)
    flushed = FLUSHED * torch.finfo(torch.float64 if torchs.dtype == torch.float64 else torch.float32).tiny
    return tolerances.allowed(torchs, exact) + max(tolerances.ULPS * info.tiny * info.eps, flushed)


def _kind(t: Tensor) -> Tensor:
    """0 a number, 1 inf, -1 -inf, 2 NaN."""
    kind = t.isposinf().int() - t.isneginf().int()
    return kind + 2 * t.isnan().int()


def same_bits(one: Results, other: Results) -> str | None:
    """The name of what differs in any bit; two NaNs are the same."""
    if one.keys() != other.keys():
        return "the names of the results"
    for name, t in one.items():
        a, b = t, other[name]
        if a.shape != b.shape or a.dtype != b.dtype:
            return name
        if a.is_floating_point():
            a, b = (torch.nan_to_num(v, nan=0.125, posinf=float("inf"), neginf=-float("inf")) for v in (a, b))
        if not torch.equal(a, b):
            return name
    return None
