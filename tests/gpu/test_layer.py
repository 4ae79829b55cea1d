"""What GPU backends share, over loops in plain PyTorch: what fused_rnn.gpu.loops.Loops means, as a program.

In float64 it is compared with the reference loop, of which it has nothing but the cells' formulas.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import program_calls
import program_cases
import pytest
import torch
from cases import PROJECTIONS, Case, inputs, option_cases
from oracle import by_backend, by_reference, by_torch
from plain_gpu import plain_backend
from program_cases import ProgramCase, call_of
from programs import PROGRAMS
from stage_cells import MASKED, STAGED
from tolerances import assert_as_good_as_torch, assert_same_formula

from fused_rnn.call import BackwardCall, LayerCall
from fused_rnn.cells.program import parse
from fused_rnn.gpu import precision
from fused_rnn.transforms import fake


@pytest.fixture(scope="module", autouse=True)
def _backend() -> Iterator[None]:
    with plain_backend():
        yield


MORE = [
    Case("lstm", T=1, B=3, proj=5, lengths=True, bidirectional=True, dtype=torch.float64),
    Case("lstm", T=7, B=5, proj=3, lengths=True, bidirectional=True, reset=True, hx=False, dtype=torch.float64),
]


@pytest.mark.parametrize("case", [*option_cases((torch.float64,)), *MORE], ids=str)
def test_float64_is_the_reference(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fused_rnn.call.CHECKPOINT_EVERY", 4)
    given = inputs(case)
    ours, reference = by_backend(case, given, "plain"), by_reference(case, given)
    assert ours.keys() == reference.keys()
    for name, value in ours.items():
        assert_same_formula(value, reference[name])


PROGRAM_OPTIONS: list[dict[str, Any]] = [
    {},
    {"bidirectional": True, "lengths": True, "reset": True, "sequences": True},
    {"save": "recompute", "bidirectional": True, "lengths": True, "sequences": True, "bias": False},
    {"save": "recompute", "T": 9, "reset": True, "hx": False},
]


@pytest.mark.parametrize("options", PROGRAM_OPTIONS, ids=lambda options: "-".join(options) or "plain")
@pytest.mark.parametrize("cell", PROGRAMS)
def test_programs_in_float64(cell: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fused_rnn.call.CHECKPOINT_EVERY", 4)
    call = call_of(ProgramCase(cell, dtype=torch.float64, **options))
    ours, reference = program_cases.by_backend(call, "plain"), program_cases.by_reference(call)
    assert ours.keys() == reference.keys()
    for name, value in ours.items():
        assert_same_formula(value, reference[name])


def _assert_the_loops_agree(call: LayerCall) -> None:
    """The loops around the kernels, with the reference."""
    ops = torch.ops.fused_rnn
    ours = program_calls.by_ops(call, ops.plain_forward.default, ops.plain_backward.default)
    reference = program_calls.by_reference(call)
    assert ours.keys() == reference.keys()
    for key, value in ours.items():
        assert_same_formula(value, reference[key])


@pytest.mark.parametrize("save", ["gates", "recompute"])
@pytest.mark.parametrize("cell", [*STAGED, *MASKED])
def test_stages_in_float64(cell: str, save: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Matrices and masks: their places among the weights and the gradients, and a chunk's part of them."""
    monkeypatch.setattr("fused_rnn.call.CHECKPOINT_EVERY", 2)
    name = MASKED[cell] if cell in MASKED else STAGED[cell].program.text
    masked = {"lengths": True, "reset": True, "directions": (1, -1), "save": save}
    call = program_calls.make_call(name, T=5, H=6, dtype=torch.float64, **masked)
    _assert_the_loops_agree(call)


