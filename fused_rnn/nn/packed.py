"""PackedSequence to padded [T, B, ·] and back by one index, so that each gradient is one gather or scatter."""

from __future__ import annotations

import torch
from torch import Tensor


class Layout:
    """Where the rows of a packed sequence lie in the padded [T, B].

    batch_sizes: [T] int64 on the CPU, as in PackedSequence: how many sequences reach step t. The padded batch has the
    packed order, longest first. `lengths` is [B] int64 on the CPU, or None where all are equally long: then what is
    packed is padded already.
    """

    def __init__(self, batch_sizes: Tensor, device: torch.device) -> None:
        self.steps: int = batch_sizes.size(0)
        self.batch: int = int(batch_sizes[0])
        self.lengths: Tensor | None = None
        if int(batch_sizes[-1]) != self.batch:
            valid = torch.arange(self.batch, device=batch_sizes.device) < batch_sizes.unsqueeze(1)  # [T, B]
            self.lengths = valid.sum(0)
            self.rows: Tensor = valid.flatten().nonzero().squeeze(1).to(device)

    def pad(self, data: Tensor) -> Tensor:
        """data [sum of lengths, D] → [T, B, D], zero past each sequence's end. Differentiable."""
        if self.lengths is not None:
            data = data.new_zeros(self.steps * self.batch, data.size(1)).index_copy(0, self.rows, data)
        return data.view(self.steps, self.batch, data.size(1))

    def pack(self, padded: Tensor) -> Tensor:
        """padded [T, B, P] → [sum of lengths, P]. Differentiable."""
        flat = padded.flatten(0, 1)
        return flat if self.lengths is None else flat.index_select(0, self.rows)
