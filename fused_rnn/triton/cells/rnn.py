"""The plain recurrent cell with tanh or relu. Source: Elman 1990; as in torch.nn.RNN."""

import triton
import triton.language as tl

from fused_rnn.triton.pointwise import tanh


@triton.jit
def fwd_tanh(x, h, bias, state, HOW: tl.constexpr):
    new = tanh(x[0] + h[0], HOW)
    return new, new, ()


@triton.jit
def bwd_tanh(dh, dc, kept, h, h_before, HOW: tl.constexpr):
    return (dh * (1.0 - h * h),), tl.full(dh.shape, 0.0, dh.dtype), dc


@triton.jit
def fwd_relu(x, h, bias, state, HOW: tl.constexpr):
    new = x[0] + h[0]
    new = tl.where(new <= 0, 0.0, new)  # a NaN stays one, as in torch
    return new, new, ()


@triton.jit
def bwd_relu(dh, dc, kept, h, h_before, HOW: tl.constexpr):
    return (tl.where(h <= 0, 0.0, dh),), tl.full(dh.shape, 0.0, dh.dtype), dc
