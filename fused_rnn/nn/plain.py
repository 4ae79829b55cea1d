"""Which calls the modules run themselves, those on plain tensors; all others go to torch.nn's own forward."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, ClassVar

from torch import Tensor, is_grad_enabled, nn
from torch._C import _are_functorch_transforms_active, _is_any_autocast_enabled, _is_tracing
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.compiler import is_compiling

from fused_rnn import ops
from fused_rnn.cells import CELLS
from fused_rnn.dispatch import BACKENDS

# The op for a single step, None where the extension is not built, and its number for each cell. It is the builtin under
# OpOverload.__call__: a frame of Python less, 0.25 µs of 4.
STEP: Callable[..., list[Tensor]] | None
STEP = ops.step._op if ops.MISSING is None else None  # type: ignore[attr-defined]
CELL_CODES = {name: code for code, name in enumerate(CELLS)}

# Any other subclass (ExpandedWeight of per-sample gradients, DTensor, a quantized weight) gives torch's operators a
# meaning of its own and knows nothing of our ops. Fake and functional tensors are how torch traces; our ops know them.
PLAIN = frozenset((Tensor, nn.Parameter, nn.Buffer, FakeTensor, FunctionalTensor))


class Fused(nn.Module):
    """What the sequence modules and the cells share: the extra argument, and the way to the twin.

    The twin is torch.nn's class of the same name. A call out of the ordinary goes to the twin's own forward, which
    raises torch's error for it, in the words of the torch installed, or computes what only torch's operators can.
    """

    # On the class too, for modules whose state was saved by torch.nn, which has no such attribute.
    backend: str | None = None

    _twin: ClassVar[type[nn.Module]]
    _states: ClassVar[int] = 1  # how many states a step has: h, or h and c

    def _as_twin(self, input: Any, hx: Any, extras: bool = False) -> Any:
        """The twin's result, if it has one. extras: lengths or reset, of which it knows nothing, were given."""
        result = self._twin.forward(self, input, hx)
        if extras or self.backend not in (None, "torch"):
            raise NotImplementedError(
                f"{type(self).__name__} with lengths, reset or backend={self.backend!r} takes plain tensors alone, "
                f"got an input of type {type(input).__name__} and parameters of "
                f"type {', '.join({type(p).__name__ for p in self.parameters()})}"
            )
        return result

    def __prepare_scriptable__(self) -> Any:
        """torch.jit.script compiles the twin in this module's place, on the same weights."""
        if "_twin" not in vars(type(self)):  # a class of the user's: his own forward is to be scripted
            return self
        state = dict(vars(self))
        for extra in ("backend", "save"):
            state.pop(extra, None)
        twin = self._twin.__new__(self._twin)
        twin.__setstate__(state)
        return twin


def check_backend(backend: str | None) -> None:
    """Raises ValueError for a backend of an unknown name."""
    if backend is not None and backend not in BACKENDS:
        raise ValueError(f"backend: got {backend!r}, expected None or one of {', '.join(map(repr, BACKENDS))}")


def may_step() -> bool:
    """Whether fused_rnn::step, which knows no gradient, autocast, batching or tracing, may be all of a call."""
    return not (
        is_grad_enabled()
        or is_compiling()
        or _is_any_autocast_enabled()
        or _are_functorch_transforms_active()
        or _is_tracing()
    )


def is_jit_tracing() -> bool:
    """Whether torch.jit.trace is recording. It shall find torch's own operators, whose gradient it can save, which any
    runtime and the ONNX exporter know, and which take any length."""
    return not is_compiling() and _is_tracing()


def are_plain(tensors: Iterable[object]) -> bool:
    """Whether every one is a plain tensor."""
    for t in tensors:  # noqa: SIM110 - a generator would cost as much again, on every call
        if type(t) not in PLAIN:
            return False
    return True
