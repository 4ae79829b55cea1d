"""torch.nn's class of the same name in a module's place: for calls that only torch's operators run, and for its errors.

What is refused reaches no kernel, torch's included, which check less than we do: they read past the end of a state
that is too small. Torch's words for it come from the counterpart's own forward on stand-ins.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FunctionType
from typing import Any

import torch
from torch import _VF, Tensor, nn
from torch._C import _is_any_autocast_enabled as is_autocasting
from torch._C import _is_tracing as is_tracing
from torch._subclasses.fake_tensor import FakeTensor
from torch.compiler import is_compiling
from torch.nn.utils.rnn import PackedSequence

from fused_rnn import checks
from fused_rnn.cells import CELLS
from fused_rnn.nn.base import Fused


def run_counterpart(module: Fused, weights: Sequence[Tensor], input: Any, hx: Any, extras: bool = False) -> Any:
    """The counterpart's result for a call on other than plain tensors, or its error.

    extras: lengths or reset were given. Raises NotImplementedError where the counterpart would have a result, but not
    the one that was asked for, and a TypeError of ours for what is no tensor: on that the counterpart does not decide,
    but stumbles (no attribute 'dim').
    """
    try:
        with _untraced():
            check_call(module, weights, input, hx)
    except ValueError as error:
        refuse(module, weights, input, hx, error)
    if extras or module._fused_counterpart is None or module._fused_backend not in (None, "torch"):
        with_these = f" with lengths, reset or backend={module._fused_backend!r}" if module._fused_counterpart else ""
        raise NotImplementedError(
            f"{type(module).__name__}{with_these} takes plain tensors "
            f"alone, got an input of type {type(input).__name__} and parameters of "
            f"type {', '.join({type(p).__name__ for p in module.parameters()})}"
        )
    return module._fused_counterpart.forward(module, input, hx)


def refuse(module: Fused, weights: Sequence[Tensor], input: Any, hx: Any, error: Exception) -> Any:
    """Raise what torch's module raises for an argument that we refused; where it would take it, or hx seems to be
    another argument, our own error."""
    if not is_compiling() and not _hint(module, hx):  # nothing here can be traced
        with _untraced():
            _raise_in_torchs_words(module, weights, input, hx)
    raise error


def _hint(module: Fused, hx: Any) -> str:
    """What an error adds where hx seems to be lengths or reset, which a cell does not have."""
    return "" if isinstance(module, nn.RNNCellBase) else checks.misplaced(hx)


def check_call(module: Fused, weights: Sequence[Tensor], input: Any, hx: Any) -> None:
    """Whether a kernel may see a call: shapes, dtypes and devices fit together, whatever the tensors' types are.

    Raises TypeError for what is no tensor, ValueError for a tensor that does not fit.
    """
    data = input.data if isinstance(input, PackedSequence) else input
    checks.check_tensor("input", data)
    batch = _check_input(module, input)
    hidden, width = _check_weights(module, weights, data)
    if hx is None:
        return
    is_cell = isinstance(module, nn.RNNCellBase)
    named = [("hx", hx, width)]
    if module._fused_states > 1:
        names = [f"{name}_0" for name in CELLS[module._fused_cell].states]
        checks.check_pair(hx, f"({', '.join(names)})", is_cell, len(names))
        sizes = [width, *[hidden] * (len(names) - 1)]
        named = list(zip(names, hx, sizes, strict=True))
    rows = () if is_cell else (state_rows(module),)
    for name, state, size in named:
        shape = (*rows, *batch, size)
        hint = _hint(module, hx)
        checks.check_tensor(name, state, checks.shape_text(shape) + hint)
        check_state(name, state, data, shape, getattr(input, "sorted_indices", None), hint)


def check_state(
    name: str, state: Tensor, data: Tensor, shape: tuple[int, ...], sorted_indices: Tensor | None, hint: str
) -> None:
    """A state of this shape; of at least this batch where it is to be put into a packed sequence's order, which chooses
    from it as in torch."""
    fits = state.shape == shape
    if sorted_indices is not None and state.dim() == 3:
        fits = state.size(1) >= shape[1] and (state.size(0), state.size(2)) == (shape[0], shape[2])
    if not fits:
        raise ValueError(f"{name}: got {checks.shape_text(state.shape)}, expected {checks.shape_text(shape)}{hint}")
    if (state.dtype != data.dtype and not is_autocasting()) or state.device != data.device:
        raise ValueError(f"{name}: got {state.dtype} on {state.device}, expected input's {data.dtype} on {data.device}")


def check_packed(input: PackedSequence) -> None:
    """Whether batch_sizes are those of the data: never growing, with a row for each. Raises ValueError."""
    data, sizes = input.data, input.batch_sizes
    if data.dim() != 2:
        raise ValueError(f"input: got packed data of {data.dim()} dimensions, expected two")
    if sizes.dim() != 1 or sizes.dtype != torch.int64 or not sizes.is_cpu or len(sizes) == 0:
        got = f"{checks.shape_text(sizes.shape)} of {sizes.dtype} on {sizes.device}"
        hint = ": nothing exports packing, give the padded batch and lengths=" if isinstance(sizes, FakeTensor) else ""
        raise ValueError(f"input.batch_sizes: got {got}, expected [T] of torch.int64 on the CPU{hint}")
    if is_compiling():
        return
    counts = sizes.tolist()
    if counts != sorted(counts, reverse=True) or counts[-1] < 0 or sum(counts) != data.size(0):
        raise ValueError(
            f"input.batch_sizes: got {counts}, expected sizes that never grow and sum to the data's {data.size(0)} rows"
        )
    for name, indices in (("sorted_indices", input.sorted_indices), ("unsorted_indices", input.unsorted_indices)):
        if indices is not None and indices.shape != (counts[0],):
            raise ValueError(f"input.{name}: got {checks.shape_text(indices.shape)}, expected [B] = [{counts[0]}]")


def state_rows(module: Any) -> int:
    """L·R, the rows of a state."""
    return int(module.num_layers) * _directions(module)


def _check_input(module: Any, input: Any) -> tuple[int, ...]:
    """The batch's shape: (B,), or () where it is unbatched."""
    if isinstance(input, PackedSequence):
        if isinstance(module, nn.RNNCellBase):
            raise TypeError("input: got a PackedSequence, expected a tensor")
        check_packed(input)
        return (int(input.batch_sizes[0]),)
    dims, unbatched = input.dim(), 1 if isinstance(module, nn.RNNCellBase) else 2
    if dims not in (unbatched, unbatched + 1):
        raise ValueError(f"input: got {dims} dimensions, expected {unbatched} or {unbatched + 1}")
    if dims == unbatched:
        return ()
    return (input.size(0 if unbatched == 1 or module.batch_first else 1),)


