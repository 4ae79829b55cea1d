"""How many floating-point operations our ops take, for torch.utils.flop_counter.

Counted as torch counts: 2·m·k·n for a product of [m, k] and [k, n], nothing for what is pointwise. By the shapes alone,
so that steps past a sequence's end count as all others do.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from math import prod
from types import ModuleType
from typing import Any

from fused_rnn.call import BackwardCall, LayerCall

Shape = Sequence[int]
Formula = Callable[..., int]

_COUNTER = "torch.utils.flop_counter"


def _products(call: LayerCall) -> tuple[int, int, int]:
    """Multiplications for a step of one row, in all recurrences: by W_ih, by W_hh, by W_hr and a cell's matrices."""
    each = call.each
    return (
        sum(prod(w.w_ih) for w in each),
        sum(prod(w.w_hh) for w in each if w.w_hh is not None),
        sum(prod(matrix) for w in each for matrix in (w.w_hr, *w.matrices) if matrix is not None),
    )


def forward(*args: Any, **_: Any) -> int:
    """fused_rnn::forward: every step multiplies by W_ih, W_hh and the projection."""
    call = LayerCall(*args)
    x: Any = call.x
    return int(2 * x[0] * x[1] * sum(_products(call)))


def backward(*args: Any, **_: Any) -> int:
    """fused_rnn::backward: the state's gradient through all steps, but into an h0 that was not given; x's and the
    weights' where they are asked for; with save="recompute" all of forward once more."""
    call = BackwardCall(*args)
    x: Any = call.x
    steps, batch = x[:2]
    w_ih, w_hh, w_hr = _products(call.layer)
    through = w_hh * (steps - (not call.states)) + w_hr * steps
    weights = (call.need_dw + (call.save == "recompute")) * (w_ih + w_hh + w_hr)
    return int(2 * batch * (through + steps * (call.need_dx * w_ih + weights)))


def step(x: Shape, weights: Sequence[Shape], *_: Any, **__: Any) -> int:
    """fused_rnn::step: one step of x [B, D]."""
    return 2 * x[0] * sum(prod(w) for w in weights if len(w) == 2)


class _WhenImported(MetaPathFinder):
    """Registers formulas when torch's counter is imported: to import it here would be to import Triton."""

    def __init__(self) -> None:
        self.formulas: dict[Any, Formula] = {}

    def find_spec(self, name: str, path: Any, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != _COUNTER:
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                run(module)
                for packet, formula in self.formulas.items():
                    module.register_flop_formula(packet)(formula)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


_later = _WhenImported()


def register(packet: Any, formula: Formula) -> None:
    """Count torch.ops.fused_rnn.<op> by this formula, of its arguments with shapes in the place of tensors."""
    add = getattr(sys.modules.get(_COUNTER), "register_flop_formula", None)
    if add is not None:
        add(packet)(formula)
    if _later not in sys.meta_path:
        sys.meta_path.insert(0, _later)
    _later.formulas[packet] = formula
