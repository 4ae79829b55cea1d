"""How a loop over time runs: by which launches, in what tiles."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from fused_rnn.cells import Cell

LOOPS = ("solo", "cooperative", "stepwise")


class Shape(NamedTuple):
    """What a schedule is keyed on.

    kind: how products are taken, "half" (16-bit), "tf32" or "ieee".  recurrent: as the cell's.
    """

    cell: str
    gates: int
    kind: str
    hidden: int
    backward: bool
    recurrent: bool = True

    @property
    def size(self) -> int:
        return 2 if self.kind == "half" else 4


def shape_of(cell: Cell, kind: str, hidden: int, backward: bool) -> Shape:
    """The shape of a cell's loop."""
    return Shape(cell.name, cell.gates, kind, hidden, backward, cell.recurrent)


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