def _check_weights(module: Any, weights: Sequence[Tensor], data: Tensor) -> tuple[int, int]:
    """(H, P) of weights that fit each other and the input."""
    sizes = _check_shapes(module, weights, data.size(-1))
    if not is_autocasting():  # which gives them its own dtype
        checks.check_dtypes(data, weights)
    return sizes


def _check_shapes(module: Any, weights: Sequence[Tensor], input_size: int) -> tuple[int, int]:
    is_cell = isinstance(module, nn.RNNCellBase)
    layers, recurrences, heads = (1, 1, 1) if is_cell else (module.num_layers, _directions(module), module._fused_heads)
    sizes = checks.check_shapes(module._fused_cell, weights, input_size, layers, recurrences * heads)
    return sizes[0] * heads, sizes[1] * heads


def _directions(module: Any) -> int:
    return 2 if module.bidirectional else 1


@contextmanager
def _untraced() -> Iterator[None]:
    """torch.jit.trace sees nothing of what is done here."""
    if is_compiling() or not is_tracing():
        yield
        return
    state = torch._C._get_tracing_state()
    torch._C._set_tracing_state(None)  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch._C._set_tracing_state(state)  # type: ignore[attr-defined]


class _NothingToSay(Exception):
    """Torch's checks let a call pass."""


def _raise_in_torchs_words(module: Any, weights: Sequence[Tensor], input: Any, hx: Any) -> None:
    """Run the counterpart's forward on stand-ins, with another _VF at the point where its checks in Python end."""
    if module._fused_counterpart is None:
        _raise_in_words_of_the_base(module, input, hx)
        return
    forward = module._fused_counterpart.forward
    if not isinstance(forward, FunctionType) or "_VF" not in forward.__globals__:  # somebody's own
        return
    if isinstance(input, PackedSequence) and input.data.dim() == 2:
        check_packed(input)  # nothing of torch's reads batch_sizes that are wrong
    scope = {**forward.__globals__, "_VF": _Kernels(module, weights, input)}
    checks_alone = FunctionType(forward.__code__, scope, "forward", forward.__defaults__, forward.__closure__)
    try:
        with torch.no_grad():
            checks_alone(module, _stand_in(input), _stand_in(hx))
    except _NothingToSay:
        pass


