"""Gated recurrent unit, gate order r, z, n, the reset gate applied after the recurrent product.

Source: Cho et al. 2014, in the form of torch.nn.GRU and cuDNN: n = tanh(x_n + r (W_hn h + b_hn)), h' = n + z (h - n).
"""

import triton
import triton.language as tl

from fused_rnn.triton.pointwise import sigmoid, tanh

AFTER, BEFORE = (), ("h",)


@triton.jit
def fwd(x, r, bias, states, params, ACTIVATION: tl.constexpr):
    reset = sigmoid(x[0] + r[0], ACTIVATION)
    z = sigmoid(x[1] + r[1], ACTIVATION)
    hn = r[2] + bias[0]
    n = tanh(x[2] + reset * hn, ACTIVATION)
    return (n + z * (states[0] - n),), (reset, z, n, hn)


@triton.jit
def bwd(dstates, kept, after, before, params, ACTIVATION: tl.constexpr):
    dh = dstates[0]
    reset, z, n, hn = kept
    dn = dh * (1.0 - z) * (1.0 - n * n)
    dr = dn * hn * reset * (1.0 - reset)
    return (dn, dr, dh * (before[0] - n) * z * (1.0 - z), dn * reset), (dh * z,), ()
