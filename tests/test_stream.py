"""module.stream(): the numbers of the sequence call, step by step, and a state that is nobody else's."""

from __future__ import annotations

import copy
import math
import multiprocessing
import os
import pickle
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from tolerances import allowed, assert_same_formula, error
from torch import Tensor, nn

import fused_rnn
from fused_rnn import Stream, ops

ROOT = Path(__file__).parent.parent
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
KINDS: dict[str, dict[str, Any]] = {
    "LSTM": {},
    "LSTM-proj": {"proj_size": 5},
    "GRU": {},
    "RNN": {},
    "RNN-relu": {"nonlinearity": "relu"},
}
needs_kernels = pytest.mark.skipif(ops.MISSING is not None, reason=str(ops.MISSING))


def make(kind: str, input_size: int = 9, hidden: int = 21, **options: Any) -> Any:
    """A module in eval mode; what KINDS has goes before."""
    return getattr(fused_rnn, kind.partition("-")[0])(input_size, hidden, **KINDS[kind], **options).eval()


def states(hx: Any) -> tuple[Tensor, ...]:
    return tuple(hx) if isinstance(hx, tuple) else (hx,)


def by_steps(stream: Stream, x: Tensor) -> Tensor:
    """x [T, B, D] → [T, B, P]."""
    return torch.stack([stream.step(x_t) for x_t in x])


# ---- the same numbers ----


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("batch", [1, 2, 7])
@pytest.mark.parametrize("kind", KINDS)
def test_bitwise_the_sequence_call(kind: str, batch: int, dtype: torch.dtype) -> None:
    """65 steps of one sequence leave a chunk of a single row; 9 inputs are less than a vector, 300 two blocks."""
    for input_size, hidden, layers, bias in ((9, 21, 2, True), (300, 35, 1, False), (32, 64, 1, True)):
        module = make(kind, input_size, hidden, num_layers=layers, bias=bias, dtype=dtype)
        x = torch.randn(65 if batch == 1 else 20, batch, input_size).to(dtype)
        with torch.no_grad():
            y, hx = module(x)
        stream = module.stream(batch)
        assert torch.equal(by_steps(stream, x), y)
        for ours, theirs in zip(states(stream.state), states(hx), strict=True):
            assert torch.equal(ours, theirs)
        stream.reset()
        assert torch.equal(torch.cat([stream.steps(part) for part in x.split([1, 7, len(x) - 8])]), y)


@pytest.mark.slow
@needs_kernels
@pytest.mark.parametrize("name", (ops._C.available_isas().split(", ") if ops.MISSING is None else [])[1:])
def test_bitwise_on_every_instruction_set(name: str) -> None:
    arguments = ["-q", "-p", "no:cacheprovider", __file__, "-k", "bitwise_the_sequence_call and 7- or rounded"]
    program = f"import sys, pytest; sys.exit(pytest.main({arguments}))"
    environment = os.environ | {"FUSED_RNN_ISA": name}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert "skipped" not in done.stdout.splitlines()[-1]


