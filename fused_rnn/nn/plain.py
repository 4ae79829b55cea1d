"""Which calls the modules run themselves: those on plain tensors. All others go to torch.nn's own forward."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn, strided
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor

from fused_rnn import ops

# A step, or a layer in one direction, without gradient and without the dispatcher; None for any other call.
FAST_PATH = ops.fast_path
STEPPING = (None, "cpu")  # the backends that it may stand for
# Any other subclass (ExpandedWeight of per-sample gradients, DTensor, a quantized weight) gives torch's operators a
# meaning of its own and knows nothing of our ops. Fake and functional tensors are how torch traces; our ops know them.
PLAIN = frozenset((Tensor, nn.Parameter, nn.Buffer, FakeTensor, FunctionalTensor))


def are_plain(tensors: Iterable[Any]) -> bool:
    """Whether every one is a plain tensor: not a sparse one either, of which torch's operators know some."""
    for t in tensors:  # noqa: SIM110 - a generator would cost as much again, on every call
        if type(t) not in PLAIN or t.layout is not strided:
            return False
    return True


def is_plain_hx(hx: object, states: int) -> bool:
    """Whether hx is as many plain tensors as a step has states, or None."""
    if hx is None:
        return True
    if states == 1:
        return are_plain((hx,))
    return isinstance(hx, (tuple, list)) and len(hx) == states and are_plain(hx)
