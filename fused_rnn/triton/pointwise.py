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


@triton.jit
def expm1(x):
    """exp(x) - 1, relatively accurate near zero too."""
    # Below 1/2 the difference cancels: its series, of which the first term left out is 1e-8 of the sum.
    z = tl.where(tl.abs(x) < 0.5, x, 0.0)
    p = ((2.48015873e-5 * z + 1.98412698e-4) * z + 1.38888889e-3) * z + 8.33333333e-3
    p = (((p * z + 4.16666667e-2) * z + 1.66666667e-1) * z + 0.5) * z
    return tl.where(tl.abs(x) < 0.5, p * z + z, tl.exp(x) - 1.0)


@triton.jit
def log1p(x):
    """log(1 + x), relatively accurate near zero too."""
    # What 1 + x is rounded by is undone by a quotient (Kahan).
    u = 1.0 + x
    d = u - 1.0
    exact = (d == x) | (u == float("inf"))  # nothing to undo
    return tl.where(d == 0.0, x, tl.where(exact, tl.log(u), tl.log(u) * (x / d)))


@triton.jit
def softplus(x):
    """log(1 + exp(x))."""
    return tl.where(x > 0.0, x, 0.0) + log1p(tl.exp(-tl.abs(x)))


@triton.jit
def power(a, b):
    """a to the power b, as IEEE has it; in float64, for b magnifies the error of the logarithm."""
    a, b = a.to(tl.float64), b.to(tl.float64)
    size = tl.abs(a)
    whole = tl.floor(b) == b
    odd = whole & (tl.floor(0.5 * b) != 0.5 * b)
    r = tl.exp2(b * tl.log2(size))
    r = tl.where((b == 0.0) | (a == 1.0) | ((size == 1.0) & (tl.abs(b) == float("inf"))), 1.0, r)
    negative = (a < 0.0) | (1.0 / a < 0.0)  # -0 too
    r = tl.where(negative & odd, -r, r)
    return tl.where((a < 0.0) & (size != float("inf")) & (whole == 0), float("nan"), r).to(tl.float32)
