"""The flat list of a layer's weights, by kind, and what of it goes into the loops and into the products around them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fused_rnn.gpu.loops import Cell


def aligned(tensor: Tensor) -> Tensor:
    """Kernels are compiled for addresses that 16 divides; a view into the middle of a buffer may have another one."""
    tensor = tensor.contiguous()
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()


@dataclass(frozen=True)
class Weights:
    """Per recurrence: w_ih [G·H, D], w_hh [G·H, P], b_ih, b_hh [G·H] or none at all, w_hr [P, H] or none at all."""

    w_ih: list[Tensor]
    w_hh: list[Tensor]
    b_ih: list[Tensor]
    b_hh: list[Tensor]
    w_hr: list[Tensor]

    @classmethod
    def split(cls, flat: Sequence[Tensor], recurrences: int) -> Weights:
        count = len(flat) // recurrences
        columns = [list(flat[i::count]) for i in range(count)]
        b_ih, b_hh = columns[2:4] if count >= 4 else ([], [])
        return cls(columns[0], columns[1], b_ih, b_hh, columns[-1] if count in (3, 5) else [])

    def recurrent(self, cell: Cell) -> Tensor:
        """What a loop multiplies by: [R, G, H, H], a view where there is but one W_hh and no projection."""
        each = [torch.mm(w, p) for w, p in zip(self.w_hh, self.w_hr, strict=True)] if self.w_hr else self.w_hh
        hidden = each[0].shape[1]
        w = each[0].contiguous() if len(each) == 1 else torch.stack(each)
        return aligned(w.view(len(each), cell.gates, hidden, hidden))

    def input_bias(self, r: int, cell: Cell) -> Tensor | None:
        """What is added before the cell: b_ih + b_hh, less the bias that the cell adds itself."""
        if not self.b_ih:
            return None
        if not cell.hidden_bias:
            return self.b_ih[r] + self.b_hh[r]
        hidden = self.b_hh[r].shape[0] // cell.gates
        bias = self.b_ih[r].clone()
        bias[:-hidden] += self.b_hh[r][:-hidden]
        return bias

    def hidden_bias(self, cell: Cell) -> Tensor | None:
        """b_hh of the last gate, [R, H], zeros where there are no biases; None if the cell has none inside."""
        if not cell.hidden_bias:
            return None
        hidden, recurrences = self.w_hh[0].shape[1], len(self.w_hh)
        if not self.b_hh:
            return self.w_hh[0].new_zeros(recurrences, hidden)
        return torch.stack([b[-hidden:] for b in self.b_hh])
