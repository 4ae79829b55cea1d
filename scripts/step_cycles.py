"""Cycles of one step of a CUDA loop on sm_90, by part, from its machine code: no GPU is asked.

The first thread of a launch runs (sass.py) with the arguments that a plan gives the kernel; of its path, a step in the
middle of the loop is timed. Only teams in a cluster: their wait for each other shows in the code. Peers are taken to be
there, so that a step is what a member does itself; the exchange runs beside the part after the send.
"""

from __future__ import annotations

import struct
from math import ceil
from typing import NamedTuple

from sass import Issued, Thread, issue, listing

from fused_rnn.cells import CELLS
from fused_rnn.plan import Plan

PARAMETERS = 0x210  # of the constant bank, where a kernel's arguments begin
L2, DRAM = 270, 650  # cycles of a load from there
STEPS = 6
ADDRESS = 1 << 20  # of every array that is given: aligned
PARTS = ("wait", "product", "sums", "cell", "send", "tail")


class Launch(NamedTuple):
    """What a kernel runs, by a plan with teams in a cluster."""

    cell: str
    plan: Plan
    batch: int
    hidden: int
    backward: bool

    def constants(self, rare: bool) -> bytes:
        """The constant bank: params.h, in bytes. rare: with resets, and backward without dy."""
        plan, cell = self.plan, CELLS[self.cell]
        depth = plan.members * plan.units * (cell.gates if self.backward else 1)
        depth_of_block = 16 if plan.number in ("tf32", "ieee") else 32  # 64 bytes
        blocks = ceil(ceil(depth / depth_of_block) / plan.warps[1])
        numbers = [STEPS, 0, STEPS, 0, STEPS, 0, 1, 0, ADDRESS * rare, self.batch, 1, self.hidden, plan.tiles, 0]
        steps = struct.pack("<5i4xQi4xQQ5i4x", *numbers)
        team = struct.pack("<8i", 1, plan.members, plan.units, plan.rows, *plan.warps, depth, blocks)
        has_cell = self.cell == "lstm"
        if self.backward:  # dy, given, w, states, first_state, saved, dgates, dh, dc
            there = [not rare, False, True, True, True, True, True, True, has_cell]
            arguments = struct.pack("<9Q??6x", *(ADDRESS * given for given in there), False, True)
        else:  # gx, given, w, bias, h0, state, y, h_n, saved, cells, checkpoints
            there = [True, False, True, True, True, True, True, True, True, has_cell, False]
            arguments = struct.pack("<11Qi?3x", *(ADDRESS * given for given in there), 1, False)
        size = struct.pack("<6i", plan.threads, 1, 1, plan.members * plan.tiles, 1, 1)
        return size.ljust(PARAMETERS, b"\0") + steps + team + struct.pack("<2Q", 0, 0) + arguments


class Step(NamedTuple):
    cycles: dict[str, int]  # by part
    waits: list[str]  # for loads that the next step needs

    @property
    def total(self) -> int:
        return sum(self.cycles.values())


def is_wait(one: Issued) -> bool:
    return one.executed and one.instruction.name.endswith("TRYWAIT")


def places(path: list[Issued], names: tuple[str, ...], begin: int, end: int) -> list[int]:
    return [i for i in range(begin, end) if path[i].executed and path[i].instruction.name.split(".")[0] in names]


def replay(code: str, launch: Launch, memory: int = L2, rare: bool = False) -> Step:
    """A step of a kernel; code: what cuobjdump -sass prints of it. memory: cycles of a load."""
    path = issue(Thread(listing(code), launch.constants(rare)).trace(), memory)
    before, begin, end = [i for i, one in enumerate(path) if is_wait(one)][1:4]
    product = places(path, ("LDS", "LDSM"), begin, end)[0]
    sums = places(path, ("BAR",), begin, end)[0]
    sent = places(path, ("STAS",), sums, end)
    put = places(path, ("STS",), sums, sent[0])
    cell = next(iter(places(path, ("MUFU",), sums, put[0])), put[0])
    marks = [path[i].cycle for i in (begin, product, sums, cell, put[-1], sent[-1], end)]
    cycles = {part: b - a for part, a, b in zip(PARTS, marks, marks[1:], strict=False)}

    # What the step before loads after its last send is for this one's cells: nothing before the sums may wait for it.
    last = places(path, ("STAS",), before, begin)[-1]
    return Step(cycles, [str(one.instruction) for one in path[last:sums] if any(load > last for load in one.loads)])
