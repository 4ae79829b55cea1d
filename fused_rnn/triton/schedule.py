"""How a loop over time runs: by which launches, in what tiles."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from fused_rnn.cells import Cell
from fused_rnn.cells.program import Graph

LOOPS = ("solo", "cooperative", "stepwise")
LSTM_ALIVE = (9, 12)  # of its forward and backward as a program, and its states
CROWDED = 16  # values a unit of a cell with stages may have more than an LSTM's, in tiles for an LSTM


class Shape(NamedTuple):
    """What a schedule is keyed on.

    kind: how products are taken, "half" (16-bit), "tf32" or "ieee".  recurrent: as the cell's.
    staged: a step has stages, at whose ends a program must know of all units: none has a second tile of them.
    blocks: of the cell's own matrices, which lie beside W_hh where all is in registers.
    heavier: by how many values alive at once a unit has more than an LSTM's, for which the tiles are chosen.
    """

    cell: str
    gates: int
    kind: str
    hidden: int
    backward: bool
    recurrent: bool = True
    heavier: int = 0
    staged: bool = False
    blocks: int = 0

    @property
    def size(self) -> int:
        return 2 if self.kind == "half" else 4


def shape_of(cell: Cell, kind: str, hidden: int, backward: bool) -> Shape:
    """The shape of a cell's loop."""
    heavier = 0
    if cell.program:
        graph = cell.program.backward if backward else cell.program.forward
        more = len(cell.states) + (len(cell.params) if backward else 0)  # what a loop carries from step to step
        heavier = max(0, _alive(graph) + more - LSTM_ALIVE[backward])
    staged = cell.program is not None and cell.program.sees_units
    return Shape(cell.name, cell.gates, kind, hidden, backward, cell.recurrent, heavier, staged, cell.blocks)


def _alive(graph: Graph) -> int:
    """Values that are alive at once, at most, in the order of the code. Constants are in the instructions."""
    last = {i: k for k, (_, args, _) in enumerate(graph.code) for i in args}
    last |= {i: len(graph.code) for group in graph.outputs for i in group}
    alive = {i for i in range(graph.inputs) if i in last}
    most = len(alive)
    for k, instruction in enumerate(graph.code):
        if instruction.op not in ("const", "units") and graph.inputs + k in last:
            alive.add(graph.inputs + k)
        most = max(most, len(alive))
        alive = {i for i in alive if last[i] > k}
    return most


@dataclass(frozen=True)
class Tile:
    """batch x units of one program, products taken in steps of depth."""

    batch: int
    units: int
    depth: int
    warps: int
    stages: int = 1
    ahead: bool = True  # a step's input is asked for before the wait for the step's turn; costs registers


@dataclass(frozen=True)
class Schedule:
    """loop: solo, one program a batch tile; cooperative, a team that waits for each other; stepwise, a launch a step.

    team: programs that share a recurrence and batch tile.  spread: unit tiles of each.
    registers: all of h and W_hh in one program.  hold: the program's part of W_hh resident.
    """

    loop: str
    tile: Tile
    team: int
    spread: int = 1
    registers: bool = False
    hold: bool = False

    @property
    def ahead(self) -> bool:
        return self.tile.ahead and self.spread == 1 and self.loop != "stepwise"

    def tiles(self, batch: int) -> int:
        return -(-batch // self.tile.batch)

    def programs(self, batch: int, recurrences: int) -> int:
        return self.team * self.tiles(batch) * recurrences

    def __str__(self) -> str:
        how = "registers" if self.registers else "resident" if self.hold else "streamed"
        t = self.tile
        team = f"team of {self.team}" if self.team > 1 else "one program"
        return f"loop {self.loop}, {team}, W_hh {how}, tile {t.batch}x{t.units}x{t.depth}, {t.warps} warps"
