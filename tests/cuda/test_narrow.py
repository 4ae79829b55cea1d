"""W_hh in fewer bytes in the CUDA loops: their source under sanitizers, and streams over the emulator."""

from __future__ import annotations

import copy
import functools
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import emulated_build as build
import literature
import pytest
import torch
from cuda_cases import DEVICE, EXCHANGES, PRECISIONS
from emulated import on_the_emulator
from emulated_printed import SHAPES, Loader, Printed, shapes
from narrow_streams import assert_as_good_as_rounded, by_steps, rounded
from tolerances import tf32

import fused_rnn
from fused_rnn import ops
from fused_rnn.cells import CELLS
from fused_rnn.cuda import programs
from fused_rnn.cuda.printer import Kernel
from fused_rnn.gpu.narrow import narrowed, widened
from fused_rnn.plan import PRECISIONS as PLACES
from fused_rnn.plan import Forced
from fused_rnn.plan import make as make_plan
from fused_rnn.stream import runners
from fused_rnn.stream.runners import Narrowed

from .emulated import cases
from .test_emulated import drive

pytestmark = [
    pytest.mark.skipif(shutil.which(build.CXX) is None, reason=f"no {build.CXX}"),
    pytest.mark.skipif(ops.MISSING is not None, reason=str(ops.MISSING)),
]

# ---- the loops alone, against float64 loops on what the narrow weights stand for

INSTANCES = [
    build.Instance("lstm", "bf16", narrow="int8"),
    build.Instance("gru", "f16", True, "int8"),
    build.Instance("lstm", "tf32", True, "int8"),
    build.Instance("gru", "tf32", True, "bf16"),
    build.Instance("rnn_relu", "ieee", narrow="int8"),
    build.Instance("gru", "ieee", True, "bf16"),
]


@functools.cache
def drawn(instance: build.Instance, small: bool = False) -> list[cases.Case]:
    """By every exchange but stepwise and the known team of wide layers, which know no narrow weights."""
    kernel = instance[:2]
    told = cases.pairwise([kernel], {kernel} if instance.smallest else set(), seed=4, small=small)
    changed = {case._replace(save="none", sequences=False, narrow=instance.narrow) for case in told}
    return sorted(case for case in changed if case.exchange not in ("stepwise", "known grid"))


# Warps with more blocks than their registers keep, in whole vectors and weight by weight; and how many those keep.
BEYOND = {
    ("lstm", "bf16", "int8"): ("cluster 8", (512, 500), 14),
    ("gru", "tf32", "bf16"): ("cluster 4", (256, 250), 12),
    ("gru", "ieee", "bf16"): ("cluster 4", (256, 250), 4),
}
# Known teams that have not the registers for whole weights.
NARROW_TEAMS = {("lstm", "tf32", "int8"): 512, ("gru", "tf32", "bf16"): 512}


def beyond_registers(instance: build.Instance) -> Iterator[cases.Case]:
    cell, precision, narrow = instance.cell, instance.precision, instance.narrow
    exchange, widths, kept = BEYOND.get((cell, precision, narrow), ("", (), 0))
    for hidden in widths:
        sizes = (PLACES.index(precision), False, CELLS[cell].gates, 1, hidden, 1)
        forced = Forced("cluster", cases.EXCHANGES[exchange].members, known=False)
        assert make_plan(ops._C, sizes, ops._C.Device(*DEVICE), forced, narrow=narrow).blocks > kept
        yield cases.Case(cell, precision, exchange, 2, 1, hidden, save="none", narrow=narrow)
    if (hidden := NARROW_TEAMS.get((cell, precision, narrow), 0)) > 0:
        yield cases.Case(cell, precision, "scatter 16", 2, 3, hidden, save="none", narrow=narrow)


@pytest.mark.parametrize("instance", INSTANCES, ids=lambda one: f"{one.cell}-{one.precision}-{one.narrow}")
def test_address_and_undefined_behaviour(instance: build.Instance, tmp_path: Path) -> None:
    told = [*drawn(instance), *beyond_registers(instance)]
    assert {case.exchange for case in told} >= {"cta", "cluster 2", "cluster 16", "grid"}
    assert any(case.H % 8 for case in told) and any(case.H % 8 == 0 for case in told)
    assert not (
        found := drive("asan", build.module("asan", [instance._replace(shapes=cases.shapes(told))]), told, 1, tmp_path)
    ), found


@pytest.mark.parametrize("instance", INSTANCES[1:4], ids=lambda one: f"{one.cell}-{one.precision}-{one.narrow}")
def test_races(instance: build.Instance, tmp_path: Path) -> None:
    told = [*drawn(instance, small=True), *beyond_registers(instance)]
    library = build.module("races", [instance._replace(shapes=cases.shapes(told))])
    assert not (found := drive("races", library, told, 1, tmp_path)), found


# ---- streams

