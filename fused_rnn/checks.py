"""What functional requires of its arguments, before any kernel runs. Errors say which argument, what it is and what was expected."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fused_rnn.cells import CELLS

INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


class Sizes(NamedTuple):
    """What the arguments' shapes say: T, B, D, H, P, the number of weights per recurrence, and whether there are biases."""

    steps: int
    batch: int
    input_size: int
    hidden_size: int
    width: int
    count: int
    bias: bool


def _shape(t: Tensor) -> str:
    return "[" + ", ".join(map(str, t.shape)) + "]"


def check_stack(
    cell: str, x: Tensor, weights: Sequence[Tensor], h0: Tensor | None, c0: Tensor | None, num_layers: int, recurrences: int
) -> Sizes:
    """Sizes of a stack of layers.

    Raises ValueError for a wrong rank, size, dtype or device, RuntimeError for T = 0 (as torch does).
    """
    if x.dim() != 3:
        raise ValueError(f"x: got {_shape(x)}, expected three dimensions [T, B, D]")
    steps, batch, input_size = x.shape
    if steps == 0:
        raise RuntimeError("Expected sequence length to be larger than 0 in RNN")
    sizes = check_weights(cell, x, weights, input_size, num_layers, recurrences)
    _, width, count, hidden = sizes
    for name, state, last in (("h0", h0, width), ("c0", c0, hidden)):
        if state is not None:
            check_state(name, state, x, (num_layers * recurrences, batch, last), "[L·R, B, " + ("P]" if name == "h0" else "H]"))
    return Sizes(steps, batch, input_size, hidden, width, count, count >= 4)


def check_weights(
    cell: str, x: Tensor, weights: Sequence[Tensor], input_size: int, num_layers: int, recurrences: int
) -> tuple[int, int, int, int]:
    """(G·H, P, weights per recurrence, H). Raises ValueError as check_stack does."""
    count, left_over = divmod(len(weights), num_layers * recurrences)
    if left_over or not 2 <= count <= (5 if cell == "lstm" else 4) or (count == 3 and cell != "lstm"):
        allowed = "2, 3, 4 or 5" if cell == "lstm" else "2 or 4"
        raise ValueError(
            f"weights: got {len(weights)} tensors, expected {allowed} for each of {num_layers} layer(s) × {recurrences} direction(s)"
        )
    rows, width = weights[1].shape if weights[1].dim() == 2 else (0, 0)
    hidden = rows // CELLS[cell].gates
    expected = [(rows, input_size), (rows, width)]
    if count >= 4:
        expected += [(rows,), (rows,)]
    if count in (3, 5):
        hidden = weights[count - 1].shape[-1]
        expected.append((width, hidden))
    if rows == 0 or rows != hidden * CELLS[cell].gates or (width != hidden and count not in (3, 5)):
        _refuse_w_hh(cell, weights[1], count)
    dtype, device = x.dtype, x.device
    for k, w in enumerate(weights):
        if k == count * recurrences:  # every layer above the first reads all directions of the one below
            expected[0] = (rows, recurrences * width)
        if w.shape != expected[k % count]:
            raise ValueError(f"weights[{k}]: got {_shape(w)}, expected {list(expected[k % count])}")
        if w.dtype != dtype or w.device != device:
            raise ValueError(f"weights[{k}]: got {w.dtype} on {w.device}, expected x's {dtype} on {device}")
    return rows, width, count, hidden


def _refuse_w_hh(cell: str, w_hh: Tensor, count: int) -> None:
    gates = CELLS[cell].gates
    columns = "P" if count in (3, 5) else "H"
    raise ValueError(f"weights[1]: got {_shape(w_hh)}, expected w_hh [{gates}·H, {columns}] of a {cell}")


def check_state(name: str, state: Tensor, x: Tensor, shape: tuple[int, ...], letters: str) -> None:
    """An initial state of x's dtype and device, of this shape. Raises ValueError."""
    if state.shape != shape:
        raise ValueError(f"{name}: got {_shape(state)}, expected {letters} = {list(shape)}")
    if state.dtype != x.dtype or state.device != x.device:
        raise ValueError(f"{name}: got {state.dtype} on {state.device}, expected x's {x.dtype} on {x.device}")


def check_lengths(lengths: Tensor | Sequence[int], x: Tensor) -> Tensor:
    """lengths as [B] int64 on x's device.

    Raises ValueError for a wrong shape or dtype, and, where the values can be read without a synchronisation, out of 0 … T.
    """
    if not isinstance(lengths, Tensor):
        lengths = torch.as_tensor(lengths)
    steps, batch = x.shape[:2]
    if lengths.dtype not in INTEGERS:
        raise ValueError(f"lengths: got {lengths.dtype}, expected an integer dtype")
    if lengths.shape != (batch,):
        raise ValueError(f"lengths: got {_shape(lengths)}, expected [B] = [{batch}]")
    if not torch.compiler.is_compiling() and lengths.device.type == "cpu" and not torch._C._are_functorch_transforms_active() and batch:
        low, high = (int(end) for end in torch.aminmax(lengths))
        if low < 0 or high > steps:
            raise ValueError(f"lengths: got values from {low} to {high}, expected 0 to T = {steps}")
    return lengths.to(device=x.device, dtype=torch.int64)


def check_reset(reset: Tensor, x: Tensor) -> Tensor:
    """reset, if it is [T, B] bool on x's device; raises ValueError."""
    if reset.dtype != torch.bool:
        raise ValueError(f"reset: got {reset.dtype}, expected torch.bool")
    if reset.shape != x.shape[:2]:
        raise ValueError(f"reset: got {_shape(reset)}, expected [T, B] = {list(x.shape[:2])}")
    if reset.device != x.device:
        raise ValueError(f"reset: got a tensor on {reset.device}, expected x's {x.device}")
    return reset
