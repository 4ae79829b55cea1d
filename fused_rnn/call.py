"""One layer's call, forward and backward: the arguments of the ops in their order, with what they mean by name.

`op(*call)` calls an op, `LayerCall(*arguments)` reads what an op was called with.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fused_rnn.cells import CELLS, Cell

# Steps between two checkpoints, whose gates are made again at a time; also in csrc/ops/layer.h.
CHECKPOINT_EVERY = 64
SAVES = ("gates", "recompute")
# What a stream keeps its weights in, the module's dtype or fewer bytes; Narrow in csrc/params.h and csrc/cuda/tiles.h.
NARROW = {None: 0, "bf16": 1, "int8": 2}


def known_save(save: str) -> str:
    """save, if there is such a way to keep what backward needs; raises ValueError."""
    if save not in SAVES:
        raise ValueError(f"save: got {save!r}, expected one of {', '.join(map(repr, SAVES))}")
    return save


class Weights(NamedTuple):
    """The weights of one recurrence: w_ih [G·H, D], w_hh [G·H, P], of N blocks on its diagonal [G·H, H/N], biases [G·H]
    or None, w_hr [P, H] or None, params [H] each, matrices [n·H, H], masks [1 or T, B, H]. w_hh and b_hh are None where
    the cell is not recurrent."""

    w_ih: Any
    w_hh: Any
    b_ih: Any
    b_hh: Any
    w_hr: Any
    params: tuple[Any, ...] = ()
    matrices: tuple[Any, ...] = ()
    masks: tuple[Any, ...] = ()


class Kinds(NamedTuple):
    """Which weights a recurrence has. number: of them all.  matrices, masks: how many."""

    number: int
    bias: bool
    projects: bool
    recurrent: bool = True
    matrices: int = 0
    masks: int = 0

    def split(self, flat: Sequence[Any]) -> list[Weights]:
        """Of every recurrence its weights by name. flat: tensors, shapes, or what else stands for each weight."""
        each = []
        for first in range(0, len(flat), self.number):
            own = iter(flat[first : first + self.number])
            w_ih, w_hh = next(own), next(own) if self.recurrent else None
            b_ih = next(own) if self.bias else None
            b_hh = next(own) if self.bias and self.recurrent else None
            w_hr = next(own) if self.projects else None
            rest = tuple(own)
            first, last = self.matrices, len(rest) - self.masks
            each.append(Weights(w_ih, w_hh, b_ih, b_hh, w_hr, rest[first:last], rest[:first], rest[last:]))
        return each

    def is_mask(self, place: int) -> bool:
        """Whether a weight of the flat list is a mask, which gets no gradient."""
        return place % self.number >= self.number - self.masks

    def without_masks(self, each: Sequence[Any]) -> list[Any]:
        """What there is of each weight, None of the masks."""
        return [None if self.is_mask(k) else own for k, own in enumerate(each)]

    def shapes(self, cell: Cell, input_size: int, hidden: int, width: int) -> list[tuple[int, ...]]:
        """The shape of every weight; a mask's as its last dimension alone."""
        rows = cell.gates * hidden
        sides = 1 + self.recurrent
        matrices, biases = [(rows, input_size), (rows, width // cell.diagonal)][:sides], [(rows,)] * (sides * self.bias)
        own = [(rows_of * hidden, hidden) for rows_of in cell.matrices]
        vectors = [(hidden,)] * (len(cell.params) + cell.masks)
        return [*matrices, *biases, *[(width, hidden)] * self.projects, *own, *vectors]


def kinds(cell: Cell, count: int) -> Kinds | None:
    """Which weights a recurrence of a cell has if it has this many; None where it cannot have as many."""
    matrices = count - _own(cell)
    if matrices not in _counts(cell):
        return None
    more = (len(cell.matrices), cell.masks)
    if not cell.recurrent:
        return Kinds(count, matrices == 2, False, False, *more)
    return Kinds(count, matrices >= 4, matrices % 2 == 1, True, *more)


def _own(cell: Cell) -> int:
    """How many weights there are of the cell's own."""
    return len(cell.params) + len(cell.matrices) + cell.masks


def _counts(cell: Cell) -> tuple[int, ...]:
    """How many matrices and biases there may be."""
    return (1, 2) if not cell.recurrent else (2, 3, 4, 5) if cell.projects else (2, 4)


def counts(cell: Cell) -> str:
    """How many weights a recurrence of a cell may have, as errors write it."""
    each = [str(n + _own(cell)) for n in _counts(cell)]
    return f"{', '.join(each[:-1])} or {each[-1]}"


class LayerCall(NamedTuple):
    """One layer, all its R recurrences, over all of time.

    x: [T, B, D], or [T, B, R, D] with an input per recurrence.
    weights: per recurrence w_ih [G·H, D], w_hh [G·H, P], (b_ih, b_hh [G·H]), (w_hr [P, H]), matrices [n·H, H],
        params [H], masks [1 or T, B, H]; no w_hh and b_hh where the cell is not recurrent. A W_hh of N blocks on its
        diagonal is [G·H, H/N]: row g·H + u holds what unit u reads of its block. A mask gets no gradient: where a
        backward has one for each weight, a tensor of shape [0] has its place.
    states: () for zeros, or one for each of the cell's: h [R, B, P], the others [R, B, H].
    lengths: [B] int64, reset: [T, B] bool, or None.
    cell: its name.  directions: +1 or -1 each.
    save: what is kept for backward, "gates", "recompute" or "none".
    keep_hidden: whether backward gets a copy of y, so that y may be changed in place.
    sequences: whether each state but h is returned over time, too: [T, B, R, H], zeros past a sequence's end.

    The op returns y [T, B, R·P], the states after, the sequences if asked for; and unless save is "none" what is kept:
    saved, histories, hidden. With save="gates" the sequences are the histories, which are then left out.
    """

    x: Tensor
    weights: Sequence[Tensor]
    states: Sequence[Tensor]
    lengths: Tensor | None
    reset: Tensor | None
    cell: str
    directions: Sequence[int]
    save: str = "none"
    keep_hidden: bool = False
    sequences: bool = False

    @property
    def spec(self) -> Cell:
        """The cell's descriptor."""
        return CELLS[self.cell]

    @property
    def recurrences(self) -> int:
        """R."""
        return len(self.directions)

    @property
    def hidden_size(self) -> int:
        """H."""
        return self.weights[0].shape[0] // self.spec.gates

    @property
    def width(self) -> int:
        """P: of the output of one recurrence."""
        return self.weights[1].shape[1] * self.spec.diagonal if self.spec.recurrent else self.hidden_size

    @property
    def kinds(self) -> Kinds:
        """Which weights a recurrence has. Raises RuntimeError for a number of weights that the cell cannot have."""
        count, left_over = divmod(len(self.weights), max(1, self.recurrences))
        found = None if left_over else kinds(self.spec, count)
        if found is None:
            raise RuntimeError(
                f"weights: got {len(self.weights)} tensors for {self.recurrences} recurrence(s) of a {self.spec.title},"
                f" expected {counts(self.spec)} each"
            )
        return found

    @property
    def each(self) -> list[Weights]:
        """The weights of every recurrence, by name."""
        return self.kinds.split(self.weights)

    def state_shapes(self) -> list[tuple[int, ...]]:
        """[R, B, P] of h, [R, B, H] of every other state."""
        batch = self.x.shape[1]
        widths = [self.width] + [self.hidden_size] * (len(self.spec.states) - 1)
        return [(self.recurrences, batch, width) for width in widths]

    def sequence_shapes(self) -> list[tuple[int, ...]]:
        """[T, B, R, H] of each state but h."""
        return [(*self.x.shape[:2], self.recurrences, self.hidden_size)] * (len(self.spec.states) - 1)

    @property
    def every(self) -> int:
        """Steps between two checkpoints."""
        return CHECKPOINT_EVERY

    def kept_shapes(self) -> tuple[tuple[Any, ...], list[tuple[Any, ...]], torch.dtype]:
        """What `save` keeps: the shape of `saved`, those of the histories of all states but h, and their dtype."""
        (steps, batch), recurrences, hidden = self.x.shape[:2], self.recurrences, self.hidden_size
        more = len(self.spec.states) - 1
        if self.save == "gates":
            rows = (steps, batch, recurrences)
            return (*rows, self.spec.saved, hidden), [(*rows, hidden)] * more, self.x.dtype
        # One checkpoint more than there can be, for torch.compile takes a size of 1 for a constant.
        return (0,), [(steps // self.every + 2, recurrences, batch, hidden)] * more, wide(self.x.dtype)

    def initial(self) -> list[Tensor]:
        """The states, zeros where none were given."""
        return list(self.states) or [self.x.new_zeros(shape) for shape in self.state_shapes()]


class BackwardCall(NamedTuple):
    """The gradients of a LayerCall, whose arguments it repeats.

    dy: [T, B, R·P] or None.  dstates: () or one for each state.
    hidden, saved, histories: what forward kept, or returned.
    need_dx, need_dw: whether x's and the weights' gradients are wanted.
    dsequences: () or of each state but h the gradient of its sequence, [T, B, R, H], or of shape [0] for zero.
    """

    dy: Tensor | None
    dstates: Sequence[Tensor]
    x: Tensor
    weights: Sequence[Tensor]
    states: Sequence[Tensor]
    lengths: Tensor | None
    reset: Tensor | None
    hidden: Tensor
    saved: Tensor
    histories: Sequence[Tensor]
    cell: str
    directions: Sequence[int]
    save: str
    need_dx: bool
    need_dw: bool
    dsequences: Sequence[Tensor] = ()

    @property
    def layer(self) -> LayerCall:
        """The call of forward."""
        return LayerCall(*self[2:7], *self[10:13])


class StackCall(NamedTuple):
    """A stack of layers in one direction, all with the same H and without a projection, over all of time.

    x, lengths, reset, cell, save, keep_hidden: as in LayerCall, keep_hidden of the last layer alone.
    weights, states: of each layer.  dropout: the probability for what passes between layers to be zero.
    """

    x: Tensor
    weights: Sequence[Sequence[Tensor]]
    states: Sequence[Sequence[Tensor]]
    lengths: Tensor | None
    reset: Tensor | None
    cell: str
    dropout: float = 0.0
    save: str = "none"
    keep_hidden: bool = False

    def layer(self, place: int, x: Tensor) -> LayerCall:
        """The call of one layer. x: its input."""
        keep_hidden = self.keep_hidden and place == len(self.weights) - 1
        own = (self.weights[place], self.states[place], self.lengths, self.reset)
        return LayerCall(x, *own, self.cell, (1,), self.save, keep_hidden)

    @property
    def scale(self) -> float:
        """Of what dropout leaves."""
        return 1 / (1 - self.dropout)


def all_or_none(tensors: Sequence[Tensor], number: int) -> list[Tensor | None]:
    """The tensors, one for each of this many states; None for each where none was given."""
    return [*tensors] if tensors else [None] * number


def is_absent(t: Tensor, mapped: bool = False) -> bool:
    """Whether a tensor stands for none: the ops, which return and take lists, mark one by the shape [0]. mapped: it has
    a dimension more, of vmap's."""
    return t.dim() == 1 + mapped and t.numel() == 0


def wide(dtype: torch.dtype) -> torch.dtype:
    """In what states and sums are kept: float32, float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32
