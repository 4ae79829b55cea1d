"""The compiled ops, if they were built: handles, fake kernels, vmap rules, operations, the gradient of an op alone.

Importing the pybind11 module `fused_rnn._C` registers them. Without it the package still imports, and MISSING says why
the `cpu` backend is unavailable.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.utils.rnn import PackedSequence

from fused_rnn import missing
from fused_rnn.transforms import fake, flops, op_gradient, vmap

_C: Any
MISSING: str | None
try:
    _C, MISSING = import_module("fused_rnn._C"), None
except ImportError as error:
    _C, MISSING = None, missing.reason("_C", error)

# The cells that there are CPU loops for.
CELLS: tuple[str, ...] = () if _C is None else tuple(cell["name"] for cell in _C.cells())


def _absent(*_: Any) -> Any:
    raise NotImplementedError(MISSING)


# The instruction set that the CPU loops use, None without them.
ISA: str | None = None if _C is None else _C.isa()

# Looked up once: a chain of attributes through torch.ops costs a microsecond a call.
forward: Callable[..., list[Tensor]] = _absent
backward: Callable[..., list[Tensor]] = _absent
step: Callable[..., list[Tensor]] = _absent
mask: Callable[..., Tensor] | None = None  # numbers for regularisers, on CPU tensors
# Called by ops on a GPU, so they have nothing but their kernels: csrc/ops/steps.cpp, plain_layer.cpp.
run_steps: Callable[..., None] = _absent
plain_forward: Callable[..., list[Tensor]] = _absent
plain_backward: Callable[..., list[Tensor]] = _absent


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
    _C.watch_steps(_WATCHERS, vars(forward_ad), PackedSequence)
    return True


_library = torch.library.Library("fused_rnn", "FRAGMENT")  # what is registered through it lives as long
if _C is not None:
    forward = torch.ops.fused_rnn.forward.default
    backward = torch.ops.fused_rnn.backward.default
    step = torch.ops.fused_rnn.step.default
    mask = torch.ops.fused_rnn.mask.default
    run_steps = torch.ops.fused_rnn.run_steps.default
    plain_forward = torch.ops.fused_rnn.cuda_plain_forward.default
    plain_backward = torch.ops.fused_rnn.cuda_plain_backward.default
    fast_path = _C.fast_path if _lends_tensors() else None
    torch.library.register_fake("fused_rnn::forward", fake.forward)
    torch.library.register_fake("fused_rnn::backward", fake.backward)
    torch.library.register_fake("fused_rnn::step", fake.step)
    torch.library.register_fake("fused_rnn::mask", lambda seed, like, *_: torch.empty_like(like))
    op_gradient.register("fused_rnn::forward", forward, backward)
    vmap.register("fused_rnn::forward", forward, vmap.forward, _library)
    vmap.register("fused_rnn::backward", backward, vmap.backward, _library)
    vmap.register("fused_rnn::step", step, vmap.step, _library)
    flops.register(torch.ops.fused_rnn.forward, flops.forward)
    flops.register(torch.ops.fused_rnn.backward, flops.backward)
    flops.register(torch.ops.fused_rnn.step, flops.step)
