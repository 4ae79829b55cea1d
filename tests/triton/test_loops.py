"""The Triton loops against the float64 reference: every cell, dtype, loop and odd shape, forward and every gradient."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from cases import PROJECTIONS, Case, Inputs, inputs
from oracle import Results, by_backend, by_reference, by_torch, over_draws
from tolerances import assert_as_good_as_torch
from triton_cases import DTYPES, LOOPS, MARKS, ROWS, Row, case_of, here, quicker_interpreter

from fused_rnn.triton import planner

pytestmark = MARKS


@pytest.fixture(autouse=True)
def _quick() -> None:
    quicker_interpreter()


def check(case: Case, **schedule: object) -> None:
    def ours(case: Case, given: Inputs) -> Results:
        with planner.override(**schedule):
            return by_backend(case, given, "triton")

    def drawn(run: Callable[[Case, Inputs], Results]) -> Results:
        if not torch.cuda.is_available():  # the interpreter takes a second a draw
            return run(case, inputs(case))
        return over_draws(case, lambda case, given: run(case, here(given)))

    assert_as_good_as_torch(drawn(ours), drawn(by_torch), drawn(by_reference))


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row['loop']}-{case_of(row)}")
def test_every_loop(row: Row) -> None:
    check(case_of(row), **LOOPS[row["loop"]])


@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn_tanh", "rnn_relu"])
def test_what_the_planner_chooses(cell: str) -> None:
    """A stack of layers, by the schedules of a device of its own choice."""
    check(Case(cell, T=4, layers=2, bidirectional=True, lengths=True, reset=True))
    check(Case(cell, T=2, H=260, B=2, D=3))


PROJECTED = [
    *(Case("lstm", T=4, B=4, H=9, dtype=dtype, **options) for dtype in DTYPES for options in PROJECTIONS),
    Case("lstm", T=1, B=3, H=9, proj=5, lengths=True, bidirectional=True),
    Case("lstm", T=6, B=5, H=9, proj=3, lengths=True, bidirectional=True, reset=True, hx=False, save="recompute"),
]


@pytest.mark.parametrize("case", PROJECTED, ids=str)
def test_projections(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fused_rnn.call.CHECKPOINT_EVERY", 3)
    check(case)


@pytest.mark.parametrize("loop", ["solo-registers", "solo-streamed", "cooperative-resident", "stepwise"])
@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_gates_are_made_again_chunk_by_chunk(cell: str, loop: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of 2 over 5 steps, sequences that end in each of them, both directions, resets."""
    monkeypatch.setattr("fused_rnn.call.CHECKPOINT_EVERY", 2)
    case = Case(cell, T=5, B=4, H=3, bidirectional=True, lengths=True, reset=True, save="recompute")
    given = here(inputs(case)._replace(lengths=torch.tensor([5, 2, 3, 1])))
    with planner.override(**LOOPS[loop]):
        ours = by_backend(case, given, "triton")
    assert_as_good_as_torch(ours, by_torch(case, given), by_reference(case, given))
