"""Whether ours is as good as torch's, by the rule of common/tolerances.py, also where values are not ordinary."""

from __future__ import annotations

import tolerances
import torch
from torch import Tensor

from .run import Results

# The loops take denormal numbers for zero (csrc/cpu/layout.h), as products of bfloat16 pairs do by their definition; up
# to so many of them are lost in a sum. float16, whose denormals are float32's ordinary numbers, keeps its own.
FLUSHED = 2.0**14


def strange(ours: Results, torchs: Results, wide: Results) -> str | None:
    """What of ours is no number, another shape, or another integer, in a line; None if all is as torch's.

    wide: torch's in float64, of the same inputs.
    """
    if ours.keys() != torchs.keys():
        return f"results: {', '.join(ours)}; torch's: {', '.join(torchs)}"
    for name, mine in ours.items():
        theirs = torchs[name]
        if mine.shape != theirs.shape:
            return f"{name}: {list(mine.shape)}, torch {list(theirs.shape)}"
        if not mine.is_floating_point():
            if not torch.equal(mine, theirs):
                return f"{name}: differs from torch's"
            continue
        differs = (_kind(mine) != _kind(theirs)) & _agreed(theirs, wide[name])
        if bool(differs.any()):
            at = tuple(differs.nonzero()[0].tolist())
            values = f"{mine[at]:.4g}, torch {theirs[at]:.4g}"
            return f"{name}: {int(differs.sum())} of {mine.numel()} values, as at {list(at)}: {values}"
    return None


def excess(ours: Results, torchs: Results, wide: Results) -> dict[str, str]:
    """The results whose error is larger than it may be, each with a line about it."""
    found = {}
    for name, mine in ours.items():
        theirs, exact = torchs[name], wide[name]
        if not mine.is_floating_point():
            continue
        numbers = _agreed(theirs, exact) & (_kind(theirs) == 0) & (_kind(mine) == 0)
        mine, theirs, exact = mine[numbers], theirs[numbers], exact[numbers]
        made, may = tolerances.error(mine, exact), allowed(mine, theirs, exact)
        if not made <= may:
            own, scale = tolerances.error(theirs, exact), float(exact.abs().max())
            found[name] = f"{name}: error {made:.3g}, allowed {may:.3g}, torch {own:.3g}, scale {scale:.3g}"
    return found


def _agreed(torchs: Tensor, wide: Tensor) -> Tensor:
    """Where torch's two dtypes agree on whether a value is a number.

    Where they do not, rounding decides whether something overflows: torch rounds after every operation and ours after
    the last, so that there is no right answer.
    """
    return _kind(torchs) == _kind(wide)


def allowed(ours: Tensor, torchs: Tensor, exact: Tensor) -> float:
    """tolerances.allowed, and an ulp is no less than the distance of two denormal numbers: of float16's where it is the
    dtype of a leaf, and autocast's another."""
    denormal = max(torch.finfo(t.dtype).tiny * torch.finfo(t.dtype).eps for t in (ours, torchs))
    flushed = FLUSHED * torch.finfo(torch.float64 if torchs.dtype == torch.float64 else torch.float32).tiny
    return tolerances.allowed(torchs, exact) + max(tolerances.ULPS * denormal, flushed)


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
