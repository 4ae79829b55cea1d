"""Chunks of time side by side, by the CUDA loops in the emulator: what the loop over all of time makes, to the same
rule."""

from __future__ import annotations

import shutil
from typing import Any

import pytest
import torch
from cuda_cases import PRECISIONS
from emulated import on_the_emulator
from emulated_printed import Loader, kernels
from linear_cells import SCANS, delays
from literature import indrnn, sru
from program_cases import ProgramCase, Results, by_backend, by_loop, by_reference, call_of
from tolerances import assert_as_good_as_torch

import fused_rnn
from fused_rnn import ops
from fused_rnn.backends import cuda as backend
from fused_rnn.call import LayerCall
from fused_rnn.cells import CELLS
from fused_rnn.cuda import launch, programs, scan
from fused_rnn.gpu import chunks
from fused_rnn.problem import Problem

pytestmark = [
    pytest.mark.skipif(shutil.which("g++") is None, reason="the emulator is compiled by g++"),
    pytest.mark.skipif(ops.MISSING is not None, reason=str(ops.MISSING)),
    pytest.mark.timeout(1200),
]
CHUNK = 3
TEXTS = {name: cell.descriptor().name for name, cell in SCANS.items()}
DELAYS = delays.descriptor().name


def summary(text: str) -> str:
    found = scan.summary_of(text)
    assert found is not None
    return found.name


