"""Cycles of one step of a CUDA loop on sm_90, by part, from its machine code: no GPU is asked.

The first thread of a launch runs (sass.py) with the arguments that a plan gives the kernel; of its path, a step in the
middle of the loop is timed: what one warp of one member does itself. Peers are taken to be there at the first look, and
no other warp is in its way; the exchange runs beside the part after the send. A team of one CTA is not timed: no plan
of a size that matters has it.

A step begins with the first look behind a send. Of a team that gathers its operand the parts are: wait, for peers, and
until the operand can be read; product, to the barrier; sums, from there, and for the cell's input; cell, to the last
put; send; tail, all that comes before the next look. Of one that scatters sums: wait, to the first load of a partial
sum; sums, until the last one is there, looks for later groups among them; cell, which adds them up, to the last put;
product, with the barrier before it, to the first tile that is sent; send, the other tiles; tail.

Of a grid's exchange the figure has one trip to L2 each for the fence before a member is counted in, for the look at the
counter and for the copy of the operand. Not in it: the way of the count to L2, looks that come too early, and the time
that the operand's bytes take beyond the first. ARCHITECTURE.md has what an H200 took beside it.
"""

from __future__ import annotations

import struct
from itertools import pairwise
from math import ceil
from typing import NamedTuple

from sass import L2, Issued, Thread, issue, listing

from fused_rnn.cells import CELLS
from fused_rnn.plan import EXCHANGES, Plan

PARAMETERS = 0x210  # of the constant bank, where a kernel's arguments begin
DRAM = 650  # cycles of a load from there
STEPS = 8  # of which the timed one still has some before it that are read ahead (ahead.h)
MOST_STATES = 4  # csrc/cells/cell.h
ADDRESS = 1 << 20  # of every array that is given: aligned
GATHER = ("wait", "product", "sums", "cell", "send", "tail")
SCATTER = ("wait", "sums", "cell", "product", "send", "tail")


class Marks(NamedTuple):
    """How an exchange shows in a path: the instruction that looks whether peers are there; the one that puts a cell
    where it is sent or multiplied from; the one that sends, or says that all is there; the one that reads the operand
    of a product."""

    look: str
    put: str
    send: str
    operand: str = "LDS"


MARKS = {
    "cluster": Marks("SYNCS.PHASECHK.TRANS64.TRYWAIT", "STS", "STAS"),
    "scatter": Marks("SYNCS.PHASECHK.TRANS64.TRYWAIT", "STS", "STAS"),
    "grid": Marks("LDG.E.STRONG", "STG", "REDG"),
    "direct": Marks("LDG.E.STRONG", "STG", "REDG", "LDG.E.128.STRONG"),
}


class Launch(NamedTuple):
    """What a kernel runs, by a plan with an exchange of MARKS."""

    cell: str
    plan: Plan
    batch: int
    hidden: int
    backward: bool

    def constants(self, rare: bool) -> bytes:
        """The constant bank: params.h, in bytes. rare: with resets, wide histories, and backward without dy."""
        plan, cell = self.plan, CELLS[self.cell]
        members = 1 if plan.exchange == "scatter" else plan.members  # whose units are the depth
        depth = members * plan.units * (cell.gates if self.backward else 1)
        depth_of_block = 16 if plan.number in ("tf32", "ieee") else 32  # 64 bytes
        blocks = ceil(ceil(depth / depth_of_block) / plan.warps[1])
        grid = plan.exchange in ("grid", "direct")
        tiles = min(plan.tiles, plan.tiles_at_once) if grid else plan.tiles
        numbers = [STEPS, 0, STEPS, 0, STEPS, 0, 1, 0, ADDRESS * rare, self.batch, 1, self.hidden, tiles, 0]
        steps = struct.pack("<5i4xQi4xQQ5i4x", *numbers)
        exchange = EXCHANGES.index(plan.exchange)
        team = struct.pack("<8i", exchange, plan.members, plan.units, plan.rows, *plan.warps, depth, blocks)
        workspace = struct.pack("<2Q", ADDRESS * grid, ADDRESS * grid)
        each = [True] * MOST_STATES
        if self.backward:  # dy, given, w, states, first, saved, dgates, dstates; histories_are_wide, close
            there = [not rare, False, True, *each, *each, True, True, *each]
            arguments = struct.pack(f"<{len(there)}Q??6x", *(ADDRESS * given for given in there), rare, True)
        else:  # gx, given, w, bias, h0, carried, hidden, y, h_n, saved, histories, checkpoints; every ..; params, scale
            there = [True, False, True, True, True, *each, False, True, True, True, *each, *([False] * MOST_STATES)]
            addresses = [ADDRESS * given for given in there]
            arguments = struct.pack(f"<{len(there)}Qi??2x2Q", *addresses, 1, True, rare, 0, ADDRESS)
        size = struct.pack("<6i", plan.threads, 1, 1, plan.members * tiles, 1, 1)
        return size.ljust(PARAMETERS, b"\0") + steps + team + workspace + arguments


