"""The forward loop over time: one kernel for every cell, team and dtype.

A program is one member of the team that runs one recurrence for one tile of the batch. Its place in the launch is
(recurrence, batch tile, member); a member owns NT tiles of BH hidden units. How h_{t-1} reaches the product with W_hh:
  REGISTERS  one program has all units: h and W_hh never leave it.
  HOLD       the member's rows of W_hh stay resident, h is read from y, where the team has just put it.
  neither    the rows of W_hh are streamed in BK-deep tiles as well.
  REPLAY     there is no product: acc comes ready-made from `given` (the gates of save="recompute" being made again).
  not RECURRENT  the cell has no W_hh, and no program needs another's units.
COUNT says that members run in one launch and wait for each other; without it a launch is one step, or one is alone.
"""

# Triton knows neither unpacking nor a constant condition beside one that is none.
# ruff: noqa: RUF005, SIM102

import triton
import triton.language as tl

from fused_rnn.triton.exchange import arrive, wait
from fused_rnn.triton.product import dot, rounded, zeros
from fused_rnn.triton.product_fwd import hold_fused, product_held
from fused_rnn.triton.tuples import load_each, load_gates, load_masks, load_vectors, store_each, to_float32, where_each

# Arguments for whose values no kernel is compiled, of both loops.
SIZES = ("steps", "batch", "recurrences", "tiles", "tile0", "step0", "step1", "window0", "window1", "every", "close")
SIZES += ("chunk", "reversed_", "period")


@triton.jit
def load_w_fwd(w, g, n, k, H: tl.constexpr):
    """Gate g of W_hh for units n and depth k, as the right side of a product: [BK, BH]. w: [G, H, H]."""
    at = w + g * H * H + n[None, :] * H + k[:, None]
    if H // n.shape[0] * n.shape[0] == H and H // k.shape[0] * k.shape[0] == H:
        return tl.load(at)
    return tl.load(at, mask=(n < H)[None, :] & (k < H)[:, None], other=0.0)


@triton.jit
def hold_fwd(w, n, G: tl.constexpr, H: tl.constexpr, PRECISION: tl.constexpr):
    """All of W_hh, whose units are n, by gates."""
    held = ()
    for g in tl.static_range(G):
        held = held + (rounded(load_w_fwd(w, g, n, n, H), PRECISION),)
    return held


@triton.jit
def product_streamed(row, live, w, n, G: tl.constexpr, H: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr):
    """h_{t-1} @ W_hh^T, both streamed in tiles of depth BK."""
    acc = zeros(G, row.shape[0], n.shape[0])
    for k0 in range(0, H, BK):
        k = k0 + tl.arange(0, BK)
        h = tl.load(row[:, None] + k[None, :], mask=live[:, None] & (k < H)[None, :], other=0.0, cache_modifier=".cg")
        h = rounded(h, PRECISION)
        sums = ()
        for g in tl.static_range(G):
            tile = rounded(load_w_fwd(w, g, n, k, H), PRECISION)
            sums = sums + (dot(h, tile, acc[g], PRECISION),)
        acc = sums
    return acc


