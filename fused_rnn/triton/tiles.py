"""The tiles of a program: the shipped tables, and which of a table's tiles a shape takes on an architecture."""

from __future__ import annotations

from dataclasses import replace

from fused_rnn.cells.program import is_program
from fused_rnn.triton.schedule import CROWDED, Shape, Tile
from fused_rnn.triton.target import KIB, Target

# Chosen by what compiles into an architecture's shared memory (Triton 3.6 and 3.9): without spills worth a
# retry, with few products a warp, and with loads of h or dgates that do not wait for each other. Not by time, for want
# of a GPU: measured schedules go into the table of measured.py. Of several tiles the first that fits is taken.
HOLD = {
    "half": (Tile(16, 32, 128, 4), Tile(16, 16, 256, 4)),
    "tf32": (Tile(16, 32, 128, 4), Tile(16, 16, 128, 4)),
    "ieee": (),  # without tensor cores the operands of a resident product fill the registers
}
HOLD_BACKWARD = {
    "half": (Tile(16, 32, 128, 8), Tile(16, 16, 128, 8)),
    "tf32": (Tile(16, 32, 128, 8, ahead=False), Tile(16, 16, 64, 8, ahead=False), Tile(16, 16, 32, 4, ahead=False)),
    "ieee": (),
}
HOLD_LARGE = {
    "half": (Tile(32, 64, 128, 8), Tile(32, 32, 128, 8), Tile(32, 16, 1024, 8)),
    "tf32": (),
    "ieee": (),
}
HOLD_LARGE_BACKWARD = {**HOLD_LARGE, "half": (Tile(32, 64, 128, 8), Tile(32, 16, 128, 8))}
STREAM = {"half": Tile(16, 32, 64, 4, 3), "tf32": Tile(16, 32, 32, 4, 3), "ieee": Tile(16, 32, 32, 8, 3, ahead=False)}
STREAM_LARGE = {
    "half": Tile(64, 32, 32, 8, 2, ahead=False),
    "tf32": Tile(32, 64, 32, 8, 2, ahead=False),
    "ieee": Tile(32, 32, 32, 8, 2, ahead=False),
}
# LSTM's backward has the most to hold in registers. A product of all four gates over 64 rows is too much for it.
STREAM_LARGE_BACKWARD = {
    **STREAM_LARGE,
    "half": Tile(32, 64, 32, 8, 2, ahead=False),
    "tf32": Tile(32, 64, 16, 8, 2, ahead=False),
    "ieee": Tile(32, 32, 16, 8, 2, ahead=False),
}
# For rows of H elements that 16 bytes do not divide: elements loaded one by one take the registers of a large tile.
STREAM_ODD = {
    "half": Tile(16, 32, 32, 4, 3, ahead=False),
    "tf32": Tile(16, 32, 32, 4, 3, ahead=False),
    "ieee": Tile(16, 32, 16, 8, 3, ahead=False),
}
# Values a unit may have more than an LSTM's in a large tile of the forward loop in 16 bits. Others have no room.
FREE_FORWARD = 5
# And with a resident W_hh of four gates in the backward loop in TF32.
FREE_TF32 = 2
# On AMD what is resident stays in registers, not in shared memory: this much of it leaves room for the rest, in
# backward half as much.
AMD_RESIDENT = 64 * KIB
DEEPEST = 1024  # step of a product with a resident W_hh


def padded(hidden: int) -> int:
    """H as the side of a tile: a power of two, 16 at least. In memory H is never padded."""
    return max(16, 1 << (hidden - 1).bit_length())


