"""Cells that are linear in their states on the CPU: many steps at once beside one after the other, by time and size.

python benchmarks/linear_cells.py [--threads 1] writes benchmarks/results/cpu/linear-cells-1t.md. Both ways run in one
process and take turns; what counts is how many times as fast the medians are, and the fastest runs. Of one thread it is
the time that it had a core; of several the clock's, which other work on the machine is part of.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

import fused_rnn
from fused_rnn import _C
from fused_rnn.commands.machine import describe

CELLS = {"MinGRU": {}, "MinLSTM": {}, "SRU": {"recurrent_terms": False}}
SIZES = [(B, H) for H in (8, 32, 64, 128) for B in (1, 2)]
TIMES = (8, 16, 64, 256, 1024, 4096)
ALWAYS, NEVER = (1, 1 << 40), (1 << 40, 0)
RESULTS = Path(__file__).parent / "results" / "cpu"


def compared(call: Callable[[], object], rows: int, seconds: float) -> tuple[float, float]:
    """The time of one step after the other over that of many at once: of medians, and of the fastest."""
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    found: dict[tuple[int, int], list[float]] = {NEVER: [], ALWAYS: []}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(found[ALWAYS]) < 8:
        for limits in (NEVER, ALWAYS, ALWAYS, NEVER):
            _C.scan_limits(*limits, rows)
            start = clock()
            call()
            found[limits].append(clock() - start)
    return statistics.median(found[NEVER]) / statistics.median(found[ALWAYS]), min(found[NEVER]) / min(found[ALWAYS])


def measure(cell: str, T: int, B: int, H: int, rows: int, seconds: float) -> list[tuple[float, float]]:
    """A forward without gradient, and one with its backward."""
    module = getattr(fused_rnn, cell)(H, H, **CELLS[cell])
    x, dy = torch.randn(T, B, H, requires_grad=True), torch.randn(T, B, H)

    def inference() -> None:
        with torch.no_grad():
            module(x)

    def training() -> None:
        module(x)[0].backward(dy)

    return [compared(call, rows, seconds) for call in (inference, training)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=0.2, help="of each comparison")
    parser.add_argument("--times", type=int, nargs="*", default=TIMES)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    before = _C.scan_limits(*NEVER, 1)
    facts = describe("cpu")
    lines = [
        f"| forward, training; T = | {' | '.join(map(str, options.times))} |",
        "|---" * (len(options.times) + 1) + "|",
    ]
    for cell in CELLS:
        for B, H in SIZES:
            entries = []
            for T in options.times:
                pairs = measure(cell, T, B, H, before[2], options.seconds)
                entries.append(", ".join(f"{median:.2f} ({fastest:.2f})" for median, fastest in pairs))
            lines.append(f"| {cell} B={B} H={H} | {' | '.join(entries)} |")
            print(lines[-1], flush=True)
    _C.scan_limits(*before)
    machine = f"{facts['device_name']}, {_C.isa()}, torch {facts['torch']}, {options.threads} thread(s)"
    text = f"{machine}, commit {facts['commit']}, {facts['date']}."
    title = "# Many steps at once over one after the other: times as fast, medians (fastest runs)"
    path = RESULTS / f"linear-cells-{options.threads}t.md"
    path.write_text("\n".join([title, "", text, "", *lines, "", "`python benchmarks/linear_cells.py`", ""]))
    print(path)


if __name__ == "__main__":
    main()