@triton.jit(do_not_specialize=SIZES)
def fwd_kernel(
    gx,  # [window, B, R, G, H]     input product
    given,  # [window, B, R, G, H]  recurrent product, REPLAY only
    w,  # [R, G, H, H]
    bias,  # [R, APART, H]          of the recurrent side of the gates that are apart
    vectors,  # [R, NP, H]          the cell's numbers of each unit
    masks,  # a [R, 1 or T, B, H] each, or ()
    shared,  # STAGED only, else (): partials and operands of each team, for this step and the next; matrices: stages.py
    h0,  # [R, B, H]
    carried,  # a [R, B, H] float32 each, in at step0, out at step1: h if READS_H and not REPLAY, then all other states
    y,  # [T, B, R, H]
    h_n,  # [R, B, H]               written with the last step
    saved,  # [window, B, R, S, H]  SAVE only
    histories,  # a [window, B, R, H] for each state but h, or ()
    checkpoints,  # a [ceil(T / every), R, B, H] float32 for each state but h, entering step j * every   CHECKPOINT only
    lengths,  # [B] int64           HAS_LENGTHS only
    reset,  # [T, B] int32          HAS_RESET only; narrower would lead Triton to a slower layout of the products
    counters,  # [R * tiles, 32] int32 COUNT only
    steps,  # T
    batch,  # B
    recurrences,  # R
    tiles,  # batch tiles in this launch, from tile0 on
    tile0,
    window0,  # steps that gx, given, saved and histories hold; all of time: 0, T
    window1,
    step0,  # run steps step0 .. step1 - 1, in the recurrence's own order
    step1,
    every,  # steps between checkpoints
    chunk,  # CHUNKED only: steps of each of the chunks that run side by side, with a carried [chunks, R, B, H]
    reversed_,  # bit r % period: recurrence r runs backwards in time
    period,
    CELL: tl.constexpr,
    G: tl.constexpr,
    S: tl.constexpr,
    H: tl.constexpr,
    ALIGN: tl.constexpr,  # bytes that divide a row of H elements, 16 at most
    APART: tl.constexpr,
    NP: tl.constexpr,
    N: tl.constexpr,  # the blocks of the cell's own matrices
    OVER_TIME: tl.constexpr,  # for each mask whether it has T
    STAGED: tl.constexpr,
    HOW: tl.constexpr,  # of stages.py
    RECURRENT: tl.constexpr,
    READS_H: tl.constexpr,
    HAS_LENGTHS: tl.constexpr,
    HAS_RESET: tl.constexpr,
    SAVE: tl.constexpr,
    CHECKPOINT: tl.constexpr,
    REPLAY: tl.constexpr,
    CHUNKED: tl.constexpr,
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
    at_carried = at_rb
    closes = step1 == steps
    if CHUNKED:
        step0 = tl.program_id(1) * chunk
        step1 = tl.minimum(step0 + chunk, steps)
        at_carried = tl.program_id(1) * width + at_rb
        closes = step1 > step0
    zero = zeros(len(carried), BB, BH)
    s = zero
    apart = zeros(APART, 1, BH)
    p = zeros(NP, 1, BH)
    if NT == 1:
        s = load_each(carried, at_carried, own)
        apart = load_vectors(bias, r, n, APART, H)
        p = load_vectors(vectors, r, n, NP, H)
    if AHEAD:
        t = tl.where(backwards, steps - 1 - step0, step0)
        x_next = load_gates(gx + (t - t_base) * (width * G), row, n, own & (b * 0 + step0 < step1)[:, None], G, H)
    if REGISTERS:
        if RECURRENT:
            held = hold_fwd(w_r, n, G, H, PRECISION)
    elif HOLD:
        held = hold_fused(w_r, member * BH, G, H, BH, BK, PRECISION)
    if REGISTERS:
        h = tl.load(h0 + at_rb, mask=own, other=0.0)
    STAGES: tl.constexpr = HOW[10] if STAGED else 0
    STAGE: tl.constexpr = HOW[7] if STAGED else -1
    WHOLE: tl.constexpr = STAGE < 0 or STAGE == STAGES  # the launch comes to the end of a step
    SLOTS: tl.constexpr = HOW[11] if STAGED else 0
    OPERANDS: tl.constexpr = HOW[12] if STAGED else 0
    ARRIVALS: tl.constexpr = TEAM * (STAGES if REPLAY else STAGES + 1)  # of a team, each step
    if STAGED:
        pair = (r * tiles + tile - tile0).to(tl.int64) * 2
        matrices = shared[2] + r.to(tl.int64) * (N * H * H)
        blocks = ()
        if REGISTERS:
            blocks = hold_fwd(matrices, n, N, H, PRECISION)

    for i in range(step0 * NT, step1 * NT):
        step = i // NT
        t = tl.where(backwards, steps - 1 - step, step)
        local = (t - t_base) * width
        valid = t < length
        live = valid
        if HAS_RESET:
            live = valid & (tl.load(reset + t.to(tl.int64) * batch + b, mask=valid, other=0) == 0)

        if NT != 1:
            n = member * (NT * BH) + (i % NT) * BH + tl.arange(0, BH)
            own = in_b[:, None] & (n < H)[None, :]
            at_rb = row_rb[:, None] * H + n[None, :]
            s = load_each(carried, at_rb, own)
            apart = load_vectors(bias, r, n, APART, H)
            p = load_vectors(vectors, r, n, NP, H)
        if AHEAD:
            # One step ahead, so that memory's latency passes behind the wait and the product.
            x = x_next
            ahead = own & (b * 0 + step + 1 < step1)[:, None]
            t_next = tl.where(backwards, t - 1, t + 1)
            x_next = load_gates(gx + (t_next - t_base) * (width * G), row, n, ahead, G, H)
            x = to_float32(x)  # and brought into the product's layout before the wait, not after it
        else:
            x = load_gates(gx + local * G, row, n, own, G, H)

        if CHECKPOINT:
            if step % every == 0:
                store_each(checkpoints, (step // every) * width + at_rb, s, own)

        # The first step of a row enters with h0; the reverse direction of a short sequence starts at its own end.
        first = b * 0 + step == 0
        if HAS_LENGTHS:
            first = first | (t == tl.where(backwards, length - 1, -2))
        before = tl.where(backwards, t + 1, t - 1)
        h_row = tl.multiple_of(tl.where(first, h0 + row_rb * H, y + before * width + row * H), [ALIGN])

        if not RECURRENT:
            acc = ()
        elif REPLAY:
            acc = to_float32(load_gates(given + local * G, row, n, own, G, H))
        elif REGISTERS:
            acc = ()
            h_in = tl.where(live[:, None], h, tl.full(h.shape, 0.0, h.dtype)) if HAS_RESET else h
            h_in = rounded(h_in, PRECISION)
            for g in tl.static_range(G):
                acc = acc + (dot(h_in, held[g], tl.full((BB, BH), 0.0, tl.float32), PRECISION),)
        else:
            if COUNT:
                if i % NT == 0:
                    wait(counter, ARRIVALS * step)
            if HOLD:
                acc = product_held(h_row, live, held, G, H, PRECISION)
            else:
                acc = product_streamed(h_row, live, w_r, n, G, H, BK, PRECISION)

        entering = where_each(live, s, zero) if HAS_RESET else s
        if REPLAY and READS_H:
            h_in = tl.load(h_row[:, None] + n[None, :], mask=own & live[:, None], other=0.0)
            entering = (h_in.to(tl.float32),) + entering
        elif not READS_H:
            entering = zeros(1, BB, BH) + entering
        given_p = p + load_masks(masks, r, t, b, n, own & valid[:, None], steps, batch, OVER_TIME, H)
        if STAGED:
            turn = pair + step % 2
            partials, operands = shared[0] + turn * (SLOTS * TEAM * BB), shared[1] + turn * (OPERANDS * BB * H)
            team = (n, own, partials, operands, matrices, counter, ARRIVALS * (step - window0)) + blocks
            after, kept = CELL(to_float32(x), acc, apart, entering, given_p, team, HOW, ACTIVATION)
        else:
            after, kept = CELL(to_float32(x), acc, apart, entering, given_p, ACTIVATION)
        if not WHOLE:
            own = own & tl.full(own.shape, 0, tl.int1)  # nothing is there to be stored
        s_new = ()
        for j in tl.static_range(len(after) - len(s), len(after)):
            s_new = s_new + (after[j],)
        s = where_each(valid, s_new, s) if HAS_LENGTHS else s_new
        if NT != 1:
            store_each(carried, at_rb, s, own)
        if not REPLAY:
            out = tl.where(valid[:, None], after[0], 0.0).to(y.dtype.element_ty)
            tl.store(y + t * width + (row[:, None] * H + n[None, :]), out, mask=own)
            if COUNT:
                if i % NT == NT - 1:
                    if WHOLE:
                        arrive(counter, LANES)
            elif RECURRENT and TEAM == 1 and not REGISTERS:
                tl.debug_barrier()  # a team of one: what its threads stored is what its threads read next
        if REGISTERS:
            new = after[0].to(h.dtype)
            if H != BH:  # a formula may make a NaN of the zeros beyond H, which the product would spread
                new = tl.where(own, new, 0.0)
            h = tl.where(valid[:, None], new, h) if HAS_LENGTHS else new
        # After the arrival: the team need not wait for what only backward reads.
        if SAVE:
            for g in tl.static_range(S):
                at = row[:, None] * (S * H) + (g * H + n)[None, :]
                tl.store(saved + local * S + at, tl.where(valid[:, None], kept[g], 0.0), mask=own)
        ended = where_each(valid, s, zero) if HAS_LENGTHS else s
        store_each(histories, local + (row[:, None] * H + n[None, :]), ended, own)

    if NT == 1:
        store_each(carried, at_carried, s, own)
    if WHOLE and not REPLAY:
        if closes:
            if REGISTERS:
                tl.store(h_n + at_rb, h, mask=own)
            else:
                # The last valid row of y that this program itself wrote.
                tl.debug_barrier()
                last = tl.where(backwards, 0, length - 1)
                here = in_b
                if CHUNKED:  # of which one has a row's last step
                    end = tl.where(length == 0, steps, tl.where(backwards, steps, length))
                    here = in_b & (end > step0) & (end <= step1)
                h_row = tl.where(length > 0, y + last * width + row * H, h0 + row_rb * H)
                for j in range(NT):
                    n = member * (NT * BH) + j * BH + tl.arange(0, BH)
                    own = here[:, None] & (n < H)[None, :]
                    value = tl.load(h_row[:, None] + n[None, :], mask=own, other=0.0)
                    tl.store(h_n + row_rb[:, None] * H + n[None, :], value, mask=own)