@needs_kernels
@pytest.mark.parametrize("kind", KINDS)
def test_threads_do_not_show(kind: str) -> None:
    module, x = make(kind, 64, 300), torch.randn(6, 30, 64)
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        stream = module.stream(30)
        results += [by_steps(stream, x), stream.reset() or stream.steps(x)]  # type: ignore[func-returns-value]
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize("kind", KINDS)
def test_few_rows_are_as_good_as_torch(kind: str) -> None:
    """A call of up to 16 rows in all takes its weights unpacked, and sums in another order than a stream."""
    module, x = make(kind), torch.randn(5, 3, 9)
    counterpart = fused_rnn.to_torch(copy.deepcopy(module))
    with torch.no_grad():
        torchs, reference = counterpart(x)[0], copy.deepcopy(counterpart).double()(x.double())[0]
    assert error(by_steps(module.stream(3), x), reference) <= allowed(torchs, reference)


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("kind", KINDS)
def test_other_backends(kind: str, backend: str) -> None:
    """By `functional`, in buffers that are written in place: no step moves the state or the weights."""
    module = make(kind, num_layers=2, backend=backend)
    x = torch.randn(20, 3, 9)
    with torch.no_grad():
        y, hx = module(x)
    stream = module.stream(3)
    runner: Any = stream._runner
    tensors = [*stream._states.values(), *runner._weights]
    addresses = [t.data_ptr() for t in tensors]
    ours = torch.cat([by_steps(stream, x[:5]), stream.steps(x[5:])])
    torch.testing.assert_close(ours, y, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(states(stream.state), states(hx), rtol=1e-5, atol=1e-6)
    stream.reset(torch.tensor([True, False, True]))
    stream.state = stream.state
    stream.load_state_dict(stream.state_dict())
    stream.refresh()
    stream.step(x[0])
    after = [*stream._states.values(), *runner._weights]
    assert all(one is other for one, other in zip(tensors, after, strict=True))
    assert [t.data_ptr() for t in after] == addresses


# ---- weights in fewer bytes ----


@needs_kernels
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_bf16_is_the_module_of_rounded_weights(kind: str, batch: int) -> None:
    for input_size, hidden in ((9, 21), (300, 35), (16, 16)):
        module = make(kind, input_size, hidden, num_layers=2)
        stream, x = module.stream(batch, weights="bf16"), torch.randn(20, batch, input_size)
        with torch.no_grad():
            for parameter in module.parameters():
                if parameter.dim() == 2:
                    parameter.copy_(parameter.bfloat16())
            assert torch.equal(by_steps(stream, x), module(x)[0])


@needs_kernels
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_int8_is_the_module_of_rounded_weights(kind: str, batch: int) -> None:
    """Up to the rounding of float32 sums, for a scale is applied to a whole sum and not to each weight."""
    module = make(kind, num_layers=2)
    stream, x = module.stream(batch, weights="int8"), torch.randn(20, batch, 9)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.dim() == 2:
                scale = parameter.abs().amax(1, keepdim=True) / 127
                parameter.copy_((parameter / scale).round() * scale)
        counterpart = fused_rnn.to_torch(module)
        torchs, reference = counterpart(x)[0], copy.deepcopy(counterpart).double()(x.double())[0]
    assert error(by_steps(stream, x), reference) <= allowed(torchs, reference)


@needs_kernels
@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
def test_accuracy_of_narrow_weights(kind: str) -> None:
    """Root mean square of the error over that of the output: docs/streaming.md's bounds, and no better than can be."""
    module, x = make(kind, 64, 128), torch.randn(300, 1, 64)
    exact = by_steps(module.stream(), x)

    def off(weights: str) -> float:
        y = by_steps(module.stream(weights=weights), x)
        return float((y - exact).square().mean().sqrt() / exact.square().mean().sqrt())

    assert 1e-5 < off("bf16") < 4e-3
    assert 1e-4 < off("int8") < 1e-2


@needs_kernels
def test_rows_of_zeros_and_extremes() -> None:
    module = make("GRU")
    with torch.no_grad():
        module.weight_hh_l0[5] = 0
        module.weight_ih_l0[3] *= 1e30
        module.weight_ih_l0[4] *= 1e-30
    for weights in ("bf16", "int8"):
        assert bool(by_steps(module.stream(weights=weights), torch.randn(4, 1, 9)).isfinite().all())
    with torch.no_grad():
        module.weight_ih_l0[0, 0] = math.inf
    module.stream(weights="bf16")
    with pytest.raises(ValueError, match=r"weights\[0\]: got a value that is not finite"):
        module.stream(weights="int8")


# ---- the state ----


@pytest.mark.parametrize("kind", KINDS)
def test_reset(kind: str) -> None:
    module, x = make(kind, num_layers=2), torch.randn(40, 3, 9)
    mask = torch.zeros(40, 3, dtype=torch.bool)
    mask[10, 1] = mask[20, 0] = mask[20, 2] = True
    with torch.no_grad():
        expected = module(x, reset=mask)[0]
    stream, outputs = module.stream(3), []
    for x_t, now in zip(x, mask, strict=True):
        if bool(now.any()):
            stream.reset(now)
        outputs.append(stream.step(x_t))
    assert torch.equal(torch.stack(outputs), expected)
    stream.reset()
    assert not any(bool(s.any()) for s in states(stream.state))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_state_is_taken_and_given(kind: str, dtype: torch.dtype) -> None:
    module, x = make(kind, num_layers=2, dtype=dtype), torch.randn(30, 2, 9).to(dtype)
    hx = tuple(torch.randn(2, 2, n).to(dtype) for n in ([module.proj_size or 21, 21] if "LSTM" in kind else [21]))
    given: Any = hx if "LSTM" in kind else hx[0]
    with torch.no_grad():
        expected = module(x, given)[0]
    stream = module.stream(2)
    stream.state = given
    assert all(torch.equal(a, b) for a, b in zip(states(stream.state), hx, strict=True))
    assert torch.equal(by_steps(stream, x), expected)
    # An exact continuation: c has more bits inside than a 16-bit module's state.
    stream.state = given
    first, kept, left = by_steps(stream, x[:9]), stream.state_dict(), stream.state
    other = module.stream(2)
    other.load_state_dict(kept)
    stream.reset()
    assert all(bool(s.any()) for s in (*kept.values(), *states(left)))  # copies
    assert torch.equal(torch.cat([first, by_steps(other, x[9:])]), expected)


def test_no_result_is_written_again() -> None:
    for backend in ("cpu", "reference"):
        stream, x = make("LSTM", backend=backend).stream(), torch.randn(5, 1, 9)
        results = [stream.step(x_t) for x_t in x]
        kept = [y.clone() for y in results]
        by_steps(stream, x)
        stream.reset()
        assert all(torch.equal(a, b) for a, b in zip(results, kept, strict=True))
        assert len({y.data_ptr() for y in results}) == 5


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_out(backend: str) -> None:
    dtype = torch.float32 if backend == "cpu" else torch.float64
    module, x = make("GRU", 21, backend=backend, dtype=dtype), torch.randn(9, 2, 21, dtype=dtype)
    expected = by_steps(module.stream(2), x)
    stream, out = module.stream(2), torch.empty(2, 21, dtype=dtype)

    def assert_same(one: Tensor, other: Tensor) -> None:
        if backend == "cpu":
            assert torch.equal(one, other)
        else:  # torch.mm's bits may go by where its operands lie in memory
            assert_same_formula(one, other)

    for x_t, y in zip(x, expected, strict=True):
        assert stream.step(x_t, out=out) is out
        assert_same(out, y)
    stream.reset()
    for x_t, y in zip(x, expected, strict=True):  # over its own input, and into columns
        same, columns = x_t.clone(), torch.empty(21, 2, dtype=dtype).t()
        kept = stream.state_dict()
        assert_same(stream.step(x_t, out=columns), y)
        stream.load_state_dict(kept)
        assert_same(stream.step(same, out=same), y)


def test_inputs_out_of_the_ordinary() -> None:
    """Strides, lazy negations, a Parameter, batch_first, one number, an inference tensor."""
    module, x = make("GRU", batch_first=True), torch.randn(2, 30, 9)
    with torch.no_grad():
        expected = module(x)[0]
    stream = module.stream(2)
    assert torch.equal(torch.stack([stream.step(x[:, t]) for t in range(30)], 1), expected)
    stream.reset()
    assert torch.equal(stream.steps(x), expected)
    stream.reset()
    with torch.no_grad():
        assert torch.equal(stream.step(nn.Parameter(x[:, 0].contiguous())), expected[:, 0])
    tiny = fused_rnn.RNN(1, 1)
    negative = torch.complex(torch.zeros(1, 1), torch.ones(1, 1)).conj().imag
    assert negative.is_neg()
    assert torch.equal(tiny.stream().step(negative), tiny.stream().step(torch.full((1, 1), -1.0)))
    with torch.inference_mode():
        stream, x = tiny.stream(), torch.randn(20, 1, 1)
        expected = tiny(x)[0]
        assert torch.equal(by_steps(stream, x[:10]), expected[:10])
    stream.step(torch.ones(1, 1))
    stream.reset()


# ---- weights are a snapshot ----


def test_weights_are_those_of_the_last_refresh() -> None:
    for backend in ("cpu", "reference"):
        module, x = make("LSTM", num_layers=2, backend=backend), torch.randn(20, 1, 9)
        stream = module.stream()
        before = by_steps(stream, x)
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.mul_(1.5)
            expected = module(x)[0]
        stream.reset()
        assert torch.equal(by_steps(stream, x), before)
        stream.refresh()
        stream.reset()
        torch.testing.assert_close(by_steps(stream, x), expected, rtol=1e-5, atol=1e-6)
        module.double()
        with pytest.raises(ValueError, match=r"weights\[0\]: got torch.float64 on cpu"):
            stream.refresh()


def test_copies() -> None:
    module, x = make("LSTM", dtype=torch.bfloat16), torch.randn(3, 1, 9).bfloat16()
    stream = module.stream()
    by_steps(stream, x)
    counterparts = [copy.deepcopy(stream), copy.copy(stream), pickle.loads(pickle.dumps(stream))]
    expected = by_steps(stream, x)
    assert all(torch.equal(by_steps(counterpart, x), expected) for counterpart in counterparts)


# ---- around it ----


@needs_kernels
def test_several_streams_in_several_threads() -> None:
    module = make("LSTM", 256, 256)
    inputs = [torch.randn(40, 1, 256) for _ in range(6)]
    expected = [by_steps(module.stream(), x) for x in inputs]
    with ThreadPoolExecutor(6) as pool:
        results = list(pool.map(lambda x: by_steps(module.stream(), x), inputs))
    assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))


