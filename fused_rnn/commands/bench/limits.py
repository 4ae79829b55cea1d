"""What the machine could do at best, measured in the same run, and the time a point cannot beat by it.

A point's floor is the largest of these times: its matrix products at the measured FLOP rate; the reading of W_hh once
a step (twice in training: forward and backward) at the measured rate for a buffer of that size; on a GPU, where W_hh
may stay in the multiprocessors for all of time, its reading once in all, but an exchange between them after each step.
What is read besides is small or can hide behind the arithmetic. The FLOP rate is that of the best product there is,
torch.mm or on a CPU our own; the reading is torch.sum's. What is known to be reachable is a limit only until somebody
goes past it: then it is measured again, for the machine may have been disturbed, and if that does not help the limit is
what was reached. The exchanges are those of benchmarks/exchange.cu.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch

from fused_rnn import ops
from fused_rnn.commands.bench.exchange import Exchanges, measure_exchanges
from fused_rnn.commands.bench.grid import DTYPES, Point
from fused_rnn.commands.bench.providers import build
from fused_rnn.commands.machine import caches

BUFFER_BYTES = tuple(1 << power for power in range(12, 27, 2))  # 4 KiB, in the first cache, to 64 MiB
BEYOND = (1 << 28,)  # where a cache is so large that 64 MiB may lie in it
OUR_PRODUCTS = (("RNN", 128, 256), ("LSTM", 512, 256), ("LSTM", 256, 512), ("RNN", 1024, 512))  # cell, B, H
MULTIPROCESSOR_BYTES = (228 + 256) << 10  # where W_hh may stay: shared memory and registers, a Hopper's


@dataclass(frozen=True)
class Limits:
    """flops: per second, in the dtype measured. read: (buffer's bytes, bytes per second), by size.

    exchanges: on a GPU, (kind, members, seconds a round). by: whose product the flops are.
    """

    flops: float
    read: tuple[tuple[int, float], ...]
    exchanges: Exchanges = ()
    by: str = "torch.mm"

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
        reading = read_bytes(point, device) / self.bandwidth(point.recurrent_bytes)
        if device == "cpu":
            return max(point.flops / self.flops, reading)
        return max(point.flops / self.flops, reading, passes * point.T * self.exchange(point))

    def reached(self, point: Point, seconds: float, device: str = "cpu") -> Limits:
        """These, but for what is below the rates of a point that took so long."""
        flops, rate = point.flops / seconds, read_bytes(point, device) / seconds
        known = self
        if flops > self.flops:
            known = replace(known, flops=flops, by=str(point))
        if rate > self.bandwidth(point.recurrent_bytes):
            buffer = next((size for size, _ in self.read if size >= point.recurrent_bytes), self.read[-1][0])
            read = tuple((size, max(old, rate) if size == buffer else old) for size, old in self.read)
            known = replace(known, read=read)
        return known

    def best(self, other: Limits) -> Limits:
        """The higher of the two everywhere. other: of the same buffers."""
        flops, by = max((self.flops, self.by), (other.flops, other.by))
        read = tuple((size, max(a, b)) for (size, a), (_, b) in zip(self.read, other.read, strict=True))
        return Limits(flops, read, self.exchanges, by)


def read_bytes(point: Point, device: str) -> int:
    """What of W_hh must be read at least: once a step on a CPU, once in all on a GPU; in training for both passes."""
    passes = (2 if point.mode == "training" else 1) * point.layers * point.directions
    return passes * point.recurrent_bytes * (point.T if device == "cpu" else 1)


class Ceilings:
    """The limits of a run, which rise where a point goes past them."""

    AGAIN = 3  # so often at most they are measured anew: each time takes two seconds

    def __init__(self, limits: Limits, measure: Callable[[], Limits], device: str) -> None:
        self.limits, self.measure, self.device = limits, measure, device
        self.measured_again = 0
        self.first = limits

    def check(self, point: Point, seconds: float) -> None:
        """Measure again, and if need be raise, the limits below which a point came out."""
        if seconds >= self.limits.floor(point, self.device):
            return
        if self.measured_again < self.AGAIN:
            self.measured_again += 1
            self.limits = self.limits.best(self.measure())
        self.limits = self.limits.reached(point, seconds, self.device)

    def said(self) -> str:
        """What has become of the limits; "" if nothing was faster."""
        raised, old, new = [], self.first, self.limits
        if new.flops > old.flops:
            raised.append(f"{old.flops / 1e9:.0f} GFLOP/s are now {new.flops / 1e9:.0f} ({new.by})")
        for (size, before), (_, now) in zip(old.read, new.read, strict=True):
            if now > before:
                raised.append(f"{before / 1e9:.0f} GB/s of {size >> 10} KiB are now {now / 1e9:.0f}")
        again = f"measured again {self.measured_again} time{'s' * (self.measured_again != 1)}"
        return f"Points went past the limits, {again}: {'; '.join(raised)}." if raised else ""


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
    """Measure the ceilings with the threads that are set: products, reads of ever larger buffers, exchanges."""
    flops, by = max(_products(dtype, device))
    sizes = (*BUFFER_BYTES, *BEYOND) if max(caches().values(), default=0) > BUFFER_BYTES[-1] // 2 else BUFFER_BYTES
    reads = tuple((size, read_rate(size, device)) for size in sizes)
    return Limits(flops, reads, _exchanges() if device == "cuda" else (), by)


def _products(dtype: str, device: str) -> Iterator[tuple[float, str]]:
    """FLOP rates of the products there are: square ones by torch.mm, and on a CPU one step of wide batches by us."""
    for n in (512, 1024) if device == "cpu" else (8192,):
        a, b, out = (torch.randn(n, n, device=device, dtype=DTYPES[dtype]) for _ in range(3))
        yield best_rate(2.0 * n**3, partial(torch.mm, a, b, out=out), device, seconds=0.3), "torch.mm"
    if device == "cpu" and ops._C is not None:
        for cell, B, H in OUR_PRODUCTS:
            point = Point(cell, "inference", dtype, 1, B, H)
            yield best_rate(point.flops, build("cpu", point).run, device, seconds=0.2), "our own product"


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
