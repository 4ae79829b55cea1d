"""What a short call costs on the host of a GPU: a launch, our layers and torch.nn's, and where the time goes.

    python scripts/gpu_host.py [--device cuda] [--count 200]

A call returns before the device is through, so long as nobody waits; what is timed is the call. Run by scripts/gpu.py.
"""

from __future__ import annotations

import argparse
import cProfile
import io
import pstats
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).parent.parent))  # a checkout built in place, with nothing installed

import torch

import fused_rnn
from fused_rnn.cuda import plans


def micros(call: Callable[[], object], count: int, wait: Callable[[], None]) -> float:
    """Median time of a call; the device's queue, which has a limit, is emptied now and then."""
    taken = []
    for n in range(count):
        if n % 20 == 0:
            wait()
        began = time.perf_counter_ns()
        call()
        taken.append((time.perf_counter_ns() - began) * 1e-3)
    wait()
    return median(taken)


def calls(kind: str, backend: str | None, device: str) -> dict[str, Callable[[], object]]:
    """A forward without gradient and a training step of a layer; of torch.nn if backend is None."""
    owner, options = (torch.nn, {}) if backend is None else (fused_rnn, {"backend": backend})
    layer = getattr(owner, kind)(128, 128, device=device, dtype=torch.bfloat16, **options)
    x = torch.randn(4, 8, 128, device=device, dtype=torch.bfloat16)
    leaf, dy = x.clone().requires_grad_(), torch.randn_like(x)

    @torch.no_grad()
    def inference() -> object:
        return layer(x)

    def training() -> None:
        layer(leaf)[0].backward(dy)

    return {"inference": inference, "training": training}


def profile(call: Callable[[], object], count: int) -> str:
    profiler, out = cProfile.Profile(), io.StringIO()
    profiler.enable()
    for _ in range(count):
        call()
    profiler.disable()
    pstats.Stats(profiler, stream=out).sort_stats("tottime").print_stats(28)
    return out.getvalue()


def main() -> None:
    parser = argparse.ArgumentParser(prog="gpu_host", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--count", type=int, default=200)
    chosen = parser.parse_args()
    device, count = chosen.device, chosen.count
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    one = torch.zeros(32, device=device)
    print(f"add_          {micros(lambda: one.add_(1), 5 * count, wait):7.1f} us")
    print(f"new_zeros     {micros(lambda: one.new_zeros(32), 5 * count, wait):7.1f} us")
    print(f"new_empty     {micros(lambda: one.new_empty(32), 5 * count, wait):7.1f} us")
    ours = {}
    for kind in ("LSTM", "GRU"):
        for backend in (None, "cuda", "torch"):
            for mode, call in calls(kind, backend, device).items():
                for _ in range(10):
                    call()
                name = f"{kind} {mode} {'torch.nn' if backend is None else backend}"
                print(f"{name:<28} {micros(call, count, wait):7.1f} us", flush=True)
                if backend == "cuda":
                    ours[name] = call
    for hidden, batch in ((128, 8), (1024, 64)):
        layer = fused_rnn.LSTM(8, hidden, device=device, dtype=torch.bfloat16, backend="cuda")
        x = torch.randn(64, batch, 8, device=device, dtype=torch.bfloat16)
        with plans.override("stepwise"), torch.no_grad():
            layer(x)
            taken = micros(lambda: (layer(x), wait()), 10, wait) / len(x)  # noqa: B023
        print(f"LSTM H={hidden} B={batch} without a team, a step {taken:7.1f} us", flush=True)
    for dtype in (torch.float16, torch.bfloat16):
        for owner in (torch.nn, fused_rnn):
            layer, x = owner.LSTM(8, 8, device=device), torch.randn(3, 2, 8, device=device)
            with torch.autocast(device, dtype):
                print(f"autocast {dtype}: {owner.__name__}.LSTM gives {layer(x)[0].dtype}")
    for name, call in ours.items():
        if name.startswith("LSTM"):
            print(f"--- {name}\n{profile(call, count)}", flush=True)
            wait()
            if device == "cuda":
                with torch.profiler.profile() as watched:
                    for _ in range(20):
                        call()
                    wait()
                table = watched.key_averages()
                print(table.table(sort_by="self_cpu_time_total", row_limit=30, max_name_column_width=60))
                print(table.table(sort_by="self_cuda_time_total", row_limit=20, max_name_column_width=60))


if __name__ == "__main__":
    main()
