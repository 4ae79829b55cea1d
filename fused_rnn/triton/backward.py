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
from fused_rnn.triton.forward import SIZES
from fused_rnn.triton.product import dot, rounded, total, zeros
from fused_rnn.triton.product_bwd import hold_bwd, product_held, product_streamed
from fused_rnn.triton.tuples import (
    add_of_rows,
    add_to_first,
    add_to_rest,
    load_each,
    load_gates,
    load_masks,
    load_vectors,
    store_each,
    store_gates,
    to_float32,
    where_each,
)


@triton.jit
def place(step, step0, steps, batch, backwards, b, length, reset, HAS_RESET: tl.constexpr):
    """A step, its time, and by row whether it is run here, and whether gradient passes to the step before."""
    t = tl.where(backwards, steps - 1 - step, step)
    valid = (b * 0 + step >= step0) & (t < length)
    live = valid
    if HAS_RESET:
        live = valid & (tl.load(reset + t.to(tl.int64) * batch + b, mask=valid, other=0) == 0)
    return step, t, valid, live


@triton.jit
def load_step(
    now,
    units,
    window,
    kept,
    S: tl.constexpr,
    ALIGN: tl.constexpr,
    AFTER: tl.constexpr,
    BEFORE: tl.constexpr,
    HAS_DY: tl.constexpr,
    HAS_LENGTHS: tl.constexpr,
):
    """Kept gates, dy, the other sequences' gradients, the states after the step and those before; zeros for what is not
    needed.

    now: from `place`.  units: (row, row_rb, n, own, H).  window: (its first step, t_base, width, backwards, length).
    kept: the pointers (dy, dsequences, states, first, saved).
    """
    step, t, valid, live = now
    row, row_rb, n, own, H = units
    window0, t_base, width, backwards, length = window
    dy, dsequences, states, first, saved = kept
    here = own & valid[:, None]
    local = (t - t_base) * width
    gates = load_gates(saved + local * S, row, n, here, S, H)
    at = row[:, None] * H + n[None, :]
    dy_t = tl.full(here.shape, 0.0, dy.dtype.element_ty)
    if HAS_DY:
        dy_t = tl.load(dy + t * width + at, mask=here, other=0.0)
    more = load_each(dsequences, t * width + at, here)
    after = ()
    before = ()
    for j in tl.static_range(len(states)):
        # h is there for all of time, other states for the window.
        state = states[j] + (t * width if j == 0 else local)
        value = tl.full(here.shape, 0.0, states[j].dtype.element_ty)
        entering = value
        if AFTER[j]:
            value = tl.load(state + at, mask=here, other=0.0)
        if BEFORE[j]:
            begins = row * 0 + step == (0 if j == 0 else window0)
            if HAS_LENGTHS:
                begins = begins | (t == tl.where(backwards, length - 1, -2))
            there = state + tl.where(backwards, width, -width)
            rows = tl.multiple_of(tl.where(begins, first[j] + row_rb * H, there + row * H), [ALIGN])
            entering = tl.load(rows[:, None] + n[None, :], mask=own & live[:, None], other=0.0)
        after = after + (value,)
        before = before + (entering,)
    return gates, dy_t, more, after, before


