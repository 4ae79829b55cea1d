"""What the machine could do at best, measured in the same run, and the time a point cannot beat by it.

A point's floor is the largest of these times: its matrix products at the measured FLOP rate; the reading of W_hh once
a step (twice in training: forward and backward) at the measured rate for a buffer of that size; on a GPU, where W_hh
may stay in the multiprocessors for all of time, its reading once in all, but an exchange between them after each step.
What is read besides is small or can hide behind the arithmetic. The first two ceilings are measured with torch's own
kernels, so they are what is known to be reachable; a kernel may come out above 100 %, in small caches above all. The
exchanges are those of benchmarks/exchange.cu.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch

from fused_rnn.bench.exchange import Exchanges, measure_exchanges
from fused_rnn.bench.grid import DTYPES, Point

BUFFER_BYTES = tuple(1 << power for power in range(12, 27, 2))  # 4 KiB, in the first cache, to 64 MiB
MULTIPROCESSOR_BYTES = (228 + 256) << 10  # where W_hh may stay: shared memory and registers, a Hopper's


@dataclass(frozen=True)
class Limits:
    """flops: per second, in the dtype measured. read: (buffer's bytes, bytes per second), by size.

    exchanges: on a GPU, (kind, members, seconds a round).
    """

    flops: float
    read: tuple[tuple[int, float], ...]
    exchanges: Exchanges = ()

    def bandwidth(self, size: int) -> float:
        """Bytes per second for reading a buffer of this size again and again: that of the next larger one measured."""
        return next((rate for buffer, rate in self.read if buffer >= size), self.read[-1][1])

    def exchange(self, point: Point) -> float:
        """Seconds of the fastest exchange of a team of multiprocessors that W_hh fits into; 0.0 where none is known."""
        members = -(-point.recurrent_bytes // MULTIPROCESSOR_BYTES)
        known = [seconds for kind, size, seconds in self.exchanges if (1 if kind == "cta" else size) >= members]
        return min(known, default=0.0)

    def floor(self, point: Point, device: str = "cpu") -> float:
        """Seconds below which this point cannot go by these ceilings."""
        passes = (2 if point.mode == "training" else 1) * point.layers
        reading = passes * point.directions * point.recurrent_bytes / self.bandwidth(point.recurrent_bytes)
        if device == "cpu":
            return max(point.flops / self.flops, point.T * reading)
        return max(point.flops / self.flops, reading, passes * point.T * self.exchange(point))


def best_rate(work: float, call: Callable[[], object], device: str, seconds: float = 0.1) -> float:
    """work per second in the fastest of the runs that fit into the time given."""
    call()
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter_ns()
        call()
        if device == "cuda":
            torch.cuda.synchronize()
        best = min(best, (time.perf_counter_ns() - start) * 1e-9)
    return work / best


@torch.no_grad()
def measure_limits(dtype: str, device: str) -> Limits:
    """Measure the ceilings with the threads that are set: a large torch.mm, reads of ever larger buffers, exchanges."""
    n = 1024 if device == "cpu" else 8192
    a, b, out = (torch.randn(n, n, device=device, dtype=DTYPES[dtype]) for _ in range(3))
    flops = best_rate(2.0 * n**3, lambda: torch.mm(a, b, out=out), device, seconds=0.5)
    reads = tuple((size, read_rate(size, device)) for size in BUFFER_BYTES)
    return Limits(flops, reads, _exchanges() if device == "cuda" else ())


def _exchanges() -> Exchanges:
    try:
        return measure_exchanges()
    except RuntimeError as error:  # the rest is worth measuring all the same
        warnings.warn(f"the limits leave exchanges out: {error}", stacklevel=2)
        return ()


def read_rate(size: int, device: str) -> float:
    """Bytes per second of summing a buffer of this size.

    A small one is summed many times in one call, through a view of stride zero, so that the cost of the call does not
    count. In float32 whatever the point's dtype: bytes are bytes.
    """
    repeats = max(1, (1 << (22 if device == "cpu" else 30)) // size)
    buffer = torch.randn(size // 4, device=device).expand(repeats, -1)
    return best_rate(float(repeats * size), lambda: torch.sum(buffer), device)
