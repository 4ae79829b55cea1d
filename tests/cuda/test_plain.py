"""A plain layer by one op in C++ beside the same layer by Python, in the emulator: same numbers, same errors."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from typing import Any

import pytest
import torch
from emulated import on_the_emulator
from tolerances import tf32
from torch import Tensor

import fused_rnn
from fused_rnn import ops
from fused_rnn.call import BackwardCall, LayerCall
from fused_rnn.cells import CELLS
from fused_rnn.cuda import plain, programs

pytestmark = [
    pytest.mark.skipif(shutil.which("g++") is None, reason="the emulator is compiled by g++"),
    pytest.mark.skipif(ops.MISSING is not None, reason=str(ops.MISSING)),
    pytest.mark.timeout(1200),  # the first of them builds the module, on a busy machine for minutes
]
T, B, D, H = 5, 3, 6, 20
WAYS = [(1,), (-1,), (1, -1)]
MASKS = ("", "lengths", "reset", "lengths and reset")


@pytest.fixture(autouse=True)
def _deterministic() -> Iterator[None]:
    """New tensors are full of NaN: what is not written shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def layer(cell: str, dtype: torch.dtype, directions: tuple[int, ...], states: bool, bias: bool) -> LayerCall:
    spec, recurrences = CELLS[cell], len(directions)

    def tensor(*shape: int) -> Tensor:
        return (torch.randn(*shape) / 3).to(dtype)

    rows = spec.gates * H
    shapes = [(rows, D), (rows, H), *[(rows,)] * (2 * bias)] * recurrences
    given = [tensor(recurrences, B, H) for _ in spec.states] if states else []
    return LayerCall(tensor(T, B, D), [tensor(*shape) for shape in shapes], given, None, None, cell, directions)


def masked(call: LayerCall, mask: str) -> LayerCall:
    """Past a sequence's end x is NaN, which nothing may come of."""
    if "lengths" in mask:
        lengths = torch.tensor([T, 0, 2])
        past = torch.arange(T).unsqueeze(1) >= lengths
        call = call._replace(lengths=lengths, x=call.x.masked_fill(past.unsqueeze(-1), torch.nan))
    if "reset" in mask:
        call = call._replace(reset=torch.rand(T, B) < 0.4)
    return call


def gradients(call: LayerCall, kept: list[Tensor], dy: bool = True, dstates: bool = True) -> BackwardCall:
    """The backward of a call whose forward with save="gates" gave this."""
    count = len(call.spec.states)
    torch.manual_seed(1)
    given = [torch.randn_like(s) for s in kept[1 : 1 + count]] if dstates else []
    saved, *histories, _ = kept[1 + count :]
    dlast = torch.randn_like(kept[0]) if dy else None
    return BackwardCall(dlast, given, *call[:5], kept[0], saved, histories, *call[5:7], "gates", True, True)


