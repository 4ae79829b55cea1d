"""Peak memory of one forward, or forward and backward, in a process of its own.

On the CPU it is the growth of the resident set's high-water mark, so scratch buffers of C++ code count like
tensors do; on a GPU it is the allocator's peak. Weights, input and output gradient are there before and not counted.

    python -m fused_rnn.commands.bench.memory '{"cell": "LSTM", "mode": "training", ...}'      prints bytes
"""

from __future__ import annotations

import contextlib
import json
import resource
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from fused_rnn.commands.bench.grid import Point
from fused_rnn.commands.bench.providers import build

# Long enough that what is kept per step dominates.
SIZES = (1024, 32, 256)  # T, B, H


def peak_memory(point: Point, provider: str, device: str, threads: int, save: str | None = None) -> int:
    """Bytes that `provider` needs at `point` beyond its inputs; measured in a fresh Python process.

    Raises RuntimeError with the last line of what that process said if it fails.
    """
    request = {"point": asdict(point), "provider": provider, "device": device, "threads": threads, "save": save}
    command = [sys.executable, "-m", "fused_rnn.commands.bench.memory", json.dumps(request)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(done.stderr.strip().splitlines()[-1] if done.stderr.strip() else f"exit {done.returncode}")
    return int(done.stdout)


def _serve(request: dict[str, Any]) -> int:
    torch.set_num_threads(request["threads"])
    point = Point(**request["point"])
    options = {} if request["save"] is None else {"save": request["save"]}
    call = build(request["provider"], point, request["device"], **options)
    # One short run first: code pages, thread stacks and the allocators' first blocks are not the layer's memory.
    small = build(request["provider"], Point(**{**request["point"], "T": 2}), request["device"], **options)
    small.run()
    del small
    call.prepare()
    if request["device"] == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call.run()
        return torch.cuda.max_memory_allocated() - before
    forget_peak()
    before = resident("VmRSS")
    call.run()
    return max(0, resident("VmHWM") - before)


def resident(field: str) -> int:
    """Bytes resident now (VmRSS) or at most so far (VmHWM); without /proc both are the latter, over the process's life.

    Where there is /proc, getrusage is not asked: there a process starts with the peak of the one it was forked from.
    """
    status = Path("/proc/self/status")
    if not status.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    line = next(line for line in status.read_text().splitlines() if line.startswith(field + ":"))
    return int(line.split()[1]) * 1024


def forget_peak() -> bool:
    """Make the present size the high-water mark; whether the kernel allows it."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
        return True
    return False


if __name__ == "__main__":
    print(_serve(json.loads(sys.argv[1])))
