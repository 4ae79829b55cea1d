"""Gated recurrent unit, gate order r, z, n, the reset gate applied after the recurrent product.

Source: Cho et al. 2014, in the form of torch.nn.GRU and cuDNN: n = tanh(x_n + r (W_hn h + b_hn)), h' = n + z (h - n).
"""

import triton
import triton.language as tl

from fused_rnn.triton.pointwise import sigmoid, tanh


@triton.jit
def fwd(x, h, bias, state, HOW: tl.constexpr):
    """Gates' input side x and recurrent side h, tuples of 3; b_hn; the old h. Returns h', h' as the state, the kept."""
    r = sigmoid(x[0] + h[0], HOW)
    z = sigmoid(x[1] + h[1], HOW)
    hn = h[2] + bias
    n = tanh(x[2] + r * hn, HOW)
    new = n + z * (state - n)
    return new, new, (r, z, n, hn)


@triton.jit
def bwd(dh, dc, kept, h, h_before, HOW: tl.constexpr):
    """Gradients of n's input side, r, z, n's recurrent side: each weight's gradient reads three of them in a row."""
    r, z, n, hn = kept[0], kept[1], kept[2], kept[3]
    dn = dh * (1.0 - z) * (1.0 - n * n)
    gates = (dn, dn * hn * r * (1.0 - r), dh * (h_before - n) * z * (1.0 - z), dn * r)
    return gates, dh * z, dc
