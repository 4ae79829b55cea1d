"""What the machine could do at best, measured in the same run, and the time a point cannot beat by it.

A point's floor is the larger of two times: its matrix products at the measured FLOP rate, and the reading of W_hh once
a step (twice in training: forward and backward) at the measured rate for a buffer of that size; on a GPU, where W_hh
may stay in the multiprocessors for all of time, once in all. What is read besides is small or can hide behind the
arithmetic. Both ceilings are measured with torch's own kernels, so they are what is known to be reachable; a kernel may
come out above 100 %, in small caches above all.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from fused_rnn.bench.grid import DTYPES, Point

BUFFER_BYTES = tuple(1 << power for power in range(12, 27, 2))  # 4 KiB, in the first cache, to 64 MiB


@dataclass(frozen=True)
class Limits:
    """flops: per second, in the dtype measured. read: (buffer's bytes, bytes per second), by size."""

    flops: float
    read: tuple[tuple[int, float], ...]

    def bandwidth(self, size: int) -> float:
        """Bytes per second for reading a buffer of this size again and again: that of the next larger one measured."""
        return next((rate for buffer, rate in self.read if buffer >= size), self.read[-1][1])

    def floor(self, point: Point, device: str = "cpu") -> float:
        """Seconds below which this point cannot go by these ceilings."""
        readings = point.T if device == "cpu" else 1
        passes = readings * (2 if point.mode == "training" else 1) * point.layers * point.directions
        reading = passes * point.recurrent_bytes / self.bandwidth(point.recurrent_bytes)
        return max(point.flops / self.flops, reading)


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
    """Measure both ceilings with the threads that are set: a large torch.mm, and reads of ever larger buffers."""
    n = 1024 if device == "cpu" else 8192
    a, b, out = (torch.randn(n, n, device=device, dtype=DTYPES[dtype]) for _ in range(3))
    flops = best_rate(2.0 * n**3, lambda: torch.mm(a, b, out=out), device, seconds=0.5)
    return Limits(flops, tuple((size, read_rate(size, device)) for size in BUFFER_BYTES))


def read_rate(size: int, device: str) -> float:
    """Bytes per second of summing a buffer of this size.

    A small one is summed many times in one call, through a view of stride zero, so that the cost of the call does not
    count. In float32 whatever the point's dtype: bytes are bytes.
    """
    repeats = max(1, (1 << (22 if device == "cpu" else 30)) // size)
    buffer = torch.randn(size // 4, device=device).expand(repeats, -1)
    return best_rate(float(repeats * size), lambda: torch.sum(buffer), device)
