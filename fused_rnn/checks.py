"""What a call requires of its arguments, before any kernel runs.

Errors say which argument, what it is and what was expected.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import Parameter

from fused_rnn.call import Kinds, counts, kinds
from fused_rnn.cells import CELLS

# The modes of make_fx, torch.export and AOTAutograd: no value is to be read under them.
_RECORDERS = (torch._C._TorchDispatchModeKey.PROXY, torch._C._TorchDispatchModeKey.FAKE)
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)

Shapes = tuple[torch.Size, ...]


def shape_text(shape: Sequence[int]) -> str:
    """A shape as errors write it: [5, 3]."""
    return "[" + ", ".join(map(str, shape)) + "]"


def kind(value: object) -> str:
    """What an argument is, as errors write it: a tensor [5, 3], True, tuple, ndarray."""
    if isinstance(value, Tensor):
        return f"a tensor {shape_text(value.shape)}"
    return repr(value) if value is None or isinstance(value, (bool, int, float)) else type(value).__name__


def misplaced(hx: Any) -> str:
    """What an error says of an initial state that seems to be another argument, given by position."""
    dtype = str(getattr(hx, "dtype", ""))  # torch's or numpy's
    numbers = isinstance(hx, (tuple, list)) and len(hx) > 0 and all(isinstance(n, int) for n in hx)
    if numbers or ("int" in dtype and hx.ndim == 1):
        return "; lengths are given by name: lengths="
    return "; reset is given by name: reset=" if "bool" in dtype else ""


def parse(cell: str, shapes: Shapes, input_size: int, num_layers: int, recurrences: int) -> tuple[int, int, Kinds]:
    """(H, P, which weights) of a stack of layers with weights of these shapes. Raises ValueError."""
    if num_layers < 1:
        raise ValueError(f"num_layers: got {num_layers}, expected at least 1")
    spec = CELLS[cell]
    count, left_over = divmod(len(shapes), num_layers * recurrences)
    found = None if left_over else kinds(spec, count)
    if found is None:
        raise ValueError(
            f"weights: got {len(shapes)} tensors, expected {counts(spec)}"
            f" for each of {num_layers} layer(s) × {recurrences} direction(s)"
        )
    at = int(spec.recurrent)  # w_hh, or w_ih where there is none
    rows, width = shapes[at] if len(shapes[at]) == 2 else (0, 1)
    hidden, width = rows // spec.gates, width * spec.diagonal
    if not spec.recurrent:
        width = hidden if rows else 1
    if rows != hidden * spec.gates or (width != hidden and not found.projects):
        columns = "P" if found.projects else f"H/{spec.diagonal}" if spec.diagonal > 1 else "H"
        expected = f"w_hh [{spec.gates}·H, {columns}]" if at else f"w_ih [{spec.gates}·H, D]"
        raise ValueError(f"weights[{at}]: got {shape_text(shapes[at])}, expected {expected} of a {spec.title}")
    shapes_of_one = found.shapes(spec, input_size, hidden, width)
    for k, shape in enumerate(shapes):
        if k == count * recurrences:  # every layer above the first reads all directions of the one below
            shapes_of_one[0] = (rows, recurrences * width)
        if found.masks and found.is_mask(k):
            if len(shape) != 3 or shape[2:] != shapes_of_one[k % count]:
                raise ValueError(f"weights[{k}]: got {shape_text(shape)}, expected a mask [1 or T, B, H]")
        elif shape != shapes_of_one[k % count]:
            raise ValueError(f"weights[{k}]: got {shape_text(shape)}, expected {shape_text(shapes_of_one[k % count])}")
    return hidden, width, found


def check_masks(kinds: Kinds, weights: Sequence[Tensor], steps: int, batch: int) -> None:
    """Whether the masks among the weights are of all of time and the batch. Raises ValueError."""
    for last in range(kinds.number, len(weights) + 1, kinds.number):
        for k in range(last - kinds.masks, last):
            shape = weights[k].shape
            if shape[1] != batch or shape[0] not in (1, steps):
                expected = f"a mask [1 or T, B, H] with T = {steps}, B = {batch}"
                raise ValueError(f"weights[{k}]: got {shape_text(shape)}, expected {expected}")


_parse_cached = lru_cache(maxsize=4096)(parse)


def check_weights(
    cell: str, x: Tensor, weights: Sequence[Tensor], input_size: int, num_layers: int, recurrences: int
) -> tuple[int, int, Kinds]:
    """What `parse` says of the weights, which have x's dtype and device. Raises ValueError."""
    sizes = check_shapes(cell, weights, input_size, num_layers, recurrences)
    check_dtypes(x, weights)
    return sizes