@pytest.mark.parametrize("save", ["gates", "recompute"])
@pytest.mark.parametrize("cell", ["gru", "lstm", "leaky", "deep"])
def test_blocks_of_w_hh_in_float64(cell: str, save: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loops get a whole matrix, and its gradient is cut."""
    monkeypatch.setattr("fused_rnn.call.CHECKPOINT_EVERY", 2)
    program = STAGED[cell].program if cell in STAGED else parse(PROGRAMS[cell])
    masked = {"lengths": True, "reset": True, "directions": (1, -1), "save": save}
    name = program._replace(diagonal=3).text
    call = program_calls.make_call(name, T=5, H=21, dtype=torch.float64, **masked)
    _assert_the_loops_agree(call)
    weights = [call.weights[0], call.weights[1][:, :5], *call.weights[2:]]
    with pytest.raises(RuntimeError, match=r"weights\[1\]: got \[\d+, 5\], expected \[\d·H, H/3\]"):
        torch.ops.fused_rnn.plain_forward.default(*call._replace(weights=weights))


def test_masks_of_recurrences_differ_in_time() -> None:
    """One's mask is the same at all times, the other's has each time's."""
    call = program_calls.make_call(MASKED["dropped"], directions=(1, -1), dtype=torch.float64)
    weights, first = list(call.weights), call.kinds.number - 2
    weights[first], weights[first + 1] = weights[first + 1], weights[first]
    call = call._replace(weights=weights)
    ops = torch.ops.fused_rnn
    ours = program_calls.by_ops(call, ops.plain_forward.default, ops.plain_backward.default)
    for key, value in program_calls.by_reference(call).items():
        assert_same_formula(ours[key], value)


def test_a_mask_of_another_time() -> None:
    call = program_calls.make_call(MASKED["dropped"], T=5)
    weights = [*call.weights[:-1], call.weights[-1][:3]]
    with pytest.raises(RuntimeError, match=r"weights\[5\]: got \[3, 3, 17\], expected \[5, 3, 17\]"):
        torch.ops.fused_rnn.plain_forward.default(*call._replace(weights=weights))


@pytest.mark.parametrize("save", ["gates", "recompute"])
def test_sequences_of_a_projected_cell(save: str) -> None:
    given = inputs(Case("lstm", T=6, proj=5, bidirectional=True, lengths=True, dtype=torch.float64))
    call = LayerCall(given.x, given.weights, given.hx, given.lengths, None, "lstm", (1, -1), save, False, True)
    ours, reference = program_cases.by_backend(call, "plain"), program_cases.by_reference(call)
    for name, value in ours.items():
        assert_same_formula(value, reference[name])


@pytest.mark.parametrize("sequences", [False, True])
@pytest.mark.parametrize("save", ["none", "gates", "recompute"])
def test_what_forward_returns(save: str, sequences: bool) -> None:
    call = call_of(ProgramCase("sru", save=save, sequences=sequences, bidirectional=True))
    outputs = torch.ops.fused_rnn.plain_forward.default(*call)
    expected = fake.forward(*call)
    assert [(t.shape, t.dtype) for t in outputs] == [(t.shape, t.dtype) for t in expected]
    torch.library.opcheck(
        torch.ops.fused_rnn.plain_forward.default, tuple(call), test_utils=("test_schema", "test_faketensor")
    )


def test_backward_refuses_sequences_of_other_sizes() -> None:
    call = call_of(ProgramCase("lstm", sequences=True))
    y, h_n, c_n, cs, saved, hidden = torch.ops.fused_rnn.plain_forward.default(*call)
    back = BackwardCall(y, (h_n, c_n), *call[:5], hidden, saved, (cs,), *call[5:8], True, True, (cs[:, 1:],))
    back = back._replace(hidden=y)
    for dsequences, message in (((cs[:, 1:],), "dsequences: got"), ((cs, cs), "dsequences: got 2 tensors")):
        with pytest.raises(RuntimeError, match=message):
            torch.ops.fused_rnn.plain_backward.default(*back._replace(dsequences=dsequences))


@pytest.mark.parametrize("options", PROJECTIONS, ids=str)
def test_float32_projection(options: dict[str, Any]) -> None:
    case = Case("lstm", **options)
    given = inputs(case)
    assert_as_good_as_torch(by_backend(case, given, "plain"), by_torch(case, given), by_reference(case, given))


@pytest.mark.parametrize("save", ["gates", "recompute"])
def test_opcheck_with_a_projection(save: str) -> None:
    case = Case("lstm", T=2, B=2, H=4, proj=3, bidirectional=True, lengths=True, reset=True, dtype=torch.float64)
    given = inputs(case)
    call = LayerCall(given.x, given.weights, given.hx, given.lengths, given.reset, "lstm", [1, -1], save, True)
    forward, backward = torch.ops.fused_rnn.plain_forward.default, torch.ops.fused_rnn.plain_backward.default
    torch.library.opcheck(forward, tuple(call), test_utils=("test_schema", "test_faketensor"))
    saved, *histories, hidden = forward(*call)[3:]
    back = BackwardCall(given.dout[0], given.dout[1:], *call[:5], hidden, saved, histories, *call[5:8], True, True)
    torch.library.opcheck(backward, tuple(back), test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("matmul", ["ieee", "tf32", "none"])
@pytest.mark.parametrize("allowed", [False, True])
def test_products_outside_the_loops_follow_cudnn(allowed: bool, matmul: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "tf32_allowed", lambda: allowed)
    flags = torch.backends.cuda.matmul
    before = flags.fp32_precision
    try:
        flags.fp32_precision = matmul
        with precision.as_in_cudnn():
            assert flags.fp32_precision == ("tf32" if allowed else "ieee")
        assert flags.fp32_precision == matmul
    finally:
        flags.fp32_precision = before
