"""The backward loop over time: one kernel for every cell, team and dtype. Teams and names as in forward.py.

It walks the recurrence's steps from the last to the first. What reaches h_{t-1} from step t is the gates' gradients
times W_hh, for which the whole team's are needed, and what the cell passes by the gates. Both meet in `dh`, float32,
which belongs to the member that owns the unit. Without REGISTERS the product of step t is taken at the start of step
t-1, when the team has stored its part of dgates.
"""

# Triton knows neither unpacking nor a constant condition beside one that is none.
# ruff: noqa: RUF005, SIM102

import triton
import triton.language as tl

from fused_rnn.triton.exchange import arrive, wait
from fused_rnn.triton.forward import load_gates, to_float32
from fused_rnn.triton.product import all_asked_for, dot, rounded, rounded_after, total, zeros


@triton.jit
def load_w_bwd(w, g, n, k, H: tl.constexpr, BH: tl.constexpr, BK: tl.constexpr):
    """Gate g of W_hh from units k back to units n, as the right side of a product: [BK, BH]. w: [G, H, H]."""
    at = w + g * H * H + k[:, None] * H + n[None, :]
    if H % BH == 0 and H % BK == 0:
        return tl.load(at)
    return tl.load(at, mask=(n < H)[None, :] & (k < H)[:, None], other=0.0)


