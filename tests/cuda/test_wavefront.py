"""Stacks as wavefronts by the CUDA loops in the emulator: the bits of layer by layer, in chunks that the planner finds.

A row of a product by torch on a CPU is the same however many go through it together: in bf16 always, in float32 and
float64 where rows and columns are multiples of 8.
"""

from __future__ import annotations

import shutil
from typing import Any

import pytest
import torch
from cases import Case, inputs
from cuda_cases import DEVICE, EXCHANGES, PRECISIONS
from emulated import on_the_emulator
from oracle import Results, by_backend
from tolerances import tf32

import fused_rnn
from fused_rnn import ops
from fused_rnn.backends import cuda as backend
from fused_rnn.cells import CELLS
from fused_rnn.cuda import plans
from fused_rnn.cuda.chunks import paying_chunks
from fused_rnn.gpu import run, wavefront

pytestmark = [
    pytest.mark.skipif(shutil.which("g++") is None, reason="the emulator is compiled by g++"),
    pytest.mark.skipif(ops.MISSING is not None, reason=str(ops.MISSING)),
    pytest.mark.timeout(1200),  # the first of them builds the module, on a busy machine for minutes
]


def both(case: Case, precision: str, chunks: int, monkeypatch: pytest.MonkeyPatch, **forced: Any) -> list[Results]:
    """Layer by layer, and as a wavefront."""
    ran, schedule = list[tuple[int, int]](), wavefront.schedule

    def counted(lanes: Any, rows: int, count: int, work: Any) -> None:
        ran.append((rows, count))
        schedule(lanes, rows, count, work)

    monkeypatch.setattr(wavefront, "schedule", counted)
    found, given = [], inputs(case)
    for number in (1, chunks):
        with tf32(precision == "tf32"), on_the_emulator(number, **forced, chunks=number):
            found.append(by_backend(case, given, "cuda"))
    assert [rows for rows, _ in ran] == [case.layers] * 2
    assert all(count > 1 for _, count in ran)
    return found


# Forward and backward of known teams, and of general ones over every exchange.
ROWS = [
    ("lstm", "bf16", "scatter4", 64),
    ("gru", "f16", "scatter8", 128),
    ("gru", "tf32", "scatter4", 64),
    ("lstm", "bf16", "cluster2", 32),
    ("gru", "ieee", "cluster2", 48),
    ("lstm", "ieee", "grid", 40),
    ("rnn_tanh", "tf32", "cta", 16),
    ("rnn_relu", "ieee", "cta", 24),
    ("gru", "bf16", "stepwise", 24),
    ("lstm", "f64", "stepwise", 16),
]


@pytest.mark.parametrize("options", [{}, {"lengths": True, "reset": True}], ids=["plain", "masked"])
@pytest.mark.parametrize(("cell", "precision", "exchange", "hidden"), ROWS)
def test_the_bits_of_layer_by_layer(
    cell: str, precision: str, exchange: str, hidden: int, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Case(cell, T=11, B=8, D=8, H=hidden, layers=3, dtype=PRECISIONS[precision], **options)
    theirs, ours = both(case, precision, 3, monkeypatch, **EXCHANGES[exchange])
    for name, value in ours.items():
        assert torch.equal(value, theirs[name]), name


@pytest.mark.parametrize("hidden", [17, 33])
def test_odd_sizes(hidden: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks begin where 16 divides an address: at every eighth step, of an odd B·H in bf16."""
    case = Case("lstm", T=21, B=3, D=5, H=hidden, layers=2, dtype=torch.bfloat16, lengths=True, reset=True)
    theirs, ours = both(case, "bf16", 21, monkeypatch)
    for name, value in ours.items():
        assert torch.equal(value, theirs[name]), name


def test_a_module_with_dropout() -> None:
    model = fused_rnn.LSTM(8, 32, 3, dropout=0.4, backend="cuda")
    x, found = torch.randn(12, 8, 8), []
    for chunks in (1, 4):
        torch.manual_seed(0)
        leaf = x.clone().requires_grad_()
        with tf32(False), on_the_emulator(chunks=chunks):
            y, _ = model(leaf)
            found.append([y, *torch.autograd.grad(y.square().sum(), [leaf, *model.parameters()])])
    for theirs, ours in zip(*found, strict=True):
        assert torch.equal(ours, theirs)


def test_a_tensor_that_does_not_lie_in_memory_as_it_seems() -> None:
    """Its address is not handed to the loops: the layers' ops get it as torch resolves it."""
    model, x, h0 = fused_rnn.GRU(8, 32, 2, backend="cuda"), torch.randn(12, 8, 8), torch.randn(2, 8, 32)
    for given, same in ((torch._neg_view(-h0), h0), (torch._efficientzerotensor(h0.shape), torch.zeros_like(h0))):
        with tf32(False), torch.no_grad(), on_the_emulator(chunks=4):
            assert torch.equal(model(x, given)[0], model(x, same)[0])


def test_a_layer_alone_runs_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a stack whose lower layer is frozen: it would have nobody to run beside."""
    model, ran, backward = fused_rnn.LSTM(8, 32, 2, backend="cuda"), list[tuple[int, int]](), run.Backward.run

    def counted(layer: run.Backward, loops: Any, first: int, last: int) -> None:
        ran.append((first, last))
        backward(layer, loops, first, last)

    monkeypatch.setattr(run.Backward, "run", counted)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.endswith("l1"))
    with on_the_emulator(chunks=4):
        model(torch.randn(12, 8, 8))[0].sum().backward()
    assert ran == [(0, 12)]


# --- who takes it


def test_where_it_is_estimated_to_pay() -> None:
    case = Case("lstm", B=8, H=256, layers=3, dtype=torch.bfloat16)
    with on_the_emulator():
        said = backend.describe(case.problem())
        plan = fused_rnn.plan("lstm", 8, 256, dtype=torch.bfloat16, device=DEVICE)
        chunks = plans.chunks(CELLS["lstm"], 0, (0, False, 4, 8, 256, 1), 3, 1024)
        assert chunks == paying_chunks(plan, 3, 1024) > 1
        assert f"3 layers as a wavefront (1024 steps in {chunks} chunks); backward" in said
        for other in (case._replace(layers=1), case._replace(bidirectional=True), case._replace(B=64)):
            assert "wavefront" not in backend.describe(other.problem())
        with plans.override("stepwise"):
            assert "wavefront" not in backend.describe(case.problem())


def test_an_override_that_there_is_not() -> None:
    with pytest.raises(ValueError, match="chunks: got 0, expected None or at least 1"), plans.override(chunks=0):
        pass
