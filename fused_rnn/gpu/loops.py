"""What a layer needs of a backend: its loops over time, what they are told, and the buffers they are given."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from fused_rnn import cells as specs


@dataclass(frozen=True)
class Cell:
    """What a layer and its loops know of a cell.

    gates: G.  stored: S vectors kept for backward.  gradients: DG vectors made by backward. DG is G + 1 where the last
    gate's input side and recurrent side differ: then the last gate's input side comes first, so that the input side is
    the first G of them, and the recurrent side the last G.
    """

    name: str
    gates: int
    stored: int
    gradients: int
    has_c: bool  # a second state, c
    has_state: bool  # something is carried in the accumulation dtype: c of LSTM, h of GRU
    hidden_bias: bool  # the last gate's recurrent bias stays inside the cell


def _cell(spec: specs.Spec) -> Cell:
    apart = spec.name == "gru"  # its reset gate multiplies the recurrent side of n alone
    return Cell(spec.name, spec.gates, spec.stored, spec.gates + apart, spec.has_c, spec.has_c or apart, apart)


CELLS: dict[str, Cell] = {name: _cell(spec) for name, spec in specs.CELLS.items()}


@dataclass(frozen=True)
class Layer:
    """What all launches of one layer share. lengths: [B] int64, reset: [T, B] int32, or None."""

    cell: Cell
    steps: int
    batch: int
    hidden: int
    directions: tuple[int, ...]
    lengths: Tensor | None
    reset: Tensor | None

    @property
    def recurrences(self) -> int:
        return len(self.directions)


class Loops(Protocol):
    """A backend's loops over time, for one layer and one call of forward or backward. They write what they are given.

    Every tensor is contiguous and starts at an address that 16 divides.
    window: steps first .. last - 1 in each recurrence's own order; gx, given, saved, a cell's c hold these alone, a
    recurrence that runs backwards in time the last ones; y, h and dgates hold all of time, t ascending.
    "wide" is the accumulation dtype: float32, float64 for float64.
    """

    def forward(
        self,
        *,
        gx: Tensor,  # [T, B, R, G, H]  input product and biases, less `bias`
        w: Tensor,  # [R, G, H, H]      W_hh
        bias: Tensor | None,  # [R, H]  of the last gate's recurrent side, of a cell with hidden_bias
        h0: Tensor,  # [R, B, H]
        state: Tensor | None,  # [R, B, H] wide, of a cell with has_state: in the first one, out the last
        y: Tensor,  # out: [T, B, R, H], zeros past a sequence's end
        h_n: Tensor,  # out: [R, B, H]
        saved: Tensor | None,  # out: [T, B, R, S, H], zeros past the end
        cells: Tensor | None,  # out: [T, B, R, H], of a cell with c
        checkpoints: Tensor | None,  # out: [>= ceil(T / every), R, B, H] wide: row k the c that enters step k * every
        every: int,
    ) -> None: ...

    def replay(
        self,
        *,
        gx: Tensor,  # [window, B, R, G, H]
        given: Tensor,  # [window, B, R, G, H]  the recurrent product, ready-made
        bias: Tensor | None,  # [R, H]
        h0: Tensor,  # [R, B, H]
        hidden: Tensor,  # [T, B, R, H]  y
        state: Tensor | None,  # [R, B, H] wide, of a cell with c: the one entering the window; may be overwritten
        saved: Tensor,  # out: [window, B, R, S, H]
        cells: Tensor | None,  # out: [window, B, R, H] wide
        window: tuple[int, int],
    ) -> None: ...

    def backward(
        self,
        *,
        dy: Tensor | None,  # [T, B, R, H]; what it holds past a sequence's end is not to be used
        w: Tensor,  # [R, G, H, H]
        states: Tensor,  # c_t [window, B, R, H] of a cell with c, else h_t [T, B, R, H]
        first_state: Tensor,  # [R, B, H]  what enters the first of these
        saved: Tensor | None,  # [window, B, R, S, H]
        dgates: Tensor,  # out: [T, B, R, DG, H], zeros past the end
        dh: Tensor,  # [R, B, H] wide, in: gradient of h after the window; out: before it
        dc: Tensor | None,  # likewise of c
        window: tuple[int, int] | None = None,  # a call for each, from the last window to the first
    ) -> None: ...


def wide(dtype: torch.dtype) -> torch.dtype:
    """In what states and their gradients are summed up."""
    return torch.float64 if dtype == torch.float64 else torch.float32
