"""What a cell is: data the loops read, and one pointwise step. A new cell touches no loop."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

from torch import Tensor

# (gates of the input side [B, G·H], of the recurrent side [B, G·H], h [B, P], c [B, H] or None) → (h' [B, H], c' or
# None). The biases are already in: b_ih in the input side, b_hh in the recurrent one. A projection of h' is the loop's.
Step = Callable[[Tensor, Tensor, Tensor, Tensor | None], tuple[Tensor, Tensor | None]]


class Spec(NamedTuple):
    """A cell.

    gates: G, the pre-activations of width H.  stored: S, the vectors kept per step for backward.
    has_c: whether there is a second state beside h.  step: the formula.
    """

    name: str
    gates: int
    stored: int
    has_c: bool
    step: Step


def unknown(cell: str, known: Iterable[str]) -> str | None:
    """Why a backend with kernels for these cells cannot run this one; None where it can."""
    return None if cell in known else f"it knows the cells {', '.join(known)}, not {cell!r}"
