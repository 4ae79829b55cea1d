"""Activations of float32 tiles, in three qualities. ACTIVATION: tl.constexpr says which.

"float32"  as good as the type: relatively accurate near zero too
"half"     for results that are rounded to 16 bits: absolutely accurate to 1e-7
"mufu"     the same on NVIDIA, by its tanh instruction: accurate to 5e-4, a fifth of the instructions
"""

import triton
import triton.language as tl


@triton.jit
def mufu_tanh(x):
    return tl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=r,r", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def sigmoid(x, ACTIVATION: tl.constexpr):
    if ACTIVATION == "mufu":
        return 0.5 * mufu_tanh(0.5 * x) + 0.5
    if ACTIVATION == "half":
        return 1.0 / (1.0 + tl.exp(-x))
    e = tl.exp(-tl.abs(x))  # in (0, 1]: no overflow on either side
    return tl.where(x >= 0, 1.0, e) / (1.0 + e)


@triton.jit
def tanh(x, ACTIVATION: tl.constexpr):
    if ACTIVATION == "mufu":
        return mufu_tanh(x)
    if ACTIVATION == "half":
        return 2.0 / (1.0 + tl.exp(-2.0 * x)) - 1.0
    a = tl.abs(x)
    e = tl.exp(-2.0 * a)
    large = (1.0 - e) / (1.0 + e)
    # Below 0.625 the quotient cancels; an odd polynomial holds the relative error (Cephes' tanhf, Moshier).
    z = tl.minimum(a, 1.0) * tl.minimum(a, 1.0)
    p = (-5.70498872745e-3 * z + 2.06390887954e-2) * z - 5.37397155531e-2
    p = (p * z + 1.33314422036e-1) * z - 3.33332819422e-1
    small = p * z * a + a
    r = tl.where(a < 0.625, small, large)
    return tl.where(x < 0, -r, r)
