"""What a second thread costs, or gains, while other processes keep the cores busy: ours beside torch.nn's.

    python scripts/oversubscribed.py [--busy 0 1 2] [--cells LSTM GRU] [--shapes 64,8,128] [--pin]

Prints for every point the time of a call on one thread, and of more threads as a multiple of it, under each load.
Providers and numbers of threads take turns, a third of a second each, so all of them meet the same load; medians of
their turns, by the wall clock.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

import fused_rnn

SHAPES = ((64, 1, 256), (64, 8, 128), (64, 32, 256))  # T, B, H: units divided twice, then rows
WINDOW_S = 0.3
PACKAGES = {"ours": fused_rnn, "torch": torch.nn}


@contextmanager
def busy(count: int, pin: bool) -> Iterator[None]:
    """So many processes that compute and never wait; `pin`: each on a core of its own, from the last one on."""
    cores = sorted(os.sched_getaffinity(0), reverse=True)
    started = []
    try:
        for index in range(count):
            place = f"import os; os.sched_setaffinity(0, [{cores[index % len(cores)]}])\n" if pin else ""
            started.append(subprocess.Popen([sys.executable, "-c", f"{place}while True: pass"]))
        time.sleep(0.3 if count else 0)
        yield
    finally:
        for process in started:
            process.kill()
            process.wait()


def call_of(package: str, cell: str, mode: str, T: int, B: int, H: int) -> Callable[[], None]:
    """A call of a layer with D = H, and its gradients when training."""
    torch.manual_seed(0)
    layer = getattr(PACKAGES[package], cell)(H, H)
    x = torch.randn(T, B, H, requires_grad=mode == "training")

    def infer() -> None:
        with torch.inference_mode():
            layer(x)

    def train() -> None:
        for tensor in (x, *layer.parameters()):
            tensor.grad = None
        layer(x)[0].backward(x.detach())

    return infer if mode == "inference" else train


def window(call: Callable[[], None], threads: int, seconds: float) -> float:
    """Seconds of a call, on average over a turn; the first one does not count, for the threads start in it."""
    torch.set_num_threads(threads)
    call()
    count, start = 0, time.perf_counter()
    while count == 0 or time.perf_counter() - start < seconds:
        call()
        count += 1
    return (time.perf_counter() - start) / count


def measure(
    calls: dict[str, Callable[[], None]], threads: int, rounds: int, seconds: float
) -> dict[tuple[str, int], float]:
    """Median over the rounds, by (package, number of threads)."""
    found: dict[tuple[str, int], list[float]] = {(name, count): [] for name in calls for count in (1, threads)}
    for _ in range(rounds):
        for (name, count), samples in found.items():
            samples.append(window(calls[name], count, seconds))
    return {key: statistics.median(samples) for key, samples in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--busy", type=int, nargs="+", default=[0, 1, 2], help="processes that keep cores busy")
    parser.add_argument("--pin", action="store_true", help="each of them on a core of its own")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--cells", nargs="+", default=["LSTM", "GRU", "RNN"])
    parser.add_argument("--modes", nargs="+", default=["inference", "training"])
    parser.add_argument("--shapes", nargs="+", default=[",".join(map(str, shape)) for shape in SHAPES], metavar="T,B,H")
    parser.add_argument("--packages", nargs="+", default=list(PACKAGES))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--window", type=float, default=WINDOW_S, help="seconds of a turn")
    given = parser.parse_args()
    print(f"torch {torch.__version__}, {os.cpu_count()} cores; µs of a call on 1 thread, and on {given.threads} × that")
    for count in given.busy:
        with busy(count, given.pin):
            for cell in given.cells:
                for mode in given.modes:
                    for shape in given.shapes:
                        T, B, H = map(int, shape.split(","))
                        calls = {name: call_of(name, cell, mode, T, B, H) for name in given.packages}
                        found = measure(calls, given.threads, given.rounds, given.window)
                        times = "   ".join(
                            f"{name} {found[name, 1] * 1e6:8.0f} {found[name, given.threads] / found[name, 1]:5.2f}×"
                            for name in given.packages
                        )
                        print(f"busy {count}  {cell:4} {mode:9} T={T} B={B:<2} H={H}   {times}", flush=True)


if __name__ == "__main__":
    main()
