"""Packed weights that stay from call to call, for as long as they are known to be the module's: csrc/ops/frozen.h."""

from __future__ import annotations

import copyreg
import weakref
from typing import Any

from torch.optim.optimizer import register_optimizer_step_post_hook

from fused_rnn import ops

# What int8 weights are multiplied with; Narrow in csrc/params.h.
ACTIVATIONS = {"float32": 2, "int8": 3}


def keeper(cell: str, names: list[str], layers: int, directions: int, narrow: int = 0) -> Any:
    """What keeps the panels of tensors of these names; None where nothing can. narrow: what those of int8 are packed
    as, one of ACTIVATIONS."""
    if ops.fast_path is None:
        return None
    _watch_optimizers()
    kept = ops._C.Frozen(cell, names, layers, directions, narrow)
    _keepers.add(kept)
    return kept


_keepers = weakref.WeakSet[Any]()
_watching = list[Any]()  # the hook's handle, once there is one


def _watch_optimizers() -> None:
    """Have the panels forgotten after a step of an optimizer with fused=True, which torch does not count as a write."""

    def forget(optimizer: Any, *_: Any) -> None:
        if any(group.get("fused") for group in optimizer.param_groups):
            for kept in list(_keepers):
                kept.forget()

    if not _watching:
        _watching.append(register_optimizer_step_post_hook(forget))


def keeper_of(module: Any) -> Any:
    """A Recurrent's. Raises NotImplementedError for one whose calls never run on such panels, RuntimeError for weights
    by which a change could not be seen."""
    if ops.fast_path is None:
        return None
    names = module._fused_names()
    if names is None:
        raise NotImplementedError(
            f"freeze: got {module}, whose weights are made anew in each call, or which runs more than its layers;"
            " expected one without regularisers, heads, blocks, computed weights or checks of a subclass's own"
        )
    for name, weight in module.named_parameters(recurse=False):
        if weight.is_inference():
            raise RuntimeError(
                f"{name}: got a tensor made under inference_mode, which does not count its changes; expected a"
                " parameter made outside of it: clone it there"
            )
    return keeper(module._fused_cell, names, module.num_layers, 2 if module.bidirectional else 1)


if ops._C is not None:  # copies begin without panels
    copyreg.pickle(ops._C.Frozen, lambda kept: (keeper, kept.arguments))
