"""The product of two tiles, with one detour for Triton's interpreter."""

# Triton knows no unpacking.
# ruff: noqa: RUF005

import triton
import triton.language as tl


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """acc + a @ b in float32; PRECISION as tl.dot's input_precision."""
    if PRECISION == "interpreter":
        # It would multiply the bit patterns of bfloat16. Products of 16-bit numbers are exact in float32.
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def zeros(G: tl.constexpr, BB: tl.constexpr, BH: tl.constexpr):
    """G accumulators [BB, BH]."""
    acc = ()
    for _ in tl.static_range(G):
        acc = acc + (tl.full((BB, BH), 0.0, tl.float32),)
    return acc


@triton.jit
def total(sums, G: tl.constexpr):
    out = sums[0]
    for g in tl.static_range(1, G):
        out += sums[g]
    return out
