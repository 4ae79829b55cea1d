"""The compiled ops, if they were built: handles, fake kernels, vmap rules, operations, the gradient of an op alone.

Importing the pybind11 module `fused_rnn._C` registers them. Without it the package still imports, and MISSING says why
the `cpu` backend is unavailable.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from fused_rnn import missing
from fused_rnn.cells import CELLS
from fused_rnn.transforms import flops, op_gradient, vmap

_C: Any
MISSING: str | None
try:
    _C, MISSING = import_module("fused_rnn._C"), None
except ImportError as error:
    _C, MISSING = None, missing.reason("_C", error)

# The op fused_rnn::step takes the cell as a number: a string costs more to hand over than a small step takes.
CODES = {"lstm": 0, "gru": 1, "rnn_tanh": 2, "rnn_relu": 3}  # csrc/params.h's Cell


def _absent(*_: Any) -> list[Tensor]:
    raise NotImplementedError(MISSING)


# The instruction set that the CPU loops use, None without them.
ISA: str | None = None if _C is None else _C.isa()

# Looked up once: a chain of attributes through torch.ops costs a microsecond a call.
forward: Callable[..., list[Tensor]] = _absent
backward: Callable[..., list[Tensor]] = _absent
step: Callable[..., list[Tensor]] = _absent


# A step past the dispatcher, where this torch lends its tensors to plain functions.
fast_path: Callable[..., tuple[Tensor, ...] | None] | None = None
# All that may watch a call, or change what operators mean, and that a step past the dispatcher would slip by: while any
# of it is on, a step is the op. Each is called on every step, in some 30 ns. Beside them csrc/ops/dlpack_view.cpp asks
# for the level of forward-mode differentiation, which a variable in Python alone tells, and for profilers' callbacks.
# A gradient, which is not asked for here, is what saved-tensor hooks, anomaly detection and checkpointing go with;
# inference mode and deterministic filling are torch.empty's, by which results are made; tensor subclasses, conjugate,
# negative, functional, batched, sparse and meta tensors are not read; Dynamo is asked for by the modules.
# tests/ops/test_watchers.py has one of each.
_WATCHERS = (
    torch._C._are_functorch_transforms_active,
    torch._C._is_any_autocast_enabled,
    torch._C._is_torch_function_mode_enabled,  # the default device is one
    torch._C._is_tracing,
    torch._C._len_torch_dispatch_stack,  # those of fake, functional and proxy tensors, too
)


def _lends_tensors() -> bool:
    exchange = getattr(Tensor, "__dlpack_c_exchange_api__", None)
    if exchange is None or not _C.use_exchange(exchange, Tensor, nn.Parameter, torch.empty_like):
        return False
    _C.watch_steps(_WATCHERS, vars(forward_ad))
    return True


def _same_device(x: Tensor, *others: Tensor | None) -> None:
    """A real call with one argument on the meta device arrives here, not in C++: it must not be answered."""
    for t in others:
        if t is not None and t.device != x.device:
            raise RuntimeError(f"fused_rnn: got tensors on {x.device} and on {t.device}, expected all on one device")


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
    _same_device(x, h0, c0, lengths, reset, *weights)
    spec, recurrences = CELLS[cell], len(directions)
    steps, batch = x.shape[:2]
    hidden, width = weights[1].shape[0] // spec.gates, weights[1].shape[1]
    y = x.new_empty(steps, batch, recurrences * width)
    outputs = [y, x.new_empty(recurrences, batch, width)]
    if spec.has_c:
        outputs.append(x.new_empty(recurrences, batch, hidden))
    if save == "none":
        return outputs
    if save == "gates":
        saved = x.new_empty(steps, batch, recurrences, spec.stored, hidden)
        cells = x.new_empty(steps, batch, recurrences, hidden) if spec.has_c else x.new_empty(0)
    else:
        chunks = steps // _C.CHECKPOINT_EVERY + 2  # never 1, on which Dynamo would specialise
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        saved = x.new_empty(chunks, recurrences, batch, width + (hidden if spec.has_c else 0), dtype=wide)
        cells = x.new_empty(0)
    return [*outputs, saved, cells, torch.empty_like(y) if keep_hidden else x.new_empty(0)]


def _backward_fake(
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
    _same_device(x, dy, dh_n, dc_n, h0, c0, lengths, reset, hidden, saved, cells, *weights)
    dx = x.new_empty(x.shape) if need_dx else x.new_empty(0)
    dh0 = x.new_empty(0 if h0 is None else h0.shape)
    dc0 = x.new_empty(0 if c0 is None else c0.shape)
    return [dx, dh0, dc0, *([w.new_empty(w.shape) for w in weights] if need_dw else [])]


def _step_fake(
    x: Tensor,
    h: Tensor | None,
    c: Tensor | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    w_hr: Tensor | None,
    cell: int,
) -> list[Tensor]:
    _same_device(x, h, c, w_ih, w_hh, b_ih, b_hh, w_hr)
    spec, leading = list(CELLS.values())[cell], x.shape[:-1]
    width, hidden = w_hh.shape[1], w_hh.shape[0] // spec.gates
    sequence, batch = x.dim() == 3, math.prod(leading)  # torch.Size.numel() would make a symbolic B a constant

    def after(state: Tensor | None, width: int) -> Tensor:
        if state is not None:
            return x.new_empty(state.shape)
        return x.new_empty(1, batch, width) if sequence else x.new_empty(batch, width)

    outputs = [x.new_empty(*leading, width)] if sequence else []
    return outputs + [after(h, width)] + ([after(c, hidden)] if spec.has_c else [])


_library = torch.library.Library("fused_rnn", "FRAGMENT")  # what is registered through it lives as long
if _C is not None:
    forward = torch.ops.fused_rnn.forward.default
    backward = torch.ops.fused_rnn.backward.default
    step = torch.ops.fused_rnn.step.default
    fast_path = _C.fast_path if _lends_tensors() else None
    torch.library.register_fake("fused_rnn::forward", _forward_fake)
    torch.library.register_fake("fused_rnn::backward", _backward_fake)
    torch.library.register_fake("fused_rnn::step", _step_fake)
    op_gradient.register("fused_rnn::forward", forward, backward)
    vmap.register("fused_rnn::forward", forward, vmap.forward, _library)
    vmap.register("fused_rnn::backward", backward, vmap.backward, _library)
    vmap.register("fused_rnn::step", step, vmap.step, _library)
    flops.register(torch.ops.fused_rnn.forward, flops.forward)
    flops.register(torch.ops.fused_rnn.backward, flops.backward)
    flops.register(torch.ops.fused_rnn.step, flops.step)
