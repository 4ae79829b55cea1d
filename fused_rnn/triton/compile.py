"""What the two kernels are compiled for, and under which options. Imports no Triton."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, TypeVar

from fused_rnn.cells import Cell
from fused_rnn.flex.scan import scan_of
from fused_rnn.triton.cells import kernels
from fused_rnn.triton.published import published
from fused_rnn.triton.schedule import CROWDED, Schedule, shape_of
from fused_rnn.triton.target import Target

SPILLS = 64  # bytes of a thread that a kernel may spill: they cost less than to compile it again
Made = TypeVar("Made")


def _constants(cell: Cell, hidden: int, size: int) -> dict[str, Any]:
    align = math.gcd(hidden * size, 16)
    constants = {"G": cell.gates, "S": cell.saved, "APART": cell.apart, "H": hidden, "ALIGN": align}
    constants |= {"NP": len(cell.params), "N": cell.blocks, "RECURRENT": cell.recurrent}
    return constants | {"CHUNKED": False}


def constants_forward(
    cell: Cell, hidden: int, size: int, save: bool, checkpoint: bool, replay: bool, over_time: tuple[bool, ...] = ()
) -> dict[str, Any]:
    """What fwd_kernel is compiled for, less the schedule's part. size: of an element, in bytes.  over_time: for each
    mask whether it has T."""
    return _constants(cell, hidden, size) | {
        "OVER_TIME": over_time,
        "CELL": kernels(cell.name).fwd,
        "READS_H": cell.reads_h,
        "SAVE": save,
        "CHECKPOINT": checkpoint and len(cell.states) > 1,
        "REPLAY": replay,
    }


def constants_backward(
    cell: Cell, hidden: int, size: int, has_dy: bool, has_dp: bool, over_time: tuple[bool, ...] = ()
) -> dict[str, Any]:
    """What bwd_kernel is compiled for, less the schedule's part."""
    module, shape = kernels(cell.name), shape_of(cell, "half", hidden, True)
    return _constants(cell, hidden, size) | {
        "OVER_TIME": over_time,
        "CELL": module.bwd,
        "READS_H": cell.reads_h,
        "AFTER": tuple(state in module.AFTER for state in cell.states),
        "BEFORE": tuple(state in module.BEFORE for state in cell.states),
        "HAS_DY": has_dy,
        "DP": len(cell.params) if has_dp else 0,
        "KEEP": not (shape.staged and shape.heavier > CROWDED),
    }


def constants_scan(cell: Cell, backward: bool) -> dict[str, Any]:
    """What the kernels of scan.py are compiled for besides: the cell is linear in its states."""
    module, scan = kernels(cell.name), scan_of(cell.name)
    assert scan is not None
    return {"SCAN": module.scan_bwd if backward else module.scan_fwd, "FORGETS": scan.forgets(backward)}


def last_stage(cell: Cell, backward: bool) -> int:
    """The number of a step's last stage; -1 where there is one alone."""
    if cell.program is None:
        return -1
    return (len((cell.program.backward if backward else cell.program.forward).stages) - 1) or -1


def constants_stages(
    cell: Cell, hidden: int, align: int, schedule: Schedule, target: Target, precision: str, backward: bool, stage: int
) -> dict[str, Any]:
    """What both kernels are compiled for where a step of the cell must know of other units. stage: the only one of a
    launch, which it ends; -1 for all of them. HOW, in the order that stages.py knows:

    H, TEAM, a power of two from TEAM on, BK, whether the matrices are resident, COUNT, LANES, stage, ALIGN, PRECISION,
    and how many there are of stages that publish, of numbers and of operands that they publish.
    """
    program = cell.program
    if program is None or not program.sees_units:
        return {"STAGED": False, "HOW": ()}
    made, team, tile = published(program.backward if backward else program.forward), schedule.team, schedule.tile
    count, lanes = schedule.loop == "cooperative", 64 * tile.warps if target.amd else 0
    units = (hidden, team, 1 << (team - 1).bit_length(), tile.depth)
    how = (schedule.registers, count, lanes, stage, align, precision)
    return {"STAGED": True, "HOW": (*units, *how, len(made.runs), made.slots, made.operands)}


def constants_schedule(
    schedule: Schedule, target: Target, lengths: bool, reset: bool, precision: str, activation: str
) -> dict[str, Any]:
    """What both kernels are compiled for besides."""
    return {
        "HAS_LENGTHS": lengths,
        "HAS_RESET": reset,
        "REGISTERS": schedule.registers,
        "HOLD": schedule.hold,
        "COUNT": schedule.loop == "cooperative",
        "LANES": 64 * schedule.tile.warps if target.amd else 0,
        "AHEAD": schedule.ahead,
        "TEAM": schedule.team,
        "NT": schedule.spread,
        "BB": schedule.tile.batch,
        "BH": schedule.tile.units,
        "BK": schedule.tile.depth,
        "PRECISION": precision,
        "ACTIVATION": activation,
    }


def options(schedule: Schedule, arch: str, bound: int | None = None) -> dict[str, Any]:
    """How a kernel is compiled and launched; the interpreter knows none of it. bound: one of `bounds`."""
    if arch == "interpreter":
        return {}
    chosen: dict[str, Any] = {
        "num_warps": schedule.tile.warps,
        "num_stages": schedule.tile.stages,
        "enable_fp_fusion": True,
        "launch_cooperative_grid": schedule.loop == "cooperative",
    }
    return chosen if bound is None else {**chosen, "maxnreg": bound}


def bounds(schedule: Schedule, arch: str) -> tuple[int | None, ...]:
    """Register bounds to try.

    Left alone ptxas may spill, or let loads wait for each other, to fit more programs on a multiprocessor than these
    loops ever have there: all registers come first, its own choice second.
    """
    return (255, None) if arch.startswith("sm_") and schedule.tile.warps <= 8 else (None,)


def lighter(schedule: Schedule) -> Iterator[Schedule]:
    """A schedule, and what takes fewer registers with the same team and batch tile."""
    yield schedule
    tile = schedule.tile
    if schedule.ahead:
        tile = replace(tile, ahead=False)
        yield replace(schedule, tile=tile)
    while tile.depth > 16 and not schedule.registers:  # there the depth is all of H
        tile = replace(tile, depth=tile.depth // 2)
        yield replace(schedule, tile=tile)


def fewest_spills(
    cell: Cell, schedule: Schedule, arch: str, compiled: Callable[[Schedule, int | None], tuple[int, Made]]
) -> Made:
    """The best of what `compiled` makes, of the bytes it spills and the result, under one of the bounds.

    A built-in cell's tiles were chosen by what they spill. What a user's cell takes shows when it is compiled: if that
    is too much, a lighter schedule may do.
    """
    enough = SPILLS if schedule.hold else 0  # streamed, ptxas's own choice is as good, and may spill nothing
    tried: list[tuple[int, Made]] = []
    for candidate in lighter(schedule) if cell.program else (schedule,):
        least = min((spills for spills, _ in tried), default=None)
        for bound in bounds(schedule, arch):
            tried.append(compiled(candidate, bound))
            if tried[-1][0] <= enough:
                return tried[-1][1]
        if least is not None and least <= min(SPILLS, *(spills for spills, _ in tried)):
            break  # no tile changes it, as that of a sine, whose reduction has an array
    return min(tried, key=lambda each: each[0])[1]