LOADER = Loader(
    [
        *(
            [one for text in TEXTS.values() for name in (text, summary(text)) for one in kernels(name, precision)]
            for precision in ("bf16", "f16", "ieee", "f64")
        ),
        [one for name in (DELAYS, summary(DELAYS)) for one in kernels(name, "ieee")],
    ]
)


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks, "SHORTEST_CHUNK", CHUNK)
    monkeypatch.setattr(chunks, "FEWEST_CHUNKS", 2)


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, tuple[int, int, int] | None]]:
    """The loops that run, and their chunks."""
    seen: list[tuple[str, tuple[int, int, int] | None]] = []
    bind = launch.Loops._bind

    def watched(self: Any, loop: str, given: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        seen.append((loop, given.get("chunks")))
        return bind(self, loop, given, *args, **kwargs)

    monkeypatch.setattr(launch.Loops, "_bind", watched)
    return seen


def run(call: LayerCall, seed: int = 0) -> Results:
    with on_the_emulator(seed, False), programs.emulating(LOADER):
        return by_backend(call, "cuda")


def check(case: ProgramCase, seed: int = 0) -> None:
    call = call_of(case._replace(cell=TEXTS[case.cell]), seed)
    assert_as_good_as_torch(run(call, seed), by_loop(call), by_reference(call))


@pytest.mark.parametrize("precision", ["bf16", "f16", "ieee", "f64"])
@pytest.mark.parametrize("cell", SCANS)
def test_every_cell(cell: str, precision: str, launched: list[tuple[str, Any]]) -> None:
    dtype, masked = PRECISIONS[precision], {"bidirectional": True, "lengths": True, "reset": True, "sequences": True}
    check(ProgramCase(cell, T=11, dtype=dtype, **masked))
    assert launched[:4] == [
        ("Forward", (0, 8, 4)), ("Forward", (0, 11, 4)), ("Backward", (4, 11, 4)), ("Backward", (0, 11, 4))
    ]  # fmt: skip
    check(ProgramCase(cell, T=6, B=17, H=33, bias=False, hx=False, dtype=dtype))


@pytest.mark.parametrize("lengths", [False, True])
@pytest.mark.parametrize("reset", [False, True])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_every_mask(lengths: bool, reset: bool, bidirectional: bool) -> None:
    for seed, cell in enumerate(("sru", "many")):
        case = ProgramCase(cell, T=10, B=5, H=40, lengths=lengths, reset=reset, bidirectional=bidirectional)
        check(case, seed)


@pytest.mark.parametrize("cell", ["sru", "linear_indrnn", "many"])
def test_a_reset_at_each_step_of_a_chunk(cell: str) -> None:
    """Of three rows one is reset at the chunks' first steps, one at their last ones, one in between."""
    call = call_of(ProgramCase(TEXTS[cell], T=9, bidirectional=True))
    reset = torch.arange(9).unsqueeze(1) % CHUNK == torch.arange(3)
    call = call._replace(reset=reset)
    assert_as_good_as_torch(run(call), by_loop(call), by_reference(call))


@pytest.mark.parametrize("steps", [1, 2, CHUNK, 2 * CHUNK - 1, 2 * CHUNK])
def test_few_steps(steps: int, launched: list[tuple[str, Any]]) -> None:
    check(ProgramCase("min_gru", T=steps, B=1, lengths=True))
    assert len(launched) == (4 if steps == 2 * CHUNK else 2)


def test_an_empty_batch() -> None:
    check(ProgramCase("min_gru", T=8, B=0))


def test_recompute(monkeypatch: pytest.MonkeyPatch, launched: list[tuple[str, Any]]) -> None:
    """Checkpoints are those of the loop, wherever chunks begin; backward goes from one to the next."""
    monkeypatch.setattr("fused_rnn.call.CHECKPOINT_EVERY", 4)
    check(ProgramCase("sru", T=11, lengths=True, reset=True, bidirectional=True, save="recompute"))
    assert [chunks for _, chunks in launched] == [(0, 8, 4), (0, 11, 4), *[None] * 6]


def test_forward_alone() -> None:
    call = call_of(ProgramCase(TEXTS["sru"], T=11, lengths=True, save="none"))
    with on_the_emulator(0, False), programs.emulating(LOADER):
        kept = backend.forward(call._replace(save="gates"))
        for one, other in zip(backend.forward(call), kept, strict=False):
            assert torch.equal(one, other)


def test_the_same_bits_whatever_the_schedule() -> None:
    masked = {"lengths": True, "reset": True, "bidirectional": True, "sequences": True}
    call = call_of(ProgramCase(TEXTS["many"], T=11, **masked))
    first, second = run(call, 1), run(call, 2)
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def test_a_reset_keeps_what_is_not_finite_from_the_next_chunks() -> None:
    """As it does in the loop: what a reset leaves behind is not multiplied by zero."""
    call = call_of(ProgramCase(TEXTS["min_gru"], T=12, B=3, H=5))
    call.states[0][0, 0] = float("inf")
    call.x[1, 1] = float("nan")
    reset = torch.zeros(12, 3, dtype=torch.bool)
    reset[7, :2] = True
    call = call._replace(reset=reset)
    y, expected = run(call)["y"], by_reference(call)["y"]
    assert bool(y[7:].isfinite().all())
    assert torch.equal(y.isfinite(), expected.isfinite())
    torch.testing.assert_close(y[7:].double(), expected[7:])


def test_what_is_not_finite_is_forgotten() -> None:
    """By a factor that is zero whatever comes, as in the loop."""
    call = call_of(ProgramCase(DELAYS, T=12, B=3, H=5))
    call.states[1][0, 0] = float("inf")
    y, expected = run(call)["y"], by_reference(call)["y"]
    assert torch.equal(y.isfinite(), expected.isfinite())
    assert y[1:].isfinite().all()


def test_a_factor_beyond_range_makes_nothing_of_zero() -> None:
    call = call_of(ProgramCase(TEXTS["linear_indrnn"], T=12, B=2, H=5, hx=False, bias=False))
    call.weights[-1].fill_(1e30)  # u, of which three steps are beyond float32
    call.x[:10] = 0
    y = run(call)["y"]
    assert not y[:10].any()
    assert bool(y[10:].isfinite().all())
    assert bool(y[10:].any())


# --- when


def test_when_chunks_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where one loop over time leaves most of the device idle, and time is long."""
    monkeypatch.setattr(chunks, "SHORTEST_CHUNK", 64)
    monkeypatch.setattr(chunks, "FEWEST_CHUNKS", 4)
    cell = CELLS[TEXTS["min_gru"]]

    def chunk(steps: int, units: int) -> int:
        return scan.chunk_of(cell, steps, units, 132)

    assert chunk(255, 1) == 255
    assert chunk(256, 1) == 64
    assert chunk(1 << 20, 1) == -(-(1 << 20) // (4 * 132))
    assert chunk(1 << 14, 1024) == -(-(1 << 14) // 132)  # four CTAs of units a chunk, four on each of 132 processors
    assert chunk(1 << 14, 256 * 132) == 1 << 12
    assert chunk(1 << 14, 256 * 132 + 1) == 1 << 14
    assert scan.chunk_of(CELLS["lstm"], 1 << 14, 1, 132) == 1 << 14


def of_states(count: int) -> str:
    """h, and others of which each is a gate times itself."""

    @fused_rnn.cell(recurrent=False, gates=1, states=tuple(f"s{j}" for j in range(count)))
    def cell(x: Any, r: Any, s: Any, p: Any) -> Any:
        return x[0], *(x[0] * s[j] for j in range(1, count))

    text: str = cell.program.text
    return text


def test_which_cells_have_a_summary() -> None:
    """Those that are linear in their states, of which there are not too many: twice as many are run over a chunk."""
    for name, text in TEXTS.items():
        cell, found = CELLS[text], CELLS[summary(text)]
        assert found.reads_h == cell.reads_h, name
        assert len(found.states) == len(cell.states) + cell.carried + 1
    for other in (indrnn, sru):
        assert scan.summary_of(other.program.text) is None
    assert scan.summary_of(of_states(6)) is not None
    assert scan.summary_of(of_states(7)) is None


def test_what_is_said_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks, "SHORTEST_CHUNK", 64)
    monkeypatch.setattr(chunks, "FEWEST_CHUNKS", 4)
    sizes = (3, 5, 40, 40, 1, 1, True, True, False, "gates", False, False)
    with on_the_emulator(0, False), programs.emulating(LOADER):
        told = {
            name: backend.describe(Problem(cell.program.text, torch.float32, "cpu", False, *sizes))
            for name, cell in (("min_gru", SCANS["min_gru"]), ("indrnn", indrnn))
        }
    assert told["min_gru"].endswith("runs all of its steps, by chunks of time side by side from T = 256 on")
    assert "chunks" not in told["indrnn"]
