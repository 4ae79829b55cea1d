"""The forward loop's product where a member's rows of W_hh are resident."""

# Triton knows no unpacking.
# ruff: noqa: RUF005

import triton
import triton.language as tl

from fused_rnn.triton.product import all_asked_for, dot, rounded, rounded_after


@triton.jit
def hold_side_by_side(w, n0, g0, G: tl.constexpr, H: tl.constexpr, BH: tl.constexpr, k, PRECISION: tl.constexpr):
    """Gates g0 .. of W_hh, at most four, for units n0 .. and depth k: [BK, 1, 2 or 4 BH].

    Columns are (high bit of the gate, unit, low bit of the gate): `gates_of` then finds all of a unit in one thread. Of
    three gates a fourth is zero.
    """
    WIDTH: tl.constexpr = 4 if G > 2 else G
    LOW: tl.constexpr = 2 if G > 1 else 1
    q = tl.arange(0, WIDTH * BH)
    g, n = g0 + q // (LOW * BH) * LOW + q % LOW, n0 + q % (LOW * BH) // LOW
    at = w + (g * (H * H) + n * H)[None, :] + k[:, None]
    tile = tl.load(at, mask=((g < g0 + G) & (n < H))[None, :] & (k < H)[:, None], other=0.0)
    return rounded(tile, PRECISION)


@triton.jit
def hold_fused(w, n0, G: tl.constexpr, H: tl.constexpr, BH: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr):
    """All of W_hh that units n0 .. need, up to four gates side by side: a tuple over depth tiles, then fours."""
    held = ()
    for j in tl.static_range((H + BK - 1) // BK):
        k = j * BK + tl.arange(0, BK)
        for q in tl.static_range(G // 4):
            held = held + (hold_side_by_side(w, n0, 4 * q, 4, H, BH, k, PRECISION),)
        if G % 4 != 0:
            held = held + (hold_side_by_side(w, n0, G // 4 * 4, G % 4, H, BH, k, PRECISION),)
    return held


@triton.jit
def gates_of(acc, G: tl.constexpr):
    """The gates [BB, BH] of a product with what hold_side_by_side made: four for three."""
    if G == 1:
        gates = (acc,)
    elif G == 2:
        gates = tl.split(tl.reshape(acc, (acc.shape[0], acc.shape[1] // 2, 2)))
    else:
        low, high = tl.split(tl.permute(tl.reshape(acc, (acc.shape[0], 2, acc.shape[1] // 4, 2)), (0, 2, 1, 3)))
        a, c = tl.split(low)
        b, d = tl.split(high)
        gates = (a, b, c, d)
    return gates


@triton.jit
def product_held(row, live, held, G: tl.constexpr, H: tl.constexpr, PRECISION: tl.constexpr):
    """h_{t-1} @ W_hh^T, W_hh resident. row: [BB] pointers to h_{t-1}, live: [BB] where it is not zero.

    One product for four gates: one per gate would be a chain to Triton, whose warps then repeat each other's work.
    """
    BK: tl.constexpr = held[0].shape[0]
    FOURS: tl.constexpr = (G + 3) // 4
    h = ()
    # All of it is asked for before the first of it is used; of more than four gates not by Triton 3.6.
    for j in tl.static_range(len(held) // FOURS):
        k = j * BK + tl.arange(0, BK)
        # From L2: the line may have been read by this multiprocessor before another one wrote it.
        mask = live[:, None] & (k < H)[None, :]
        h = h + (tl.load(row[:, None] + k[None, :], mask=mask, other=0.0, cache_modifier=".cg"),)
    zero = all_asked_for(PRECISION)
    gates = ()
    for q in tl.static_range(FOURS):
        acc = tl.full((row.shape[0], held[q].shape[1]), 0.0, tl.float32)
        for j in tl.static_range(len(h)):
            acc = dot(rounded_after(h[j], zero, PRECISION), held[j * FOURS + q], acc, PRECISION)
        gates = gates + gates_of(acc, 4 if q < G // 4 else G % 4)
    return gates
