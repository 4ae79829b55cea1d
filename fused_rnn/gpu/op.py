"""A backend's loops as two ops that torch.compile and torch.func know: fused_rnn::<name>_forward, <name>_backward.

Arguments and results are those of fused_rnn::forward and fused_rnn::backward, the CPU loops' ops.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from fused_rnn.gpu import precision, run
from fused_rnn.gpu.loops import CELLS, Cell, Layer, Loops, wide
from fused_rnn.gpu.weights import Weights, aligned
from fused_rnn.transforms import flops, op_gradient, vmap

# (layer, x, whether for backward) → the loops. Raises RuntimeError where x cannot be run.
Make = Callable[[Layer, Tensor, bool], Loops]

_library = torch.library.Library("fused_rnn", "FRAGMENT")
_INPUTS = "Tensor x, Tensor[] weights, Tensor? h0, Tensor? c0, Tensor? lengths, Tensor? reset"


def _on(x: Tensor) -> AbstractContextManager[None]:
    """x's device is current; products have the precision of a recurrent layer, which autocast would change."""
    kind = x.device.type
    as_it_is = not torch.is_autocast_enabled(kind)
    if as_it_is and kind == "cuda":
        as_it_is = x.dtype != torch.float32 and x.device.index == torch.cuda.current_device()
    return nullcontext() if as_it_is else _changed(x)


@contextmanager
def _changed(x: Tensor) -> Iterator[None]:
    kind = x.device.type
    with ExitStack() as stack:
        if torch.is_autocast_enabled(kind):
            stack.enter_context(torch.autocast(kind, enabled=False))
        if kind == "cuda":
            stack.enter_context(torch.cuda.device(x.device))
            if x.dtype == torch.float32:
                stack.enter_context(precision.as_in_cudnn())
        yield


def _check(name: str, tensor: Tensor | None, sizes: Sequence[int], x: Tensor, dtype: torch.dtype | None = None) -> None:
    """A pointer into a tensor of other sizes, type or device would be read beyond its end."""
    if tensor is None:
        return
    if tensor.device != x.device:
        raise RuntimeError(f"{name}: got a tensor on {tensor.device}, expected x's {x.device}")
    if tensor.dtype != (dtype or x.dtype):
        raise RuntimeError(f"{name}: got {tensor.dtype}, expected {dtype or x.dtype}")
    if tuple(tensor.shape) != tuple(sizes):
        raise RuntimeError(f"{name}: got {list(tensor.shape)}, expected {list(sizes)}")


def layer_of(
    x: Tensor,
    weights: Sequence[Tensor],
    h0: Tensor | None,
    c0: Tensor | None,
    lengths: Tensor | None,
    reset: Tensor | None,
    cell: str,
    directions: Sequence[int],
) -> tuple[Layer, Weights]:
    """The layer, if everything fits together; raises RuntimeError naming what does not."""
    kinds, recurrences = CELLS[cell], len(directions)
    count, left_over = divmod(len(weights), max(1, recurrences))
    if left_over or count not in ((2, 3, 4, 5) if kinds.has_c else (2, 4)):
        raise RuntimeError(f"weights: got {len(weights)} tensors for {recurrences} recurrence(s) of a {cell}")
    if x.dim() not in (3, 4) or (x.dim() == 4 and x.shape[2] != recurrences):
        raise RuntimeError(f"x: got {list(x.shape)}, expected [T, B, D] or [T, B, {recurrences}, D]")
    if x.shape[0] == 0 or x.shape[-1] == 0 or weights[1].numel() == 0:
        raise RuntimeError(f"x: got {list(x.shape)}, expected at least one step, input and hidden unit")
    (steps, batch), rows, width = x.shape[:2], weights[1].shape[0], weights[1].shape[-1]
    hidden = rows // kinds.gates
    biases = [(rows,), (rows,)] if count >= 4 else []
    projection = [(width, hidden)] if count in (3, 5) else []
    if not projection:
        width = hidden
    for i, weight in enumerate(weights):
        sizes = [(kinds.gates * hidden, x.shape[-1]), (kinds.gates * hidden, width), *biases, *projection][i % count]
        _check(f"weights[{i}]", weight, sizes, x)
    _check("h0", h0, (recurrences, batch, width), x)
    _check("c0", c0, (recurrences, batch, hidden), x)
    _check("lengths", lengths, (batch,), x, torch.int64)
    _check("reset", reset, (steps, batch), x, torch.bool)
    layer = Layer(
        kinds, steps, batch, hidden, tuple(directions), None if lengths is None else aligned(lengths),
        None if reset is None else reset.to(torch.int32).contiguous(),
    )  # fmt: skip
    return layer, Weights.split(weights, recurrences)


