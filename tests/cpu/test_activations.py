"""The polynomials of the CPU loops against float64: largest error in ulp, and what they make of the special values."""

import pytest
import torch

from fused_rnn import ops

pytestmark = pytest.mark.skipif(ops.MISSING is not None, reason=str(ops.MISSING))
# Measured: 2.48 and 1.41 in float32. Below 2^-125 in size the float32 sigmoid stops at 1.6e-38, not in the ranges here.
ULPS = {"sigmoid": 2.5, "tanh": 1.5}


def samples(dtype: torch.dtype) -> torch.Tensor:
    """From where the functions are saturated to where they are linear, both signs."""
    tiny = torch.logspace(-30, 1.9, 1 << 17, dtype=torch.float64)
    return torch.cat([torch.linspace(-80, 80, 1 << 18, dtype=torch.float64), tiny, -tiny]).to(dtype)


def exact(name: str, x: torch.Tensor) -> torch.Tensor:
    """In float64; for float64 itself by 1 / (1 + exp) and libm, good to about one ulp."""
    return getattr(torch, name)(x.double())


@pytest.mark.parametrize("name", ["sigmoid", "tanh"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_error_in_ulp(name: str, dtype: torch.dtype) -> None:
    x = samples(dtype)
    made = torch.ops.fused_rnn.activation(x, name == "tanh")
    expected = exact(name, x)
    bits = 23 if dtype == torch.float32 else 52
    ulp = torch.exp2(expected.abs().clamp_min(1e-37).log2().floor() - bits)
    worst = float(((made.double() - expected).abs() / ulp).max())
    # In float64 the judge is itself good to 2.5 ulp only.
    assert worst <= ULPS[name] + (2.5 if dtype == torch.float64 else 0.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_special_values(dtype: torch.dtype) -> None:
    x = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.0, 300.0, -300.0], dtype=dtype)
    sigmoid, tanh = (torch.ops.fused_rnn.activation(x, i) for i in (0, 1))
    assert sigmoid[0].isnan()
    assert tanh[0].isnan()
    torch.testing.assert_close(sigmoid[1:], torch.tensor([1, 0, 0.5, 1, 0], dtype=dtype), rtol=0, atol=1e-37)
    assert tanh[1:].tolist() == [1, -1, 0, 1, -1]
