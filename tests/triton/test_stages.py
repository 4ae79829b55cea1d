"""Cells whose steps have stages, matrices of their own, masks, by the Triton loops: alone, in teams, step by step."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from program_calls import Results, by_ops, by_reference, by_steps, make_call
from programs import LSTM
from stage_cells import MASKED, STAGED
from tolerances import assert_as_good_as_torch
from torch.nn import functional as F
from triton_cases import DEVICE, MARKS, planted, quicker_interpreter

pytest.importorskip("triton", reason="Triton is not installed")

import fused_rnn
from fused_rnn.backends import triton as backend
from fused_rnn.call import LayerCall
from fused_rnn.cells import CELLS
from fused_rnn.cells.program import Program, parse
from fused_rnn.gpu.loops import Layer
from fused_rnn.triton import cells, launch, planner, printer
from fused_rnn.triton.published import published
from fused_rnn.triton.schedule import Schedule, Tile, shape_of
from fused_rnn.triton.target import ARCHITECTURES

pytestmark = MARKS

PROGRAMS = {name: cell.program.text for name, cell in STAGED.items()} | MASKED
ONE, HALF = Tile(16, 32, 16, 4), Tile(16, 16, 16, 4)  # of 17 units: all in a tile, or the last alone in its own
LOOPS: dict[str, dict[str, Any]] = {
    "solo-registers": {"loop": "solo", "registers": True},
    "solo-streamed": {"loop": "solo", "tile": ONE},
    "team-of-one": {"loop": "cooperative", "tile": ONE},
    "team-of-two": {"loop": "cooperative", "tile": HALF},
    "team-resident": {"loop": "cooperative", "tile": HALF, "hold": True},
    "stepwise": {"loop": "stepwise", "tile": HALF},
}
MASKS: dict[str, Any] = {"lengths": True, "reset": True, "directions": (1, -1)}


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    quicker_interpreter()
    monkeypatch.setattr("fused_rnn.call.CHECKPOINT_EVERY", 2)


def on_device(call: LayerCall) -> LayerCall:
    weights, states = [w.to(DEVICE) for w in call.weights], [s.to(DEVICE) for s in call.states]
    masks = [None if t is None else t.to(DEVICE) for t in (call.lengths, call.reset)]
    return call._replace(x=call.x.to(DEVICE), weights=weights, states=states, lengths=masks[0], reset=masks[1])


def ours(call: LayerCall, loop: str) -> Results:
    with planner.override(**LOOPS[loop]):
        return by_ops(on_device(call), backend.forward_op, backend.backward_op)


def check(cell: str, loop: str, **case: Any) -> None:
    """Over as many draws as test_programs.py has: in one of them the plain loop's roundings may cancel by luck."""
    found: list[list[Results]] = []
    for seed in range(3 if DEVICE == "cuda" or cell == "layer_norm_lstm" else 1):
        call = make_call(PROGRAMS.get(cell, cell), **case, seed=seed)
        made = {name: value.cpu() for name, value in ours(call, loop).items()}
        found.append([made, by_steps(call), by_reference(call)])
    assert_as_good_as_torch(*(
        {name: torch.stack([results[name] for results in each]) for name in each[0]}
        for each in zip(*found, strict=True)
    ))  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("cell", PROGRAMS)
def test_every_cell(cell: str, dtype: torch.dtype) -> None:
    check(cell, "solo-registers", T=3, dtype=dtype, **MASKS)
    if dtype != torch.float16:
        check(cell, "team-of-two", T=2, dtype=dtype, **MASKS)


@pytest.mark.slow
@pytest.mark.parametrize("save", ["gates", "recompute"])
@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("cell", ["layer_norm", "masked_product", "unit_norm"])
def test_every_loop(cell: str, loop: str, save: str) -> None:
    if cell == "unit_norm" and loop == "team-resident":
        pytest.skip("there is no W_hh to be resident")
    check(cell, loop, save=save, T=3, **MASKS)


@pytest.mark.parametrize(
    ("cell", "loop", "case"),
    [
        ("deep", "team-of-two", {"T": 1, "B": 1, "bias": False, "hx": False}),
        ("deep", "solo-registers", {"T": 2, "B": 17, "H": 3}),  # two tiles of rows
        ("deep", "team-of-two", {"T": 2, "B": 17, "H": 40}),  # a team of three
        ("reset_before", "team-resident", {"T": 2, "H": 64}),  # of four, nothing padded
        ("dropped", "solo-streamed", {"B": 1, "H": 1, "save": "recompute"}),
    ],
)
def test_odd_sizes(cell: str, loop: str, case: dict[str, Any]) -> None:
    check(cell, loop, **case)