def by_python(name: str, call: Any, monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    with monkeypatch.context() as context:
        context.setattr(plain, "_loop_of", lambda *_, **__: None)
        result: list[Tensor] = getattr(torch.ops.fused_rnn, f"cuda_{name}")(*call)
    return result


def by_both(name: str, call: Any, monkeypatch: pytest.MonkeyPatch) -> tuple[list[Tensor], list[Tensor]]:
    """The op's outputs, and the same by Python. Fails where the op has not taken the short way."""
    taken = list[list[Tensor]]()
    way = getattr(plain, name)

    def counted(call: Any) -> list[Tensor]:
        taken.append(way(call))
        return taken[-1]

    with monkeypatch.context() as context:
        context.setattr(plain, name, counted)
        ours = getattr(torch.ops.fused_rnn, f"cuda_{name}")(*call)
    assert taken[0], "this is not plain"
    return ours, by_python(name, call, monkeypatch)


def same(ours: list[Tensor], theirs: list[Tensor]) -> None:
    assert [(t.shape, t.dtype, t.stride()) for t in ours] == [(t.shape, t.dtype, t.stride()) for t in theirs]
    for mine, other in zip(ours, theirs, strict=True):
        assert torch.equal(mine, other)


@pytest.mark.parametrize("directions", WAYS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("cell", CELLS)
def test_forward(cell: str, dtype: torch.dtype, directions: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    with on_the_emulator(), tf32(False):
        for states, bias, save, mask in product((False, True), (False, True), ("none", "gates"), MASKS):
            call = layer(cell, dtype, directions, states, bias)._replace(save=save, keep_hidden=states)
            same(*by_both("forward", masked(call, mask), monkeypatch))


@pytest.mark.parametrize("directions", WAYS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("cell", CELLS)
def test_backward(cell: str, dtype: torch.dtype, directions: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    with on_the_emulator(), tf32(False):
        for states, bias, mask in product((False, True), (False, True), (*MASKS, "one step")):
            call = masked(layer(cell, dtype, directions, states, bias), mask)
            if mask == "one step":
                call = call._replace(x=call.x[:1].contiguous())
            kept = torch.ops.fused_rnn.cuda_forward(*call._replace(save="gates"))
            for dy, dstates, need_dx in ((True, True, True), (True, False, False), (False, True, False)):
                asked = gradients(call, kept, dy, dstates)._replace(need_dx=need_dx)
                ours, theirs = by_both("backward", asked, monkeypatch)
                if len(directions) > 1 and need_dx:  # added up after the products, not by them: sums in another order
                    close = {"rtol": 0, "atol": 8 * torch.finfo(dtype).eps * float(theirs[0].abs().max())}
                    torch.testing.assert_close(ours[0], theirs[0], **close)
                    ours[0] = theirs[0]
                same(ours, theirs)


def test_what_is_not_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes the way of Python, with the same results as ever; nothing is begun in C++ that is not ended there."""
    ran = list[bool]()

    def counted(way: Any) -> Any:
        def run(*args: Any) -> list[Tensor]:
            outputs: list[Tensor] = way(*args)
            ran.append(bool(outputs))
            return outputs

        return run

    monkeypatch.setattr(ops, "plain_forward", counted(ops.plain_forward))
    monkeypatch.setattr(ops, "plain_backward", counted(ops.plain_backward))
    lstm = layer("lstm", torch.float32, (1,), True, True)
    both = layer("lstm", torch.float32, (1, -1), False, True)
    projected = [torch.randn(4 * H, D), torch.randn(4 * H, 7), torch.randn(7, H)]
    several = torch.randn(T, B, 2, D)
    odd = torch.randn(T * B * D + 1)[1:].view(T, B, D)
    calls = {
        "an input for each": both._replace(x=several),
        "made again": lstm._replace(save="recompute"),
        "states over time": lstm._replace(sequences=True),
        "a projection": lstm._replace(weights=projected, states=[]),
        "float64 runs a step at a time": layer("lstm", torch.float64, (1,), False, True),
        "no batch": lstm._replace(x=torch.randn(T, 0, D), states=[]),
        "a state in the middle of a buffer": lstm._replace(states=[torch.randn(B * H + 1)[1:].view(1, B, H)] * 2),
    }
    with on_the_emulator(), tf32(False):
        for call in calls.values():
            assert all(t.isfinite().all() for t in torch.ops.fused_rnn.cuda_forward(*call)[: 1 + len(call.states)])
        assert True not in ran
        torch.ops.fused_rnn.cuda_forward(*lstm._replace(x=odd))  # torch's product reads it, wherever it begins
        assert ran.pop()


def test_batch_first_is_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    lstm = layer("lstm", torch.float32, (1,), True, True)
    call = lstm._replace(x=lstm.x.transpose(0, 1).contiguous().transpose(0, 1), save="gates")
    with on_the_emulator(), tf32(False):
        kept, theirs = by_both("forward", call, monkeypatch)
        same(kept, theirs)
        asked = gradients(call, kept)
        assert asked.dy is not None
        dy = asked.dy.transpose(0, 1).contiguous().transpose(0, 1)
        same(*by_both("backward", asked._replace(dy=dy), monkeypatch))
        same(*by_both("backward", asked._replace(dy=torch.ones(()).expand_as(dy)), monkeypatch))


def test_threads_that_meet_at_the_first_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of them makes a loop, of which one is remembered: the others' must live as long as they run."""
    planned, barrier = programs.planned, threading.Barrier(4)

    def slow(*args: Any) -> Any:
        barrier.wait(60)
        return planned(*args)

    net, x = fused_rnn.LSTM(D, H + 1, backend="cuda"), torch.randn(T, B, D)
    with on_the_emulator(), tf32(False), torch.no_grad():
        expected, _ = net(x)
        plain._prepared.cache_clear()
        monkeypatch.setattr(programs, "planned", slow)

        def run(_: int) -> Tensor:
            with torch.no_grad():
                return net(x)[0]

        with ThreadPoolExecutor(4) as pool:
            for y in pool.map(run, range(4)):
                assert torch.equal(y, expected)


def test_an_error_of_torch_keeps_its_words(monkeypatch: pytest.MonkeyPatch) -> None:
    """The stable ABI hands on neither its type nor its text: Python meets it once more."""

    def fails(*_: Any) -> list[Tensor]:
        raise RuntimeError("torch_call_dispatcher(...) API call failed")

    call = layer("gru", torch.float32, (1,), True, True)
    with on_the_emulator(), tf32(False):
        expected = by_python("forward", call, monkeypatch)
        monkeypatch.setattr(ops, "plain_forward", fails)
        same(torch.ops.fused_rnn.cuda_forward(*call), expected)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"x": torch.randn(T, B, D + 1)}, r"weights\[0\]: got \[80, 6\], expected \[80, 7\]"),
        ({"states": [torch.randn(1, B, H), torch.randn(1, B + 1, H)]}, r"c0: got \[1, 4, 20\]"),
        ({"states": [torch.randn(1, B, H), torch.randn(1, B, H).double()]}, "c0: got torch.float64"),
        ({"lengths": torch.ones(B, dtype=torch.int32)}, "lengths: got torch.int32"),
        ({"x": torch.randn(0, B, D)}, "at least one step"),
        ({"directions": [], "states": []}, "directions is empty"),
        ({"x": torch.ones(T, B, D, dtype=torch.int64)}, r"weights\[0\]: got torch.float32, expected torch.int64"),
    ],
)
def test_errors_are_those_of_python(change: dict[str, Any], says: str) -> None:
    with on_the_emulator(), pytest.raises(RuntimeError, match=says):
        torch.ops.fused_rnn.cuda_forward(*layer("lstm", torch.float32, (1,), True, True)._replace(**change))


# What torch issues beside the loop: on a GPU a launch each, and most of a short call. On the CPU addmm copies the bias.
FORWARD = {"aten::addmm": 1, "aten::sub": 1, "aten::zero_": 1, "aten::copy_": 1 + 1}
# A clone copies; what entered each step is copied by a launch of our own.
BACKWARD = {"aten::mm": 3, "aten::zero_": 1, "aten::sum": 1, "aten::clone": 1, "aten::copy_": 1}


def test_what_a_call_issues() -> None:
    """An LSTM's inference, and its backward without states: products, biases, zeros and what comes out."""
    watched = {*FORWARD, *BACKWARD, "aten::cat", "aten::bmm", "aten::add", "aten::_to_copy", "aten::contiguous"}
    net = fused_rnn.LSTM(D, H, dtype=torch.bfloat16, backend="cuda")
    x = torch.randn(T, B, D, dtype=torch.bfloat16, requires_grad=True)

    def issued(call: Any) -> dict[str, int]:
        with torch.profiler.profile() as profiler:
            call()
        return {event.key: event.count for event in profiler.key_averages() if event.key in watched}

    with on_the_emulator():
        torch.use_deterministic_algorithms(False)
        with torch.no_grad():
            net(x)
            assert issued(lambda: net(x)) == FORWARD
        y, _ = net(x)
        dy = torch.randn_like(y)
        inputs = [x, *net.parameters()]
        assert issued(lambda: torch.autograd.grad(y, inputs, dy)) == BACKWARD
