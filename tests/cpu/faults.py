"""Faults of the environment, each in a process of its own: `python tests/cpu/faults.py NAME`. Run by test_faults.py.

A process that gets through prints "ok"; an assertion, a crash or a hang keeps it from that.
"""

from __future__ import annotations

import ctypes
import gc
import os
import resource
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from tolerances import assert_same_formula
from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence

import fused_rnn

PAGE = resource.getpagesize()
MIB = 1 << 20
FAULTS: dict[str, Callable[[], None]] = {}


def fault(function: Callable[[], None]) -> Callable[[], None]:
    FAULTS[function.__name__] = function
    return function


def outcome(module: Any, x: Tensor, grad: bool = True) -> list[Tensor]:
    """y and, if asked for, the gradients of all that goes in."""
    if not grad:
        with torch.no_grad():
            return [module(x)[0].clone()]
    leaf = x.detach().clone().requires_grad_()
    y = module(leaf)[0]
    return [y.detach(), *torch.autograd.grad(y.square().sum(), [leaf, *module.parameters()])]


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def statm(field: int) -> int:
    return int(Path("/proc/self/statm").read_text().split()[field]) * PAGE


@contextmanager
def memory_limit(more: int) -> Iterator[None]:
    """The process may take so many bytes of address space more, and no more."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (statm(0) + more, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def assert_fails_for_memory(function: Callable[[], Any]) -> None:
    try:
        function()
    except (MemoryError, RuntimeError) as error:
        text = f"{type(error).__name__}: {error}"
    else:
        raise AssertionError("there was memory enough")
    assert any(word in text for word in ("MemoryError", "memory", "alloc")), text


# ---- allocation


@fault
def tensors_that_do_not_fit() -> None:
    """What torch allocates: outputs, gates, gradients."""
    for threads in (1, 2):
        torch.set_num_threads(threads)
        for cls in (fused_rnn.LSTM, fused_rnn.GRU, fused_rnn.RNN):
            module, small = cls(8, 64, num_layers=2), torch.randn(5, 40, 8)
            expected = [outcome(module, small), outcome(module, small, grad=False)]
            large = torch.randn(4000, 40, 8)
            outcome(module, large[:100])  # libgomp ends a process in which it cannot start its threads
            with memory_limit(8 * MIB):
                for grad in (True, False):
                    assert_fails_for_memory(lambda m=module, x=large, g=grad: outcome(m, x, g))
            assert same(expected[0], outcome(module, small))
            assert same(expected[1], outcome(module, small, grad=False))


@fault
def scratch_that_does_not_fit() -> None:
    """What the loops allocate: the output is small, packed weights and buffers are large."""
    for threads in (1, 2):
        torch.set_num_threads(threads)
        module, small = fused_rnn.GRU(2000, 2000), torch.randn(2, 3, 2000)  # 48 MB of weights each
        tiny = fused_rnn.GRU(4, 5)
        expected = outcome(tiny, torch.ones(2, 3, 4))
        rows = torch.randn(20, 3, 2000)  # enough for the weights to be packed
        with memory_limit(30 * MIB):
            assert_fails_for_memory(lambda m=module, x=rows: outcome(m, x, grad=False))
        whole = outcome(module, small)
        assert same(whole, outcome(module, small))
        assert same(expected, outcome(tiny, torch.ones(2, 3, 4)))


@fault
def streams_that_do_not_fit() -> None:
    module = fused_rnn.LSTM(1000, 1000, num_layers=2)
    kept = fused_rnn.LSTM(4, 5).stream(3)
    for weights in (None, "bf16", "int8"):
        with memory_limit(4 * MIB):
            assert_fails_for_memory(lambda w=weights: module.stream(2, weights=w))
            kept.step(torch.ones(3, 4))
        stream, x = module.stream(2, weights=weights), torch.randn(4, 2, 1000)
        first = stream.steps(x)
        stream.reset()
        assert torch.equal(stream.steps(x), first)


@fault
def a_huge_request() -> None:
    """More than any machine has, and more than 64 bits count."""
    module = fused_rnn.GRU(1, 64)
    small = torch.randn(3, 2, 1)
    expected = outcome(module, small)
    for steps in (1 << 40, 1 << 55):
        huge = torch.zeros(1, 1, 1).expand(steps, 8, 1)
        for grad in (True, False):
            with torch.set_grad_enabled(grad):
                assert_fails_for_memory(lambda x=huge: module(x))
        assert same(expected, outcome(module, small))


# ---- signals


@fault
def ctrl_c() -> None:
    """A long call runs to its end; then comes KeyboardInterrupt, and the module is as before."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's background processes ignore
    torch.set_num_threads(2)
    for cls in (fused_rnn.LSTM, fused_rnn.GRU):
        module = cls(64, 64)
        small, x = torch.randn(3, 2, 64), torch.randn(400, 64, 64)
        for grad in (False, True):
            expected = outcome(module, small, grad)
            begin = time.monotonic()
            outcome(module, x, grad)
            alone = time.monotonic() - begin
            for delay in (0.3, 0.7):
                child = subprocess.Popen(["sh", "-c", f"sleep {alone * delay}; kill -INT {os.getpid()}"])
                begin = time.monotonic()
                try:
                    outcome(module, x, grad)
                    child.wait()
                    time.sleep(0.1)  # where the call came first, the signal comes here
                except KeyboardInterrupt:
                    child.wait()
                else:
                    raise AssertionError("no KeyboardInterrupt")
                assert time.monotonic() - begin < 20 * alone + 10
                assert same(expected, outcome(module, small, grad))