def _kept(cell: Cell, steps: Any, batch: Any, recurrences: int, hidden: Any, save: str) -> tuple[Any, Any]:
    """Sizes of `saved` and `cells`; (0,) for one that is not there."""
    if save == "gates":
        lead = (steps, batch, recurrences)
        return (*lead, cell.stored, hidden), (*lead, hidden) if cell.has_c else (0,)
    return (run.checkpoint_rows(steps), recurrences, batch, hidden) if cell.has_c else (0,), (0,)


def _same_device(x: Tensor, *others: Tensor | None) -> None:
    """A real call with one argument on the meta device ends up in a fake kernel: it must not be answered."""
    for t in others:
        if t is not None and t.device != x.device:
            raise RuntimeError(f"got tensors on {x.device} and on {t.device}, expected all on one device")


def _saved_dtype(dtype: torch.dtype, save: str, cell: Cell) -> torch.dtype:
    return wide(dtype) if save == "recompute" and cell.has_c else dtype


def _check_backward(
    layer: Layer,
    weights: Weights,
    x: Tensor,
    dy: Tensor | None,
    dh_n: Tensor | None,
    dc_n: Tensor | None,
    hidden: Tensor,
    saved: Tensor,
    cells: Tensor,
    save: str,
) -> None:
    steps, batch, recurrences, width = layer.steps, layer.batch, layer.recurrences, weights.w_hh[0].shape[1]
    saved_sizes, cells_sizes = _kept(layer.cell, steps, batch, recurrences, layer.hidden, save)
    _check("dy", dy, (steps, batch, recurrences * width), x)
    _check("dh_n", dh_n, (recurrences, batch, width), x)
    _check("dc_n", dc_n, (recurrences, batch, layer.hidden), x)
    _check("hidden", hidden, (steps, batch, recurrences * width), x)
    _check("saved", saved, saved_sizes, x, _saved_dtype(x.dtype, save, layer.cell))
    _check("cells", cells, cells_sizes, x)


def _forward_fake(
    x: Tensor,
    weights: Sequence[Tensor],
    h0: Tensor | None,
    c0: Tensor | None,
    lengths: Tensor | None,
    reset: Tensor | None,
    cell: str,
    directions: Sequence[int],
    save: str,
    keep_hidden: bool,
) -> list[Tensor]:
    _same_device(x, *weights, h0, c0, lengths, reset)
    kinds, recurrences = CELLS[cell], len(directions)
    (steps, batch), (rows, width) = x.shape[:2], weights[1].shape
    hidden = rows // kinds.gates
    y = x.new_empty(steps, batch, recurrences * width)
    outputs = [y, x.new_empty(recurrences, batch, width)]
    if kinds.has_c:
        outputs.append(x.new_empty(recurrences, batch, hidden))
    if save == "none":
        return outputs
    saved, cells = _kept(kinds, steps, batch, recurrences, hidden, save)
    return [
        *outputs, x.new_empty(saved, dtype=_saved_dtype(x.dtype, save, kinds)), x.new_empty(cells),
        torch.empty_like(y) if keep_hidden else x.new_empty(0),
    ]  # fmt: skip


def _backward_fake(*args: Any) -> list[Tensor]:
    x, weights, h0, c0, need_dx, need_dw = *args[3:7], *args[15:17]
    _same_device(x, *weights, *(a for a in args[:12] if isinstance(a, Tensor)))
    states = [x.new_empty(0 if state is None else state.shape) for state in (h0, c0)]
    dx = x.new_empty(x.shape if need_dx else 0)
    return [dx, *states, *([w.new_empty(w.shape) for w in weights] if need_dw else [])]


