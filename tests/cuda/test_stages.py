"""Cells with masks, sums over the units of a row and matrices of their own, by the CUDA loops in the emulator."""

from __future__ import annotations

import shutil
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from cuda_cases import EXCHANGES, PRECISIONS, _Tf32Products
from emulated import on_the_emulator
from emulated_printed import Loader, Printed, kernels, shapes
from program_cases import ProgramCase, Results, by_backend, by_loop, by_reference, call_of
from stage_cells import MASKED, STAGED
from tolerances import assert_as_good_as_torch, tf32

from fused_rnn import ops
from fused_rnn.backends import cuda as backend
from fused_rnn.cells import CELLS
from fused_rnn.cuda import programs
from fused_rnn.cuda.printer import Kernel, struct
from fused_rnn.flex.compile import Shape, program_of
from fused_rnn.plan import PRECISIONS as PLACES
from fused_rnn.plan import Stages, stages_of
from fused_rnn.problem import Problem

pytestmark = [
    pytest.mark.skipif(shutil.which("g++") is None, reason="the emulator is compiled by g++"),
    pytest.mark.skipif(ops.MISSING is not None, reason=str(ops.MISSING)),
    pytest.mark.timeout(1200),
]


def _gated(x: Any, r: Any, s: Any, p: Any, m: Any, masks: Any) -> Any:
    """With few numbers a unit, so that there are known teams of it."""
    h = torch.sigmoid(x[0] + r[0]) * torch.tanh(x[1] + r[1])
    return masks[0] * h + masks[1] * s[0]


GATED = program_of("gated", _gated, _gated, Shape(2, ("h",), masks=("new", "old"))).text


def _means(x: Any, r: Any, s: Any, p: Any, m: Any, masks: Any) -> Any:
    """Sums one behind the other, with nothing between them."""
    a = torch.tanh(x[0] + r[0]) + torch.sigmoid(x[1] + r[1]) * torch.sigmoid(x[2] + r[2]) * torch.tanh(x[3] + r[3])
    for _ in range(8):
        a = torch.tanh(a - a.mean(-1, keepdim=True))
    return a


MEANS = program_of("means", _means, _means, Shape(4, ("h",))).text
TEXTS = {name: cell.descriptor().name for name, cell in STAGED.items()} | MASKED | {"gated": GATED, "means": MEANS}
# Which precisions a cell meets by a team. What two norms make of TF32's rounding over few units is luck, of torch's one
# result as well: of six seeds four had more than twice its error at H = 17, none at H = 50.
BY_TEAMS = {
    "layer_norm": ("bf16", "ieee"),
    "rms_norm": ("f16",),
    "layer_norm_lstm": ("bf16", "ieee"),
    "reset_before": ("bf16", "ieee"),
    "deep": ("tf32", "f16"),
    "masked_product": ("bf16", "tf32"),
}
TEAMS = [(cell, precision) for cell, precisions in BY_TEAMS.items() for precision in precisions]
HIDDEN = {"cta": 29, "cluster2": 33, "cluster4": 50, "grid": 50}  # of no whole members
CASES = [(*team, exchange) for team in TEAMS for exchange, width in HIDDEN.items() if team[1] != "tf32" or width == 50]


# A step at a time: sums, a variance; products; both, and masks; without W_hh.
STEPWISE = ("layer_norm", "layer_norm_lstm", "reset_before", "deep", "masked_product", "unit_norm")


def staged(cell: str, precision: str) -> list[Printed]:
    """The kernels of a cell in stages: it has no others than those of teams."""
    return [one for one in kernels(TEXTS[cell], precision) if one.kernel.tiles]


LOADER = Loader(
    [
        *(staged(cell, precision) for cell, precision in TEAMS),
        *(kernels(MASKED["dropped"], precision) for precision in ("bf16", "ieee", "f64")),
        kernels(GATED, "bf16", known=shapes(4, 16)),
        staged("means", "tf32"),
        *(
            [one for cell in STEPWISE for one in kernels(TEXTS[cell], precision) if not one.kernel.tiles]
            for precision in ("bf16", "f16", "ieee", "f64")
        ),
    ]
)


def run(case: ProgramCase, precision: str, seed: int = 0, **forced: Any) -> Results:
    with tf32(precision == "tf32"), on_the_emulator(seed, False, **forced), programs.emulating(LOADER):
        return by_backend(call_of(case), "cuda")


