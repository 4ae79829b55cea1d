"""Activations in float32: relatively accurate near zero, and free of overflow (of warnings, in the interpreter)."""

import triton
import triton.language as tl


@triton.jit
def sigmoid(x):
    e = tl.exp(-tl.abs(x))  # in (0, 1]: no overflow on either side
    return tl.where(x >= 0, 1.0, e) / (1.0 + e)


@triton.jit
def tanh(x):
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