def check_shapes(
    cell: str, weights: Sequence[Tensor], input_size: int, num_layers: int, recurrences: int
) -> tuple[int, int, Kinds]:
    """What `parse` says of the weights. Raises ValueError, TypeError for what are no tensors."""
    try:
        if isinstance(weights, Tensor):  # type: ignore[unreachable]  # which would be a sequence of its rows
            raise TypeError
        shapes = tuple([w.shape for w in weights])
    except (AttributeError, TypeError):
        raise TypeError(f"weights: got {kind(weights)}, expected a sequence of tensors") from None
    if torch.compiler.is_compiling() or torch._C._is_tracing():  # the cache is not to be traced, nor to keep what is
        return parse(cell, shapes, input_size, num_layers, recurrences)
    try:
        return _parse_cached(cell, shapes, input_size, num_layers, recurrences)
    except TypeError:  # symbolic sizes (make_fx), which no cache can hold
        return parse(cell, shapes, input_size, num_layers, recurrences)


def check_dtypes(x: Tensor, weights: Sequence[Tensor]) -> None:
    """Whether the weights have x's dtype and device. Raises ValueError."""
    dtype, device = x.dtype, x.device
    for k, w in enumerate(weights):
        if w.dtype != dtype or w.device != device:
            check_tensor(f"weights[{k}]", w)
            raise ValueError(f"weights[{k}]: got {w.dtype} on {w.device}, expected x's {dtype} on {device}")


def check_tensor(name: str, value: object, letters: str = "") -> None:
    """Raises TypeError for what is no tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: got {kind(value)}, expected a tensor{letters and ' ' + letters}")


def check_sequence(x: Tensor) -> tuple[int, int, int]:
    """(T, B, D). Raises ValueError for a wrong rank, RuntimeError for T = 0 (as torch does)."""
    if x.dim() != 3:
        raise ValueError(f"x: got {shape_text(x.shape)}, expected three dimensions [T, B, D]")
    steps, batch, input_size = x.shape
    if steps == 0:
        raise RuntimeError("Expected sequence length to be larger than 0 in RNN")
    return steps, batch, input_size


def check_pair(hx: Any, letters: str, is_cell: bool, count: int = 2) -> None:
    """Whether hx is a pair, or a tuple of as many; a tensor is none, though it would unpack along its first dimension.
    Raises TypeError."""
    if isinstance(hx, (tuple, list)) and len(hx) == count:
        return
    got = f"a {kind(hx)} of {len(hx)}" if isinstance(hx, (tuple, list)) else kind(hx)
    hint = "" if is_cell else misplaced(hx)
    what = "pair" if count == 2 else "tuple"
    raise TypeError(f"hx: got {got}, expected a {what} {letters} of tensors{hint}")


def check_state(name: str, state: Tensor, x: Tensor, shape: tuple[int, ...], letters: str) -> None:
    """An initial state of x's dtype and device, of this shape. Raises ValueError, TypeError for what is no tensor."""
    check_tensor(name, state, letters)
    if state.shape != shape:
        hint = misplaced(state) if len(shape) == 3 else ""  # a cell has no lengths
        raise ValueError(f"{name}: got {shape_text(state.shape)}, expected {letters} = {shape_text(shape)}{hint}")
    if state.dtype != x.dtype or state.device != x.device:
        raise ValueError(f"{name}: got {state.dtype} on {state.device}, expected x's {x.dtype} on {x.device}")


def as_lengths(lengths: Any) -> Tensor:
    """lengths as a tensor, of one or of a sequence of integers; raises ValueError."""
    if isinstance(lengths, Tensor):
        return lengths
    try:
        made: Tensor = torch.as_tensor(lengths, device="cpu")
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"lengths: got {kind(lengths)}, expected [B] integers ({error})") from None
    return made if made.numel() else made.long()  # of no numbers torch makes floats


