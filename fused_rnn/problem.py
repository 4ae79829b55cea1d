"""What dispatch and the backends know of a call before they run it."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Problem(NamedTuple):
    """A stack of layers to run. A named tuple: it is built on every call, at a third of a frozen dataclass' cost.

    Of T only `single_step` is kept, so that nothing chosen here can make torch.compile specialise on the length.
    """

    cell: str
    dtype: torch.dtype
    device: str  # the device's type
    single_step: bool  # T == 1
    batch: int
    input_size: int
    hidden_size: int
    width: int  # P: of the output of one recurrence
    layers: int
    recurrences: int  # R, of each layer
    bias: bool
    needs_grad: bool
    forward_ad: bool  # forward-mode differentiation is under way
    save: str
    lengths: bool
    reset: bool
    transformed: bool = False  # a torch.func transform is under way
    tf32: bool = False  # on a GPU: float32's products may round their operands to TF32
    functionalized: bool = False  # torch.func's functionalize is under way, and so is its grad
    sequences: bool = False  # every state is returned over time
