"""What a cell is: data the loops read, and one pointwise step. A new cell touches no loop."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

# (gates of the input side [B, G·H], of the recurrent side [B, G·H], h [B, H or P], c [B, H] or None) → (h' [B, H], c' or None).
# The biases are already in: b_ih in the input side, b_hh in the recurrent one. A projection of h' is the loop's.
Step = Callable[[Tensor, Tensor, Tensor, Tensor | None], tuple[Tensor, Tensor | None]]


class Spec(NamedTuple):
    """A cell: `gates` G pre-activations of width H, `stored` S vectors kept per step for backward, `has_c` a second state."""

    name: str
    gates: int
    stored: int
    has_c: bool
    step: Step