def check_lengths(lengths: Tensor | Sequence[int], x: Tensor) -> Tensor:
    """lengths as [B] int64 on x's device.

    Raises ValueError for a wrong shape or dtype, and, where the values can be read without a synchronisation, for
    one out of 0 … T.
    """
    lengths = as_lengths(lengths)
    steps, batch = x.shape[:2]
    if lengths.dtype not in INTEGERS:
        remedy = "a mask's sum over time has" if lengths.dtype == torch.bool else ".long() makes"
        raise ValueError(f"lengths: got {lengths.dtype}, expected an integer dtype, as {remedy}")
    if lengths.shape != (batch,):
        got = shape_text(lengths.shape) if lengths.dim() else "a single number"
        raise ValueError(f"lengths: got {got}, expected [B] = [{batch}]")
    if batch and can_be_read(lengths):
        low, high = (int(end) for end in torch.aminmax(lengths))
        if low < 0 or high > steps:
            raise ValueError(f"lengths: got values from {low} to {high}, expected 0 to T = {steps}")
    return lengths.to(device=x.device, dtype=torch.int64)


def can_be_read(t: Tensor) -> bool:
    """Whether t has values, at once, that nothing is recording."""
    if t.device.type != "cpu" or torch.compiler.is_compiling() or in_transform() or torch._C._is_tracing():
        return False
    if torch._C._len_torch_dispatch_stack() and any(map(torch._C._get_dispatch_mode, _RECORDERS)):
        return False
    return type(t) is not FakeTensor and not torch._C._functorch.is_legacy_batchedtensor(t)


def as_reset(reset: Any, device: torch.device) -> Tensor:
    """reset as a tensor of bool, of one or of a nest of lists; raises ValueError."""
    if not isinstance(reset, Tensor):
        wrong = f"reset: got {kind(reset)}, expected bools, one for each step of each sequence"
        try:
            made: Tensor = torch.as_tensor(reset, device=device)
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"{wrong} ({error})") from None
        if made.dim() == 0:
            raise ValueError(wrong)
        reset = made if made.numel() else made.bool()  # of no numbers torch makes floats
    if reset.dtype != torch.bool:
        raise ValueError(f"reset: got {reset.dtype}, expected torch.bool, as .bool() makes")
    return reset  # type: ignore[no-any-return]


def check_reset_shape(reset: Tensor, shape: Sequence[int], letters: str, why: str = "") -> None:
    """Whether reset has this shape; raises ValueError, with the reason for the layout at the end."""
    if reset.shape != shape:
        raise ValueError(f"reset: got {shape_text(reset.shape)}, expected {letters} = {shape_text(shape)}{why}")


def check_reset(reset: Tensor | Sequence[Sequence[bool]], x: Tensor) -> Tensor:
    """reset as a tensor, if it is [T, B] bool on x's device; raises ValueError."""
    reset = as_reset(reset, x.device)
    check_reset_shape(reset, x.shape[:2], "[T, B]")
    if reset.device != x.device:
        raise ValueError(f"reset: got a tensor on {reset.device}, expected x's {x.device}")
    return reset


def is_as_it_seems(t: Tensor) -> bool:
    """Whether t has the dimensions that it shows, none traced and none mapped over: they may be changed in place."""
    if torch.compiler.is_compiling() or in_transform():
        return False
    return not torch._C._functorch.is_legacy_batchedtensor(t)


def is_plain(tensors: Sequence[Tensor]) -> bool:
    """Whether these tensors lie in memory as they seem, and nothing stands for them or watches what runs on them: no
    transform, trace, mode or subclass, no negative view, no zeros without memory."""
    if torch.compiler.is_compiling() or in_transform():
        return False
    if torch._C._is_tracing() or torch._C._len_torch_dispatch_stack():
        return False
    legacy = torch._C._functorch.is_legacy_batchedtensor
    return all(type(t) in (Tensor, Parameter) and not (legacy(t) or t.is_neg() or t._is_zerotensor()) for t in tensors)


def in_transform() -> bool:
    """Whether a torch.func transform (vmap, grad, …) is under way: tensors may be wrapped, their values unreadable."""
    active: bool = torch._C._are_functorch_transforms_active()
    return active


# What torch.compiler.assume_constant_result does: Dynamo asks for real, and where it traces a transform, one is on.
in_transform._dynamo_marked_constant = True  # type: ignore[attr-defined]
