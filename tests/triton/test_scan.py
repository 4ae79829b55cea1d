"""Chunks of time side by side, by the Triton loops: what the loop over all of time makes, to the same rule."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from linear_cells import SCANS, delays
from literature import indrnn
from program_cases import ProgramCase, Results, by_backend, by_loop, by_reference, call_of, mapped
from tolerances import assert_as_good_as_torch
from triton_cases import DEVICE, MARKS, planted, quicker_interpreter

from fused_rnn.backends import triton as backend
from fused_rnn.call import LayerCall
from fused_rnn.cells import CELLS
from fused_rnn.gpu import chunks
from fused_rnn.problem import Problem
from fused_rnn.triton import launch, planner
from fused_rnn.triton.schedule import Schedule, Tile
from fused_rnn.triton.target import ARCHITECTURES

pytestmark = MARKS
CHUNK = 3


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    quicker_interpreter()
    monkeypatch.setattr(chunks, "SHORTEST_CHUNK", CHUNK)
    monkeypatch.setattr(chunks, "FEWEST_CHUNKS", 2)


def on_device(case: ProgramCase, seed: int = 0) -> LayerCall:
    cell = delays if case.cell == "delays" else SCANS[case.cell]
    call = call_of(case._replace(cell=cell.program.text), seed)
    masks = [None if t is None else t.to(DEVICE) for t in (call.lengths, call.reset)]
    return mapped(call, lambda t: t.to(DEVICE))._replace(lengths=masks[0], reset=masks[1])


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """The kernels that run, each with how many chunks it has side by side."""
    seen: list[tuple[str, int]] = []
    run = launch.Launches.run

    def watched(self: Any, *args: Any) -> None:
        seen.append((self.kernel.fn.__name__, self.chunks))
        run(self, *args)

    monkeypatch.setattr(launch.Launches, "run", watched)
    return seen


def check(case: ProgramCase) -> None:
    """On a GPU over three draws: in one of them the loop's own roundings may cancel by luck."""
    found: list[list[Results]] = []
    for seed in range(3 if DEVICE == "cuda" else 1):
        call = on_device(case, seed)
        found.append([by_backend(call, backend), by_loop(call), by_reference(call)])
    assert_as_good_as_torch(*(
        {name: torch.stack([results[name] for results in each]) for name in each[0]}
        for each in zip(*found, strict=True)
    ))  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("cell", SCANS)
def test_every_cell(cell: str, dtype: torch.dtype, launched: list[tuple[str, int]]) -> None:
    masked: dict[str, Any] = {"bidirectional": True, "lengths": True, "reset": True, "sequences": True}
    check(ProgramCase(cell, T=11, dtype=dtype, **masked))
    expected = [("scan_fwd_kernel", 2), ("fwd_kernel", 3), ("scan_bwd_kernel", 2), ("bwd_kernel", 3)]
    assert launched[:4] == expected
    check(ProgramCase(cell, T=6, B=17, H=3, bias=False, hx=False, dtype=dtype))


@pytest.mark.parametrize("lengths", [False, True])
@pytest.mark.parametrize("reset", [False, True])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_every_mask(lengths: bool, reset: bool, bidirectional: bool) -> None:
    for cell in ("sru", "many"):
        check(ProgramCase(cell, T=10, B=5, H=40, lengths=lengths, reset=reset, bidirectional=bidirectional))


def test_recompute(monkeypatch: pytest.MonkeyPatch, launched: list[tuple[str, int]]) -> None:
    """Checkpoints are those of the loop, wherever chunks begin; backward goes from one to the next."""
    monkeypatch.setattr("fused_rnn.call.CHECKPOINT_EVERY", 4)
    check(ProgramCase("sru", T=11, lengths=True, reset=True, bidirectional=True, save="recompute"))
    assert launched[:2] == [("scan_fwd_kernel", 2), ("fwd_kernel", 3)]


def test_forward_alone() -> None:
    call = on_device(ProgramCase("sru", T=11, lengths=True, save="none"))
    kept = backend.forward(call._replace(save="gates"))
    for one, other in zip(backend.forward(call), kept, strict=False):
        assert torch.equal(one, other)


def test_equal_from_run_to_run() -> None:
    call = on_device(ProgramCase("min_lstm", T=11, lengths=True, reset=True, bidirectional=True))
    first, second = by_backend(call, backend), by_backend(call, backend)
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def test_a_reset_keeps_what_is_not_finite_from_the_next_chunks() -> None:
    """As it does in the loop: what a reset leaves behind is not multiplied by zero."""
    case = ProgramCase("min_gru", T=12, B=3, H=5)
    call = on_device(case)
    call.states[0][0, 0] = float("inf")
    call.x[1, 1] = float("nan")
    reset = torch.zeros(12, 3, dtype=torch.bool, device=DEVICE)
    reset[7, :2] = True
    call = call._replace(reset=reset)
    y = backend.forward(call)[0]
    expected = by_reference(call)["y"]
    assert bool(y[7:].isfinite().all())
    assert torch.equal(y.isfinite(), expected.isfinite())
    torch.testing.assert_close(y[7:].double(), expected[7:])


