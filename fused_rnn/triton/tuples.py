"""Tuples of tiles: what a step has of each gate, and of each state."""

# Triton knows no unpacking.
# ruff: noqa: RUF005

import triton
import triton.language as tl


@triton.jit
def load_gates(base, row, n, mask, G: tl.constexpr, H: tl.constexpr):
    """G tiles [BB, BH] in their storage type. base: one step's [B, R, G, H]; row: [BB] index of the first two."""
    at = row[:, None] * (G * H) + n[None, :]
    gates = ()
    for g in tl.static_range(G):
        gates = gates + (tl.load(base + (at + g * H), mask=mask, other=0.0),)
    return gates


@triton.jit
def store_gates(base, row, n, gates, mask, G: tl.constexpr, H: tl.constexpr):
    """What load_gates loads."""
    at = row[:, None] * (G * H) + n[None, :]
    for g in tl.static_range(G):
        tl.store(base + (at + g * H), gates[g], mask=mask)


@triton.jit
def load_vectors(vectors, r, n, COUNT: tl.constexpr, H: tl.constexpr):
    """Of units n the numbers of recurrence r: [1, BH] each. vectors: [R, COUNT, H]."""
    numbers = ()
    for g in tl.static_range(COUNT):
        v = tl.load(vectors + (r * COUNT + g) * H + n, mask=n < H, other=0.0).to(tl.float32)
        numbers = numbers + (v[None, :],)
    return numbers


@triton.jit
def load_masks(masks, r, t, row, n, mask, steps, batch, OVER_TIME: tl.constexpr, H: tl.constexpr):
    """Numbers of recurrence r at time t: [BB, BH] each. masks: [R, 1 or T, B, H] each; row: [BB] index into B."""
    numbers = ()
    at = row[:, None] * H + n[None, :]
    for j in tl.static_range(len(masks)):
        place = r.to(tl.int64)
        if OVER_TIME[j]:
            place = place * steps + t
        numbers = numbers + (tl.load(masks[j] + place * batch * H + at, mask=mask, other=0.0).to(tl.float32),)
    return numbers


@triton.jit
def to_float32(tiles):
    wide = ()
    for j in tl.static_range(len(tiles)):
        wide = wide + (tiles[j].to(tl.float32),)
    return wide


@triton.jit
def load_each(pointers, at, mask):
    """A tile of each state: [BB, BH]."""
    states = ()
    for j in tl.static_range(len(pointers)):
        states = states + (tl.load(pointers[j] + at, mask=mask, other=0.0),)
    return states


@triton.jit
def store_each(pointers, at, states, mask):
    """The last of the states, as many as there are pointers."""
    for j in tl.static_range(len(pointers)):
        tl.store(pointers[j] + at, states[len(states) - len(pointers) + j], mask=mask)


@triton.jit
def where_each(rows, states, others):
    """Of the rows for which it holds the states, of the rest the others. rows: [BB]."""
    chosen = ()
    for j in tl.static_range(len(states)):
        chosen = chosen + (tl.where(rows[:, None], states[j], others[j]),)
    return chosen


@triton.jit
def add_to_first(states, more):
    """A tuple of tiles with `more` added to the first."""
    sums = (states[0] + more,)
    for j in tl.static_range(1, len(states)):
        sums = sums + (states[j],)
    return sums


@triton.jit
def add_to_rest(states, more):
    """A tuple of tiles with those of `more`, if there are any, added to all but the first."""
    sums = (states[0],)
    for j in tl.static_range(1, len(states)):
        if len(more) > 0:
            sums = sums + (states[j] + more[j - 1],)
        else:
            sums = sums + (states[j],)
    return sums


@triton.jit
def add_of_rows(sums, rows, more):
    """The sums, to which `more` is added in the rows for which it holds. rows: [BB]."""
    added = ()
    for j in tl.static_range(len(sums)):
        added = added + (sums[j] + tl.where(rows[:, None], more[j], 0.0),)
    return added
