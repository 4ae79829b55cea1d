"""Cells of the literature as FlexRNN in the Triton loops: on a GPU, or in Triton's interpreter."""

from __future__ import annotations

from typing import Any

import literature
import pytest
import torch
from plain_loop import Own, check
from triton_cases import DEVICE, DTYPES, LOOPS, MARKS, quicker_interpreter

import fused_rnn
from fused_rnn.triton import planner

# numpy's, in the interpreter, of the units past H that a tile has: nobody reads what is made of them.
pytestmark = [*MARKS, pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")]

OPTIONS: list[dict[str, Any]] = [
    {"T": 3, "H": 17, "lengths": True},
    {"T": 4, "B": 2, "H": 6, "heads": 2, "bidirectional": True, "reset": True, "hx": False},
    {"T": 4, "B": 3, "H": 5, "save": "recompute", "lengths": True, "reset": True, "bias": False},
    {"T": 2, "B": 17, "H": 3, "layers": 2, "bidirectional": True, "lengths": True},
    {"T": 1, "H": 34, "D": 1},
]


def cases() -> list[tuple[Own, str]]:
    """Every cell by two loops, in two dtypes, with two options; every loop with every dtype and option in turn."""
    loops, made = list(LOOPS), []
    for c, cell in enumerate(literature.CELLS):
        for k in range(2):
            own = Own(cell, **OPTIONS[(c + 2 * k) % len(OPTIONS)], dtype=DTYPES[(c // 2 + k) % len(DTYPES)]).fit()
            made.append((own, loops[(c + 3 * k) % len(loops)]))
    return made


@pytest.mark.timeout(110)
@pytest.mark.parametrize(("case", "loop"), cases(), ids=str)
def test_by_the_loops(case: Own, loop: str, monkeypatch: pytest.MonkeyPatch) -> None:
    quicker_interpreter()
    monkeypatch.setattr("fused_rnn.call.CHECKPOINT_EVERY", 2)
    with planner.override(**LOOPS[loop]):
        check(case, "triton", DEVICE)


@pytest.mark.parametrize("loop", LOOPS)
def test_what_a_step_makes_past_the_last_unit_reaches_no_other(loop: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """There params are zero, and this one makes NaN of them."""

    @fused_rnn.cell(gates=1, params=("tau",))
    def divides(x: Any, r: Any, s: Any, p: Any) -> Any:
        return torch.tanh(x[0] + r[0]) / p.tau

    monkeypatch.setitem(literature.CELLS, "divides", divides)
    monkeypatch.setitem(literature.RANGES, "divides", {"tau": (0.5, 2.0)})
    with planner.override(**LOOPS[loop]):
        check(Own("divides", T=3, H=5), "triton", DEVICE)


@pytest.mark.timeout(110)  # on a GPU Triton compiles for most of it
@pytest.mark.parametrize("loop", ["solo-registers", "cooperative-resident", "cooperative-streamed"])
@pytest.mark.parametrize("gates", [2, 5, 6, 7])
def test_numbers_of_gates(gates: int, loop: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A resident W_hh has up to four of them side by side; each must come back as itself."""
    quicker_interpreter()

    @fused_rnn.cell(gates=gates)
    def many(x: Any, r: Any, s: Any, p: Any) -> Any:
        return torch.tanh(sum((g + 1) * torch.sin(x[g] + (g + 1) * r[g]) for g in range(gates)) / gates**2)

    monkeypatch.setitem(literature.CELLS, "many", many)
    with planner.override(**LOOPS[loop]):
        check(Own("many", T=3, H=34), "triton", DEVICE)