@triton.jit
def hold_bwd(w, n, G: tl.constexpr, H: tl.constexpr, BH: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr):
    """All of W_hh that units n need: a tuple over depth tiles, then gates."""
    held = ()
    for j in tl.static_range((H + BK - 1) // BK):
        for g in tl.static_range(G):
            tile = load_w_bwd(w, g, n, j * BK + tl.arange(0, BK), H, BH, BK)
            held = held + (rounded(tile, PRECISION),)
    return held


@triton.jit
def load_dgates(row, live, k0, G: tl.constexpr, H: tl.constexpr, BK: tl.constexpr):
    """Units k0 .. of the G recurrent gates' gradients, [BB, BK] each, from L2: see forward.product_held."""
    k = k0 + tl.arange(0, BK)
    mask = live[:, None] & (k < H)[None, :]
    d = ()
    for g in tl.static_range(G):
        d = d + (tl.load(row[:, None] + (g * H + k)[None, :], mask=mask, other=0.0, cache_modifier=".cg"),)
    return d


@triton.jit
def product_held(
    row, live, held, G: tl.constexpr, H: tl.constexpr, BB: tl.constexpr, BH: tl.constexpr, BK: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """dgates @ W_hh, W_hh resident. row: [BB] pointers to [G, H], live: [BB] where it reaches the step before."""
    acc = zeros(G, BB, BH)
    for j in tl.static_range((H + BK - 1) // BK):
        # Two at a time: all would fill the registers, and one ahead shares scoreboards with the one that is waited for.
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
def product_streamed(
    row, live, w, n, G: tl.constexpr, H: tl.constexpr, BB: tl.constexpr, BH: tl.constexpr, BK: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """dgates @ W_hh, both streamed in tiles of depth BK."""
    acc = zeros(G, BB, BH)
    for k0 in range(0, H, BK):
        d = load_dgates(row, live, k0, G, H, BK)
        sums = ()
        for g in tl.static_range(G):
            tile = rounded(load_w_bwd(w, g, n, k0 + tl.arange(0, BK), H, BH, BK), PRECISION)
            sums = sums + (dot(rounded(d[g], PRECISION), tile, acc[g], PRECISION),)
        acc = sums
    return total(acc, G)


@triton.jit
def place(step, step0, steps, batch, backwards, b, length, reset, HAS_RESET: tl.constexpr):
    """Of a step: its time, and by row whether it is run here, and whether gradient passes to the step before."""
    t = tl.where(backwards, steps - 1 - step, step)
    valid = (b * 0 + step >= step0) & (t < length)
    live = valid
    if HAS_RESET:
        live = valid & (tl.load(reset + t.to(tl.int64) * batch + b, mask=valid, other=0) == 0)
    return t, valid, live


@triton.jit
def load_step(
    step, t, valid, live, dy, states, first_state, saved, row, row_rb, own, n, t_base, width, length, window0,
    backwards,
    S: tl.constexpr, H: tl.constexpr, ALIGN: tl.constexpr, HAS_C: tl.constexpr, NEEDS_STATE: tl.constexpr,
    NEEDS_BEFORE: tl.constexpr, HAS_DY: tl.constexpr, HAS_LENGTHS: tl.constexpr,
):  # fmt: skip
    """Kept gates, dy, the state of the step and the one before; zeros for what is not needed."""
    here = own & valid[:, None]
    local = (t - t_base) * width
    kept = load_gates(saved + local * S, row, n, here, S, H)
    here_states = states + (local if HAS_C else t * width)
    at = row[:, None] * H + n[None, :]
    dy_t = tl.full(here.shape, 0.0, dy.dtype.element_ty)
    state = tl.full(here.shape, 0.0, states.dtype.element_ty)
    before = tl.full(here.shape, 0.0, states.dtype.element_ty)
    if HAS_DY:
        dy_t = tl.load(dy + t * width + at, mask=here, other=0.0)
    if NEEDS_STATE:
        state = tl.load(here_states + at, mask=here, other=0.0)
    if NEEDS_BEFORE:
        first = row * 0 + step == (window0 if HAS_C else 0)
        if HAS_LENGTHS:
            first = first | (t == tl.where(backwards, length - 1, -2))
        there = here_states + tl.where(backwards, width, -width)
        rows = tl.multiple_of(tl.where(first, first_state + row_rb * H, there + row * H), [ALIGN])
        before = tl.load(rows[:, None] + n[None, :], mask=own & live[:, None], other=0.0)
    return kept, dy_t, state, before


@triton.jit(
    do_not_specialize=[
        "steps", "batch", "recurrences", "tiles", "tile0", "step0", "step1", "window0", "window1", "close", "reversed_",
        "period",
    ]
)  # fmt: skip
def bwd_kernel(
    dy,  # [T, B, R, H]             HAS_DY only
    w,  # [R, G, H, H]
    states,  # [window, B, R, H] of a cell with c: c_t; else [T, B, R, H]: h_t
    first_state,  # [R, B, H]       what enters the first of these
    lengths,  # [B] int64           HAS_LENGTHS only
    reset,  # [T, B] int32          HAS_RESET only
    saved,  # [window, B, R, S, H]
    dgates,  # [T, B, R, DG, H]
    dh_state,  # [R, B, H] float32  in: gradient of h after the last step to run; out: before the first
    dc_state,  # [R, B, H] float32  likewise of c; HAS_C only
    counters,  # [R * tiles, 32] int32 COUNT only
    steps,  # T
    batch,  # B
    recurrences,  # R
    tiles,  # batch tiles in this launch, from tile0 on
    tile0,
    step0,  # run steps step1 - 1 .. step0, in the recurrence's own order, from the last to the first
    step1,
    window0,  # steps that saved (and states, of a cell with c) hold; all of time: 0, T
    window1,
    close,  # after step 0, take its product too, into dh_state: the gradient of h0
    reversed_,  # bit r % period: recurrence r runs backwards in time
    period,
    CELL: tl.constexpr,
    G: tl.constexpr,
    S: tl.constexpr,
    DG: tl.constexpr,  # gradients a step stores; the recurrent side's are the last G
    H: tl.constexpr,
    ALIGN: tl.constexpr,  # bytes that divide a row of H elements, 16 at most
    HAS_C: tl.constexpr,
    NEEDS_STATE: tl.constexpr,
    NEEDS_BEFORE: tl.constexpr,
    HAS_DY: tl.constexpr,
    HAS_LENGTHS: tl.constexpr,
    HAS_RESET: tl.constexpr,
    REGISTERS: tl.constexpr,
    HOLD: tl.constexpr,
    COUNT: tl.constexpr,
    LANES: tl.constexpr,
    AHEAD: tl.constexpr,
    TEAM: tl.constexpr,
    NT: tl.constexpr,
    BB: tl.constexpr,
    BH: tl.constexpr,
    BK: tl.constexpr,
    PRECISION: tl.constexpr,
    HOW: tl.constexpr,  # the activations: see pointwise.py
):
    pid = tl.program_id(0)
    member = pid % TEAM
    tile = tile0 + (pid // TEAM) % tiles
    r = pid // (TEAM * tiles)
    backwards = ((reversed_.to(tl.int64) >> (r % period).to(tl.int64)) & 1) != 0
    counter = counters + (r * tiles + tile - tile0) * 32
    b = tile * BB + tl.arange(0, BB)
    in_b = b < batch
    row_rb = r * batch + b  # into [R, B, ..]
    row = b * recurrences + r  # into one step's [B, R, ..]: offsets in a step take 32 bits, a step's place 64
    width = recurrences.to(tl.int64) * batch * H  # of a step, by gate
    w_r = w + r.to(tl.int64) * (G * H * H)
    length = tl.where(in_b, steps, 0)  # rows beyond the batch have none
    if HAS_LENGTHS:
        length = tl.load(lengths + b, mask=in_b, other=0).to(tl.int32)
    t_base = tl.where(backwards, steps - window1, window0)

    n = member * (NT * BH) + tl.arange(0, BH)
    own = in_b[:, None] & (n < H)[None, :]
    at_rb = row_rb[:, None] * H + n[None, :]
    dh = tl.full((BB, BH), 0.0, tl.float32)
    dc = tl.full((BB, BH), 0.0, tl.float32)
    if NT == 1:
        dh = tl.load(dh_state + at_rb, mask=own, other=0.0)
        if HAS_C:
            dc = tl.load(dc_state + at_rb, mask=own, other=0.0)
    if REGISTERS or HOLD:
        held = hold_bwd(w_r, n, G, H, BH, BK, PRECISION)

    if AHEAD:
        step = step1 - 1
        t, valid, live = place(step, step0, steps, batch, backwards, b, length, reset, HAS_RESET)
        kept_next, dy_next, state_next, before_next = load_step(
            step, t, valid, live, dy, states, first_state, saved, row, row_rb, own, n, t_base, width, length, window0,
            backwards, S, H, ALIGN, HAS_C, NEEDS_STATE, NEEDS_BEFORE, HAS_DY, HAS_LENGTHS,
        )  # fmt: skip

    # Iterations of a step: its NT tiles. A product alone closes the loop, at "step -1".
    for i in range((steps - step1) * NT, (steps - step0 + close) * NT):
        step = steps - 1 - i // NT
        t, valid, live = place(step, step0, steps, batch, backwards, b, length, reset, HAS_RESET)
        if NT != 1:
            n = member * (NT * BH) + (i % NT) * BH + tl.arange(0, BH)
            own = in_b[:, None] & (n < H)[None, :]
            at_rb = row_rb[:, None] * H + n[None, :]
            dh = tl.load(dh_state + at_rb, mask=own, other=0.0)
            if HAS_C:
                dc = tl.load(dc_state + at_rb, mask=own, other=0.0)

        if AHEAD:
            # What forward left is read one step early, so that memory's latency passes behind the wait and the product,
            # and brought into the product's layout before the wait, not after it.
            kept, dy_t, state, before = to_float32(kept_next, S), dy_next.to(tl.float32), state_next, before_next
            state, before = state.to(tl.float32), before.to(tl.float32)
            t_next, valid_next, live_next = place(
                step - 1, step0, steps, batch, backwards, b, length, reset, HAS_RESET
            )  # fmt: skip
            kept_next, dy_next, state_next, before_next = load_step(
                step - 1, t_next, valid_next, live_next, dy, states, first_state, saved, row, row_rb, own, n, t_base,
                width, length, window0, backwards, S, H, ALIGN, HAS_C, NEEDS_STATE, NEEDS_BEFORE, HAS_DY, HAS_LENGTHS,
            )  # fmt: skip

        if not REGISTERS:
            if step + 1 < steps:
                # The step that ran last here, t_later, and whether its gradient reaches this one: not past a reset.
                t_later = tl.where(backwards, t - 1, t + 1)
                reaches = t_later < length
                if HAS_RESET:
                    at_reset = reset + t_later.to(tl.int64) * batch + b
                    reaches = reaches & (tl.load(at_reset, mask=reaches, other=0) == 0)
                d_row = tl.multiple_of(dgates + t_later * (width * DG) + (row * (DG * H) + (DG - G) * H), [ALIGN])
                if COUNT:
                    if i % NT == 0:
                        wait(counter, TEAM * (steps - 1 - step))
                if HOLD:
                    dh += product_held(d_row, reaches, held, G, H, BB, BH, BK, PRECISION)
                else:
                    dh += product_streamed(d_row, reaches, w_r, n, G, H, BB, BH, BK, PRECISION)

        if not AHEAD:
            kept, dy_t, state, before = load_step(
                step, t, valid, live, dy, states, first_state, saved, row, row_rb, own, n, t_base, width, length,
                window0, backwards, S, H, ALIGN, HAS_C, NEEDS_STATE, NEEDS_BEFORE, HAS_DY, HAS_LENGTHS,
            )  # fmt: skip
        if HAS_DY:
            dh += dy_t.to(tl.float32)
        d_gates, d_by, dc_by = CELL(dh, dc, to_float32(kept, S), state.to(tl.float32), before.to(tl.float32), HOW)
        for g in tl.static_range(DG):
            at = row[:, None] * (DG * H) + (g * H + n)[None, :]
            d = tl.where(valid[:, None], d_gates[g], 0.0).to(dgates.dtype.element_ty)
            tl.store(dgates + t * (width * DG) + at, d, mask=own & (b * 0 + step >= step0)[:, None])
        if HAS_RESET:
            d_by = tl.where(live[:, None], d_by, 0.0)
            dc_by = tl.where(live[:, None], dc_by, 0.0)
        # Where the sequence is over, or has not begun, gradients pass unchanged.
        dh = tl.where(valid[:, None], d_by, dh)
        dc = tl.where(valid[:, None], dc_by, dc)
        if REGISTERS:
            sums = ()
            for g in tl.static_range(G):
                d = tl.where(live[:, None], d_gates[DG - G + g], 0.0).to(w.dtype.element_ty)
                sums = sums + (dot(rounded(d, PRECISION), held[g], tl.full((BB, BH), 0.0, tl.float32), PRECISION),)
            dh += total(sums, G)
        if NT != 1:
            tl.store(dh_state + at_rb, dh, mask=own)
            if HAS_C:
                tl.store(dc_state + at_rb, dc, mask=own)
        if COUNT:
            if i % NT == NT - 1:
                arrive(counter, LANES)
        elif TEAM == 1 and not REGISTERS:
            tl.debug_barrier()  # a team of one: what its threads stored is what its threads read next

    if NT == 1:
        tl.store(dh_state + at_rb, dh, mask=own)
        if HAS_C:
            tl.store(dc_state + at_rb, dc, mask=own)
