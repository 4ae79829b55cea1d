"""Users' cells by the CUDA loops, in the emulator: the printed source, compiled by g++, against the reference loop."""

from __future__ import annotations

import shutil
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from cuda_cases import EXCHANGES, PRECISIONS, _Tf32Products
from emulated import on_the_emulator
from emulated_printed import Loader, Printed, kernels, shapes
from program_cases import ProgramCase, by_backend, by_loop, by_reference, call_of
from programs import PROGRAMS, program_of
from tolerances import assert_as_good_as_torch, tf32

import fused_rnn
from fused_rnn import layers, ops
from fused_rnn.backends import cuda as backend
from fused_rnn.cells import CELLS
from fused_rnn.cells.program import PREFIX
from fused_rnn.cuda import programs
from fused_rnn.plan import PRECISIONS as PLACES
from fused_rnn.plan import fewer_blocks
from fused_rnn.problem import Problem

pytestmark = [
    pytest.mark.skipif(shutil.which("g++") is None, reason="the emulator is compiled by g++"),
    pytest.mark.skipif(ops.MISSING is not None, reason=str(ops.MISSING)),
    pytest.mark.timeout(1200),
]

# Which cells meet which precision by a team; pointwise all meet all.
BY_TEAMS = {"bf16": ("lstm",), "f16": ("leaky",), "tf32": ("gru",), "ieee": ("lstm", "leaky"), "f64": ()}
ALONE = ("indrnn", "sru")


def group(precision: str) -> list[Printed]:
    names = [*BY_TEAMS[precision], *(ALONE if precision != "tf32" else ())]
    names = list(PROGRAMS) if precision == "f64" else names
    known = {"bf16": shapes(4, 16), "tf32": shapes(4, 16)}.get(precision, [])
    return [
        one
        for name in names
        for one in kernels(PROGRAMS[name], precision, known=known if name in ("lstm", "gru") else ())
    ]


LOADER = Loader(group(precision) for precision in PRECISIONS)


def check(case: ProgramCase, precision: str, seed: int = 0, **forced: Any) -> None:
    call = call_of(case, seed)
    with tf32(precision == "tf32"), on_the_emulator(seed, **forced), programs.emulating(LOADER):
        ours = by_backend(call, "cuda")
    with _Tf32Products() if precision == "tf32" else nullcontext():
        theirs = by_loop(call)
    assert_as_good_as_torch(ours, theirs, by_reference(call))


OPTIONS = [
    {},
    {"lengths": True, "reset": True, "bidirectional": True, "sequences": True},
    {"lengths": True, "bidirectional": True, "save": "recompute"},
    {"reset": True, "save": "recompute", "sequences": True, "hx": False, "bias": False, "T": 7},
]


