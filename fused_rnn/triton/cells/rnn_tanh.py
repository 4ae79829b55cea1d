"""The plain recurrent cell with tanh. Source: Elman 1990; as in torch.nn.RNN."""

import triton
import triton.language as tl

from fused_rnn.triton.pointwise import tanh

AFTER, BEFORE = ("h",), ()


@triton.jit
def fwd(x, r, bias, states, params, ACTIVATION: tl.constexpr):
    return (tanh(x[0] + r[0], ACTIVATION),), ()


@triton.jit
def bwd(dstates, kept, after, before, params, ACTIVATION: tl.constexpr):
    dh, h = dstates[0], after[0]
    return (dh * (1.0 - h * h),), (tl.full(dh.shape, 0.0, dh.dtype),), ()