def _in_child(stream: Stream, x: Tensor, out: Tensor, queue: Any) -> None:
    queue.put(stream.step(x, out=out).tolist())


@needs_kernels
@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork.*:DeprecationWarning")
def test_works_after_fork() -> None:
    torch.set_num_threads(2)
    stream, x, out = make("GRU", 256, 512).stream(64), torch.randn(64, 256), torch.zeros(64, 512)
    kept = stream.state_dict()
    expected = stream.step(x).tolist()
    stream.load_state_dict(kept)
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_in_child, args=(stream, x, out, queue), daemon=True)
    child.start()
    try:
        result = queue.get(timeout=30)
        child.join(timeout=10)
    finally:
        child.kill()
    assert result == expected


def test_autocast_leaves_it_alone() -> None:
    for backend in ("cpu", "reference"):
        stream, x = make("GRU", backend=backend).stream(), torch.randn(1, 9)
        expected = stream.step(x)
        stream.reset()
        with torch.autocast("cpu"):
            assert torch.equal(stream.step(x), expected)


@pytest.mark.compile
def test_compiled_code_breaks_its_graph_at_a_step() -> None:
    stream, x = make("GRU").stream(), torch.randn(4, 1, 9)
    expected = by_steps(stream, x) * 2
    stream.reset()
    doubled = torch.compile(lambda x_t: stream.step(x_t) * 2, backend="eager")
    assert torch.equal(torch.stack([doubled(x_t) for x_t in x]), expected)


