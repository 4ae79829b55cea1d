"""The Triton loops (fused_rnn.triton_kernels): any NVIDIA or AMD GPU that Triton compiles for, no build."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fused_rnn import vmap
from fused_rnn.cells import CELLS
from fused_rnn.triton_kernels import device as devices
from fused_rnn.triton_kernels import tiles

if TYPE_CHECKING:
    from fused_rnn.problem import Problem
    from fused_rnn.triton_kernels.launch import Layer

NAME = "triton"
DIFFERENTIABLE = False  # fused_rnn.autograd's Functions wrap the ops
stack = None  # functional runs the layers one by one

_WIDEST = 4  # vectors of H that are kept, or made, per step at most
_LIMIT = 1 << 31  # offsets within a step, and numbers of steps, take 32 bits; a step's place takes 64


# What torch.compiler.assume_constant_result does, without the import of all of Dynamo that it costs: an answer of the
# environment, which is not to be traced.
devices.refusal._dynamo_marked_constant = True  # type: ignore[attr-defined]


def supports(problem: Problem) -> str | None:
    """None if this backend can run the problem, else the reason it cannot."""
    reason = devices.refusal(problem.device)
    if reason is not None:
        return reason
    if problem.dtype not in devices.DTYPES:
        return f"it knows float32, bfloat16 and float16, not {problem.dtype}"
    if problem.width != problem.hidden_size:
        return "it has no projection (proj_size)"
    if problem.forward_ad:
        return "it has no forward-mode derivative"
    step = problem.batch * problem.recurrences * problem.hidden_size * _WIDEST
    if step >= _LIMIT:
        return f"B·R·H·{_WIDEST} = {step} is beyond the 2^31 that its kernels can address in a step"
    return None


def describe(problem: Problem) -> str:
    """What would run, in a line."""
    if devices.refusal(problem.device) is not None:
        return "nothing here"
    device = tiles.INTERPRETER if problem.device == "cpu" else devices.device_at(torch.cuda.current_device())
    kind = devices.kind_of(problem.dtype, device)
    spec = CELLS[problem.cell]
    shapes = [tiles.Shape(problem.cell, spec.gates, kind, problem.hidden_size, backward) for backward in (False, True)]
    plans = [
        tiles.choose(shape, device, problem.batch, problem.recurrences) for shape in shapes[: 1 + problem.needs_grad]
    ]
    where = "Triton's interpreter" if problem.device == "cpu" else f"Triton on {device.arch}"
    return f"{where}; " + "; ".join(
        f"{name}: {plan}" for name, plan in zip(("forward", "backward"), plans, strict=False)
    )


def _layer(
    x: Tensor,
    weights: Sequence[Tensor],
    lengths: Tensor | None,
    reset: Tensor | None,
    cell: str,
    directions: Sequence[int],
) -> tuple[Layer, str]:
    from fused_rnn.triton_kernels.cells import CELLS as KERNELS
    from fused_rnn.triton_kernels.launch import Layer

    reason = devices.refusal(x.device.type)
    if reason is not None:
        raise RuntimeError(f"x: {reason}")
    named = [("lengths", lengths), ("reset", reset), *((f"weights[{i}]", w) for i, w in enumerate(weights))]
    for name, tensor in named:
        if tensor is not None and tensor.device != x.device:
            raise RuntimeError(f"{name}: got a tensor on {tensor.device}, expected x's {x.device}")
    if x.shape[0] >= _LIMIT:
        raise RuntimeError(f"x: got T = {x.shape[0]}, expected less than 2^31")
    device = devices.device_of(x)
    kind = devices.kind_of(x.dtype, device)
    layer = Layer(
        KERNELS[cell], x.shape[0], x.shape[1], weights[1].shape[1], tuple(directions),
        None if lengths is None else lengths.to(torch.int64).contiguous(),
        None if reset is None else reset.to(torch.int32).contiguous(),
        devices.precision_of(kind, device), devices.activations_of(kind, device), device,
    )  # fmt: skip
    return layer, kind


def _plan(layer: Layer, kind: str, backward: bool) -> tiles.Plan:
    shape = tiles.Shape(layer.cell.name, layer.cell.gates, kind, layer.hidden, backward)
    return tiles.choose(shape, layer.device, layer.batch, layer.recurrences)


class _On:
    """The tensor's device is current, and autocast, which would recast the products inside, is off."""

    def __init__(self, x: Tensor) -> None:
        kind = x.device.type
        self.autocast = torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else None
        self.device = torch.cuda.device(x.device) if kind == "cuda" else None

    def __enter__(self) -> None:
        for context in (self.autocast, self.device):
            if context is not None:
                context.__enter__()  # type: ignore[no-untyped-call]

    def __exit__(self, *error: Any) -> None:
        for context in (self.device, self.autocast):
            if context is not None:
                context.__exit__(*error)


