"""The coupled-gate LSTM's kernels: gate order i, g, o, the forget gate 1 - i; states h, c. A trial of a new cell."""

import triton
import triton.language as tl

from fused_rnn.triton.pointwise import sigmoid, tanh

AFTER = BEFORE = ("c",)


@triton.jit
def fwd(x, r, bias, states, params, ACTIVATION: tl.constexpr):
    i = sigmoid(x[0] + r[0], ACTIVATION)
    g = tanh(x[1] + r[1], ACTIVATION)
    o = sigmoid(x[2] + r[2], ACTIVATION)
    c = states[1] + i * (g - states[1])
    return (o * tanh(c, ACTIVATION), c), (i, g, o)


@triton.jit
def bwd(dstates, kept, after, before, params, ACTIVATION: tl.constexpr):
    dh, dc = dstates
    i, g, o = kept
    t = tanh(after[1], ACTIVATION)
    dc += dh * o * (1.0 - t * t)
    gates = (dc * (g - before[1]) * i * (1.0 - i), dc * i * (1.0 - g * g), dh * t * o * (1.0 - o))
    return gates, (tl.full(dh.shape, 0.0, dh.dtype), dc * (1.0 - i)), ()