def test_it_costs_no_gradient() -> None:
    for backend in ("cpu", "reference"):
        stream, x = make("GRU", backend=backend).stream(), torch.randn(1, 9, requires_grad=True)
        assert not stream.step(x.detach()).requires_grad
        with torch.no_grad():
            stream.step(x)
        for call in (lambda: stream.step(x), lambda: stream.steps(x[None])):  # noqa: B023
            with pytest.raises(RuntimeError, match=r"x.*: requires a gradient"):
                call()
        with pytest.raises(RuntimeError, match=r"torch\.func transform"):
            torch.vmap(stream.step)(torch.randn(2, 1, 9))
        for call in (stream.step, lambda x_t: stream.steps(x_t[None])):  # noqa: B023
            with pytest.raises(RuntimeError, match=r"torch\.jit\.trace is recording"):
                torch.jit.trace(call, torch.randn(1, 9))
        with pytest.raises(RuntimeError, match=r"torch\.export is recording"):
            torch.export.export(Stepping(stream), (torch.randn(1, 9),), strict=False)


class Stepping(nn.Module):
    """A model that steps a stream, as nothing can record it."""

    def __init__(self, stream: fused_rnn.Stream) -> None:
        super().__init__()
        self.stream = stream

    def forward(self, x_t: Tensor) -> Tensor:
        return self.stream.step(x_t)


@needs_kernels
def test_a_stream_says_that_another_thread_is_in_it() -> None:
    """Its state would be of both, and every answer wrong. Steps of this size let other threads run meanwhile."""
    stream, x = make("GRU", 64, 512).stream(), torch.randn(200, 1, 64)
    refused, ready = [], threading.Barrier(2)

    def work() -> None:
        ready.wait()
        try:
            for _ in range(20):
                stream.steps(x)
                stream.step(x[0])
        except RuntimeError as error:
            refused.append(str(error))

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert refused and "another thread is in it" in refused[0]
    stream.steps(x)  # and it is free again


