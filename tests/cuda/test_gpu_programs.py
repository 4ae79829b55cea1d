"""Users' cells by the CUDA loops on a GPU: compiled there by NVRTC, every exchange, captured, beside built-in ones."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import literature
import program_cases
import pytest
import stage_cells
import torch
from cuda_cases import EXCHANGES, PRECISIONS, _Tf32Products
from linear_cells import SCANS
from plain_loop import Own
from plain_loop import check as check_module
from program_cases import ProgramCase, by_loop, by_reference, call_of
from programs import PROGRAMS
from tolerances import assert_as_good_as_torch, tf32

import fused_rnn
from fused_rnn.call import LayerCall
from fused_rnn.cuda import module as cuda_module
from fused_rnn.cuda import plans, programs

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(cuda_module.refusal("cuda") is not None, reason=str(cuda_module.refusal("cuda"))),
]

MASKED: dict[str, Any] = {"lengths": True, "reset": True, "bidirectional": True, "sequences": True}
BY_TEAMS = {"bf16": "lstm", "f16": "leaky", "tf32": "gru", "ieee": "lstm"}


def here(call: LayerCall) -> LayerCall:
    masks = [None if t is None else t.cuda() for t in (call.lengths, call.reset)]
    return program_cases.mapped(call, torch.Tensor.cuda)._replace(lengths=masks[0], reset=masks[1])


def check(case: ProgramCase, precision: str, **forced: Any) -> None:
    call = here(call_of(case))
    with tf32(precision == "tf32"):
        with plans.override(**forced):
            ours = program_cases.by_backend(call, "cuda")
        with _Tf32Products() if precision == "tf32" else nullcontext():
            theirs = by_loop(call)
    assert_as_good_as_torch(ours, theirs, by_reference(call))


@pytest.mark.parametrize("save", ["gates", "recompute"])
@pytest.mark.parametrize("exchange", ["cta", "cluster2", "grid", "stepwise"])
@pytest.mark.parametrize("precision", BY_TEAMS)
def test_every_exchange(precision: str, exchange: str, save: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if exchange == "cluster2" and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("clusters begin with sm_90")
    monkeypatch.setattr("fused_rnn.call.CHECKPOINT_EVERY", 3)
    case = ProgramCase(BY_TEAMS[precision], H=33, B=9, save=save, dtype=PRECISIONS[precision], **MASKED)
    check(case, precision, **EXCHANGES[exchange])


@pytest.mark.parametrize("precision", ["bf16", "ieee", "f64"])
@pytest.mark.parametrize("cell", ["indrnn", "sru", "chain"])
def test_other_programs(cell: str, precision: str) -> None:
    check(ProgramCase(cell, T=3, B=40, H=65, dtype=PRECISIONS[precision], **MASKED), precision)


@pytest.mark.parametrize("save", ["gates", "recompute"])
@pytest.mark.parametrize("precision", ["bf16", "f16", "ieee", "f64"])
@pytest.mark.parametrize("cell", SCANS)
def test_chunks_of_time(cell: str, precision: str, save: str) -> None:
    """Four of them side by side, as the planner has them."""
    spec = SCANS[cell].descriptor()
    case = ProgramCase(spec.name, T=300, B=3, H=40, save=save, dtype=PRECISIONS[precision], **MASKED)
    assert plans.chunk_of_time(spec, torch.cuda.current_device(), case.T, 2 * case.B * case.H) == 75
    check(case, precision)


STAGES = {
    "layer_norm": "bf16",
    "layer_norm_lstm": "ieee",
    "reset_before": "f16",
    "deep": "tf32",
    "masked_product": "bf16",
}
WIDTHS = {"cta": 29, "cluster2": 50, "grid": 130, "stepwise": 300, "": 512}


@pytest.mark.parametrize("save", ["gates", "recompute"])
@pytest.mark.parametrize("exchange", WIDTHS)
@pytest.mark.parametrize("cell", STAGES)
def test_stages(cell: str, exchange: str, save: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if exchange == "cluster2" and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("clusters begin with sm_90")
    monkeypatch.setattr("fused_rnn.call.CHECKPOINT_EVERY", 3)
    name = stage_cells.MASKED[cell] if cell in stage_cells.MASKED else stage_cells.STAGED[cell].descriptor().name
    case = ProgramCase(name, T=7, H=WIDTHS[exchange], B=9, save=save, dtype=PRECISIONS[STAGES[cell]], **MASKED)
    check(case, STAGES[cell], **EXCHANGES.get(exchange, {}))


@pytest.mark.parametrize("precision", ["bf16", "f64"])
def test_stages_without_a_team(precision: str) -> None:
    """In float64, and without W_hh."""
    for cell in ("deep", "unit_norm")[precision == "bf16" :]:
        name = stage_cells.STAGED[cell].descriptor().name
        check(ProgramCase(name, T=7, H=65, B=9, dtype=PRECISIONS[precision], **MASKED), precision)


OPTIONS: list[dict[str, Any]] = [
    {"T": 7, "B": 9, "H": 40, "bidirectional": True, "lengths": True, "reset": True},
    {"T": 5, "B": 3, "H": 80, "heads": 2, "reset": True, "hx": False},
    {"T": 6, "B": 17, "H": 33, "layers": 2, "save": "recompute", "lengths": True, "bias": False},
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("case", [
    Own(cell, **OPTIONS[i % len(OPTIONS)], dtype=DTYPES[i // 2 % len(DTYPES)]).fit()
    for i, cell in enumerate(literature.CELLS)
], ids=str)  # fmt: skip
def test_cells_of_the_literature(case: Own) -> None:
    """By the team that the planner chooses."""
    check_module(case, "cuda", "cuda")


def train(rnn: torch.nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    y = rnn(x)[0]
    return [y.detach(), *torch.autograd.grad(y.float().square().sum(), [x, *rnn.parameters()])]


@pytest.mark.parametrize(("cell", "steps"), [("peephole_lstm", 7), ("min_gru", 300)])
def test_captured_and_replayed(cell: str, steps: int) -> None:
    """By a team; by chunks of time."""
    rnn = fused_rnn.FlexRNN(literature.CELLS[cell], 24, 64, device="cuda", dtype=torch.bfloat16, backend="cuda")
    x = torch.randn(steps, 20, 24, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        train(rnn, x)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = train(rnn, x)
    for _ in range(3):
        fresh = torch.randn_like(x).requires_grad_()
        with torch.no_grad():
            x.copy_(fresh)
        graph.replay()
        for ours, eager in zip(captured, train(rnn, fresh), strict=True):
            assert torch.equal(ours, eager)


@pytest.mark.parametrize("name", ["lstm", "gru"])
def test_the_built_in_cells_as_programs(name: str) -> None:
    """The same numbers as by the kernels that are compiled in, but for the order of a formula's factors."""
    call = here(call_of(ProgramCase(name, H=128, B=16, T=20, dtype=torch.bfloat16, **MASKED)))
    assert call.cell == PROGRAMS[name]
    ours, theirs = (program_cases.by_backend(call._replace(cell=cell), "cuda") for cell in (PROGRAMS[name], name))
    for key, value in ours.items():
        torch.testing.assert_close(value, theirs[key], rtol=0.05, atol=0.05, msg=lambda text, key=key: f"{key}: {text}")


def test_a_second_process_finds_the_kernels_on_disk(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setenv("FUSED_RNN_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(programs, "_loaded", {})
    check(ProgramCase("sru", H=20), "ieee")
    kept = sorted(tmp_path.rglob("*.kernel"))
    assert kept
    before = [path.stat().st_mtime_ns for path in kept]
    monkeypatch.setattr(programs, "_loaded", {})
    monkeypatch.setattr("fused_rnn.cuda.nvrtc.compiled", None)  # and is not asked
    check(ProgramCase("sru", H=20), "ieee")
    assert [path.stat().st_mtime_ns for path in kept] == before
