"""Which cells are scans, and that their factors and rests are what the cells compute."""

from __future__ import annotations

from typing import Any

import literature
import pytest
import torch
from linear_cells import SCANS, restarts
from programs import PROGRAMS
from tolerances import assert_same_formula
from torch import Tensor

import fused_rnn
from fused_rnn.cells.program import Program, parse
from fused_rnn.flex.scan import Scan, scan_of


def cell(**options: Any) -> Any:
    return fused_rnn.cell(recurrent=False, **options)


STATES = {"sru": (1,), "many": (1, 2), "forgets": (0, 1)}


@cell(gates=1, states=("h", "c"))
def crossed(x: Any, r: Any, s: Any, p: Any) -> Any:
    return s.c, s.h + x[0]


@cell(gates=1)
def squared(x: Any, r: Any, s: Any, p: Any) -> Any:
    return s.h * s.h + x[0]


@cell(gates=1)
def reciprocal(x: Any, r: Any, s: Any, p: Any) -> Any:
    return x[0] / s.h


@cell(gates=1, states=("h", "c"))
def reads_what_it_reads_out(x: Any, r: Any, s: Any, p: Any) -> Any:
    c = torch.sigmoid(x[0]) * s.c + s.h
    return torch.tanh(c), c


@cell(gates=1, states=("h", "c"))
def chosen_by_a_state(x: Any, r: Any, s: Any, p: Any) -> Any:
    return s.c, torch.where(s.c > 0, s.c, x[0])


@cell(gates=1)
def without_a_state(x: Any, r: Any, s: Any, p: Any) -> Any:
    return torch.tanh(x[0])


OTHERS = (
    *(crossed, squared, reciprocal, reads_what_it_reads_out, chosen_by_a_state, restarts, without_a_state),
    *(literature.sru, literature.indrnn, literature.lstm, literature.leaky_integrator),
)


def found(program: Program) -> Scan:
    scan = scan_of(program.text)
    assert scan is not None
    return scan


def some(count: int) -> list[Tensor]:
    return list(torch.randn(count, 5, 7, dtype=torch.float64).unbind())


@pytest.mark.parametrize("name", SCANS)
def test_forward(name: str) -> None:
    torch.manual_seed(0)
    program = SCANS[name].program
    scan = found(program)
    assert scan.states == STATES.get(name, (0,))
    width, count = program.gates, len(program.states)
    inputs = some(program.forward.inputs)
    after = program.forward.run(inputs)[0]
    unread = [t * torch.nan if width <= i < width + count else t for i, t in enumerate(inputs)]
    for state, factor, rest in zip(scan.states, *scan.forward.run(unread), strict=True):
        assert_same_formula((factor * inputs[width + state] + rest).expand(5, 7), after[state].expand(5, 7))


@pytest.mark.parametrize("name", SCANS)
def test_backward(name: str) -> None:
    torch.manual_seed(1)
    program = SCANS[name].program
    scan, count = found(program), len(program.states)
    inputs = some(program.backward.inputs)
    first = len(inputs) - count
    expected = program.backward.run(inputs)[1]
    unread = [t * torch.nan if i - first in scan.states else t for i, t in enumerate(inputs)]
    factors, rests = scan.backward.run(unread)
    assert len(factors) == len(rests) == count
    for state in range(count):
        made = factors[state] * inputs[first + state] + rests[state]
        assert_same_formula(made.expand(5, 7), expected[state].expand(5, 7))
        if state not in scan.states:
            assert not factors[state].any() and not rests[state].any()


def test_which_modules_are_scans() -> None:
    made = {
        "MinGRU": fused_rnn.MinGRU(3, 5),
        "MinLSTM": fused_rnn.MinLSTM(3, 5),
        "SRU": fused_rnn.SRU(3, 5),
        "SRU without recurrent terms": fused_rnn.SRU(3, 5, recurrent_terms=False),
        "SRU without either": fused_rnn.SRU(3, 5, recurrent_terms=False, skip=False),
        "IndRNN": fused_rnn.IndRNN(3, 5),
    }
    scans = [name for name, module in made.items() if scan_of(module.cell.program.text) is not None]
    assert scans == ["MinGRU", "MinLSTM", "SRU without recurrent terms", "SRU without either"]


@pytest.mark.parametrize("other", OTHERS, ids=lambda other: other.name)
def test_what_is_no_scan(other: Any) -> None:
    assert scan_of(other.program.text) is None


@pytest.mark.parametrize("name", PROGRAMS)
def test_what_has_a_matrix_or_a_kink_is_none(name: str) -> None:
    assert scan_of(parse(PROGRAMS[name]).text) is None


def test_stretches_of_time_join() -> None:
    """A whole sequence by chunks: each from zero, beside the product of its factors, and then joined."""
    torch.manual_seed(2)
    program = SCANS["min_lstm"].program
    scan, steps, chunk = found(program), 23, 5
    gates = torch.randn(steps, 3, 4, 6, dtype=torch.float64)
    h = h0 = torch.randn(4, 6, dtype=torch.float64)
    sequence = []
    for t in range(steps):
        (h,) = program.forward.run([*gates[t], h])[0]
        sequence.append(h)
    entering, ends = h0, []
    for first in range(0, steps, chunk):
        product, total = torch.ones_like(h0), torch.zeros_like(h0)
        for t in range(first, min(first + chunk, steps)):
            (factor,), (rest,) = scan.forward.run([*gates[t], h0 * torch.nan])
            product, total = factor * product, factor * total + rest
        entering = product * entering + total
        ends.append(entering)
    assert_same_formula(torch.stack(ends), torch.stack([*sequence[chunk - 1 :: chunk], sequence[-1]]))