class Strange(Tensor):
    pass


X = torch.randn(3, 9)
BAD_CALLS: list[tuple[Any, type[Exception], str]] = [
    (lambda s: s.step(X[:2]), ValueError, r"x_t: got \[2, 9\], expected \[B, D\] = \[3, 9\]"),
    (lambda s: s.step(X[None]), ValueError, r"x_t: got \[1, 3, 9\]"),
    (lambda s: s.step(X.double()), ValueError, "x_t: got torch.float64 on cpu, expected torch.float32 on cpu"),
    (lambda s: s.step(X.to("meta")), ValueError, "x_t: got torch.float32 on meta"),
    (lambda s: s.step(X.tolist()), TypeError, "x_t: got list, expected a tensor"),
    (lambda s: s.step(X.to_sparse()), TypeError, "x_t: got a Tensor of torch.sparse_coo"),
    (lambda s: s.step(X.as_subclass(Strange)), TypeError, "x_t: got a Strange"),
    (lambda s: s.step(X, out=torch.empty(3, 20)), ValueError, r"out: got \[3, 20\], expected \[B, P\] = \[3, 21\]"),
    (lambda s: s.step(X, out=torch.empty(3, 21).half()), ValueError, "out: got torch.float16"),
    (lambda s: s.steps(X), ValueError, r"x: got \[3, 9\], expected \[T, B, D\]"),
    (lambda s: s.steps(torch.randn(5, 2, 9)), ValueError, r"x: got \[5, 2, 9\], expected \[T, B, D\] = \[5, 3, 9\]"),
    (lambda s: s.steps(torch.randn(0, 3, 9)), RuntimeError, "sequence length to be larger than 0"),
    (lambda s: s.reset([True]), TypeError, "mask: got list"),
    (lambda s: s.reset(torch.ones(3)), ValueError, r"mask: got \[3\] of torch.float32"),
    (lambda s: s.reset(torch.ones(2, dtype=torch.bool)), ValueError, r"mask: got \[2\].* expected \[B\] = \[3\]"),
    (lambda s: setattr(s, "state", torch.zeros(2, 3, 21)), TypeError, "state: got Tensor, expected a pair"),
    (lambda s: setattr(s, "state", (torch.zeros(2, 3, 21), torch.zeros(2, 3, 20))), ValueError, r"state \(c\): got"),
    (lambda s: s.load_state_dict({"h": torch.zeros(2, 3, 21)}), ValueError, "state: got the names"),
    (lambda s: s.load_state_dict({"h": torch.zeros(1), "c": torch.zeros(1)}), ValueError, r"state\['h'\]: got \[1\]"),
]


@pytest.mark.parametrize("position", range(len(BAD_CALLS)))
def test_bad_calls(position: int) -> None:
    call, kind, words = BAD_CALLS[position]
    stream = make("LSTM", num_layers=2).stream(3)
    kept = stream.state_dict()
    with pytest.raises(kind, match=words):
        call(stream)
    assert all(torch.equal(a, b) for a, b in zip(kept.values(), stream.state_dict().values(), strict=True))


def test_bad_streams() -> None:
    gru = fused_rnn.GRU(3, 4)
    for batch in (0, -1, 2.0, True, None):
        with pytest.raises(ValueError, match="batch_size: got"):
            gru.stream(batch)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"weights: got 'int4', expected None, 'bf16' or 'int8'"):
        gru.stream(weights="int4")
    with pytest.raises(ValueError, match=r"weights: got 'int8' for a module of torch\.float64"):
        fused_rnn.GRU(3, 4, dtype=torch.float64).stream(weights="int8")
    refused = r"weights='bf16' goes with the cpu and cuda backends, got backend='reference'"
    with pytest.raises(NotImplementedError, match=refused):
        fused_rnn.GRU(3, 4, backend="reference").stream(weights="bf16")
    with pytest.raises(ValueError, match="bidirectional: got True, expected False"):
        fused_rnn.GRU(3, 4, bidirectional=True).stream()
    with pytest.raises(RuntimeError, match=r"dropout: got 0.5 in training mode"):
        fused_rnn.GRU(3, 4, 2, dropout=0.5).stream()
    fused_rnn.GRU(3, 4, 2, dropout=0.5).eval().stream()
