"""The product of two tiles, with one detour for Triton's interpreter, and what TF32 makes of its operands."""

# Triton knows no unpacking.
# ruff: noqa: RUF005

import triton
import triton.language as tl


@triton.jit
def rounded(x, PRECISION: tl.constexpr, MOVABLE: tl.constexpr = True):
    """An operand of `dot`: to the nearest TF32, where that is the precision. Triton does not, and tensor cores cut.

    Where it may, Triton moves this past the change of layout before a product, and that with it, to right behind the
    load: no load is then asked for before the last has come. So what is loaded ahead of its product is not MOVABLE.
    """
    # Two to three integer instructions. A thread rounds two of a streamed W_hh for each HMMA, in less time than the tile
    # takes to come from L2; a W_hh rounded once per call would be one more launch, and a copy.
    if PRECISION == "tf32":
        x = tl.inline_asm_elementwise(
            "cvt.rna.tf32.f32 $0, $1;", "=r,r", [x], dtype=tl.float32, is_pure=MOVABLE, pack=1
        )  # fmt: skip
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
