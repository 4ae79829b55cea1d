"""A backend's loops as two ops that torch.compile and torch.func know: fused_rnn::<name>_forward, <name>_backward.

Arguments and results are those of fused_rnn::forward and fused_rnn::backward, the CPU loops' ops.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor

from fused_rnn.call import BackwardCall, LayerCall, Weights, is_absent
from fused_rnn.cells import Cell
from fused_rnn.gpu import dense, precision, run
from fused_rnn.gpu.loops import Layer, Loops
from fused_rnn.gpu.weights import aligned
from fused_rnn.transforms import fake, flops, op_gradient, vmap

# (layer, x, whether for backward) → the loops. Raises RuntimeError where x cannot be run.
Make = Callable[[Layer, Tensor, bool], Loops]


class Plain(Protocol):
    """A shorter way, for the calls that it knows: the outputs, or [] for all others."""

    def forward(self, call: LayerCall) -> list[Tensor]: ...

    def backward(self, call: BackwardCall) -> list[Tensor]: ...


_library = torch.library.Library("fused_rnn", "FRAGMENT")
_INPUTS = "Tensor x, Tensor[] weights, Tensor[] states, Tensor? lengths, Tensor? reset"


def on(x: Tensor) -> AbstractContextManager[None]:
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


def layer_of(call: LayerCall, w_hh: torch.dtype | None = None) -> tuple[Layer, list[Weights]]:
    """The layer and each recurrence's weights, if all fits together; raises RuntimeError naming what does not.

    w_hh: the dtype of W_hh, where it is not x's.
    """
    x, cell, recurrences = call.x, call.spec, call.recurrences
    kinds = call.kinds
    if x.dim() not in (3, 4) or (x.dim() == 4 and x.shape[2] != recurrences):
        raise RuntimeError(f"x: got {list(x.shape)}, expected [T, B, D] or [T, B, {recurrences}, D]")
    (steps, batch), hidden = x.shape[:2], call.hidden_size
    width = call.width if kinds.projects else hidden
    if 0 in (steps, x.shape[-1], hidden, width):
        raise RuntimeError(f"x: got {list(x.shape)}, expected at least one step, input and hidden unit")
    shapes = kinds.shapes(cell, x.shape[-1], hidden, width)
    for i, weight in enumerate(call.weights):
        place = i % kinds.number
        shape = shapes[place]
        if kinds.is_mask(place):
            shape = (weight.shape[0] if weight.dim() == 3 and weight.shape[0] in (1, steps) else steps, batch, *shape)
        _check(f"weights[{i}]", weight, shape, x, w_hh if place == 1 else None)
    _check_states("0", cell, call.states, call, x)
    _check("lengths", call.lengths, (batch,), x, torch.int64)
    _check("reset", call.reset, (steps, batch), x, torch.bool)
    layer = Layer(
        cell, steps, batch, hidden, tuple(call.directions), None if call.lengths is None else aligned(call.lengths),
        None if call.reset is None else call.reset.to(torch.int32).contiguous(),
    )  # fmt: skip
    return layer, call.each


def _check_states(suffix: str, cell: Cell, states: Sequence[Tensor], call: LayerCall, x: Tensor) -> None:
    if len(states) not in (0, len(cell.states)):
        raise RuntimeError(f"states: got {len(states)} tensors, expected none or {len(cell.states)} of a {cell.title}")
    for name, state, shape in zip(cell.states, states, call.state_shapes(), strict=False):
        _check(name + suffix, state, shape, x)


def _check_backward(call: BackwardCall) -> None:
    layer, x = call.layer, call.x
    shape = (*x.shape[:2], layer.recurrences * layer.width)
    saved, histories, dtype = layer.kept_shapes()
    _check("dy", call.dy, shape, x)
    _check_states("_n's gradient", layer.spec, call.dstates, layer, x)
    _check("hidden", call.hidden, shape, x)
    _check("saved", call.saved, saved, x)
    if len(call.histories) != len(histories):
        raise RuntimeError(f"histories: got {len(call.histories)} tensors, expected {len(histories)}")
    for history, expected in zip(call.histories, histories, strict=True):
        _check("histories", history, expected, x, dtype)
    sequences = layer.sequence_shapes()
    if len(call.dsequences) not in (0, len(sequences)):
        raise RuntimeError(f"dsequences: got {len(call.dsequences)} tensors, expected none or {len(sequences)}")
    for gradient, expected in zip(call.dsequences, sequences, strict=False):
        _check("dsequences", gradient, expected, x)


def forward(call: LayerCall, make: Make, w_hh: torch.dtype | None = None, plain: Plain | None = None) -> list[Tensor]:
    """What the forward op does. w_hh: as `layer_of` has it."""
    x, call = call.x, dense.of(call)
    with on(x):
        if plain is not None and (outputs := plain.forward(call)):
            return outputs
        layer, weights = layer_of(call, w_hh)
        if x.shape[1] == 0:
            return [torch.zeros_like(t) for t in fake.forward(*call)]
        loops, steps = make(layer, x, False), layer.steps
        whole = run.Forward(layer, call._replace(x=x.contiguous()), weights, [(0, steps)])
        whole.run(loops, 0, steps)
        return whole.outputs()


def _implement(make: Make, plain: Plain | None) -> tuple[Callable[..., list[Tensor]], Callable[..., list[Tensor]]]:
    def checked_forward(*args: Any) -> list[Tensor]:
        call = LayerCall(*args)
        if call.save not in ("none", "gates", "recompute"):
            raise RuntimeError(f"save: got {call.save!r}, expected none, gates or recompute")
        return forward(call, make, plain=plain)

    def checked_backward(*args: Any) -> list[Tensor]:
        call = BackwardCall(*args)
        if call.save not in ("gates", "recompute"):
            raise RuntimeError(f"save: got {call.save!r}, expected gates or recompute")
        with on(call.x):
            return dense.gradients(call, backward(dense.of(call)))

    def backward(call: BackwardCall) -> list[Tensor]:
        x = call.x
        if plain is not None and (outputs := plain.backward(call)):
            return outputs
        layer, weights = layer_of(call.layer)
        shape = (*x.shape[:2], layer.recurrences, layer.hidden)  # of a state over time
        call = call._replace(dsequences=[x.new_zeros(shape) if is_absent(d) else d for d in call.dsequences])
        _check_backward(call)
        if x.shape[1] == 0:
            return [torch.zeros_like(t) for t in fake.backward(*call)]
        call = call._replace(
            x=x.contiguous(), saved=aligned(call.saved), histories=[aligned(t) for t in call.histories]
        )
        loops, steps = make(layer, x, True), layer.steps
        whole = run.Backward(layer, call, weights, [(0, steps)])
        whole.run(loops, 0, steps)
        return whole.outputs()

    return checked_forward, checked_backward


def define(name: str, make: Make, keys: Sequence[str] = ("CUDA",), plain: Plain | None = None) -> tuple[Any, Any]:
    """Register both ops for these dispatch keys, and what torch asks about them; returns them."""
    tags = (torch.Tag.pt2_compliant_tag,)
    _library.define(
        f"{name}_forward({_INPUTS}, str cell, int[] directions, str save, bool keep_hidden, bool sequences)"
        " -> Tensor[]",
        tags=tags,
    )
    _library.define(
        f"{name}_backward(Tensor? dy, Tensor[] dstates, {_INPUTS}, Tensor hidden, Tensor saved,"
        " Tensor[] histories, str cell, int[] directions, str save, bool need_dx, bool need_dw,"
        " Tensor[] dsequences) -> Tensor[]",
        tags=tags,
    )
    kinds: list[tuple[str, Any, Any, Any]] = [
        ("forward", fake.forward, vmap.forward, flops.forward),
        ("backward", fake.backward, vmap.backward, flops.backward),
    ]
    ops = []
    for (kind, shapes, fold, formula), function in zip(kinds, _implement(make, plain), strict=True):
        qualified, op = f"fused_rnn::{name}_{kind}", getattr(torch.ops.fused_rnn, f"{name}_{kind}").default
        # torch.library.custom_op's wrapper would cost more a call.
        for key in keys:
            _library.impl(f"{name}_{kind}", function, key)
        torch.library.register_fake(qualified, shapes, lib=_library)
        vmap.register(qualified, op, fold, _library)
        flops.register(op.overloadpacket, formula)
        ops.append(op)
    op_gradient.register(f"fused_rnn::{name}_forward", ops[0], ops[1], _library)
    return ops[0], ops[1]


def step(
    forward: Callable[..., list[Tensor]], x: Tensor, weights: Sequence[Tensor], states: Sequence[Tensor], cell: str
) -> list[Tensor]:
    """One step by a forward op: x [B, D], states [B, ·] or () for zeros → the states after; no gradient."""
    call = LayerCall(x.unsqueeze(0), weights, [s.unsqueeze(0) for s in states], None, None, cell, [1])
    return [s[0] for s in forward(*call)[1:]]
