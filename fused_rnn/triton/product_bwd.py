"""The backward loop's product: gates' gradients times W_hh, which is resident or streamed."""

# Triton knows no unpacking.
# ruff: noqa: RUF005

import triton
import triton.language as tl

from fused_rnn.triton.product import all_asked_for, dot, rounded, rounded_after, total, zeros


@triton.jit
def load_w_bwd(w, g, n, k, H: tl.constexpr):
    """Gate g of W_hh from units k back to units n, as the right side of a product: [BK, BH]. w: [G, H, H]."""
    at = w + g * H * H + k[:, None] * H + n[None, :]
    if H // n.shape[0] * n.shape[0] == H and H // k.shape[0] * k.shape[0] == H:
        return tl.load(at)
    return tl.load(at, mask=(n < H)[None, :] & (k < H)[:, None], other=0.0)


@triton.jit
def hold_bwd(w, n, G: tl.constexpr, H: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr):
    """All of W_hh that units n need: a tuple over depth tiles, then gates."""
    held = ()
    for j in tl.static_range((H + BK - 1) // BK):
        for g in tl.static_range(G):
            tile = load_w_bwd(w, g, n, j * BK + tl.arange(0, BK), H)
            held = held + (rounded(tile, PRECISION),)
    return held


@triton.jit
def load_dgates(row, live, k0, G: tl.constexpr, H: tl.constexpr, BK: tl.constexpr):
    """Units k0 .. of the G recurrent gates' gradients, [BB, BK] each, from L2: see product_fwd.product_held."""
    k = k0 + tl.arange(0, BK)
    mask = live[:, None] & (k < H)[None, :]
    d = ()
    for g in tl.static_range(G):
        d = d + (tl.load(row[:, None] + (g * H + k)[None, :], mask=mask, other=0.0, cache_modifier=".cg"),)
    return d


@triton.jit
def product_held(row, live, held, G: tl.constexpr, H: tl.constexpr, PRECISION: tl.constexpr):
    """dgates @ W_hh, W_hh resident. row: [BB] pointers to [G, H], live: [BB] where it reaches the step before."""
    BK: tl.constexpr = held[0].shape[0]
    acc = zeros(G, row.shape[0], held[0].shape[1])
    for j in tl.static_range(len(held) // G):
        # Two at a time, and the deepest tiles have no more: more would fill the registers, and one ahead shares
        # scoreboards with the one that is waited for.
        if j % 2 == 0:
            d = load_dgates(row, live, j * BK, G, H, BK)
            if (j + 1) * BK < H:
                d = d + load_dgates(row, live, (j + 1) * BK, G, H, BK)
            zero = all_asked_for(PRECISION)
        # A sum per gate: G short chains of products instead of a long one.
        sums = ()
        for g in tl.static_range(G):
            sums = sums + (dot(rounded_after(d[j % 2 * G + g], zero, PRECISION), held[j * G + g], acc[g], PRECISION),)
        acc = sums
    return total(acc, G)


@triton.jit
def product_streamed(row, live, w, n, G: tl.constexpr, H: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr):
    """dgates @ W_hh, both streamed in tiles of depth BK."""
    acc = zeros(G, row.shape[0], n.shape[0])
    for k0 in range(0, H, BK):
        d = load_dgates(row, live, k0, G, H, BK)
        sums = ()
        for g in tl.static_range(G):
            tile = rounded(load_w_bwd(w, g, n, k0 + tl.arange(0, BK), H), PRECISION)
            sums = sums + (dot(rounded(d[g], PRECISION), tile, acc[g], PRECISION),)
        acc = sums
    return total(acc, G)