class Step(NamedTuple):
    cycles: dict[str, int]  # by part
    waits: list[str]  # for loads that the next step needs

    @property
    def total(self) -> int:
        return sum(self.cycles.values())


def places(path: list[Issued], name: str, begin: int = 0, end: int | None = None) -> list[int]:
    """Where instructions of this name are executed."""
    within = range(begin, len(path) if end is None else end)
    return [i for i in within if path[i].executed and path[i].instruction.name.startswith(name)]


class Borders(NamedTuple):
    """Of a step, as places in a path."""

    parts: list[int]  # where they begin, and the last one ends
    put: int  # the last one: what is loaded behind it is for the next step
    free: int  # before it the step waits for no input


def gathered(path: list[Issued], marks: Marks, begin: int, end: int) -> Borders:
    product = places(path, marks.operand, begin, end)[0]
    sums = places(path, "BAR", product, end)[0]
    sent = places(path, marks.send, sums, end)
    put = places(path, marks.put, sums, sent[0])
    cell = next(iter(places(path, "MUFU", sums, put[0])), put[0])
    return Borders([begin, product, sums, cell, put[-1], sent[-1], end], put[-1], sums)


def scattered(path: list[Issued], marks: Marks, begin: int, end: int) -> Borders:
    """Behind the last load of a sum the input may be waited for: it is needed as soon as they are."""
    sent = places(path, marks.send, begin, end)
    put = places(path, marks.put, begin, sent[0])
    loads = places(path, "LDS", begin, put[0])
    scoreboard = path[loads[-1]].instruction.sets
    there = next(i for i in range(loads[-1] + 1, end) if scoreboard in path[i].instruction.waits)
    return Borders([begin, loads[0], there, put[-1], sent[0], sent[-1], end], put[-1], loads[-1] + 1)


def replay(code: str, launch: Launch, memory: int = L2, rare: bool = False) -> Step:
    """A step of a kernel; code: what cuobjdump -sass prints of it. memory: cycles of a load of its input."""
    path = issue(Thread(listing(code), launch.constants(rare)).trace(), memory)
    scatters = launch.plan.exchange == "scatter"
    marks, borders = MARKS[launch.plan.exchange], scattered if scatters else gathered
    looks, sends = places(path, marks.look), places(path, marks.send)
    before, begin, end = [b for a, b in pairwise(sorted(looks + sends)) if a in sends and b in looks][1:4]
    asked, step = borders(path, marks, before, begin).put, borders(path, marks, begin, end)
    parts = zip(SCATTER if scatters else GATHER, pairwise(path[i].cycle for i in step.parts), strict=True)
    # What the step before has asked for is for this one's cells: before their sums nothing may wait for it.
    waits = [str(one.instruction) for one in path[asked : step.free] if any(load > asked for load in one.loads)]
    return Step({part: b - a for part, (a, b) in parts}, waits)