def test_what_is_not_finite_is_forgotten() -> None:
    """By a factor that is zero whatever comes, as in the loop."""
    call = on_device(ProgramCase("delays", T=12, B=3, H=5))
    call.states[1][0, 0] = float("inf")
    y, expected = backend.forward(call)[0], by_reference(call)["y"]
    assert torch.equal(y.isfinite(), expected.isfinite())
    assert y[1:].isfinite().all()


def test_a_factor_beyond_range_makes_nothing_of_zero() -> None:
    call = on_device(ProgramCase("linear_indrnn", T=12, B=2, H=5, hx=False, bias=False))
    call.weights[-1].fill_(1e30)  # u, of which three steps are beyond float32
    call.x[:10] = 0
    y = backend.forward(call)[0]
    assert not y[:10].any() and bool(y[10:].isfinite().all()) and y[10:].any()


KERNELS = {
    "scan": ("scan_fwd_kernel", "scan_bwd_kernel", "join_kernel"),
    "forward": ("fwd_kernel",),
    "backward": ("bwd_kernel",),
}
# (module, what is there, what is planted)
MUTATIONS = {
    "past_the_end": ("scan", "s = where_each(valid, s_new, s) if HAS_LENGTHS else s_new", "s = s_new"),
    "factor_past_the_end": ("scan", "f = where_each(valid, f_new, f) if HAS_LENGTHS else f_new", "f = f_new"),
    "reset": ("scan", "alone = (factors[j] != factors[j]) | (s[j] == 0.0)", "alone = s[j] == 0.0"),
    "reset_in_forward": ("scan", "entering = where_each(live, s, zero) if HAS_RESET else s", "entering = s"),
    "reset_in_backward": ("scan", "ds_before = where_each(live, ds_before, zero)", "ds_before = ds_before"),
    "last_gradient": ("scan", "if not READS_H:", "if READS_H:"),
    "order": ("scan", "c = chunks - 1 - i if BACKWARD else i", "c = i"),
    "param": ("scan", "dy_t.to(tl.float32))", "0.5 * dy_t.to(tl.float32))"),
    "last_step": ("forward", "(end <= step1)", "(end < step1)"),
    "no_step": ("forward", "tl.where(length == 0, steps, tl.where(backwards, steps, length))", "length"),
    "state": ("forward", "store_each(carried, at_carried, s, own)", "store_each(carried, at_rb, s, own)"),
    "gradient": ("backward", "at_rb = tl.program_id(1) * width + at_rb", "at_rb = at_rb"),
}


@pytest.mark.skipif(DEVICE == "cuda", reason="the interpreter shows what is wrong")
@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_mistake_is_found(mutation: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name, old, new = MUTATIONS[mutation]
    module = planted(name, old, new, tmp_path)
    for kernel in KERNELS[name]:
        monkeypatch.setattr(launch, kernel, getattr(module, kernel))
    with pytest.raises(AssertionError, match="error"):
        check_both()


def check_both() -> None:
    masked: dict[str, Any] = {"lengths": True, "reset": True, "bidirectional": True, "sequences": True}
    for cell in ("sru", "many"):
        check(ProgramCase(cell, T=10, B=5, H=5, **masked))


def test_without_a_mistake() -> None:
    """What is caught above is caught because of it."""
    check_both()


def test_when_chunks_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where one loop over time leaves most of the device idle, and time is long."""
    target, schedule = ARCHITECTURES["sm_90"], Schedule("solo", Tile(16, 32, 16, 4), 4)
    monkeypatch.setattr(chunks, "SHORTEST_CHUNK", 64)
    monkeypatch.setattr(chunks, "FEWEST_CHUNKS", 4)
    cell = CELLS[SCANS["min_gru"].program.text]

    def chunk(steps: int, batch: int) -> int:
        return planner.chunk_of(cell, schedule, target, steps, batch, 1)

    assert chunk(255, 1) == 255
    assert chunk(256, 1) == 64
    assert chunk(1 << 14, 1) == -(-(1 << 14) // 132)  # four programs of units a chunk, four on each of 132 processors
    assert chunk(1 << 14, 16 * 33) == 1 << 12
    assert chunk(1 << 14, 16 * 34) == 1 << 14
    assert planner.chunk_of(CELLS["lstm"], schedule, target, 1 << 14, 1, 1) == 1 << 14


def test_what_is_said_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks, "SHORTEST_CHUNK", 64)
    monkeypatch.setattr(chunks, "FEWEST_CHUNKS", 4)
    sizes = (3, 5, 40, 40, 1, 1, True, True, False, "gates", False, False)
    texts = {
        name: backend.describe(Problem(cell.program.text, torch.float32, DEVICE, False, *sizes))
        for name, cell in (("min_gru", SCANS["min_gru"]), ("indrnn", indrnn))
    }
    assert texts["min_gru"].count("by chunks of time side by side from T = 256 on") == 2
    assert "chunks" not in texts["indrnn"]
