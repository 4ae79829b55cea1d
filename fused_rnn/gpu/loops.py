"""What a layer needs of a backend: its loops over time, what they are told, and the buffers they are given."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from fused_rnn.cells import Cell


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
    window: steps first .. last - 1 in each recurrence's own order; gx, given, saved and the histories hold these alone,
    a recurrence that runs backwards in time the last ones; y, h and dgates hold all of time, t ascending.
    "wide" is the accumulation dtype: float32, float64 for float64.
    carried: the states that a loop carries wide, h first if the cell reads it, then all others.
    A history is a state over time, for each state but h, whose history is y; zeros past a sequence's end.
    params: the cell's vectors of one number per unit, NP of them, in x's dtype; None where it has none.
    matrices: blocks of H rows that it has beside W_hh, N of them; None where it has none.
    masks: numbers that the units of a row are given, in x's dtype: the same in every step, or T of them, t ascending.
    A cell that is not recurrent has no W_hh: w, bias and given are None, a gate is its input product, and h reaches the
    next step, and its gradient the step before, by the formula alone. Its units know nothing of each other.
    """

    def forward(
        self,
        *,
        gx: Tensor,  # [T, B, R, G, H]  input product and biases, less `bias`
        w: Tensor | None,  # [R, G, H, H]  W_hh
        bias: Tensor | None,  # [R, apart, H]  of the recurrent sides that enter the cell apart, None if there are none
        params: Tensor | None,  # [R, NP, H]
        h0: Tensor,  # [R, B, H]
        carried: list[Tensor],  # [R, B, H] wide each: in the first ones, out the last
        y: Tensor,  # out: [T, B, R, H], zeros past a sequence's end
        h_n: Tensor,  # out: [R, B, H]
        saved: Tensor | None,  # out: [T, B, R, S, H], zeros past the end
        histories: list[Tensor],  # out: [T, B, R, H] each, or none of them, with saved, with checkpoints or alone
        checkpoints: list[Tensor],  # out: [>= ceil(T / every), R, B, H] wide each, or none: row k what enters k * every
        every: int,
        matrices: Tensor | None = None,  # [R, N, H, H]
        masks: Sequence[Tensor] = (),  # [R, 1 or T, B, H] each
    ) -> None: ...

    def replay(
        self,
        *,
        gx: Tensor,  # [window, B, R, G, H]
        given: Tensor | None,  # [window, B, R, G, H]  the recurrent product, ready-made
        bias: Tensor | None,  # [R, apart, H]
        params: Tensor | None,  # [R, NP, H]
        h0: Tensor,  # [R, B, H]
        hidden: Tensor,  # [T, B, R, H]  y
        carried: list[Tensor],  # [R, B, H] wide each: all states but h, as they enter the window; may be overwritten
        saved: Tensor,  # out: [window, B, R, S, H]
        histories: list[Tensor],  # out: [window, B, R, H] wide each
        window: tuple[int, int],
        matrices: Tensor | None = None,
        masks: Sequence[Tensor] = (),
    ) -> None: ...

    def backward(
        self,
        *,
        dy: Tensor | None,  # [T, B, R, H]; what it holds past a sequence's end is not to be used
        dsequences: list[Tensor],  # [T, B, R, H] of each state but h, or none: as dy is of h
        w: Tensor | None,  # [R, G, H, H]
        params: Tensor | None,  # [R, NP, H]
        states: list[Tensor],  # h_t [T, B, R, H], then the histories [window, B, R, H]
        first: list[Tensor],  # [R, B, H] each: what enters the first of these
        saved: Tensor | None,  # [window, B, R, S, H]
        dgates: Tensor,  # out: [T, B, R, G + apart + N, H], zeros past the end
        dstates: list[Tensor],  # [R, B, H] wide each, in: gradients of the states after the window; out: before it
        dparams: Tensor | None,  # [R, B, NP, H] wide, in and out: what each step gives the params is added
        window: tuple[int, int] | None = None,  # a call for each, from the last window to the first
        matrices: Tensor | None = None,
        masks: Sequence[Tensor] = (),
    ) -> None: ...