def _raise_in_words_of_the_base(module: Any, input: Any, hx: Any) -> None:
    """Torch's words for sizes, by the checks that its modules have in Python."""
    data, sizes = (input.data, input.batch_sizes) if isinstance(input, PackedSequence) else (input, None)
    if sizes is None and data.dim() not in (2, 3):
        raise ValueError(f"{type(module).__name__}: Expected input to be 2D or 3D, got {data.dim()}D instead")
    states = [] if hx is None else _flatten(hx)
    dims = 3 if sizes is not None else data.dim()
    if any(state.dim() != dims for state in states):
        batch = "unbatched 2-D" if dims == 2 else "batched 3-D"
        got = ", ".join(f"{state.dim()}-D" for state in states)
        got = f"{got} tensor" if len(states) == 1 else f"({got}) tensors"
        raise RuntimeError(f"For {batch} input, hx should also be {dims}-D but got {got}")
    if dims == 2:
        data, states = data.unsqueeze(0 if module.batch_first else 1), [state.unsqueeze(1) for state in states]
    module.check_input(data, sizes)
    if states:
        module.check_forward_args(data, states if module._fused_states > 1 else states[0], sizes)


class _Kernels:
    """In the place of torch._VF: passes stand-ins on to it, for its words alone, where that is safe."""

    def __init__(self, module: Any, weights: Sequence[Tensor], input: Any) -> None:
        self._module, self._weights, self._input = module, weights, input

    def __getattr__(self, name: str) -> Callable[..., Any]:
        sizes = getattr(self._input, "batch_sizes", None)

        def kernel(*args: Any) -> None:
            if self._is_safe(args):
                getattr(_VF, name)(*(arg if arg is sizes else _stand_in(arg) for arg in self._shortened(args)))
            raise _NothingToSay

        return kernel

    def _is_safe(self, args: tuple[Any, ...]) -> bool:
        """Whether what is wrong in this call is what the kernel's operators check.

        Of weights that do not fit each other it takes parts that there are not, of states rows that there are not, and
        states of four dimensions crash it; oneDNN, which runs an LSTM on batches of equal lengths, reads states as if
        they had the input's dtype and sizes.
        """
        module, packed = self._module, isinstance(self._input, PackedSequence)
        try:
            hidden, width = _check_shapes(module, self._weights, module.input_size)
        except ValueError:
            return False
        if isinstance(module, nn.RNNCellBase):
            return True
        states = [state for state in _flatten(args[2 if packed else 1]) if state.dim() > 0]
        if packed:
            sizes = args[1]
            ragged = args[0].dim() == 2 and bool(sizes[0] != sizes[-1])
            return ragged and all(state.dim() < 4 and state.size(0) == state_rows(module) for state in states)
        if not isinstance(args[1], tuple) and module._fused_states == 2:  # no pair: not read at all
            return True
        x = args[0]
        shapes = [(state_rows(module), x.size(0 if module.batch_first else 1), size) for size in (width, hidden)]
        return all(state.shape in shapes and state.element_size() >= x.element_size() for state in states)

    def _shortened(self, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """A padded batch's first step is enough."""
        if isinstance(self._input, PackedSequence) or isinstance(self._module, nn.RNNCellBase):
            return args
        x, time = args[0], 1 if self._module.batch_first else 0
        return (x.narrow(time, 0, min(1, x.size(time))), *args[1:])


def _stand_in(value: Any) -> Any:
    """For a tensor, or each of a nest, zeros of its shape and dtype that take no memory, on the CPU, or on meta."""
    if isinstance(value, PackedSequence):
        indices = (None if i is None else i.cpu() for i in value[2:])
        return PackedSequence(_stand_in(value.data), value.batch_sizes, *indices)
    if isinstance(value, (tuple, list)):
        parts = [_stand_in(part) for part in value]
        return parts if isinstance(value, list) else tuple(parts)
    if not isinstance(value, Tensor):
        return value
    if value.layout is not torch.strided or value.is_quantized:
        raise _NothingToSay
    zeros = torch.zeros((), dtype=value.dtype, device="meta" if value.is_meta else "cpu").expand(value.shape)
    return nn.Parameter(zeros, requires_grad=False) if type(value) is nn.Parameter else zeros  # words tell of the type


def _flatten(value: Any) -> list[Tensor]:
    return [value] if isinstance(value, Tensor) else [t for t in value if isinstance(t, Tensor)]
