"""The product of two tiles, with one detour for Triton's interpreter, and what TF32 makes of its operands."""

# Triton knows no unpacking.
# ruff: noqa: RUF005

import triton
import triton.language as tl


@triton.jit
def rounded(x, PRECISION: tl.constexpr):
    """An operand of `dot`: to the nearest TF32, where that is the precision. Triton does not, and tensor cores cut."""
    # Two to three integer instructions. Of a streamed W_hh a thread rounds two for each HMMA, in less time than the
    # tile takes to come from L2; a W_hh rounded once per call would be one more launch, and a copy.
    if PRECISION == "tf32":
        x = tl.inline_asm_elementwise("cvt.rna.tf32.f32 $0, $1;", "=r,r", [x], dtype=tl.float32, is_pure=True, pack=1)
    return x


@triton.jit
def all_asked_for(PRECISION: tl.constexpr):
    """Zero, for `rounded_after`: from a barrier, which comes after the loads before it and has a result."""
    zero = 0
    if PRECISION == "tf32":
        barrier: tl.constexpr = "{.reg .pred p; setp.ne.u32 p, 0, 0; barrier.cta.red.popc.aligned.u32 $0, 0, p;}"
        zero = tl.inline_asm_elementwise(barrier, "=r", [], dtype=tl.int32, is_pure=False, pack=1)
    return zero


@triton.jit
def rounded_after(x, zero, PRECISION: tl.constexpr):
    """`rounded`, when all loads have been asked for.

    Left alone Triton moves a rounding to right behind its load, and ptxas moves it between the loads: those behind it
    are asked for when those before it have come.
    """
    if PRECISION == "tf32":
        after: tl.constexpr = "{.reg .b32 t; or.b32 t, $1, $2; cvt.rna.tf32.f32 $0, t;}"
        x = tl.inline_asm_elementwise(after, "=r,r,r", [x, zero], dtype=tl.float32, is_pure=False, pack=1)
    return x


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