@fused_rnn.cell(gates=1, params=("d",), matrices={"u": (1, "H")})
def divided(x: Any, r: Any, s: Any, p: Any, m: Any) -> Any:
    """A NaN of the zeros that stand for units beyond H: normed, multiplied."""
    a = torch.tanh(x[0] + r[0]) / p.d
    return torch.tanh(m.u(a) + F.layer_norm(a, a.shape[-1:]))


@pytest.mark.parametrize("loop", LOOPS)
def test_what_a_formula_makes_beyond_h_stays_there(loop: str) -> None:
    call = make_call(divided.program.text, T=3)
    call = call._replace(weights=[*call.weights[:-1], call.weights[-1].abs() + 1])
    made = {name: value.cpu() for name, value in ours(call, loop).items()}
    assert_as_good_as_torch(made, by_steps(call), by_reference(call))


@pytest.mark.parametrize("loop", ["solo-registers", "team-of-two", "stepwise"])
def test_the_same_bits_each_time(loop: str) -> None:
    call = make_call(PROGRAMS["masked_product"], T=2)
    one, other = ours(call, loop), ours(call, loop)
    assert all(torch.equal(value, other[name]) for name, value in one.items())


def test_heads() -> None:
    """Each norms its own units."""
    torch.manual_seed(0)
    rnn = fused_rnn.FlexRNN(STAGED["reset_before"], 4, 6, heads=2, device=DEVICE, backend="triton")
    normed = fused_rnn.FlexRNN(STAGED["layer_norm"], 6, 6, heads=2, device=DEVICE, backend="triton")
    x = torch.randn(3, 2, 4, device=DEVICE)
    for module, given in ((rnn, x), (normed, rnn(x)[0].detach())):
        y, h_n = module(given)
        y.square().sum().backward()
        grads = [weight.grad for weight in module.parameters()]
        module.zero_grad()
        module.backend = "reference"
        expected, h_expected = module(given)
        expected.square().sum().backward()
        torch.testing.assert_close((y, h_n), (expected, h_expected))
        torch.testing.assert_close(grads, [weight.grad for weight in module.parameters()])


def test_what_is_not_asked_for() -> None:
    """Inference makes what training makes, and where the weights want no gradient dx is the same."""
    call = on_device(make_call(PROGRAMS["deep"], T=3))
    kept = backend.forward(call)
    for one, other in zip(backend.forward(call._replace(save="none")), kept, strict=False):
        assert torch.equal(one, other)
    y, h_n, energy_n, energies, saved, *_ = kept
    grads, dsequences = (y, (h_n, energy_n)), (energies,)
    told = (y, saved, (energies,), call.cell, call.directions, "gates", True)
    every, few = (backend.backward_op(*grads, *call[:5], *told, need_dw, dsequences) for need_dw in (True, False))
    assert len(every) == len(few) + len(call.weights)
    assert all(torch.equal(one, other) for one, other in zip(few, every, strict=False))


