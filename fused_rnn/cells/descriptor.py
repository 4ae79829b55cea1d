"""What a cell is: data the loops read, and one pointwise step. A new cell touches no loop."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from torch import Tensor

from fused_rnn.cells.program import Program, is_program, parse

# (the gates' input sides, their recurrent sides, G tensors [B, H] each, the states h [B, P] and others [B, H], the
# parameter vectors [H]; of a cell that has them the matrices [n·H, H] and the masks [B, H]) → the states after. The
# biases are already in: b_ih in the input side, b_hh in the recurrent one. A projection of h is the loop's.
Step = Callable[..., tuple[Tensor, ...]]


class Parts(NamedTuple):
    """A step in two: gates(x, r, s) → the activated gates, by these names; update(gates, s) → the states after.
    candidate: the place of the gate that is what is new, if there is one."""

    names: tuple[str, ...]
    gates: Callable[..., Sequence[Tensor]]
    update: Callable[..., tuple[Tensor, ...]]
    candidate: int | None = None

    def step(
        self, x: Sequence[Tensor], r: Sequence[Tensor], s: Sequence[Tensor], p: Sequence[Tensor]
    ) -> tuple[Tensor, ...]:
        """The whole step."""
        return self.update(self.gates(x, r), s)


class Cell(NamedTuple):
    """A cell.

    gates: G, the pre-activations of width H.
    states: their names. The first is the output, and goes through W_hh.
    saved: S, the gate vectors kept per step for backward.
    step: the formula.
    params: names of vectors of one number per unit, [H] each, beside the matrices and biases.
    apart: how many of the last gates enter the formula with their input and recurrent side apart. Of all others it sees
        the sum of both.
    reads_h: the formula reads h itself, not only what W_hh makes of it.
    projects: h may have a projection.
    recurrent: there is a W_hh. Without it a step gets no recurrent sides, and h reaches the next one by the formula.
    program: of a user's cell, whose name is the program's text.
    matrices: of each matrix beside W_hh how many blocks of H rows it has.
    masks: how many numbers a unit of a row is given at each step, beside the input, which get no gradient.
    parts: the step in two, of a cell that has gates with names.
    diagonal: N, how many blocks W_hh has on its diagonal, [G·H, H/N]: row g·H + u holds what unit u reads of its block.
    """

    name: str
    gates: int
    states: tuple[str, ...]
    saved: int
    step: Step
    params: tuple[str, ...] = ()
    apart: int = 0
    reads_h: bool = False
    projects: bool = False
    recurrent: bool = True
    program: Program | None = None
    matrices: tuple[int, ...] = ()
    masks: int = 0
    parts: Parts | None = None
    diagonal: int = 1

    @property
    def title(self) -> str:
        """The name for people."""
        return self.program.title if self.program else self.name

    @property
    def gradients(self) -> int:
        """G + apart, and one for each block of the matrices: the vectors that backward makes of a step. First the input
        sides of the gates that enter apart, then the recurrent sides of all: so the input side is the first G, and the
        recurrent side G from `apart` on. What a block's product has follows."""
        return self.gates + self.apart + self.blocks

    @property
    def blocks(self) -> int:
        """N, the blocks of H rows of all matrices."""
        return sum(self.matrices)

    @property
    def operands(self) -> list[int]:
        """Of each block which matrix it is of: its operand is the saved value of that number."""
        return [j for j, count in enumerate(self.matrices) for _ in range(count)]

    @property
    def staged(self) -> bool:
        """Whether a step has more than one stage in either direction."""
        return self.program is not None and self.program.stages > 1

    @property
    def whole(self) -> Cell:
        """The same with a W_hh that is whole."""
        return self if self.program is None else CELLS[self.program._replace(diagonal=1).text]

    @property
    def carried(self) -> int:
        """How many states a loop carries in the accumulation dtype: all but h, and h too where the formula reads it."""
        return len(self.states) - 1 + self.reads_h


class Cells(dict[str, Cell]):
    """Cells by name. A name that is a program is a cell without having been registered, and is kept elsewhere: of a
    dict's subclass Dynamo guards the size."""

    def __missing__(self, name: str) -> Cell:
        return _of_program(name)


def cell_of(program: Program) -> Cell:
    """The descriptor of a user's cell. Its step is the program's."""
    return Cell(
        program.text, program.gates, program.states, program.saved, program.step, program.params, program.apart,
        program.reads_h, False, program.recurrent, program, tuple(count for _, count in program.matrices),
        len(program.masks), None, program.diagonal,
    )  # fmt: skip


_PROGRAMS: dict[str, Cell] = {}


def _of_program(name: str) -> Cell:
    """A program's cell. Raises KeyError for another name."""
    if name not in _PROGRAMS:
        if not is_program(name):
            raise KeyError(name)
        _PROGRAMS.setdefault(name, cell_of(parse(name)))
    return _PROGRAMS[name]


# As torch.compiler.assume_constant_result: of the dict Dynamo would see what was there when a trace first read it.
_of_program._dynamo_marked_constant = True  # type: ignore[attr-defined]
CELLS: Cells = Cells()


def register(cell: Cell) -> Cell:
    """Make a cell known by its name; raises ValueError for a name that another one has."""
    if CELLS.setdefault(cell.name, cell) is not cell:
        raise ValueError(f"cell: got {cell.name!r}, expected a name that no other cell has")
    return cell


def unknown(cell: str, known: Iterable[str]) -> str | None:
    """Why a backend with kernels for these cells cannot run this one; None where it can."""
    if cell in known:
        return None
    name = title(cell)  # a variant's, or a user's cell's, may be one of those
    return f"it knows the cells {', '.join(known)}, not {'this variant of ' * (name in known)}{name!r}"


def title(cell: str) -> str:
    """A cell's name for people."""
    return parse(cell).title if is_program(cell) else cell


title._dynamo_marked_constant = True  # type: ignore[attr-defined]  # as torch.compiler.assume_constant_result
