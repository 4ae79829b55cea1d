"""The clock: interleaved A/B timing in one process, and the check that what is timed is right.

By one thread on a CPU what counts is the time that it had a core, so that other work on the machine does not come into
it. All providers of a point are built first, checked against the baseline, warmed up, and then take turns: in each
round each provider runs a short block, in random order. A slow phase of the machine thus falls on everyone, and
the medians are compared. Nothing is averaged away: the 20th and 80th percentile are kept.

On a GPU every run has two events of its own and the host waits at the end of a block, not of a run: it may work ahead
as it does in training, so what counts is the longer of the host's and the device's time. The first run of a block is
not counted: before it the device was idle, and it would have the sum of both. Caches stay as they are.
"""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import torch

from fused_rnn.commands.bench.calls import Call
from fused_rnn.commands.bench.grid import Point
from fused_rnn.commands.bench.providers import BASELINE, baseline, build, supports
from fused_rnn.commands.bench.rivals.rival import Build

# A guard against timing something wrong, by ‖a - b‖ / ‖b‖; accuracy itself is judged by the tests.
TOLERANCE = {"fp64": 1e-9, "fp32": 1e-3, "tf32": 2e-2, "fp16": 2e-2, "bf16": 5e-2}
# A provider's turn lasts about this long: long enough to warm its caches, short against drifts; on a GPU long enough
# for the host to be ahead.
BLOCK_S, GPU_BLOCK_S = 2e-3, 10e-3
MIN_ROUNDS, MAX_ROUNDS = 7, 50
LONG_S, LONG_ROUNDS = 6.0, 3  # a point that takes so long after so few rounds may stop there


DISTURBED = 1.5  # the 80th percentile over the 20th


@dataclass(frozen=True)
class Timing:
    """Percentiles in seconds over n runs, or the reason why nothing is reported. compile_s: see Call."""

    p20: float = 0.0
    p50: float = 0.0
    p80: float = 0.0
    n: int = 0
    refused: str | None = None
    compile_s: float | None = None

    @property
    def disturbed(self) -> bool:
        """Whether the times differ so much that something else must have run beside them."""
        return self.p80 > DISTURBED * self.p20


def percentiles(seconds: list[float]) -> Timing:
    """Percentiles by nearest rank; seconds must not be empty."""
    ordered = sorted(seconds)
    p20, p50, p80 = (ordered[round(q * (len(ordered) - 1))] for q in (0.2, 0.5, 0.8))
    return Timing(p20, p50, p80, len(ordered))


class Runs(Protocol):
    """What can be timed: `prepare()` is outside the clock, `run()` inside it."""

    def prepare(self) -> None: ...

    def run(self) -> None: ...


@runtime_checkable
class TimesItself(Protocol):
    """What runs in a process of its own, with a clock there: the seconds of each of so many runs."""

    def seconds(self, times: int) -> list[float]: ...


def clock(device: str, core_time: bool = False) -> Callable[[Runs, int], list[float]]:
    """A function that runs a call so many times and returns the seconds of each: on a GPU by events.

    core_time: those that this thread had a core, which is right where there is no other.
    """
    now = time.thread_time_ns if core_time else time.perf_counter_ns

    def on_cpu(call: Runs, times: int) -> list[float]:
        if isinstance(call, TimesItself):
            return call.seconds(times)
        seconds = []
        for _ in range(times):
            call.prepare()
            start = now()
            call.run()
            seconds.append((now() - start) * 1e-9)
        return seconds

    def on_gpu(call: Runs, times: int) -> list[float]:
        marks = []
        torch.cuda.synchronize()
        for _ in range(1 + times):
            call.prepare()
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            call.run()
            end.record()
            marks.append((start, end))
        torch.cuda.synchronize()
        return [float(start.elapsed_time(end)) * 1e-3 for start, end in marks[1:]]

    return on_gpu if device == "cuda" else on_cpu


def counts_core_time(device: str) -> bool:
    """Whether what counts is the time that a thread had a core: on a CPU, if there is one thread."""
    return device == "cpu" and torch.get_num_threads() == 1


