"""Long short-term memory, gate order i, f, g, o; states h, c.

Source: Hochreiter & Schmidhuber 1997, forget gate of Gers et al. 2000; gates as in torch.nn.LSTM.
"""

import triton
import triton.language as tl

from fused_rnn.triton.pointwise import sigmoid, tanh

AFTER = BEFORE = ("c",)


@triton.jit
def fwd(x, r, bias, states, params, ACTIVATION: tl.constexpr):
    i = sigmoid(x[0] + r[0], ACTIVATION)
    f = sigmoid(x[1] + r[1], ACTIVATION)
    g = tanh(x[2] + r[2], ACTIVATION)
    o = sigmoid(x[3] + r[3], ACTIVATION)
    c = f * states[1] + i * g
    return (o * tanh(c, ACTIVATION), c), (i, f, g, o)


@triton.jit
def bwd(dstates, kept, after, before, params, ACTIVATION: tl.constexpr):
    dh, dc = dstates
    i, f, g, o = kept
    t = tanh(after[1], ACTIVATION)
    dc += dh * o * (1.0 - t * t)
    gates = (dc * g * i * (1.0 - i), dc * before[1] * f * (1.0 - f), dc * i * (1.0 - g * g), dh * t * o * (1.0 - o))
    return gates, (tl.full(dh.shape, 0.0, dh.dtype), dc * f), ()
