"""Which calls the modules run themselves: those on plain tensors. All others go to torch.nn's own forward."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn, strided

# What changes the meaning of operators, and fused_rnn::step knows none of. Each is asked on every step that it runs, in
# 30 to 70 ns. What else may watch a call finds the op, by way of the dispatcher; ops._WATCHERS lists it all.
from torch._C import _are_functorch_transforms_active as is_functorch
from torch._C import _is_any_autocast_enabled as is_autocasting
from torch._C import _is_tracing as is_tracing
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.autograd import forward_ad

from fused_rnn import ops
from fused_rnn.transforms.op_gradient import is_jit_tracing

# The op for a single step, None where the extension is not built, and its number for each cell. It is the builtin under
# OpOverload.__call__: a frame of Python less, 0.25 µs of 4.
STEP: Callable[..., list[Tensor]] | None
STEP = ops.step._op if ops.MISSING is None else None  # type: ignore[attr-defined]
CELL_CODES = ops.CODES
# The same without the dispatcher, in half the time. It returns None for a call that is another one, or STEP's.
FAST_PATH = ops.fast_path
STEPPING = (None, "cpu")  # the backends that it may stand for
# Up to this many numbers in its input the op is the fastest (1.1 to 3.3 times torch's cells); beyond, dispatch is asked
# what is, which takes 5 µs of 150 or more. Intel Xeon with AMX, 1 thread, November 2026.
STEP_SIZE = 4096

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


def is_ordinary_mode() -> bool:
    """Whether nothing is on that fused_rnn::step knows nothing of: tracing, autocast, a transform, forward-mode AD."""
    return not (is_tracing() or is_autocasting() or is_functorch() or forward_ad._current_level >= 0)


__all__ = [
    "CELL_CODES",
    "FAST_PATH",
    "PLAIN",
    "STEP",
    "STEPPING",
    "STEP_SIZE",
    "are_plain",
    "is_autocasting",
    "is_functorch",
    "is_jit_tracing",
    "is_ordinary_mode",
    "is_plain_hx",
    "is_tracing",
]
