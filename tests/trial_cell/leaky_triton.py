"""A cell of everything at once: two states, a gate that enters apart, and a formula that reads h. Gate order i, g.

g = tanh(x_g + i r_g), m' = i m + h, h' = h + i (g - h + m').
"""

import triton
import triton.language as tl

from fused_rnn.triton.pointwise import sigmoid, tanh

AFTER, BEFORE = (), ("m",)


@triton.jit
def fwd(x, r, bias, states, params, ACTIVATION: tl.constexpr):
    h, m = states
    i = sigmoid(x[0] + r[0], ACTIVATION)
    r_g = r[1] + bias[0]
    g = tanh(x[1] + i * r_g, ACTIVATION)
    m = i * m + h
    d = g - h + m
    return (h + i * d, m), (i, g, d, r_g)


@triton.jit
def bwd(dstates, kept, after, before, params, ACTIVATION: tl.constexpr):
    dh, dm = dstates
    i, g, d, r_g = kept
    dm += dh * i
    dg = dh * i * (1.0 - g * g)
    di = (dh * d + dm * before[1] + dg * r_g) * i * (1.0 - i)
    return (dg, di, dg * i), (dh * (1.0 - i) + dm, dm * i), ()