# ---- threads


@fault
def threads_that_die() -> None:
    """Their scratch memory goes with them, whatever they died of."""
    module, x = fused_rnn.GRU(64, 64), torch.randn(64, 32, 64)
    expected = outcome(module, x)
    wrong = 0

    def die(k: int) -> None:
        nonlocal wrong
        wrong += not same(expected, outcome(module, x))
        if k % 3 == 1:
            raise ValueError("an end in the middle")
        if k % 3 == 2:
            module(torch.randn(64, 32, 63))  # refused

    def round_of_threads() -> None:
        for k in range(40):
            thread = threading.Thread(target=die, args=(k,))
            thread.start()
            thread.join()

    threading.excepthook = lambda _: None
    torch.set_num_threads(1)
    expected = outcome(module, x)
    round_of_threads()
    before = resident()
    for _ in range(3):
        round_of_threads()
    assert wrong == 0
    assert resident() - before < 8 * MIB, f"{(resident() - before) / MIB:.1f} MiB were left by 120 threads"
    assert same(expected, outcome(module, x))


@fault
def eight_threads_with_one_module() -> None:
    """Bitwise what each gets alone: forward, backward, and a stream a thread."""
    torch.set_num_threads(1)
    for cls in (fused_rnn.LSTM, fused_rnn.GRU, fused_rnn.RNN):
        module = cls(24, 40, num_layers=2)
        xs = [torch.randn(6 + k, 1 + k, 24) for k in range(8)]

        def work(x: Tensor, module: Any = module) -> list[Tensor]:
            stream = module.stream(x.size(1))
            inferred = outcome(module, x, grad=False) + outcome(module, x[:1], grad=False)
            return [*outcome(module, x), *inferred, stream.steps(x)]

        expected = [work(x) for x in xs]
        gate = threading.Barrier(8)

        def many(k: int, work: Any = work, gate: Any = gate, xs: Any = xs, expected: Any = expected) -> bool:
            gate.wait()
            return all(same(work(xs[k]), expected[k]) for _ in range(10))

        with ThreadPoolExecutor(8) as pool:
            assert all(pool.map(many, range(8)))


@fault
def fork_among_threads() -> None:
    """A child forked while other threads run calls: right, with one thread and with two, and done in time."""
    torch.set_num_threads(2)
    wide, narrow = fused_rnn.LSTM(32, 64), fused_rnn.GRU(128, 257)
    problems = [(wide, torch.randn(16, 64, 32)), (narrow, torch.randn(16, 1, 128))]
    stop = threading.Event()

    def work(k: int) -> None:
        module, x = problems[k % 2]
        while not stop.is_set():
            outcome(module, x, grad=k < 2)

    # torch's own operations on many numbers wait in a child for threads that are gone; ours run without gradient here.
    expected = [outcome(module, x, grad=False) for module, x in problems]
    workers = [threading.Thread(target=work, args=(k,), daemon=True) for k in range(4)]
    for worker in workers:
        worker.start()
    warnings.simplefilter("ignore")  # Python's own, of forks among threads
    statuses = []
    for k in range(30):
        time.sleep(0.01)
        child = os.fork()
        if child == 0:
            signal.alarm(60)  # a hang ends it
            torch.set_num_threads(1 + k % 2)
            with torch.no_grad():
                ys = [module(x)[0] for module, x in problems]
            torch.set_num_threads(1)
            close = [float((y - e[0]).abs().max()) < 1e-5 for y, e in zip(ys, expected, strict=True)]
            os._exit(0 if all(close) else 1)
        statuses.append(os.waitpid(child, 0)[1])
    stop.set()
    for worker in workers:
        worker.join()
    assert not any(statuses), statuses


