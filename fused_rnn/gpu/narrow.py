"""W_hh in fewer bytes, for loops without gradient: its values, and what they stand for."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fused_rnn.cells import Cell


class Narrow(NamedTuple):
    """What the W_hh of a layer are kept in. kind: "bf16" or "int8".  scale: of int8, [R, G, H] float32, else None."""

    kind: str
    scale: Tensor | None

    @property
    def dtype(self) -> torch.dtype:
        """Of the values."""
        return torch.int8 if self.kind == "int8" else torch.bfloat16


def refusal_of_narrow(cell: Cell) -> str | None:
    """Why the CUDA loops cannot keep a cell's W_hh in fewer bytes; None where they can."""
    if cell.diagonal > 1:
        return "narrow weights of a W_hh of blocks on its diagonal"
    if cell.staged:
        return "narrow weights of a cell that sums over its units, or has matrices of its own"
    return None


def narrowed(w: Tensor, kind: str) -> tuple[Tensor, Tensor | None]:
    """A matrix [rows, columns] in fewer bytes, and of int8 the scale of each row, [rows] float32, else None.

    "bf16": to nearest, ties to even. "int8": 127ths of the row's largest magnitude, likewise. As csrc/cpu/prepack.h.
    """
    if kind == "bf16":
        return w.to(torch.bfloat16), None
    wide = w.float()
    scale = wide.abs().amax(1) / 127
    units = (wide / scale.unsqueeze(1)).round()
    return units.masked_fill_(scale.unsqueeze(1) == 0, 0).to(torch.int8), scale


def widened(values: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """What the numbers of such a matrix, or of several, stand for. values: [..., rows, columns], scale: [..., rows]."""
    return (values if scale is None else values * scale.unsqueeze(-1)).to(dtype)