@contextmanager
def float32_as(dtype: str, device: str) -> Iterator[None]:
    """On a GPU the point's dtype says whether float32 products may round to TF32, for torch.nn and for us."""
    if device != "cuda" or dtype not in ("fp32", "tf32"):
        yield
        return
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    before = matmul.fp32_precision
    flags = cudnn.flags(cudnn.enabled, cudnn.benchmark, deterministic=cudnn.deterministic, allow_tf32=dtype == "tf32")
    with flags:
        matmul.fp32_precision = "tf32" if dtype == "tf32" else "ieee"
        try:
            yield
        finally:
            matmul.fp32_precision = before


def difference(call: Call, expected: list[torch.Tensor]) -> float:
    """The largest relative difference ‖a - b‖ / ‖b‖ over a call's results; inf where a value is not finite."""
    worst = 0.0
    for ours, theirs in zip(call.results(), expected, strict=True):
        a, b = ours.double().flatten(), theirs.double().flatten()
        if a.numel() != b.numel() or not bool(torch.isfinite(a).all()):
            return float("inf")
        worst = max(worst, float((a - b).norm() / b.norm().clamp_min(1e-30)))
    return worst


def measure(
    point: Point, providers: list[str], device: str, budget_s: float, rivals: Mapping[str, Build] | None = None
) -> dict[str, Timing]:
    """Time every provider at one point, in about budget_s seconds, or what the fewest rounds take if that is longer.

    rivals: what builds the calls of those among the providers, of torch.nn's. A provider that does not support the
    point is left out; one that raises, or whose results differ from the baseline's, is in the answer with the reason
    and without a time.
    """
    timings: dict[str, Timing] = {}
    calls: dict[str, Call] = {}
    cost: dict[str, float] = {}
    run = clock(device, core_time=counts_core_time(device))
    first = baseline(point)
    expected: list[torch.Tensor] = []
    for provider in [first, *(p for p in providers if p != first)]:
        if supports(provider, point) is not None:
            continue
        try:
            rival = (rivals or {}).get(provider)
            call = build(provider, point, device) if rival is None else rival(build(BASELINE, point))
            run(call, 1)
        except Exception as error:  # a compiler's own errors, too: the other providers are to be timed
            if provider == first:
                raise
            timings[provider] = Timing(refused=(str(error).strip() or type(error).__name__).splitlines()[0])
            continue
        if provider == first:
            expected = [result.clone() for result in call.results()]
        elif not (off := difference(call, expected)) <= TOLERANCE[point.dtype]:
            timings[provider] = Timing(refused=f"wrong result: differs from {first} by {off:.1e}")
            continue
        calls[provider], cost[provider] = call, run(call, 1)[0]

    seconds = interleave(calls, cost, run, GPU_BLOCK_S if device == "cuda" else BLOCK_S, budget_s)
    for provider, samples in seconds.items():
        timings[provider] = replace(percentiles(samples), compile_s=calls[provider].compile_s)
    return timings


def interleave(
    calls: Mapping[str, Runs],
    cost: dict[str, float],
    run: Callable[[Runs, int], list[float]],
    block_s: float,
    budget_s: float,
) -> dict[str, list[float]]:
    """Seconds of every run of each call, in blocks of about block_s that take turns, in random order."""
    order = list(calls)
    # A fixed order would give each provider the same predecessor, whose caches and free memory it inherits, all along.
    shuffle = random.Random(0).shuffle
    block = {provider: max(1, min(50, int(block_s / cost[provider]))) for provider in order}
    samples: dict[str, list[float]] = {provider: [] for provider in order}
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        start = time.perf_counter()
        for turn in range(MAX_ROUNDS):
            spent = time.perf_counter() - start
            if spent > budget_s and (turn >= MIN_ROUNDS or (turn >= LONG_ROUNDS and spent > LONG_S)):
                break
            for provider in order:
                if provider == "loop" and turn % 3:
                    continue  # it is there for scale, and slow: fewer turns leave more time for the others
                samples[provider] += run(calls[provider], block[provider])
            shuffle(order)
    finally:
        if enabled:
            gc.enable()
    return samples
