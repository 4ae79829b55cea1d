"""Chunks of time side by side, of cells that are linear in their states (flex/scan.py): what each makes of no state,
and by what it multiplies the one that enters; then what enters each. The loops themselves run them, once that is known.

A program has a recurrence, a batch tile, a tile of units and a chunk: its places in the launch are those of the loops,
the chunk is the second. Where a reset cuts a chunk off from the one before, its factor is NaN: nothing else makes a
NaN of a factor without making one of the rest.
"""

# Triton knows no unpacking.
# ruff: noqa: RUF005

import triton
import triton.language as tl

from fused_rnn.triton.backward import load_step, place
from fused_rnn.triton.forward import SIZES
from fused_rnn.triton.product import zeros
from fused_rnn.triton.tuples import (
    add_to_first,
    add_to_rest,
    load_each,
    load_gates,
    load_vectors,
    store_each,
    to_float32,
    where_each,
)


@triton.jit
def ones(COUNT: tl.constexpr, BB: tl.constexpr, BH: tl.constexpr):
    tiles = ()
    for _ in tl.static_range(COUNT):
        tiles = tiles + (tl.full((BB, BH), 1.0, tl.float32),)
    return tiles


@triton.jit
def apply(factors, rests, states, FORGETS: tl.constexpr):
    """factor * state + rest, of each state. FORGETS: of each whether the factor is known to be zero."""
    made = ()
    for j in tl.static_range(len(states)):
        if FORGETS[j]:
            made = made + (rests[j],)
        else:
            made = made + (factors[j] * states[j] + rests[j],)
    return made


@triton.jit
def follow(factors, products, live):
    """The products of factors, with those of a step that lets nothing through where it is not live."""
    made = ()
    for j in tl.static_range(len(products)):
        made = made + (tl.where(live[:, None], factors[j] * products[j], float("nan")),)
    return made


