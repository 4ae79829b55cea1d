"""Cells that are linear in their states over many steps at once: what the loop makes step by step, to the same rule."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import literature
import pytest
import torch
from linear_cells import SCANS, restarts
from program_cases import ProgramCase, by_backend, by_loop, by_reference, call_of
from programs import PROGRAMS
from tolerances import GRADCHECK, assert_as_good_as_torch

import fused_rnn
from fused_rnn import ops
from fused_rnn.call import LayerCall
from fused_rnn.flex.scan import scan_of

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
MASKED: dict[str, Any] = {"bidirectional": True, "lengths": True, "reset": True, "sequences": True}
FIELD = {
    "MinGRU": fused_rnn.MinGRU(3, 5),
    "MinLSTM": fused_rnn.MinLSTM(3, 5),
    "SRU": fused_rnn.SRU(3, 5, recurrent_terms=False),
    "SRU without skip": fused_rnn.SRU(3, 5, recurrent_terms=False, skip=False),
    "IndRNN": fused_rnn.IndRNN(3, 5, nonlinearity="none"),
}
CELLS = SCANS | {name: module.cell for name, module in FIELD.items()}
NEVER, EVERYWHERE = (1 << 40, 0), (2, 1 << 40)  # from how many steps on, up to how many vectors
Limits = Callable[..., None]


@pytest.fixture
def limits() -> Iterator[Limits]:
    """Sets them; after the test they are what they were."""
    before = ops._C.scan_limits(*EVERYWHERE, 3)
    yield lambda steps, vectors, rows=3: ops._C.scan_limits(steps, vectors, rows)
    ops._C.scan_limits(*before)


pytestmark = [
    pytest.mark.skipif(ops.MISSING is not None, reason=str(ops.MISSING)),
    pytest.mark.usefixtures("limits"),
]


def call_for(case: ProgramCase, seed: int = 0) -> LayerCall:
    return call_of(case._replace(cell=CELLS[case.cell].program.text) if case.cell in CELLS else case, seed)


def check(case: ProgramCase) -> None:
    call = call_for(case)
    assert_as_good_as_torch(by_backend(call, "cpu"), by_loop(call), by_reference(call))


def assert_equal(*found: dict[str, torch.Tensor]) -> None:
    for name, value in found[0].items():
        for other in found[1:]:
            assert torch.equal(value, other[name]), name


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("cell", CELLS)
def test_every_cell(cell: str, dtype: torch.dtype) -> None:
    check(ProgramCase(cell, T=11, dtype=dtype, **MASKED))
    check(ProgramCase(cell, T=6, B=17, H=3, bias=False, hx=False, dtype=dtype))
    check(ProgramCase(cell, T=37, B=1, H=33, reset=True, dtype=dtype))


@pytest.mark.parametrize("lengths", [False, True])
@pytest.mark.parametrize("reset", [False, True])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_every_mask(lengths: bool, reset: bool, bidirectional: bool) -> None:
    for cell in ("sru", "many", "linear_indrnn"):
        check(ProgramCase(cell, T=10, B=5, H=40, lengths=lengths, reset=reset, bidirectional=bidirectional))


@pytest.mark.parametrize(
    "sizes", [{"T": 2, "B": 1}, {"T": 130, "B": 2}, {"T": 64, "B": 1}, {"T": 65, "B": 3, "lengths": True}], ids=str
)
@pytest.mark.parametrize("cell", ["sru", "min_gru", "many"])
def test_recompute(cell: str, sizes: dict[str, Any]) -> None:
    """Checkpoints are those of the loop, wherever windows begin; backward goes from one to the next."""
    check(ProgramCase(cell, H=19, reset=True, bidirectional=True, save="recompute", **sizes))


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("cell", CELLS)
def test_the_bits_of_step_by_step(cell: str, dtype: torch.dtype, limits: Limits) -> None:
    """Whatever is treated at once, from run to run."""
    for save in ("gates", "recompute"):
        call, found = call_for(ProgramCase(cell, T=67, B=3, H=35, dtype=dtype, save=save, **MASKED)), []
        for rows in (1, 10, 10, 1000):
            limits(*EVERYWHERE, rows)
            found.append(by_backend(call, "cpu"))
        limits(*NEVER)
        assert_equal(by_backend(call, "cpu"), *found)


@pytest.mark.parametrize("save", ["gates", "recompute"])
@pytest.mark.parametrize("cell", ["sru", "linear_indrnn"])
def test_any_number_of_threads(cell: str, save: str) -> None:
    """The same bits; and right."""
    call, found = call_for(ProgramCase(cell, T=700, B=2, D=130, H=65, save=save, lengths=True, reset=True)), []
    for threads in (1, 2, 3, 5):
        torch.set_num_threads(threads)
        found.append(by_backend(call, "cpu"))
    products = ("dx", "dweights[0]")  # whose tiles begin elsewhere
    assert_equal(*({name: value for name, value in results.items() if name not in products} for results in found))
    loop, reference = by_loop(call), by_reference(call)
    for results in found:
        assert_as_good_as_torch(results, loop, reference)


@pytest.mark.parametrize("cell", CELLS)
def test_forward_alone(cell: str) -> None:
    call = call_for(ProgramCase(cell, T=11, B=4, lengths=True, save="none"))
    kept = ops.forward(*call._replace(save="gates"))
    for one, other in zip(ops.forward(*call), kept, strict=False):
        assert torch.equal(one, other)


def test_a_reset_keeps_what_is_not_finite_from_later_steps() -> None:
    call = call_for(ProgramCase("min_gru", T=12, B=3, H=5))
    call.states[0][0, 0] = float("inf")
    call.x[1, 1] = float("nan")
    reset = torch.zeros(12, 3, dtype=torch.bool)
    reset[7, :2] = True
    call = call._replace(reset=reset)
    y = ops.forward(*call)[0]
    expected = by_reference(call)["y"]
    assert bool(y[7:].isfinite().all())
    assert torch.equal(y.isfinite(), expected.isfinite())
    torch.testing.assert_close(y[7:].double(), expected[7:])


def test_a_state_that_is_not_handed_on_forgets_what_is_not_finite() -> None:
    call = call_for(ProgramCase("forgets", T=6, B=2, H=5))
    call.states[1][:] = float("inf")
    y, h, c, *_ = ops.forward(*call)
    assert all(bool(t.isfinite().all()) for t in (y, h, c))


def test_a_step_that_chooses_forgets_what_is_not_finite() -> None:
    """As torch.where does, forward and backward."""
    assert not ops._C.scans(restarts.program.text)
    call = call_of(ProgramCase(restarts.program.text, T=20, B=2, H=5))
    call.states[1][:] = float("inf")
    call.x[3, 0] = float("nan")
    results, expected = by_backend(call, "cpu"), by_reference(call)
    for name, value in results.items():
        assert torch.equal(value.isfinite(), expected[name].isfinite()), name
    assert results["y"][-1].isfinite().any()


def test_too_many_values_for_a_window_go_step_by_step() -> None:
    """Those of a text that nobody would write take no memory for many steps; the results are the same."""

    @fused_rnn.cell(recurrent=False, gates=1, states=("h", "c"))
    def many(x: Any, r: Any, s: Any, p: Any) -> Any:
        h, t, c = x[0], x[0], 0.5 * s.c + x[0]
        for _ in range(140):
            t = torch.cos(t)
            h = h + t * c
        return h, c

    assert scan_of(many.program.text) is not None and not ops._C.scans(many.program.text)
    check(ProgramCase(many.program.text, T=6, dtype=torch.float64, **MASKED))


def layer(cls: type, **options: Any) -> Any:
    torch.manual_seed(0)
    return cls(3, 5, dtype=torch.float64, **options)


@pytest.mark.parametrize(
    "module",
    [
        layer(fused_rnn.MinGRU, bidirectional=True),
        layer(fused_rnn.MinLSTM, num_layers=2),
        layer(fused_rnn.SRU, recurrent_terms=False, return_sequences="states"),
        layer(fused_rnn.IndRNN, nonlinearity="none"),
    ],
    ids=lambda module: type(module).__name__,
)
def test_first_and_second_derivatives(module: Any) -> None:
    x = torch.randn(5, 2, 3, dtype=torch.float64, requires_grad=True)
    reset = torch.zeros(5, 2, dtype=torch.bool)
    reset[2, 1] = True
    weights = list(module.parameters())

    def run(x: torch.Tensor, *_: torch.Tensor) -> Any:
        y = module(x, lengths=torch.tensor([5, 3]), reset=reset)[0]
        return y if isinstance(y, torch.Tensor) else tuple(y)

    torch.autograd.gradcheck(run, (x, *weights), **GRADCHECK)
    torch.autograd.gradgradcheck(run, (x, *weights), **GRADCHECK)


@pytest.mark.parametrize("weights", [None, "bf16", "int8"])
def test_a_stream_of_many_steps(weights: str | None, limits: Limits) -> None:
    module, x = fused_rnn.SRU(8, 8, recurrent_terms=False), torch.randn(20, 3, 8)
    streams = [module.stream(3, weights=weights) for _ in range(2)]
    y = streams[0].steps(x)
    limits(*NEVER)
    assert torch.equal(y, torch.stack([streams[1].step(x_t) for x_t in x]))


def test_the_loops_know_the_same_cells() -> None:
    """As flex/scan.py finds them."""
    cells = [*CELLS.values(), *(cell for cell in vars(literature).values() if isinstance(cell, fused_rnn.UserCell))]
    texts = [cell.program.text for cell in cells] + list(PROGRAMS.values())
    for text in texts:
        assert ops._C.scans(text) == (scan_of(text) is not None), text[:60]
    assert sum(map(ops._C.scans, texts)) >= len(CELLS)