def check(case: ProgramCase, precision: str, seed: int = 0, **forced: Any) -> None:
    ours, call = run(case, precision, seed, **forced), call_of(case)
    with _Tf32Products() if precision == "tf32" else nullcontext():
        theirs = by_loop(call)
    assert_as_good_as_torch(ours, theirs, by_reference(call))


# B of no whole tiles; lengths hold 0 and T.
OPTIONS: list[dict[str, Any]] = [
    {"B": 9},
    {"lengths": True, "reset": True, "bidirectional": True, "sequences": True},
    {"T": 1, "B": 1, "hx": False, "bias": False},
    {"T": 7, "lengths": True, "reset": True, "bidirectional": True, "save": "recompute"},
]


@pytest.mark.parametrize("options", range(len(OPTIONS)))
@pytest.mark.parametrize(("cell", "precision", "exchange"), CASES)
def test_teams(cell: str, precision: str, exchange: str, options: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fused_rnn.call.CHECKPOINT_EVERY", 3)
    case = ProgramCase(TEXTS[cell], H=HIDDEN[exchange], dtype=PRECISIONS[precision], **OPTIONS[options])
    check(case, precision, options, rows=8, **EXCHANGES[exchange])


@pytest.mark.parametrize("exchange", ["cta", "cluster2", "grid"])
@pytest.mark.parametrize("cell", ["layer_norm", "reset_before"])
def test_whole_members(cell: str, exchange: str) -> None:
    """Rows of the matrices are whole vectors, and two tiles of the batch go together."""
    case = ProgramCase(TEXTS[cell], B=18, H=16 if exchange == "cta" else 64, dtype=torch.bfloat16)
    check(case, "bf16", rows=16 if exchange != "cluster2" else 8, **EXCHANGES[exchange])


@pytest.mark.parametrize("exchange", ["cta", "cluster4", "grid"])
@pytest.mark.parametrize("cell", ["layer_norm_lstm", "masked_product"])
def test_the_same_bits_whatever_the_schedule(cell: str, exchange: str) -> None:
    case = ProgramCase(TEXTS[cell], H=HIDDEN[exchange], bidirectional=True, lengths=True, dtype=torch.bfloat16)
    first, second = (run(case, "bf16", seed, rows=8, **EXCHANGES[exchange]) for seed in (1, 2))
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


def test_no_warp_misses_a_phase() -> None:
    """Four of eight warps have no units: nobody waits for them, and between these sums no barrier of the threads does.
    By the seeds other warps run far ahead of one."""
    case = ProgramCase(TEXTS["means"], T=7, B=9, H=50)
    first, *others = (run(case, "tf32", seed, rows=8, **EXCHANGES["cluster4"]) for seed in (0, 14, 39, 75, 91, 155))
    for name, tensor in first.items():
        assert all(torch.equal(tensor, other[name]) for other in others), name


def test_a_variance_far_from_zero() -> None:
    """Of numbers of which E[x^2] - E[x]^2 would leave nothing."""
    call = call_of(ProgramCase(TEXTS["layer_norm"], H=50))
    weights = [w + 300 if i == 3 else w for i, w in enumerate(call.weights)]  # b_hh, which the norm takes away
    call = call._replace(weights=weights)
    with on_the_emulator(0, False, rows=8, **EXCHANGES["cluster4"]), programs.emulating(LOADER):
        ours = by_backend(call, "cuda")
    assert_as_good_as_torch(ours, by_loop(call), by_reference(call))


# --- without a team


@pytest.mark.parametrize("precision", ["bf16", "f64"])
@pytest.mark.parametrize("cell", ["deep", "layer_norm_lstm"])
def test_more_units_than_a_row_has_threads(cell: str, precision: str) -> None:
    check(
        ProgramCase(TEXTS[cell], B=2, H=300, dtype=PRECISIONS[precision], **OPTIONS[1]), precision, exchange="stepwise"
    )


def test_a_step_at_a_time_gives_the_same_bits_whatever_the_schedule() -> None:
    case = ProgramCase(TEXTS["deep"], bidirectional=True, lengths=True)
    first, second = (run(case, "ieee", seed, exchange="stepwise") for seed in (1, 2))
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


@pytest.mark.parametrize("options", range(len(OPTIONS)))
@pytest.mark.parametrize("precision", ["bf16", "f16", "ieee", "f64"])
@pytest.mark.parametrize("cell", STEPWISE)
def test_a_step_at_a_time(cell: str, precision: str, options: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fused_rnn.call.CHECKPOINT_EVERY", 3)
    case = ProgramCase(TEXTS[cell], dtype=PRECISIONS[precision], **OPTIONS[options])
    check(case, precision, options, exchange="stepwise")


# --- masks alone: every loop there is


@pytest.mark.parametrize("options", range(len(OPTIONS)))
@pytest.mark.parametrize("save", ["gates", "recompute"])
@pytest.mark.parametrize(
    ("cell", "precision", "exchange", "width"),
    [
        ("dropped", "bf16", "cta", 17),
        ("gated", "bf16", "scatter4", 64),
        ("dropped", "bf16", "stepwise", 17),
        ("dropped", "ieee", "cluster2", 33),
        ("dropped", "ieee", "grid", 33),
        ("dropped", "f64", "stepwise", 17),
    ],
)
def test_masks(
    cell: str, precision: str, exchange: str, width: int, save: str, options: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fused_rnn.call.CHECKPOINT_EVERY", 3)
    forced = EXCHANGES[exchange] | ({"rows": 8} if exchange != "stepwise" else {})
    case = ProgramCase(TEXTS[cell], H=width, dtype=PRECISIONS[precision], **(OPTIONS[options] | {"save": save}))
    check(case, precision, options, **forced)


# --- what is said


def problem_of(cell: str, dtype: torch.dtype = torch.bfloat16, batch: int = 8, hidden: int = 64) -> Problem:
    sizes = (batch, 5, hidden, hidden, 1, 1)
    return Problem(TEXTS[cell], dtype, "cpu", False, *sizes, True, True, False, "gates", False, False)


def test_what_is_said_of_a_problem() -> None:
    """One that no team runs takes a step at a time, and says why."""
    with on_the_emulator(0, False), programs.emulating(LOADER):
        fits = problem_of("reset_before")
        assert backend.supports(fits) is None
        assert "cluster" in backend.describe(fits)
        reasons = {
            "float64 has no tensor-core product: it runs stepwise": fits._replace(dtype=torch.float64),
            "the cell's own matrices of 134217728 bytes": problem_of("reset_before", hidden=8192),
            "no W_hh, and a row's CTA runs its stages, a step at a time": problem_of("unit_norm"),
        }
        for reason, problem in reasons.items():
            assert backend.supports(problem) is None
            assert reason in backend.describe(problem), problem
        assert "narrow weights" in str(backend.narrows(fits))
        assert "narrow weights" not in str(backend.narrows(problem_of("dropped")))


def test_many_waves_are_no_reason() -> None:
    """A cell in one stage runs stepwise where a team would take too long; one in several takes more launches for it."""
    with on_the_emulator(0, False), programs.emulating(LOADER):
        sizes = (PLACES.index("bf16"), 0, 3, 4096, 1024, 1)
        plan, _ = programs.planned(CELLS[TEXTS["reset_before"]], 0, sizes)
        assert plan.waves > 30


def test_what_stages_need() -> None:
    told = {name: tuple(stages_of(CELLS[text], backward) for backward in (False, True)) for name, text in TEXTS.items()}
    assert told["layer_norm"] == (Stages(2, 2), Stages(2, 1))  # the sum of a variance's numbers has a pair of its own
    assert told["reset_before"] == (Stages(2, 0, 1, 1, 1), Stages(2, 0, 1, 1, 1))
    assert told["deep"] == (Stages(3, 1, 2, 3, 2), Stages(3, 1, 3, 3, 2))
    assert told["dropped"] == (Stages(), Stages())
    assert stages_of(CELLS["lstm"], True) == Stages()


def test_the_text_of_a_cell_in_stages() -> None:
    program = CELLS[TEXTS["reset_before"]].program
    assert program is not None
    text = struct(program)
    for part in (
        "static constexpr bool staged = true;",
        "static constexpr int blocks = 1;",
        "static constexpr int forward_stages = 2, forward_crossing = 4;",
        "forward_published[] = {{0, Publish::product, 0, 0, 1}};",
        "backward_published[] = {{0, Publish::transposed, 0, 0, 1}};",
        "if constexpr (stage == 1) {\n      const N v6 = a[2] + c[1];",
    ):
        assert part in text, part
    one = [Printed(TEXTS["reset_before"], Kernel("persistent_fwd", "bf16", 1))]
    assert set(one) < set(staged("reset_before", "bf16"))