def _forward(
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
    if x.shape[1] == 0:
        nothing = _forward_fake(x, weights, h0, c0, lengths, reset, cell, directions, save, keep_hidden)
        return [torch.zeros_like(t) for t in nothing]
    from fused_rnn.triton_kernels import layer as layers

    with _On(x):
        layer, kind = _layer(x, weights, lengths, reset, cell, directions)
        split = layers.Weights.split(weights, layer.recurrences)
        return layers.forward(layer, _plan(layer, kind, False), x.contiguous(), split, h0, c0, save, keep_hidden)


def _backward(
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
    kept = (hidden, saved, cells)
    if x.shape[1] == 0:
        shapes = (dy, dh_n, dc_n, x, weights, h0, c0, lengths, reset, *kept, cell, directions, save, need_dx, need_dw)
        return [torch.zeros_like(t) for t in _backward_fake(*shapes)]
    from fused_rnn.triton_kernels import layer as layers

    with _On(x):
        layer, kind = _layer(x, weights, lengths, reset, cell, directions)
        split = layers.Weights.split(weights, layer.recurrences)
        given = (dy, dh_n, dc_n, x.contiguous(), split, h0, c0, *kept, save, need_dx, need_dw)
        return layers.backward(layer, _plan(layer, kind, True), *given)


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
    spec, recurrences = CELLS[cell], len(directions)
    (steps, batch), hidden = x.shape[:2], weights[1].shape[1]
    y, state = x.new_empty(steps, batch, recurrences * hidden), x.new_empty(recurrences, batch, hidden)
    outputs = [y, state, torch.empty_like(state)] if spec.has_c else [y, state]
    if save == "none":
        return outputs
    saved, cells = x.new_empty(0), x.new_empty(0)
    if save == "gates":
        saved = x.new_empty(steps, batch, recurrences, spec.stored, hidden)
        cells = x.new_empty(steps, batch, recurrences, hidden) if spec.has_c else cells
    elif spec.has_c:
        chunks = (steps + tiles.CHECKPOINT_EVERY - 1) // tiles.CHECKPOINT_EVERY
        saved = x.new_empty(chunks, recurrences, batch, hidden, dtype=torch.float32)
    return [*outputs, saved, cells, torch.empty_like(y) if keep_hidden else x.new_empty(0)]


def _backward_fake(*args: Any) -> list[Tensor]:
    x, weights, cell, directions, need_dx, need_dw = args[3], args[4], args[12], args[13], args[15], args[16]
    state = x.new_empty(len(directions), x.shape[1], weights[1].shape[1])
    dc0 = torch.empty_like(state) if CELLS[cell].has_c else x.new_empty(0)
    dx = x.new_empty(x.shape) if need_dx else x.new_empty(0)
    return [dx, state, dc0, *([w.new_empty(w.shape) for w in weights] if need_dw else [])]


# Opaque to torch.compile: an op for forward, one for backward. torch.library.custom_op's wrapper costs more a call.
_library = torch.library.Library("fused_rnn", "FRAGMENT")
_inputs = "Tensor x, Tensor[] weights, Tensor? h0, Tensor? c0, Tensor? lengths, Tensor? reset"
_library.define(
    f"triton_forward({_inputs}, str cell, int[] directions, str save, bool keep_hidden) -> Tensor[]",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.define(
    f"triton_backward(Tensor? dy, Tensor? dh_n, Tensor? dc_n, {_inputs}, Tensor hidden, Tensor saved, Tensor cells, "
    "str cell, int[] directions, str save, bool need_dx, bool need_dw) -> Tensor[]",
    tags=(torch.Tag.pt2_compliant_tag,),
)
for _key in ("CPU", "CUDA"):  # CPU: in the interpreter
    _library.impl("triton_forward", _forward, _key)
    _library.impl("triton_backward", _backward, _key)
torch.library.register_fake("fused_rnn::triton_forward", _forward_fake, lib=_library)
torch.library.register_fake("fused_rnn::triton_backward", _backward_fake, lib=_library)
forward_op = torch.ops.fused_rnn.triton_forward.default
backward_op = torch.ops.fused_rnn.triton_backward.default
torch.library.register_vmap("fused_rnn::triton_forward", vmap.rule(forward_op, vmap.forward), lib=_library)
torch.library.register_vmap("fused_rnn::triton_backward", vmap.rule(backward_op, vmap.backward), lib=_library)


def forward(*args: Any) -> list[Tensor]:
    """One layer: the op fused_rnn::triton_forward, arguments and result as of fused_rnn::forward."""
    outputs: list[Tensor] = forward_op(*args)
    return outputs


def backward(*args: Any) -> list[Tensor]:
    """One layer's gradients: the op fused_rnn::triton_backward, arguments and result as of fused_rnn::backward."""
    outputs: list[Tensor] = backward_op(*args)
    return outputs


def step(x: Tensor, h: Tensor | None, c: Tensor | None, weights: Sequence[Tensor], cell: str) -> list[Tensor]:
    """One step: x [B, D], h [B, H], c [B, H], None for zeros → [h'] or [h', c']; no gradient."""
    h0, c0 = (t if t is None else t.unsqueeze(0) for t in (h, c))
    return [s[0] for s in forward(x.unsqueeze(0), weights, h0, c0, None, None, cell, [1], "none", False)[1:]]