# file, text in it, what to write instead, cell, loops in which it must be seen, as in test_mutations.py
MUTATIONS: dict[str, tuple[str, str, str, str, tuple[str, ...]]] = {
    "a sum counts what is beyond H": (
        "stages",
        "tl.sum(tl.where((n < H)[None, :], a, 0.0), 1)",
        "tl.sum(a, 1)",
        "layer_norm",
        ("solo-registers", "team-of-two"),
    ),
    "members' means are as good as each other": (
        "stages",
        "tl.maximum(0, tl.minimum(a.shape[1], H - first))",
        "tl.where(first < H, a.shape[1], 0)",
        "layer_norm",
        ("team-of-two", "stepwise"),
    ),
    "squares are those within the members": (
        "stages",
        "+ counts * (apart * apart)",
        "+ 0.0 * counts * (apart * apart)",
        "layer_norm",
        ("team-of-two", "stepwise"),
    ),
    "a sum is the first member's": (
        "stages",
        "mask=(m < TEAM)[None, :]",
        "mask=(m < 1)[None, :]",
        "unit_norm",
        ("team-of-two",),
    ),
    "the first block for each": (
        "stages",
        "streamed_fwd(row, there >= 0, team[4] + BLOCK * H * H",
        "streamed_fwd(row, there >= 0, team[4]",
        "deep",
        ("team-of-two", "solo-streamed"),
    ),
    "the first resident block for each": (
        "stages",
        "team[7 + BLOCK]",
        "team[7]",
        "deep",
        ("solo-registers",),
    ),
    "a matrix is not transposed": (
        "stages",
        "        if BACKWARD:",
        "        if False and BACKWARD:",
        "reset_before",
        ("team-of-two",),
    ),
    "another recurrence's matrices": (
        "forward",
        "shared[2] + r.to(tl.int64) * (N * H * H)",
        "shared[2] + 0 * r.to(tl.int64) * (N * H * H)",
        "reset_before",
        ("solo-registers", "team-of-two"),
    ),
    "another recurrence's matrices in backward": (
        "backward",
        "shared[2] + r.to(tl.int64) * (N * H * H)",
        "shared[2] + 0 * r.to(tl.int64) * (N * H * H)",
        "reset_before",
        ("solo-registers", "team-of-two"),
    ),
    "another recurrence's masks": (
        "forward",
        "load_masks(masks, r, t, b,",
        "load_masks(masks, r * 0, t, b,",
        "dropped",
        ("solo-registers",),
    ),
    "masks by the step": (
        "forward",
        "load_masks(masks, r, t, b,",
        "load_masks(masks, r, step, b,",
        "dropped",
        ("solo-registers",),
    ),
    "masks in backward by the step": (
        "backward",
        "load_masks(masks, r, t, b,",
        "load_masks(masks, r, step, b,",
        "dropped",
        ("solo-registers",),
    ),
}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of the interpreter
@pytest.mark.parametrize("mutation", MUTATIONS)
def test_mistake_is_caught(mutation: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    name, old, new, cell, loops = MUTATIONS[mutation]
    module = planted(name, old, new, tmp_path)
    if name == "stages":
        monkeypatch.setattr(cells.kernels(PROGRAMS[cell]), "stages", module)
    else:
        kernel = {"forward": "fwd_kernel", "backward": "bwd_kernel"}[name]
        monkeypatch.setattr(launch, kernel, getattr(module, kernel))
    for loop in loops:
        with pytest.raises(AssertionError, match="error"):
            check(cell, loop, T=2, **MASKS)


# --- what is printed


def program(cell: str) -> Program:
    return parse(PROGRAMS[cell])


def test_one_operand_for_all_blocks_of_a_matrix() -> None:
    made = published(program("deep").forward)
    assert len(made.runs) == 2 and made.operands == 2  # two blocks of u; v, and the mean of the squares
    text = printer.source(program("deep"))
    forward = text[text.index("def fwd") : text.index("def bwd")]
    assert forward.count("stages.put(") == 2 and forward.count("stages.product(") == 3
    assert forward.count("stages.meet(") == len(made.runs)


def test_a_cell_without_stages_knows_no_team() -> None:
    for text in (LSTM, MASKED["dropped"]):
        assert "team" not in printer.source(parse(text)) and "HOW" not in printer.source(parse(text))


# --- schedules


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_120", "gfx942"])
@pytest.mark.parametrize("cell", ["layer_norm_lstm", "reset_before", "unit_norm"])
def test_no_program_has_two_tiles_of_units(cell: str, arch: str) -> None:
    target = ARCHITECTURES[arch]
    for backward in (False, True):
        for hidden in (32, 130, 512, 2048):
            shape = shape_of(CELLS[PROGRAMS[cell]], "half", hidden, backward)
            chosen = {planner.choose(shape, target, batch, 2) for batch in (1, 64, 1 << 14)}
            assert chosen <= set(planner.shipped(shape, target))
            for schedule in planner.shipped(shape, target):
                assert schedule.spread == 1 and schedule.team == math.ceil(hidden / schedule.tile.units)
    assert planner.choose(shape, target, 1 << 14, 2).loop == "stepwise"
    alone = replace(target, cooperative=False)
    assert planner.choose(shape, alone, 1, 1).loop == "stepwise"


def test_a_tile_for_each_team_member() -> None:
    shape = shape_of(CELLS[PROGRAMS["layer_norm"]], "half", 40, False)
    for fields in ({"loop": "solo", "tile": ONE}, {"loop": "cooperative", "tile": HALF, "spread": 2}):
        with planner.override(**fields), pytest.raises(ValueError, match="one a program: the cell's step has stages"):
            planner.choose(shape, ARCHITECTURES["sm_90"], 1, 1)


def test_too_many_arrivals() -> None:
    """Each stage of a step counts."""
    call = make_call(PROGRAMS["masked_product"])
    layer = Layer(call.spec, (1 << 30) - 2, 1, 17, (1,), None, None)
    schedule = Schedule("cooperative", ONE, 1)
    with pytest.raises(NotImplementedError, match="that it can count"):
        launch.new_counters(layer, schedule, torch.device("cpu"))
    assert launch.new_counters(replace(layer, cell=CELLS["gru"]), schedule, torch.device("cpu")).shape == (1, 32)
