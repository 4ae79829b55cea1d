"""Chunks of time side by side, by the Triton loops: what the loop over all of time makes, to the same rule."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from linear_cells import SCANS
from program_cases import ProgramCase, Results, by_backend, by_loop, by_reference, call_of, mapped
from tolerances import assert_as_good_as_torch
from triton_cases import DEVICE, MARKS, quicker_interpreter

from fused_rnn.backends import triton as backend
from fused_rnn.call import LayerCall
from fused_rnn.triton import launch, planner
from fused_rnn.triton.schedule import Schedule, Tile
from fused_rnn.triton.target import ARCHITECTURES

pytestmark = MARKS
CHUNK = 3


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    quicker_interpreter()
    monkeypatch.setattr(planner, "SHORTEST_CHUNK", CHUNK)
    monkeypatch.setattr(planner, "FEWEST_CHUNKS", 2)


def on_device(case: ProgramCase, seed: int = 0) -> LayerCall:
    call = call_of(case._replace(cell=SCANS[case.cell].program.text), seed)
    masks = [None if t is None else t.to(DEVICE) for t in (call.lengths, call.reset)]
    return mapped(call, lambda t: t.to(DEVICE))._replace(lengths=masks[0], reset=masks[1])


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """The kernels that run, each with how many chunks it has side by side."""
    seen: list[tuple[str, int]] = []
    run = launch._Launches.run

    def watched(self: Any, *args: Any) -> None:
        seen.append((self.kernel.fn.__name__, self.chunks))
        run(self, *args)

    monkeypatch.setattr(launch._Launches, "run", watched)
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


def test_a_factor_beyond_range_makes_nothing_of_zero() -> None:
    call = on_device(ProgramCase("linear_indrnn", T=12, B=2, H=5, hx=False, bias=False))
    call.weights[-1].fill_(1e30)  # u, of which three steps are beyond float32
    call.x[:10] = 0
    y = backend.forward(call)[0]
    assert not y[:10].any() and bool(y[10:].isfinite().all()) and y[10:].any()


def test_when_chunks_run() -> None:
    """Where one loop over time leaves most of the device idle, and time is long."""
    target, schedule = ARCHITECTURES["sm_90"], Schedule("solo", Tile(16, 32, 16, 4), 4)
    planner_chunk = planner.chunk_of
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(planner, "SHORTEST_CHUNK", 64)
        patch.setattr(planner, "FEWEST_CHUNKS", 4)
        assert planner_chunk(schedule, target, 255, 1, 1) == 255
        assert planner_chunk(schedule, target, 256, 1, 1) == 64
        assert planner_chunk(schedule, target, 1 << 14, 1, 1) == -(-(1 << 14) // 132)
        assert planner_chunk(schedule, target, 1 << 14, 16 * 33, 1) == 1 << 12
        assert planner_chunk(schedule, target, 1 << 14, 16 * 34, 1) == 1 << 14
