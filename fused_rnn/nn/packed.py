"""PackedSequence to padded [T, B, ·] and back by one index, so that each gradient is one gather or scatter."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction

from fused_rnn import checks
from fused_rnn.reference.loop import without_autocast


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
            with without_autocast(data):  # under which index_copy knows not all dtypes
                data = data.new_zeros(self.steps * self.batch, data.size(1)).index_copy(0, self.rows, data)
        return data.view(self.steps, self.batch, data.size(1))

    def pack(self, padded: Tensor, backend: str | None) -> Tensor:
        """padded [T, B, P], a result of this backend → [sum of lengths, P]. Differentiable."""
        if self.lengths is not None:
            return padded.flatten(0, 1).index_select(0, self.rows)
        steps, batch, width = padded.shape
        flat = torch.ops.aten._unsafe_view if is_unshared(padded, backend) else torch.reshape
        return flat(padded, (steps * batch, width))


def is_unshared(result: Tensor, backend: str | None) -> bool:
    """Whether nobody but the caller will hold a result of the layers: then it may get another shape without becoming a
    view, on which detach_() and the like would fail, as they do not on torch's.

    Our Functions keep a copy for backward, and the reference stacks its steps; torch's kernels may keep the result.
    """
    if not checks.is_as_it_seems(result):
        return False
    return not result.requires_grad or backend == "reference" or isinstance(result.grad_fn, BackwardCFunction)