@fault
def a_child_that_may_start_no_thread() -> None:
    """After a fork the team is of plain threads; where there can be none, the caller alone is the team."""
    torch.set_num_threads(2)
    module, x = fused_rnn.LSTM(32, 64), torch.randn(16, 64, 32)
    expected = outcome(module, x, grad=False)
    child = os.fork()
    if child == 0:
        signal.alarm(60)
        with memory_limit(4 * MIB), torch.no_grad():  # a stack is of 8
            y = module(x)[0]
        torch.set_num_threads(1)
        os._exit(0 if float((y - expected[0]).abs().max()) < 1e-5 else 1)
    assert os.waitpid(child, 0)[1] == 0


# ---- size and endurance


@fault
def a_million_steps() -> None:
    """One call over 2**20 steps is the calls on its parts, forward and backward."""
    torch.set_num_threads(1)
    steps, parts = 1 << 20, 64
    for cls, save in ((fused_rnn.LSTM, "gates"), (fused_rnn.GRU, "recompute")):
        module = cls(1, 3, dtype=torch.float64, save=save)
        x = torch.randn(steps, 1, 1, dtype=torch.float64).requires_grad_()
        y, _ = module(x)
        names = [x, *module.parameters()]
        whole = [y.detach(), *torch.autograd.grad(y.sum(), names)]
        hx, ys = None, []
        for part in x.chunk(parts):
            y, hx = module(part, hx)
            ys.append(y)
        y = torch.cat(ys)
        for a, b in zip(whole, [y.detach(), *torch.autograd.grad(y.sum(), names)], strict=True):
            assert_same_formula(a, b)


@fault
def more_than_32_bits_count() -> None:
    """2**31 outputs and more, 4 GiB in bfloat16: the last sequences are what they are alone."""
    torch.set_num_threads(2)
    module = fused_rnn.RNN(1, 64, dtype=torch.bfloat16)
    steps, batch = 1 << 11, (1 << 14) + 8
    x = torch.randn(steps, batch, 1).bfloat16()
    with torch.no_grad():
        y, h = module(x)
        alone, last = module(x[:, -8:].contiguous())
    assert y.numel() > 1 << 31
    ulp = 2.0**-8
    assert float((y[:, -8:].float() - alone.float()).abs().max()) <= 4 * ulp
    assert float((h[:, -8:].float() - last.float()).abs().max()) <= 4 * ulp
    assert torch.equal(h[0], y[-1])


def resident() -> int:
    gc.collect()
    return statm(1)


class _Mallinfo2(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            "arena",
            "ordblks",
            "smblks",
            "hblks",
            "hblkhd",
            "usmblks",
            "fsmblks",
            "uordblks",
            "fordblks",
            "keepcost",
        )
    ]


def in_use() -> int:
    """Bytes that malloc has handed out and not taken back; 0 where the C library does not tell."""
    gc.collect()
    told = getattr(ctypes.CDLL(None), "mallinfo2", None)
    if told is None:
        return 0
    told.restype = _Mallinfo2
    return int(told().uordblks)


@fault
def ten_thousand_calls() -> None:
    """Memory stays flat: in inference, in training, packed, by streams, and of calls that are refused."""
    torch.set_num_threads(1)
    # Of memory that is handed out, the caches of sizes; of pages, the allocators' slack. 32 bytes a call would show.
    most_in_use, most = 300 << 10, 4 * MIB
    module = fused_rnn.LSTM(8, 12, num_layers=2)
    single = fused_rnn.LSTM(8, 12)
    stream = module.stream(4)
    x = torch.randn(12, 4, 8)
    packed = pack_padded_sequence(x, [12, 7, 7, 2])

    def refused(module: Any = module, x: Tensor = x) -> None:
        for wrong in (x[..., 1:], x[0, 0, 0], x.double()):
            try:
                module(wrong)
            except Exception:
                continue
            raise AssertionError("not refused")

    kinds: dict[str, Callable[[], Any]] = {
        "inference": lambda m=module, s=single, x=x: (outcome(m, x, False), outcome(s, x[:1], False)),
        "training": lambda m=module, x=x: outcome(m, x),
        "packed": lambda m=module, p=packed: m(p)[0].data.sum().backward(),
        "lengths": lambda m=module, x=x: m(x, lengths=[12, 1, 0, 5])[0].sum().backward(),
        "stream": lambda s=stream, x=x: (s.step(x[0]), s.steps(x), s.reset(), s.state),
        "streams made": lambda m=module: m.stream(4),
        "refused": refused,
    }
    for name, call in kinds.items():
        for _ in range(500):
            call()
        before, used = resident(), in_use()
        for _ in range(2_000 if name == "streams made" else 10_000):
            call()
        grown, kept = resident() - before, in_use() - used
        assert grown < most, f"{name}: grown by {grown / MIB:.1f} MiB"
        assert kept < most_in_use, f"{name}: {kept} bytes more are in use"


if __name__ == "__main__":
    warnings.simplefilter("ignore", DeprecationWarning)
    torch.manual_seed(0)
    FAULTS[sys.argv[1]]()
    print("ok")
