"""PackedSequence to padded [T, B, ·] and back by one index, so that each gradient is one gather or scatter."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction

from fused_rnn import checks
from fused_rnn.reference.loop import without_autocast

_flat = torch.ops.aten._unsafe_view.default  # looked up once, as in ops.py


class Layout:
    """Where the rows of a packed sequence lie in the padded [T, B].

    data, batch_sizes: [sum of lengths, ·] and [T] int64 on the CPU, as in PackedSequence: how many sequences reach step
    t. batch: B, if it is known; then the rows are looked up when they are first asked for. The padded batch has the
    packed order, longest first. `lengths` is [B] int64 on the CPU, or None where all are equally long: then what is
    packed is padded already.
    """

    def __init__(self, data: Tensor, batch_sizes: Tensor, batch: int | None = None) -> None:
        self.steps: int = batch_sizes.size(0)
        self.batch: int = int(batch_sizes[0]) if batch is None else batch
        self.lengths: Tensor | None = None
        self._batch_sizes, self._device = batch_sizes, data.device
        self._is_whole = data.size(0) == self.steps * self.batch
        if batch is None:
            self._look_up()

    def _look_up(self) -> None:
        if not self._is_whole and self.lengths is None:
            sizes = self._batch_sizes
            valid = torch.arange(self.batch, device=sizes.device) < sizes.unsqueeze(1)  # [T, B]
            self.lengths = valid.sum(0)
            self._rows = valid.flatten().nonzero().squeeze(1).to(self._device)

    def pad(self, data: Tensor) -> Tensor:
        """data [sum of lengths, D] → [T, B, D], zero past each sequence's end. Differentiable."""
        if not self._is_whole:
            self._look_up()
            with without_autocast(data):  # under which index_copy knows not all dtypes
                data = data.new_zeros(self.steps * self.batch, data.size(1)).index_copy(0, self._rows, data)
        return data.view(self.steps, self.batch, data.size(1))

    def pack(self, padded: Tensor, unshared: bool) -> Tensor:
        """padded [T, B, P] → [sum of lengths, P]. Differentiable. unshared: nobody else holds it (`is_unshared`)."""
        if not self._is_whole:
            return padded.flatten(0, 1).index_select(0, self._rows)
        shape = (self.steps * self.batch, padded.size(2))
        return _flat(padded, shape) if unshared else padded.reshape(shape)


def is_unshared(result: Tensor, backend: str | None) -> bool:
    """Whether nobody but the caller will hold a result of the layers: then it may get another shape without becoming a
    view, on which detach_() and the like would fail, as they do not on torch's.

    Our Functions keep a copy for backward, and the reference stacks its steps; torch's kernels may keep the result.
    """
    if not checks.is_as_it_seems(result):
        return False
    return not result.requires_grad or backend == "reference" or isinstance(result.grad_fn, BackwardCFunction)
