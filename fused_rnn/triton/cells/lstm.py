"""Long short-term memory, gate order i, f, g, o.

Source: Hochreiter & Schmidhuber 1997, forget gate of Gers et al. 2000; gates as in torch.nn.LSTM.
"""

import triton
import triton.language as tl

from fused_rnn.triton.pointwise import sigmoid, tanh


@triton.jit
def fwd(x, h, bias, c, HOW: tl.constexpr):
    """Gates' input side x and recurrent side h, tuples of 4; the old c. Returns h', c' and what backward wants kept."""
    i = sigmoid(x[0] + h[0], HOW)
    f = sigmoid(x[1] + h[1], HOW)
    g = tanh(x[2] + h[2], HOW)
    o = sigmoid(x[3] + h[3], HOW)
    c = f * c + i * g
    return o * tanh(c, HOW), c, (i, f, g, o)


@triton.jit
def bwd(dh, dc, kept, c, c_before, HOW: tl.constexpr):
    """Returns the gates' gradients, what of dh passes by the gates to the step before, and dc for it."""
    i, f, g, o = kept[0], kept[1], kept[2], kept[3]
    t = tanh(c, HOW)
    dc += dh * o * (1.0 - t * t)
    gates = (dc * g * i * (1.0 - i), dc * c_before * f * (1.0 - f), dc * i * (1.0 - g * g), dh * t * o * (1.0 - o))
    return gates, tl.full(dh.shape, 0.0, dh.dtype), dc * f