KINDS: dict[str, dict[str, Any]] = {"LSTM": {}, "GRU": {}, "RNN-relu": {"nonlinearity": "relu"}}
NAMES = {"LSTM": "lstm", "GRU": "gru", "RNN-relu": "rnn_relu"}
# kind, precision, weights, exchange, H; the last two by kernels for known teams.
STREAMS = [
    ("LSTM", "tf32", "int8", "cta", 21),
    ("LSTM", "tf32", "bf16", "cluster2", 32),
    ("GRU", "tf32", "int8", "grid", 35),
    ("GRU", "bf16", "int8", "cluster2", 33),
    ("LSTM", "f16", "int8", "grid", 40),
    ("RNN-relu", "ieee", "int8", "cta", 16),
    ("GRU", "ieee", "bf16", "cluster2", 20),
    ("LSTM", "bf16", "int8", "cluster4", 64),
    ("GRU", "tf32", "bf16", "cluster4", 64),
]


def kernels() -> Iterator[Printed]:
    for kind, precision, weights, exchange, hidden in STREAMS:
        shape = shapes(4, 16)[0] if (exchange, hidden) == ("cluster4", 64) else -1
        yield Printed(NAMES[kind], Kernel("persistent_fwd", precision, 1, 0, shape, weights))


LOADER = Loader([[one] for one in kernels()])


@contextmanager
def over_the_emulator(precision: str = "tf32", seed: int = 0, **forced: Any) -> Iterator[None]:
    with tf32(precision == "tf32"), on_the_emulator(seed, **forced), programs.emulating(LOADER):
        yield