def _deepest(tile: Tile, hidden: int) -> Tile:
    """The tile with the deepest step that wastes at most a quarter of H to padding."""
    depth = tile.depth
    while depth > 16 and -(-hidden // depth) * depth * 4 > hidden * 5:
        depth //= 2
    return replace(tile, depth=depth)


def fits(shape: Shape, target: Target, tile: Tile, units: int) -> bool:
    """Whether W_hh for `units` units can stay resident beside what the products stage."""
    depth = -(-shape.hidden // tile.depth) * tile.depth
    gates = shape.gates
    if gates % 4 == 3 and not shape.backward and units < shape.hidden:
        gates += 1  # a team's member takes four to a product, three as four
    weights = gates * units * depth * shape.size
    if shape.blocks and units < shape.hidden:
        weights += units * tile.depth * shape.size  # a tile of the cell's own matrices, which are streamed
    if not target.nvidia:
        room = AMD_RESIDENT // 2 if shape.backward else AMD_RESIDENT
        return weights < room if is_program(shape.cell) else weights <= room  # all of it leaves a user's formula none
    rows = depth
    if shape.backward:  # dgates of two steps; of those in float32 half stay in registers
        rows = min(2 * tile.depth, depth) * (gates if shape.size == 2 else (gates + 1) // 2)
    return weights + tile.batch * rows * shape.size + 2 * KIB <= target.shared


def _odd(shape: Shape) -> bool:
    return shape.hidden * shape.size % 16 != 0


def _too_heavy(shape: Shape) -> bool:
    """Whether a large tile has too few registers for the cell."""
    return shape.heavier > (FREE_FORWARD if shape.kind == "half" and not shape.backward else 0)


def crowded(shape: Shape) -> bool:
    """Whether a tile has fewer numbers than products want, though warps then repeat each other's."""
    return shape.staged and shape.heavier > CROWDED


def _lighter(shape: Shape, tile: Tile) -> Tile:
    """A streamed tile for a cell heavier than an LSTM, whose large ones leave few registers free: with fewer rows. Of
    fewer units warps would repeat each other's products."""
    if crowded(shape):
        return replace(tile, batch=16, units=min(tile.units, 32), warps=8)
    return replace(tile, batch=16) if _too_heavy(shape) else tile


def stream(shape: Shape, target: Target, large: bool) -> Tile:
    if shape.kind == "ieee" and _too_heavy(shape):
        large = False  # with 16 rows that tile is the small one, and backward's takes too shallow a step
    large_table = STREAM_LARGE_BACKWARD if shape.backward else STREAM_LARGE
    table = STREAM_ODD if _odd(shape) else large_table if large else STREAM
    tile = _lighter(shape, _deepest(table[shape.kind], shape.hidden))
    if not target.nvidia:
        # AMD's warps have twice the threads, and more than four of them share registers: too few for LSTM's 64 units.
        most = 32 if shape.backward and shape.gates == 4 else tile.units
        tile = replace(tile, units=min(tile.units, most), warps=min(tile.warps, 4))
    while _staged(shape, tile) > target.shared and tile.depth > 16:
        tile = replace(tile, depth=tile.depth // 2)
    return tile if _staged(shape, tile) <= target.shared else replace(tile, stages=2)


def _staged(shape: Shape, tile: Tile) -> int:
    """Bytes of shared memory of a streamed product: both operands' tiles of all gates, for each stage but one."""
    rows = tile.batch * (shape.gates if shape.backward else 1) + tile.units * shape.gates
    return rows * tile.depth * shape.size * max(1, tile.stages - 1)


def held(shape: Shape, target: Target, large: bool) -> Tile | None:
    """The first resident tile that fits. dgates of more than four gates fill the registers of any."""
    if (shape.gates > 4 and (large or shape.backward)) or (large and _too_heavy(shape)):
        return None
    if shape.kind == "tf32" and shape.backward and shape.gates == 4 and shape.heavier > FREE_TF32:
        return None
    forward, backward = (HOLD_LARGE, HOLD_LARGE_BACKWARD) if large else (HOLD, HOLD_BACKWARD)
    table = (backward if shape.backward else forward)[shape.kind]
    if large:  # the more units a program has, the fewer programs a tile of the batch takes
        ways = [how(shape, target, tile) for tile in table for how in (_at_once, _held_as)]
    else:
        ways = [how(shape, target, tile) for how in (_at_once, _held_as) for tile in table]
    for candidate in ways:
        if candidate is not None and fits(shape, target, candidate, candidate.units):
            return candidate
    return None


def _at_once(shape: Shape, target: Target, tile: Tile) -> Tile | None:
    """A resident tile of backward that asks for all of dgates at once, or None. Triton passes the dgates of such a deep
    step through shared memory, so that it takes fewer registers than a shallower one."""
    if not shape.backward or not target.nvidia:
        return None
    depth = padded(shape.hidden) // (1 if tile.batch < 32 else 2)
    tile = _deepest(replace(tile, depth=min(depth, DEEPEST)), shape.hidden)
    return _ahead(shape, tile) if 2 * tile.depth >= shape.hidden else None


def _held_as(shape: Shape, target: Target, tile: Tile) -> Tile:
    """A resident tile for this shape: in backward, what the registers leave room for."""
    if not target.nvidia:
        tile = replace(tile, depth=min(tile.depth, 128), warps=min(tile.warps, 4))
    side = padded(shape.hidden)
    if not shape.backward and tile.depth >= side:
        return replace(tile, depth=side)  # all of H in one step, padding and all: loads of one tile do not wait
    tile = _deepest(tile, shape.hidden)
    if not shape.backward:
        return tile
    if target.arch.startswith("sm_8" if tile.units < 32 else "sm_10"):  # deeper steps spill there
        tile = replace(tile, depth=min(tile.depth, 64))
    return _ahead(shape, tile)


def _ahead(shape: Shape, tile: Tile) -> Tile:
    return replace(tile, ahead=tile.ahead and tile.batch < 32 and not _odd(shape))
