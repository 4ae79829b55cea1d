"""Which schedule a problem runs by: a function of the cell, dtype, H and the architecture.

T has no say, so that a new length compiles nothing, but for whether chunks of time run side by side. B and R only say
which of a few schedules fits the device at once.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from fused_rnn.cells import Cell
from fused_rnn.flex.scan import scan_of
from fused_rnn.gpu import chunks
from fused_rnn.triton import measured, tiles
from fused_rnn.triton.schedule import LOOPS, Schedule, Shape, Tile
from fused_rnn.triton.target import Target

MOST_GATES = 8  # that registers have room for, beside W_hh


def _registers(shape: Shape, target: Target) -> Schedule | None:
    side = tiles.padded(shape.hidden)
    warps = 4 if shape.kind != "ieee" and side <= 64 and not tiles.crowded(shape) else 8
    if not target.nvidia:
        warps = 4
    tile = Tile(16, side, side, min(warps, max(1, side // 8)))
    beside = shape._replace(gates=shape.gates + shape.blocks)
    fits = side <= (256 if shape.kind == "half" else 64) and tiles.fits(beside, target, tile, side)
    return Schedule("solo", tile, 1, registers=True) if fits and beside.gates <= MOST_GATES else None


def _teams(shape: Shape, target: Target) -> list[Schedule]:
    """Teams with a small batch tile and with a large one."""
    if not shape.recurrent:
        small = tiles.stream(shape, target, large=False)
        return [Schedule("cooperative", small, -(-shape.hidden // small.units)), _wide(shape, target)]
    held = tiles.held(shape, target, large=False)
    small = held or tiles.stream(shape, target, large=False)
    schedules = [Schedule("cooperative", small, -(-shape.hidden // small.units), hold=held is not None)]
    large = tiles.held(shape, target, large=True) if target.nvidia else None
    if large is not None and shape.hidden % large.units == 0:
        return [*schedules, Schedule("cooperative", large, shape.hidden // large.units, hold=True)]
    return [*schedules, _wide(shape, target)]


def _wide(shape: Shape, target: Target) -> Schedule:
    """The team of the fewest programs that have a tile each, W_hh streamed."""
    tile = tiles.stream(shape, target, large=True)
    return Schedule("cooperative", tile, -(-shape.hidden // tile.units))


SPREADS = (2, 4)


def _spread(shape: Shape, target: Target, spread: int) -> Schedule:
    """A team of fewer programs with more units each, W_hh streamed: where the units are too many for the device."""
    tile = tiles.stream(shape, target, large=False)
    return Schedule("cooperative", tile, -(-shape.hidden // (tile.units * spread)), spread)


def _alone(shape: Shape, target: Target) -> Schedule:
    """One program a batch tile with W_hh streamed: no exchange, but all of W_hh read by every program in every step."""
    tile = tiles.stream(shape, target, large=True)
    return Schedule("solo", tile, 1, spread=-(-shape.hidden // tile.units))


def _stepwise(shape: Shape, target: Target) -> Schedule:
    tile = tiles.stream(shape, target, large=True)
    return Schedule("stepwise", tile, -(-shape.hidden // tile.units))


def shipped(shape: Shape, target: Target) -> list[Schedule]:
    """Every schedule that `choose` can come to without measurements: what is compiled ahead of time by `make cubin`."""
    if _independent_units(shape):
        return [_independent(shape)]
    registers = _registers(shape, target)
    if registers is not None:
        return [registers]
    teams = _teams(shape, target)
    if teams[-1].hold:
        teams.append(_wide(shape, target))
    if shape.staged:
        return [*teams, _stepwise(shape, target)]
    if 2 * teams[0].team > target.processors:
        teams += [_spread(shape, target, spread) for spread in SPREADS]
    return [*teams, _alone(shape, target), _stepwise(shape, target)]


def choose(shape: Shape, target: Target, batch: int, recurrences: int) -> Schedule:
    """The schedule for a problem. `override` forces one, a measured table comes next, then those of tiles.py."""
    if _independent_units(shape):
        return _independent(shape)
    if _forced:
        return _build(shape, target, **_forced)
    # Measured with R = 1, and perhaps on a part of the same architecture with more multiprocessors.
    found = [
        (rows, schedule)
        for rows, schedule in measured.find(shape, target)
        if schedule.loop != "cooperative" or schedule.team * recurrences <= target.processors
    ]
    if found:
        within = [schedule for rows, schedule in found if batch * recurrences <= rows]
        return within[0] if within else found[-1][1]
    registers = _registers(shape, target)
    if registers is not None:
        return registers
    teams = _teams(shape, target) if target.cooperative else []
    for schedule in teams:
        if schedule.programs(batch, recurrences) <= target.processors:
            return schedule
    alone = _alone(shape, target)
    if not shape.staged and shape.hidden <= 512 and 2 * alone.programs(batch, recurrences) >= target.processors:
        return alone  # a batch that fills the device needs no team
    # A few waves of a team are still fewer launches than one a step.
    for schedule in reversed(teams):
        programs = schedule.programs(batch, recurrences)
        if schedule.team * recurrences <= target.processors and programs <= 3 * target.processors:
            return schedule
    rest = [_wide(shape, target)] if teams and teams[-1].hold else []
    if teams and not shape.staged and 2 * teams[0].team > target.processors:
        rest += [_spread(shape, target, spread) for spread in SPREADS]
    for schedule in rest:
        if schedule.programs(batch, recurrences) <= target.processors:
            return schedule
    return _stepwise(shape, target)


def replay(hidden: int) -> Schedule:
    """For making gates again: pointwise, every program for itself, no product."""
    tile = Tile(16, 32, 16, 4, ahead=False)
    return Schedule("solo", tile, -(-hidden // tile.units))


def _independent_units(shape: Shape) -> bool:
    return not shape.recurrent and not shape.staged


def _independent(shape: Shape) -> Schedule:
    """For a cell without W_hh: every program for itself, its units over all of time."""
    tile = Tile(16, 32, 16, 4)
    return Schedule("solo", tile, -(-shape.hidden // tile.units))


def chunk_of(cell: Cell, schedule: Schedule, target: Target, steps: int, batch: int, recurrences: int) -> int:
    """How many steps a chunk has, where chunks of time run side by side; all of them where the cell is not linear in
    its states, or where they do not pay (gpu/chunks.py)."""
    if cell.program is None or scan_of(cell.name) is None:
        return steps
    return chunks.chunk_of(steps, schedule.programs(batch, recurrences), target.processors)


_forced: dict[str, Any] = {}


@contextmanager
def override(**fields: Any) -> Iterator[None]:
    """Force loop and, if given, tile, spread, registers, hold; in all threads: autograd has one for backward."""
    previous = dict(_forced)
    _forced.update(fields)
    try:
        yield
    finally:
        _forced.clear()
        _forced.update(previous)


def _build(
    shape: Shape,
    target: Target,
    loop: str,
    tile: Tile | None = None,
    spread: int = 1,
    registers: bool = False,
    hold: bool = False,
) -> Schedule:
    if loop not in LOOPS:
        raise ValueError(f"loop: expected one of {', '.join(LOOPS)}, got {loop!r}")
    if registers:
        side = tiles.padded(shape.hidden)
        batch, warps = (16, 4) if tile is None else (tile.batch, tile.warps)
        return Schedule("solo", Tile(batch, side, side, warps), 1, registers=True)
    tile = tiles.stream(shape, target, large=False) if tile is None else tile
    blocks = -(-shape.hidden // tile.units)
    if shape.staged and (spread > 1 or (loop == "solo" and blocks > 1)):
        raise ValueError(f"tile: got {blocks} tiles of units, expected one a program: the cell's step has stages")
    if loop == "solo":
        return Schedule("solo", tile, 1, blocks)
    return Schedule(loop, tile, -(-blocks // spread), spread, hold=hold and spread == 1)