def make(kind: str, hidden: int = 21, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    options = {"backend": "cuda", "num_layers": 2, **KINDS[kind], **options}
    return getattr(fused_rnn, kind.partition("-")[0])(9, hidden, dtype=dtype, **options).eval()


def assert_accurate(module: Any, weights: str, precision: str, **forced: Any) -> None:
    x = torch.randn(7, 3, module.input_size).to(module.weight_ih_l0.dtype)
    with over_the_emulator(precision, **forced):
        stream = module.stream(3, weights=weights)
        assert isinstance(stream._runner, Narrowed)
        y = by_steps(stream, x)
    assert_as_good_as_rounded(stream, y, module, weights, precision, x)


@pytest.mark.parametrize(("kind", "precision", "weights", "exchange", "hidden"), STREAMS)
def test_streams(kind: str, precision: str, weights: str, exchange: str, hidden: int) -> None:
    module, forced = make(kind, hidden, PRECISIONS[precision]), EXCHANGES[exchange]
    assert_accurate(module, weights, precision, **forced)
    cell = CELLS[NAMES[kind]]
    with over_the_emulator(precision, **forced):
        sizes = (PLACES.index(precision), False, cell.gates, 3, hidden, 1)
        plan, loaded = programs.planned(cell, 0, sizes, narrow=weights)
        assert plan is not None and loaded
        assert (plan.shape >= 0) == (hidden == 64)


@pytest.mark.slow
def test_a_large_size_in_half_of_the_team() -> None:
    """By a kernel for a known team that widens in each step."""
    kernel = Kernel("persistent_fwd", "bf16", 1, 0, SHAPES.index((False, "grid", 32, 32)), "int8")
    module, x = make("GRU", 1024, torch.bfloat16, num_layers=1), torch.randn(3, 2, 9).bfloat16()
    loader = Loader([[Printed("gru", kernel)]])
    with on_the_emulator(exchange="grid", members=32), programs.emulating(loader):
        stream = module.stream(2, weights="int8")
        y = by_steps(stream, x)
        plan, _ = programs.planned(CELLS["gru"], 0, (PLACES.index("bf16"), False, 3, 2, 1024, 1), narrow="int8")
        assert plan is not None and plan.shape == kernel.shape
    assert_as_good_as_rounded(stream, y, module, "int8", "bf16", x)


@pytest.mark.parametrize("weights", ["bf16", "int8"])
@pytest.mark.parametrize("kind", KINDS)
def test_streams_that_no_team_runs(kind: str, weights: str) -> None:
    assert_accurate(make(kind), weights, "tf32", exchange="stepwise")


@pytest.mark.parametrize("weights", ["bf16", "int8"])
def test_with_a_projection(weights: str) -> None:
    """Each matrix is rounded, and not what the loop multiplies by, which is the product of two."""
    assert_accurate(make("LSTM", proj_size=5), weights, "tf32", exchange="cta")


def test_without_biases() -> None:
    assert_accurate(make("GRU", 35, bias=False), "int8", "tf32", exchange="grid")


def test_users_cells() -> None:
    for name in ("peephole_lstm", "indrnn"):
        module = fused_rnn.FlexRNN(literature.CELLS[name], 9, 21, backend="cuda").eval()
        assert_accurate(module, "int8", "ieee", exchange="cta")


def test_it_follows_refresh_and_reset(monkeypatch: pytest.MonkeyPatch) -> None:
    """In memory that does not move. A refresh that forgets the scales would be seen here."""
    module, x = make("LSTM"), torch.randn(6, 2, 9)
    with over_the_emulator(exchange="cta"):
        stream = module.stream(2, weights="int8")
        before = by_steps(stream, x)
        runner: Any = stream._runner
        buffers = [t for layer in runner._layers for t in runners._buffers(*layer)]
        assert len(buffers) == 10 and {t.dtype for t in buffers} == {torch.float32, torch.int8}
        addresses = [t.data_ptr() for t in buffers]
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.mul_(torch.rand(len(parameter)).add(0.5).view(-1, *[1] * (parameter.dim() - 1)))
        stream.reset()
        assert torch.equal(by_steps(stream, x), before)
        expected = by_steps(module.stream(2, weights="int8"), x)
        with monkeypatch.context() as patched:
            patched.setattr(runners, "_buffers", lambda weights, narrow: weights)
            stream.refresh()
            stream.reset()
            assert not torch.equal(by_steps(stream, x), expected)
        stream.refresh()
        stream.reset(torch.tensor([True, True]))
        assert torch.equal(by_steps(stream, x), expected)
        assert [t.data_ptr() for layer in runner._layers for t in runners._buffers(*layer)] == addresses
        other = copy.deepcopy(stream)
        assert torch.equal(other.step(x[0]), stream.step(x[0]))


@pytest.mark.compile
def test_compiled_code_breaks_its_graph_at_a_step() -> None:
    module, x = make("LSTM"), torch.randn(4, 1, 9)
    with over_the_emulator(exchange="cta"):
        stream = module.stream(weights="int8")
        expected = torch.stack([stream.step(x_t) for x_t in x]) * 2
        stream.reset()
        doubled = torch.compile(lambda x_t: stream.step(x_t) * 2, backend="eager")
        assert torch.equal(torch.stack([doubled(x_t) for x_t in x]), expected)


@pytest.mark.parametrize("weights", ["bf16", "int8"])
def test_rounds_as_the_cpu_does(weights: str) -> None:
    """One feature at a time through an RNN without state leaves each weight of the CPU's stream by itself."""
    module = make("RNN-relu", 16, num_layers=1, bias=False, backend="cpu")
    with torch.no_grad():
        module.weight_ih_l0[3] *= 1e30
        module.weight_ih_l0[4] *= 1e-30
        module.weight_ih_l0[5] = 0
        module.weight_ih_l0[6] = torch.arange(9) - 4.5  # ties
        module.weight_ih_l0[6, 0] = 127
    stream, columns = module.stream(weights=weights), []
    for unit in torch.eye(9):
        sides = []
        for sign in (1, -1):
            stream.reset()
            sides.append(sign * stream.step(sign * unit[None])[0])
        columns.append(sides[0] + sides[1])
    assert torch.equal(torch.stack(columns, 1), widened(*narrowed(module.weight_ih_l0, weights), torch.float32))


@pytest.mark.parametrize("kind", KINDS)
def test_accuracy(kind: str) -> None:
    """The bounds of tests/test_stream.py: the error's root mean square over that of the output."""
    module, x = make(kind, 128, num_layers=1), torch.randn(100, 1, 9)
    with torch.no_grad():
        exact = rounded(module, "bf16", torch.float32)
        exact.load_state_dict(module.state_dict())
        y = exact(x)[0]
    for weights, least, most in (("bf16", 1e-5, 4e-3), ("int8", 1e-4, 1e-2)):
        with over_the_emulator("ieee", exchange="stepwise"):
            off = module.stream(weights=weights).steps(x) - y
        assert least < float(off.square().mean().sqrt() / y.square().mean().sqrt()) < most


def test_what_is_refused() -> None:
    module = make("LSTM")
    with pytest.raises(NotImplementedError, match=r"goes with the cpu and cuda backends, got backend='cuda' on cpu \("):
        module.stream(weights="int8")
    with on_the_emulator(), pytest.raises(NotImplementedError, match="the kernels of built-in cells alone"):
        module.stream(weights="int8")
    heads = fused_rnn.FlexRNN(literature.CELLS["mgu"], 8, 16, heads=2, backend="cuda").eval()
    with over_the_emulator():
        with pytest.raises(NotImplementedError, match="got backend='cuda' on cpu with heads=2"):
            heads.stream(weights="int8")
        with pytest.raises(
            ValueError, match=r"got 'bf16' for a module of torch\.bfloat16, expected one of torch.float32"
        ):
            make("LSTM", dtype=torch.bfloat16).stream(weights="bf16")
        expected = r"expected one of torch.float32, torch.bfloat16, torch.float16"
        with pytest.raises(ValueError, match=rf"got 'int8' for a module of torch\.float64, {expected}"):
            make("LSTM", dtype=torch.float64).stream(weights="int8")
        stream = module.stream(weights="int8")
        with torch.no_grad():
            module.weight_ih_l0[0, 0] = float("inf")
        with pytest.raises(ValueError, match=r"weights\[0\]: got a value that is not finite, which int8 cannot hold"):
            stream.refresh()
        module.double()
        with pytest.raises(ValueError, match=r"weights\[0\]: got torch.float64 on cpu"):
            stream.refresh()
