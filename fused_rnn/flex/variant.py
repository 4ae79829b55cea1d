"""A cell with what regularises it, or with its gates among its states: another step around its own, traced as it is."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from fused_rnn.cells import CELLS
from fused_rnn.flex.cell import KNOWN
from fused_rnn.flex.compile import Shape, program_of


def _shape(cell: str) -> Shape:
    if cell in KNOWN:
        return KNOWN[cell].shape
    spec = CELLS[cell]
    return Shape(spec.gates, spec.states, spec.params, spec.recurrent, diagonal=spec.diagonal)


def program(cell: str, dropped: str = "", zones: tuple[float | None, ...] = (), gates: bool = False) -> str:
    """The variant of a built-in cell, by its name, or of a user's, by its program's text: as a program's text.

    dropped: "h": W_hh multiplies h times a mask; "g": what is new is multiplied by one; "" for neither.
    zones: of each state the probability that a unit keeps it, as an expectation; None where a mask says which do.
    gates: the gates are states too.
    States: with dropped="h" first the masked h, then the cell's own, then the gates. Masks: of h, or of what is new;
    then of each state whose zone is None, not 0 where a unit keeps it. Raises ValueError for what the cell has not.
    """
    return _made(cell, dropped, zones, gates)


program._dynamo_marked_constant = True  # type: ignore[attr-defined]  # as torch.compiler.assume_constant_result


@lru_cache(maxsize=256)
def _made(cell: str, dropped: str, zones: tuple[float | None, ...], with_gates: bool) -> str:
    own, user, parts = _shape(cell), KNOWN.get(cell), CELLS[cell].parts
    masked_h, masked_g, count = dropped == "h", dropped == "g", len(own.states)

    def step(
        x: Sequence[Tensor],
        r: Sequence[Tensor] | None,
        s: Sequence[Tensor],
        p: Sequence[Tensor],
        m: Sequence[Any],
        masks: Sequence[Tensor],
    ) -> list[Tensor]:
        before, left = s[masked_h : masked_h + count], iter(masks)
        drop: Any = next(left) if dropped else None
        gates = list(x) if r is None else [a + b for a, b in zip(x, r, strict=True)]
        if user is not None:
            made = user.plain(x, r, before, p, m)
            after = list(made) if isinstance(made, (tuple, list)) else [made]
        elif parts is not None:
            gates = list(parts.gates(x, r))
            if masked_g and parts.candidate is not None:
                gates[parts.candidate] = gates[parts.candidate] * drop
            after = list(parts.update(gates, before))
        else:
            after = list(CELLS[cell].step(x, r, before, p))
        for k, zone in enumerate(zones):
            if zone is None:
                after[k] = torch.where(next(left) != 0, before[k], after[k])
            elif zone > 0:
                after[k] = zone * before[k] + (1 - zone) * after[k]
        first = [after[0] * drop] if masked_h else []
        return [*first, *after, *(gates if with_gates else ())]

    states = [*["masked"] * masked_h, *own.states, *(f"gate_{g}" for g in range(own.gates * with_gates))]
    masks = [*["dropped"] * bool(dropped), *(f"zone_{k}" for k, zone in enumerate(zones) if zone is None)]
    shape = own._replace(states=tuple(states), masks=tuple(masks))
    title = user.name if user is not None else cell
    return CELLS[program_of(title, user.step if user is not None else step, step, shape).text].name
