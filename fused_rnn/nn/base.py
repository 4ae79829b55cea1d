"""What the sequence modules and the cells share: the choice of a backend, and the way to torch.nn's class."""

from __future__ import annotations

from collections.abc import Sequence
from types import MethodType
from typing import Any, ClassVar

import torch
from torch import Tensor, is_grad_enabled, nn
from torch._jit_internal import unused
from torch.autograd import forward_ad
from torch.compiler import is_compiling
from torch.nn.utils.rnn import PackedSequence

from fused_rnn import dispatch
from fused_rnn.checks import in_transform
from fused_rnn.dispatch import known_backend
from fused_rnn.gpu.precision import tf32_allowed
from fused_rnn.problem import Problem
from fused_rnn.transforms.op_gradient import is_jit_tracing

ON_A_GPU = "cuda"  # where the counterpart may be the faster one


class Fused(nn.Module):
    """A module that takes the place of its counterpart, torch.nn's class of the same name.

    A call out of the ordinary goes to the counterpart's own forward, which raises torch's error for it, in the words of
    the torch installed, or computes what only torch's operators can. All attributes but `backend`, `save`, `stream`,
    `freeze` and `unfreeze` begin with _fused, for users' subclasses have names of their own.
    """

    _fused_counterpart: ClassVar[Any]  # None where torch.nn has none
    _fused_cell: str  # its name in cells.CELLS
    _fused_states: int = 1  # how many states a step has: h, or h and c
    # On the class too, for modules whose state was saved by torch.nn, which has no such attribute.
    _fused_backend: str | None = None

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """However it is made: by its class, by copy, or unpickled."""
        make = super().__new__
        module = make(cls) if make is object.__new__ else make(cls, *args, **kwargs)  # a mixin's may take some
        mark_leaf(module)
        return module

    def _fused_asks(self) -> bool:
        """Whether it asks for what torch.nn's classes have not."""
        return False

    @property
    @unused  # no part of what torch.jit.script makes
    def backend(self) -> str | None:
        """The backend's name, or None for the one that measured fastest. Setting an unknown one raises ValueError."""
        return self._fused_backend

    @backend.setter
    def backend(self, value: str | None) -> None:
        self._fused_backend = known_backend(value)

    def __prepare_scriptable__(self) -> Any:
        """torch.jit.script compiles the counterpart in this module's place, on the same weights.

        Of a user's class: an instance with the counterpart's forward, or, where it has its own, the module itself.
        """
        kind = type(self)
        if overrides_forward(kind):
            return self
        if self._fused_asks():
            raise NotImplementedError(
                f"{kind.__name__}: got {self.extra_repr()}; torch.jit.script compiles torch.nn's classes, which have no"
                " such arguments"
            )
        if self._fused_counterpart is None:
            raise NotImplementedError(
                f"{kind.__name__}: torch.jit.script compiles torch.nn's classes, none of which this is; torch.export"
                " and torch.jit.trace record its op"
            )
        theirs = self._fused_counterpart if "_fused_counterpart" in vars(kind) else kind
        counterpart = theirs.__new__(theirs)
        counterpart.__setstate__({key: value for key, value in vars(self).items() if not key.startswith("_fused")})
        unmark_leaf(counterpart)
        if theirs is kind:
            counterpart.__dict__["forward"] = MethodType(self._fused_counterpart.forward, counterpart)
        return counterpart


def overrides_forward(cls: type[Fused]) -> bool:
    """Whether a class has a forward of the user's, and not ours."""
    owner = next(base for base in cls.__mro__ if "forward" in vars(base))
    return "_fused_counterpart" not in vars(owner)


# What an instance has in the place of its class's __module__. torch.fx's tracers take a module for a leaf, and so for a
# call_module in their graphs, where m.__module__ starts with "torch.nn". Dynamo guards nothing of torch's own modules,
# but asks for "torch.nn.modules". pickle, repr and whoever asks type(m) see the class's.
_LEAF = {"__module__": "torch.nn"}


def mark_leaf(module: nn.Module) -> None:
    """Have torch.fx take a module of ours for a leaf, as it does the counterpart, unless its forward is the user's."""
    if overrides_forward(type(module)):  # type: ignore[arg-type]
        unmark_leaf(module)
    else:
        module.__dict__.update(_LEAF)


def unmark_leaf(module: nn.Module) -> None:
    """The inverse, for a module that is ours no longer."""
    for key in _LEAF:
        module.__dict__.pop(key, None)


def prefers_counterpart(module: Fused, weights: Sequence[Tensor], input: Tensor | PackedSequence) -> bool:
    """Whether the counterpart is to run a call that has no lengths and no reset."""
    backend, device = module._fused_backend, weights[0].device.type
    if backend is not None:
        return backend == "torch" and module._fused_counterpart is not None and _casts_alike(device)
    # A trace shall find torch's own operators, which any runtime and the ONNX exporter know.
    if is_jit_tracing():
        return module._fused_counterpart is not None
    return device == ON_A_GPU and _casts_alike(device) and _counterpart_can(module) and _is_left(module, weights, input)


def _casts_alike(device: str) -> bool:
    """Whether torch's classes cast as ours do, to autocast's dtype: on a CPU they have a rule each, and for cuDNN they
    cast to float16, whatever autocast's dtype is."""
    if device not in ("cpu", ON_A_GPU) or not torch.is_autocast_enabled(device):
        return True
    return device == ON_A_GPU and torch.get_autocast_dtype(device) == torch.float16


def _is_left(module: Fused, weights: Sequence[Tensor], input: Tensor | PackedSequence) -> bool:
    """Whether dispatch leaves a call on a GPU to torch."""
    w_ih, w_hh = weights[:2]
    hidden, width = int(module.hidden_size), w_hh.shape[1]  # type: ignore[arg-type]
    packed = isinstance(input, PackedSequence)
    if isinstance(input, PackedSequence):
        steps, batch = len(input.batch_sizes), int(input.batch_sizes[0])
    elif hasattr(module, "num_layers"):
        time = 1 if module.batch_first and input.dim() == 3 else 0
        steps, batch = input.size(time), input.size(1 - time) if input.dim() == 3 else 1
    else:
        steps, batch = 1, input.size(0) if input.dim() == 2 else 1
    dtype = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else w_ih.dtype
    layers, recurrences = getattr(module, "num_layers", 1), 2 if getattr(module, "bidirectional", False) else 1
    return dispatch.is_left_to_torch(
        Problem(
            module._fused_cell, dtype, "cuda", steps == 1, batch, w_ih.shape[1], hidden, width, layers, recurrences,
            bool(module.bias), is_grad_enabled(), False, "gates", packed, False, False, tf32_allowed(),
        )
    )  # fmt: skip


def _counterpart_can(module: Fused) -> bool:
    """Whether the counterpart would give what we promise: then it is cuDNN's best customer.

    It keeps the weights in one chunk, casts them as one under autocast, and takes packed input as it is; functional,
    which owns no weights, cannot. cuDNN has no backward in eval mode, keeps all gates, and has no rule for transforms.
    """
    if module._fused_counterpart is None or is_compiling() or in_transform() or forward_ad._current_level >= 0:
        return False
    return not is_grad_enabled() or (module.training and getattr(module, "_fused_save", "gates") == "gates")
