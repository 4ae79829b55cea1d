"""The one place where tests get their tolerances, and why they are what they are.

Against the float64 reference of the same (already rounded) inputs, an error is allowed up to

    2 × the error that torch's own implementation makes, in the same dtype on the same inputs     (TIMES_TORCH)
    + a few ulp of the largest value of that tensor                                              (ULPS)

The first term, because what a recurrence does to rounding errors (chaos in a relu RNN, cancellation in a gradient)
depends on the inputs, and torch's result measures just that; twice, because ours is another summation order of the same
sum, with an error of its own of the same size. The second, because torch's error on a small tensor can be zero by luck,
and a result that is rounded to its dtype (half an ulp), from a state that was rounded to it at every step, cannot do
better.

In TF32 torch's own result is a stand-in (cuda_cases.py, by_torch_in_tf32): the plain loop by torch's float32
operations in which the operands of every product, forward and backward, are brought to TF32, and the sums are
float32's. That is what torch computes on a GPU with TF32 on, but for the order of its sums. Without a GPU they are
rounded to nearest; on one as torch.mm there is seen to do it, which may cut the bits off instead.

A float64 result has no wider reference to be judged by: there both are the same formula (FLOAT64_SAME_FORMULA).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

TIMES_TORCH = 2.0
ULPS = 4.0

# Two float64 implementations of the same formula, relative to the tensor's largest value: 1e-16 a rounding, sums of
# some 10^4 terms (T·B of a weight's gradient) over some 10^2 steps that hand their error on.
FLOAT64_SAME_FORMULA = 1e-11

# gradcheck's defaults for float64 with eps 1e-6: central differences are right to eps², their rounding is 1e-16/1e-6.
GRADCHECK = {"eps": 1e-6, "atol": 1e-5, "rtol": 1e-3}


@contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """cudnn.allow_tf32, also after torch.testing has frozen the flags against plain assignment."""
    flags = torch.backends.cudnn
    with flags.flags(flags.enabled, flags.benchmark, deterministic=flags.deterministic, allow_tf32=allowed):
        yield


def error(actual: Tensor, reference: Tensor) -> float:
    """The largest absolute difference, in float64; inf where a NaN or an inf stands in one alone."""
    if reference.numel() == 0:
        return 0.0
    actual, reference = actual.detach().double(), reference.detach().double()
    same = (actual == reference) | (actual.isnan() & reference.isnan())
    difference = (actual - reference).abs().masked_fill(same, 0)
    return float("inf") if bool(difference.isnan().any()) else float(difference.max())


def allowed(torchs: Tensor, reference: Tensor) -> float:
    """The error allowed to a tensor of torchs' dtype, given torch's own result."""
    finite = reference.detach()[reference.detach().isfinite()]
    scale = float(finite.abs().max()) if finite.numel() else 0.0
    own = error(torchs, reference)
    if torchs.dtype == torch.float64:
        return FLOAT64_SAME_FORMULA * scale
    return (TIMES_TORCH * own if own != float("inf") else 0.0) + ULPS * torch.finfo(torchs.dtype).eps * scale


def assert_as_good_as_torch(actual: dict[str, Tensor], torchs: dict[str, Tensor], reference: dict[str, Tensor]) -> None:
    """Each named result within what it is allowed; says all that are not."""
    assert actual.keys() == torchs.keys() == reference.keys()
    bad = []
    for name, ours in actual.items():
        assert ours.shape == reference[name].shape, (
            f"{name}: {tuple(ours.shape)}, expected {tuple(reference[name].shape)}"
        )
        assert ours.dtype == torchs[name].dtype, f"{name}: {ours.dtype}, expected {torchs[name].dtype}"
        made, may = error(ours, reference[name]), allowed(torchs[name], reference[name])
        if not made <= may:
            bad.append(
                f"{name}: error {made:.3g}, allowed {may:.3g}, torch's own {error(torchs[name], reference[name]):.3g}"
            )
    assert not bad, "\n".join(bad)


def assert_same_formula(actual: Tensor, reference: Tensor) -> None:
    """Two float64 results of the same mathematics."""
    assert actual.dtype == reference.dtype == torch.float64
    assert actual.shape == reference.shape
    scale = float(reference.detach().abs().max()) if reference.numel() else 0.0
    assert error(actual, reference) <= FLOAT64_SAME_FORMULA * scale, (
        f"error {error(actual, reference):.3g}, largest value {scale:.3g}"
    )
