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

Shape = Sequence[int]
Formula = Callable[..., int]

_COUNTER = "torch.utils.flop_counter"


def _products(weights: Sequence[Shape], recurrences: int) -> tuple[int, int, int]:
    """Multiplications for a step of one row, in all recurrences: by W_ih, by W_hh, by W_hr."""
    count = len(weights) // recurrences
    kinds = [sum(prod(w) for w in weights[kind::count]) for kind in (0, 1)]
    return kinds[0], kinds[1], sum(prod(w) for w in weights[count - 1 :: count]) if count in (3, 5) else 0


def forward(
    x: Shape,
    weights: Sequence[Shape],
    h0: Any,
    c0: Any,
    lengths: Any,
    reset: Any,
    cell: str,
    directions: Sequence[int],
    *_: Any,
    **__: Any,
) -> int:
    """fused_rnn::forward: every step multiplies by W_ih, W_hh and the projection."""
    return 2 * x[0] * x[1] * sum(_products(weights, len(directions)))


def backward(
    dy: Any,
    dh_n: Any,
    dc_n: Any,
    x: Shape,
    weights: Sequence[Shape],
    h0: Any,
    c0: Any,
    lengths: Any,
    reset: Any,
    hidden: Any,
    saved: Any,
    cells: Any,
    cell: str,
    directions: Sequence[int],
    save: str,
    need_dx: bool,
    need_dw: bool,
    **_: Any,
) -> int:
    """fused_rnn::backward: the state's gradient through all steps, but into an h0 that was not given; x's and the
    weights' where they are asked for; with save="recompute" all of forward once more."""
    steps, batch = x[:2]
    w_ih, w_hh, w_hr = _products(weights, len(directions))
    through = w_hh * (steps - (h0 is None)) + w_hr * steps
    asked = need_dx * w_ih + need_dw * (w_ih + w_hh + w_hr) + (save == "recompute") * (w_ih + w_hh + w_hr)
    return 2 * batch * (through + steps * asked)


def step(
    x: Shape, h: Any, c: Any, w_ih: Shape, w_hh: Shape, b_ih: Any, b_hh: Any, w_hr: Shape | None, *_: Any, **__: Any
) -> int:
    """fused_rnn::step: one step of x [..., D]."""
    return 2 * prod(x[:-1]) * (prod(w_ih) + prod(w_hh) + (0 if w_hr is None else prod(w_hr)))


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