@triton.jit(do_not_specialize=SIZES)
def scan_fwd_kernel(
    gx,  # [T, B, R, G, H]
    vectors,  # [R, NP, H]
    sums,  # a [chunks, R, B, H] float32 for each state that is handed on: what a chunk makes of zero
    products,  # such for the products of its factors
    lengths,
    reset,
    counters,
    steps,
    batch,
    recurrences,
    tiles,
    tile0,
    window0,
    window1,
    step0,
    step1,
    every,
    chunk,  # steps of a chunk
    reversed_,
    period,
    SCAN: tl.constexpr,
    FORGETS: tl.constexpr,  # of `apply`
    G: tl.constexpr,
    H: tl.constexpr,
    NP: tl.constexpr,
    HAS_LENGTHS: tl.constexpr,
    HAS_RESET: tl.constexpr,
    TEAM: tl.constexpr,
    BB: tl.constexpr,
    BH: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    """All chunks but the last."""
    pid = tl.program_id(0)
    c = tl.program_id(1)
    tile = tile0 + (pid // TEAM) % tiles
    r = pid // (TEAM * tiles)
    backwards = ((reversed_.to(tl.int64) >> (r % period).to(tl.int64)) & 1) != 0
    b = tile * BB + tl.arange(0, BB)
    in_b = b < batch
    row = b * recurrences + r
    width = recurrences.to(tl.int64) * batch * H
    length = tl.where(in_b, steps, 0)
    if HAS_LENGTHS:
        length = tl.load(lengths + b, mask=in_b, other=0).to(tl.int32)
    n = pid % TEAM * BH + tl.arange(0, BH)
    own = in_b[:, None] & (n < H)[None, :]
    at = c * width + ((r * batch + b)[:, None] * H + n[None, :])
    zero = zeros(len(sums), BB, BH)
    s = zero
    f = ones(len(sums), BB, BH)
    p = load_vectors(vectors, r, n, NP, H)
    for step in range(c * chunk, (c + 1) * chunk):
        t = tl.where(backwards, steps - 1 - step, step)
        valid = t < length
        live = valid
        if HAS_RESET:
            live = valid & (tl.load(reset + t.to(tl.int64) * batch + b, mask=valid, other=0) == 0)
        x = load_gates(gx + t * (width * G), row, n, own, G, H)
        factors, rests = SCAN(to_float32(x), p, ACTIVATION)
        entering = where_each(live, s, zero) if HAS_RESET else s
        s_new = apply(factors, rests, entering, FORGETS)
        f_new = follow(factors, f, live)
        s = where_each(valid, s_new, s) if HAS_LENGTHS else s_new
        f = where_each(valid, f_new, f) if HAS_LENGTHS else f_new
    store_each(sums, at, s, own)
    store_each(products, at, f, own)


@triton.jit(do_not_specialize=SIZES)
def scan_bwd_kernel(
    dy,  # from here on as bwd_kernel's
    dsequences,
    vectors,
    states,
    first,
    saved,
    entering,  # [chunks, R, B, H] float32: the gradient of h that enters a chunk, where no step hands it on
    sums,  # as scan_fwd_kernel's, of the states' gradients
    products,
    lengths,
    reset,
    counters,
    steps,
    batch,
    recurrences,
    tiles,
    tile0,
    window0,
    window1,
    step0,
    step1,
    close,
    chunk,
    reversed_,
    period,
    SCAN: tl.constexpr,
    FORGETS: tl.constexpr,
    S: tl.constexpr,
    NP: tl.constexpr,
    READS_H: tl.constexpr,
    H: tl.constexpr,
    ALIGN: tl.constexpr,
    AFTER: tl.constexpr,
    BEFORE: tl.constexpr,
    HAS_DY: tl.constexpr,
    HAS_LENGTHS: tl.constexpr,
    HAS_RESET: tl.constexpr,
    TEAM: tl.constexpr,
    BB: tl.constexpr,
    BH: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    """All chunks but the first."""
    pid = tl.program_id(0)
    c = tl.program_id(1) + 1
    tile = tile0 + (pid // TEAM) % tiles
    r = pid // (TEAM * tiles)
    backwards = ((reversed_.to(tl.int64) >> (r % period).to(tl.int64)) & 1) != 0
    b = tile * BB + tl.arange(0, BB)
    in_b = b < batch
    row_rb = r * batch + b
    row = b * recurrences + r
    width = recurrences.to(tl.int64) * batch * H
    length = tl.where(in_b, steps, 0)
    if HAS_LENGTHS:
        length = tl.load(lengths + b, mask=in_b, other=0).to(tl.int32)
    t_base = tl.where(backwards, steps - window1, window0)
    n = pid % TEAM * BH + tl.arange(0, BH)
    own = in_b[:, None] & (n < H)[None, :]
    at = c * width + (row_rb[:, None] * H + n[None, :])
    ST: tl.constexpr = len(states)
    zero = zeros(ST, BB, BH)
    ds = zero
    f = ones(ST, BB, BH)
    if not READS_H:
        ds = add_to_first(ds, tl.load(entering + at, mask=own, other=0.0))
    p = load_vectors(vectors, r, n, NP, H)
    window = (window0, t_base, width, backwards, length)
    forward = (dy, dsequences, states, first, saved)
    units = (row, row_rb, n, own, H)
    begin = c * chunk
    end = tl.minimum(begin + chunk, steps)
    for i in range(steps - end, steps - begin):
        now = place(steps - 1 - i, begin, steps, batch, backwards, b, length, reset, HAS_RESET)
        _, _, valid, live = now
        kept, dy_t, more, after, before = load_step(
            now, units, window, forward, S, ALIGN, AFTER, BEFORE, HAS_DY, HAS_LENGTHS
        )
        if HAS_DY:
            ds = add_to_first(ds, dy_t.to(tl.float32))
        ds = add_to_rest(ds, to_float32(more))
        factors, rests = SCAN(ds, to_float32(kept), to_float32(after), to_float32(before), p, ACTIVATION)
        ds_before = apply(factors, rests, ds, FORGETS)
        if HAS_RESET:
            ds_before = where_each(live, ds_before, zero)
        ds = where_each(valid, ds_before, ds)
        f = where_each(valid, follow(factors, f, live), f)
    store_each(sums, at, ds, own)
    store_each(products, at, f, own)


@triton.jit(do_not_specialize=("size", "chunks"))
def join_kernel(
    sums, products, initial, size, chunks, FORGETS: tl.constexpr, BACKWARD: tl.constexpr, BLOCK: tl.constexpr
):
    """What enters each chunk, in the place of `sums`; initial: [R, B, H] each, what enters the first that runs."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    s = load_each(initial, at, inside)
    for i in range(chunks):
        c = chunks - 1 - i if BACKWARD else i
        here = c.to(tl.int64) * size + at
        mask = inside & (at * 0 + i < chunks - 1)  # the last one leads to no other
        rests = load_each(sums, here, mask)
        factors = load_each(products, here, mask)
        store_each(sums, here, s, inside)
        made = ()
        for j in tl.static_range(len(s)):
            # Nothing of a zero, whatever the factors have grown to; and nothing past a reset.
            alone = (factors[j] != factors[j]) | (s[j] == 0.0)
            if FORGETS[j]:  # and of infinity nothing, of a chunk that has a step
                alone = alone | (factors[j] == 0.0)
            made = made + (tl.where(alone, rests[j], factors[j] * s[j] + rests[j]),)
        s = made