@triton.jit(do_not_specialize=SIZES)
def bwd_kernel(
    dy,  # [T, B, R, H]             HAS_DY only
    dsequences,  # a [T, B, R, H] for each state but h, or ()
    w,  # [R, G, H, H]
    vectors,  # [R, NP, H]
    masks,  # these and what a STAGED cell has shared: as in forward.py
    shared,
    states,  # h [T, B, R, H], then a [window, B, R, H] for each other state
    first,  # a [R, B, H] for each state: what enters the first of these
    saved,  # [window, B, R, S, H]
    dgates,  # [T, B, R, APART + G + N, H]: of the input side of gates that are apart, of all gates' recurrent side, of
    # the products with the cell's own matrices
    dstates,  # a [R, B, H] float32 for each state. in: its gradient after the last step to run; out: before the first
    dparams,  # [R, B, DP, H] float32   in and out
    lengths,  # [B] int64           HAS_LENGTHS only
    reset,  # [T, B] int32          HAS_RESET only
    counters,  # [R * tiles, 32] int32 COUNT only
    steps,  # T
    batch,  # B
    recurrences,  # R
    tiles,  # batch tiles in this launch, from tile0 on
    tile0,
    window0,  # steps that saved, and states but h, hold; all of time: 0, T
    window1,
    step0,  # run steps step1 - 1 .. step0, in the recurrence's own order, from the last to the first
    step1,
    close,  # after step 0, take its product too, into dstates: the gradient of h0
    chunk,  # CHUNKED only: steps of each of the chunks that run side by side, with dstates and dparams [chunks, ..]
    reversed_,  # bit r % period: recurrence r runs backwards in time
    period,
    CELL: tl.constexpr,
    G: tl.constexpr,
    S: tl.constexpr,
    APART: tl.constexpr,
    NP: tl.constexpr,
    DP: tl.constexpr,  # NP where the params' gradients are wanted, else 0
    KEEP: tl.constexpr,  # from step to step they stay in registers
    N: tl.constexpr,
    OVER_TIME: tl.constexpr,
    STAGED: tl.constexpr,
    HOW: tl.constexpr,
    RECURRENT: tl.constexpr,
    H: tl.constexpr,
    ALIGN: tl.constexpr,  # bytes that divide a row of H elements, 16 at most
    AFTER: tl.constexpr,  # for each state whether the cell reads it as the step leaves it
    BEFORE: tl.constexpr,  # and as it enters the step
    HAS_DY: tl.constexpr,
    CHUNKED: tl.constexpr,
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
    ACTIVATION: tl.constexpr,  # see pointwise.py
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
    if CHUNKED:
        step0 = tl.program_id(1) * chunk
        step1 = tl.minimum(step0 + chunk, steps)
        at_rb = tl.program_id(1) * width + at_rb
        dparams = dparams + tl.program_id(1) * (width * DP)
    DG: tl.constexpr = APART + G + N
    ds = zeros(len(dstates), BB, BH)
    p = zeros(NP, 1, BH)
    dp = zeros(DP, BB, BH)
    if NT == 1:
        ds = load_each(dstates, at_rb, own)
        p = load_vectors(vectors, r, n, NP, H)
        if KEEP:
            dp = load_gates(dparams, row_rb, n, own, DP, H)
    if REGISTERS or HOLD:
        if RECURRENT:
            held = hold_bwd(w_r, n, G, H, BK, PRECISION)
    STAGES: tl.constexpr = HOW[10] if STAGED else 0
    STAGE: tl.constexpr = HOW[7] if STAGED else -1
    WHOLE: tl.constexpr = STAGE < 0 or STAGE == STAGES  # the launch comes to the end of a step
    SLOTS: tl.constexpr = HOW[11] if STAGED else 0
    OPERANDS: tl.constexpr = HOW[12] if STAGED else 0
    ARRIVALS: tl.constexpr = TEAM * (STAGES + 1)  # of a team, each step
    if STAGED:
        pair = (r * tiles + tile - tile0).to(tl.int64) * 2
        matrices = shared[2] + r.to(tl.int64) * (N * H * H)
        blocks = ()
        if REGISTERS:
            blocks = hold_bwd(matrices, n, N, H, BK, PRECISION)

    window = (window0, t_base, width, backwards, length)
    forward = (dy, dsequences, states, first, saved)  # what it left, and what comes of it
    if AHEAD:
        now = place(step1 - 1, step0, steps, batch, backwards, b, length, reset, HAS_RESET)
        units = (row, row_rb, n, own, H)
        next_ = load_step(now, units, window, forward, S, ALIGN, AFTER, BEFORE, HAS_DY, HAS_LENGTHS)

    # Iterations of a step: its NT tiles. A product alone closes the loop, at "step -1".
    for i in range((steps - step1) * NT, (steps - step0 + close) * NT):
        step = steps - 1 - i // NT
        now = place(step, step0, steps, batch, backwards, b, length, reset, HAS_RESET)
        _, t, valid, live = now
        if NT != 1:
            n = member * (NT * BH) + (i % NT) * BH + tl.arange(0, BH)
            own = in_b[:, None] & (n < H)[None, :]
            at_rb = row_rb[:, None] * H + n[None, :]
            ds = load_each(dstates, at_rb, own)
            p = load_vectors(vectors, r, n, NP, H)
            dp = load_gates(dparams, row_rb, n, own, DP, H)
        units = (row, row_rb, n, own, H)

        if AHEAD:
            # What forward left is read one step early, so that memory's latency passes behind the wait and the product,
            # and brought into the product's layout before the wait, not after it.
            kept, dy_t, more, after, before = next_
            kept, dy_t, more = to_float32(kept), dy_t.to(tl.float32), to_float32(more)
            after, before = to_float32(after), to_float32(before)
            later = place(step - 1, step0, steps, batch, backwards, b, length, reset, HAS_RESET)
            next_ = load_step(later, units, window, forward, S, ALIGN, AFTER, BEFORE, HAS_DY, HAS_LENGTHS)

        if RECURRENT and not REGISTERS:
            if step + 1 < steps:
                # The step that ran last here, t_later, and whether its gradient reaches this one: not past a reset.
                t_later = tl.where(backwards, t - 1, t + 1)
                reaches = t_later < length
                if HAS_RESET:
                    at_reset = reset + t_later.to(tl.int64) * batch + b
                    reaches = reaches & (tl.load(at_reset, mask=reaches, other=0) == 0)
                d_row = tl.multiple_of(dgates + t_later * (width * DG) + (row * (DG * H) + APART * H), [ALIGN])
                if COUNT:
                    if i % NT == 0:
                        wait(counter, ARRIVALS * (steps - 1 - step))
                if HOLD:
                    dh = product_held(d_row, reaches, held, G, H, PRECISION)
                else:
                    dh = product_streamed(d_row, reaches, w_r, n, G, H, BK, PRECISION)
                ds = add_to_first(ds, dh)

        if not AHEAD:
            kept, dy_t, more, after, before = load_step(
                now, units, window, forward, S, ALIGN, AFTER, BEFORE, HAS_DY, HAS_LENGTHS
            )
            kept, more, after, before = to_float32(kept), to_float32(more), to_float32(after), to_float32(before)
        if HAS_DY:
            ds = add_to_first(ds, dy_t.to(tl.float32))
        ds = add_to_rest(ds, more)
        given_p = p + load_masks(masks, r, t, b, n, own & valid[:, None], steps, batch, OVER_TIME, H)
        if STAGED:
            gone = steps - 1 - step
            turn = pair + gone % 2
            partials, operands = shared[0] + turn * (SLOTS * TEAM * BB), shared[1] + turn * (OPERANDS * BB * H)
            team = (n, own, partials, operands, matrices, counter, ARRIVALS * gone) + blocks
            d_gates, ds_before, d_params = CELL(ds, kept, after, before, given_p, team, HOW, ACTIVATION)
        else:
            d_gates, ds_before, d_params = CELL(ds, kept, after, before, given_p, ACTIVATION)
        if not WHOLE:
            own = own & tl.full(own.shape, 0, tl.int1)  # nothing is there to be stored
        if KEEP:
            dp = add_of_rows(dp, valid, d_params)
        else:
            tl.debug_barrier()  # another thread may have stored them
            so_far = load_gates(dparams, row_rb, n, own, DP, H)
            store_gates(dparams, row_rb, n, add_of_rows(so_far, valid, d_params), own, DP, H)
        for g in tl.static_range(DG):
            at = row[:, None] * (DG * H) + (g * H + n)[None, :]
            d = tl.where(valid[:, None], d_gates[g], 0.0).to(dgates.dtype.element_ty)
            tl.store(dgates + t * (width * DG) + at, d, mask=own & (b * 0 + step >= step0)[:, None])
        if HAS_RESET:
            ds_before = where_each(live, ds_before, zeros(len(ds), BB, BH))
        # Where the sequence is over, or has not begun, gradients pass unchanged.
        ds = where_each(valid, ds_before, ds)
        if REGISTERS and RECURRENT:
            sums = ()
            for g in tl.static_range(G):
                d = tl.where(live[:, None], d_gates[APART + g], 0.0).to(w.dtype.element_ty)
                if H != BH:  # see forward
                    d = tl.where(own, d, 0.0)
                sums = sums + (dot(rounded(d, PRECISION), held[g], tl.full((BB, BH), 0.0, tl.float32), PRECISION),)
            ds = add_to_first(ds, total(sums, G))
        if NT != 1:
            store_each(dstates, at_rb, ds, own)
            store_gates(dparams, row_rb, n, dp, own, DP, H)
        if COUNT:
            if i % NT == NT - 1:
                if WHOLE:
                    arrive(counter, LANES)
        elif RECURRENT and TEAM == 1 and not REGISTERS:
            tl.debug_barrier()  # a team of one: what its threads stored is what its threads read next

    if NT == 1:
        store_each(dstates, at_rb, ds, own)
        if KEEP:
            store_gates(dparams, row_rb, n, dp, own, DP, H)
