"""The plain recurrent cell with relu. Source: Elman 1990; as in torch.nn.RNN."""

import triton
import triton.language as tl

AFTER, BEFORE = ("h",), ()


@triton.jit
def fwd(x, r, bias, states, params, ACTIVATION: tl.constexpr):
    h = x[0] + r[0]
    return (tl.where(h <= 0, 0.0, h),), ()  # a NaN stays one, as in torch


@triton.jit
def bwd(dstates, kept, after, before, params, ACTIVATION: tl.constexpr):
    dh = dstates[0]
    return (tl.where(after[0] <= 0, 0.0, dh),), (tl.full(dh.shape, 0.0, dh.dtype),), ()