def _implement(make: Make) -> tuple[Callable[..., list[Tensor]], Callable[..., list[Tensor]]]:
    def forward(
        x: Tensor,
        weights: Sequence[Tensor],
        h0: Tensor | None,
        c0: Tensor | None,
        lengths: Tensor | None,
        reset: Tensor | None,
        cell: str,
        directions: Sequence[int],
        save: str,
        keep_hidden: bool,
    ) -> list[Tensor]:
        if save not in ("none", "gates", "recompute"):
            raise RuntimeError(f"save: got {save!r}, expected none, gates or recompute")
        with _on(x):
            layer, split = layer_of(x, weights, h0, c0, lengths, reset, cell, directions)
            if x.shape[1] == 0:
                nothing = _forward_fake(x, weights, h0, c0, lengths, reset, cell, directions, save, keep_hidden)
                return [torch.zeros_like(t) for t in nothing]
            return run.forward(layer, make(layer, x, False), x.contiguous(), split, h0, c0, save, keep_hidden)

    def backward(
        dy: Tensor | None,
        dh_n: Tensor | None,
        dc_n: Tensor | None,
        x: Tensor,
        weights: Sequence[Tensor],
        h0: Tensor | None,
        c0: Tensor | None,
        lengths: Tensor | None,
        reset: Tensor | None,
        hidden: Tensor,
        saved: Tensor,
        cells: Tensor,
        cell: str,
        directions: Sequence[int],
        save: str,
        need_dx: bool,
        need_dw: bool,
    ) -> list[Tensor]:
        if save not in ("gates", "recompute"):
            raise RuntimeError(f"save: got {save!r}, expected gates or recompute")
        with _on(x):
            layer, split = layer_of(x, weights, h0, c0, lengths, reset, cell, directions)
            _check_backward(layer, split, x, dy, dh_n, dc_n, hidden, saved, cells, save)
            if x.shape[1] == 0:
                call = (dy, dh_n, dc_n, x, weights, h0, c0, lengths, reset, hidden, saved, cells)
                nothing = _backward_fake(*call, cell, directions, save, need_dx, need_dw)
                return [torch.zeros_like(t) for t in nothing]
            kept = (hidden, aligned(saved), aligned(cells))
            return run.backward(
                layer, make(layer, x, True), dy, dh_n, dc_n, x.contiguous(), split, h0, c0, *kept, save, need_dx,
                need_dw,
            )  # fmt: skip

    return forward, backward


def define(name: str, make: Make, keys: Sequence[str] = ("CUDA",)) -> tuple[Any, Any]:
    """Register both ops for these dispatch keys, and what torch asks about them; returns them."""
    tags = (torch.Tag.pt2_compliant_tag,)
    _library.define(
        f"{name}_forward({_INPUTS}, str cell, int[] directions, str save, bool keep_hidden) -> Tensor[]", tags=tags
    )
    _library.define(
        f"{name}_backward(Tensor? dy, Tensor? dh_n, Tensor? dc_n, {_INPUTS}, Tensor hidden, Tensor saved, Tensor cells,"
        " str cell, int[] directions, str save, bool need_dx, bool need_dw) -> Tensor[]",
        tags=tags,
    )
    kinds: list[tuple[str, Any, Any, Any]] = [
        ("forward", _forward_fake, vmap.forward, flops.forward),
        ("backward", _backward_fake, vmap.backward, flops.backward),
    ]
    ops = []
    for (kind, fake, fold, formula), function in zip(kinds, _implement(make), strict=True):
        qualified, op = f"fused_rnn::{name}_{kind}", getattr(torch.ops.fused_rnn, f"{name}_{kind}").default
        # torch.library.custom_op's wrapper would cost more a call.
        for key in keys:
            _library.impl(f"{name}_{kind}", function, key)
        torch.library.register_fake(qualified, fake, lib=_library)
        vmap.register(qualified, op, fold, _library)
        flops.register(op.overloadpacket, formula)
        ops.append(op)
    op_gradient.register(f"fused_rnn::{name}_forward", ops[0], ops[1], _library)
    return ops[0], ops[1]


def step(
    forward: Callable[..., list[Tensor]],
    x: Tensor,
    h: Tensor | None,
    c: Tensor | None,
    weights: Sequence[Tensor],
    cell: str,
) -> list[Tensor]:
    """One step by a forward op: x [B, D], h [B, P], c [B, H], None for zeros → [h'] or [h', c']; no gradient."""
    h0, c0 = (t if t is None else t.unsqueeze(0) for t in (h, c))
    return [s[0] for s in forward(x.unsqueeze(0), weights, h0, c0, None, None, cell, [1], "none", False)[1:]]