@pytest.mark.parametrize("options", range(len(OPTIONS)))
@pytest.mark.parametrize("exchange", ["cta", "cluster2", "grid", "stepwise"])
@pytest.mark.parametrize(("precision", "cell"), [(p, cell) for p, cells in BY_TEAMS.items() for cell in cells])
def test_teams(precision: str, cell: str, exchange: str, options: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fused_rnn.call.CHECKPOINT_EVERY", 3)
    forced = EXCHANGES[exchange] | ({"rows": 8} if exchange != "stepwise" else {})
    case = ProgramCase(cell, H=33 if exchange == "cluster2" else 17, dtype=PRECISIONS[precision], **OPTIONS[options])
    check(case, precision, options, **forced)


@pytest.mark.parametrize("options", range(len(OPTIONS)))
@pytest.mark.parametrize(("precision", "cell"), [("bf16", "lstm"), ("tf32", "gru")])
def test_known_teams(precision: str, cell: str, options: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fused_rnn.call.CHECKPOINT_EVERY", 3)
    case = ProgramCase(cell, H=64, dtype=PRECISIONS[precision], **OPTIONS[options])
    check(case, precision, options, **EXCHANGES["scatter4"])
    spec = CELLS[PROGRAMS[cell]]
    with on_the_emulator(**EXCHANGES["scatter4"]), programs.emulating(LOADER):
        for backward in (False, True):
            plan, _ = programs.planned(spec, 0, (PLACES.index(precision), backward, spec.gates, 3, 64, 1))
            assert plan.shape == shapes(4, 16)[backward]


def test_a_stack_as_a_wavefront() -> None:
    """To the bit layer by layer: a row of a product is the same where rows and columns are multiples of 8."""
    first, second = (call_of(ProgramCase("leaky", T=9, B=8, D=16, H=16, lengths=True, reset=True), n) for n in (0, 1))
    leaves = [t.requires_grad_() for t in (first.x, *first.weights, *second.weights)]
    h0, found = torch.cat([*first.states, *second.states]), []
    for chunks in (1, 3):
        with on_the_emulator(exchange="cta", rows=8, chunks=chunks), programs.emulating(LOADER):
            options = {"lengths": first.lengths, "reset": first.reset, "backend": "cuda"}
            y, h_n = layers.run(first.cell, leaves[0], leaves[1:], [h0], 2, **options)
            found.append([y, h_n, *torch.autograd.grad(y.square().sum() + h_n.sum(), leaves)])
            assert ("Stack" in y.grad_fn.name()) == (chunks > 1)
    for theirs, ours in zip(*found, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("options", range(len(OPTIONS)))
@pytest.mark.parametrize("precision", [p for p in PRECISIONS if p != "tf32"])
@pytest.mark.parametrize("cell", ALONE)
def test_without_w_hh(cell: str, precision: str, options: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fused_rnn.call.CHECKPOINT_EVERY", 3)
    check(ProgramCase(cell, dtype=PRECISIONS[precision], **OPTIONS[options]), precision, options)


@pytest.mark.parametrize("options", range(len(OPTIONS)))
@pytest.mark.parametrize("cell", PROGRAMS)
def test_float64(cell: str, options: int) -> None:
    check(ProgramCase(cell, dtype=torch.float64, **OPTIONS[options]), "f64", options)


@pytest.mark.parametrize(("cell", "precision"), [("lstm", "bf16"), ("lstm", "ieee"), ("gru", "tf32"), ("gru", "f64")])
def test_as_the_hand_written_cell(cell: str, precision: str) -> None:
    """Forward to the bit: the formula is the same. Gradients as near to the truth."""
    case = ProgramCase(cell, lengths=True, reset=True, bidirectional=True, dtype=PRECISIONS[precision])
    call = call_of(case)
    forced = {} if precision == "f64" else {"exchange": "cta", "rows": 8}
    with tf32(precision == "tf32"), on_the_emulator(**forced), programs.emulating(LOADER):
        ours, theirs = (by_backend(call._replace(cell=name), "cuda") for name in (call.cell, cell))
    for name in ("y", *(f"{state}_n" for state in call.spec.states)):
        assert torch.equal(ours[name], theirs[name]), name
    assert_as_good_as_torch(ours, theirs, by_reference(call))


# --- cells with more numbers a unit than an LSTM, whose kernels leave weights to shared memory


@fused_rnn.cell(gates=4, states=("h", "c"), params=("p_i", "p_f", "p_o"))
def peephole(x: Any, r: Any, s: Any, p: Any) -> Any:
    i = torch.sigmoid(x[0] + r[0] + p.p_i * s.c)
    f = torch.sigmoid(x[1] + r[1] + p.p_f * s.c)
    c = f * s.c + i * torch.tanh(x[2] + r[2])
    o = torch.sigmoid(x[3] + r[3] + p.p_o * c)
    return o * torch.tanh(c), c


@pytest.mark.parametrize("exchange", ["cluster4", "grid"])
def test_fewer_blocks_in_registers(exchange: str) -> None:
    cell = peephole.descriptor()
    numbers = [fewer_blocks(cell, "bf16", backward) for backward in (False, True)]
    assert min(numbers) > 0
    case = ProgramCase(cell.name, H=117, B=2, T=3, bidirectional=True, sequences=True, dtype=torch.bfloat16)
    check(case, "bf16", rows=8, **EXCHANGES[exchange])


THIRTEEN_STATES = PREFIX + f"x|1 0 1|{'a ' * 13}||tanh 0>{'14 ' * 13};|const 0.0>39;{'39 ' * 13};"


def test_what_is_said() -> None:
    """Of a cell that can be compiled, and of one that cannot."""
    name = peephole.descriptor().name
    problem = Problem(name, torch.float32, "cpu", False, 3, 5, 17, 17, 1, 1, True, True, False, "gates", False, False)
    assert backend.supports(problem) is not None
    with on_the_emulator():
        assert backend.supports(problem) == "the emulator has the kernels of built-in cells alone"
        with programs.emulating(LOADER):
            assert backend.supports(problem) is None
            assert "forward: " in backend.describe(problem)
            for most in (program_of(5, states=12), program_of(2, params=16)):
                assert backend.supports(problem._replace(cell=most)) is None
            for beyond in (program_of(2, params=17), THIRTEEN_STATES):
                reason = str(backend.supports(problem._replace(cell=beyond)))
                assert "it knows cells of up to 12 states and 16 params, this one has" in reason
            large = problem._replace(cell=program_of(1, params=8), batch=1 << 20, hidden_size=256, width=256)
            assert "B·R·H·8 = 2147483648 is beyond" in str(backend.supports(large))
            alone = problem._replace(cell=PROGRAMS["indrnn"])
            assert "no W_hh, and a unit's thread runs all of its steps" in backend.describe(alone)
