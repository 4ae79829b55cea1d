"""An ensemble as one launch a layer (torch.func.vmap over weights), beside its members one after the other.

    OMP_NUM_THREADS=1 python examples/ensemble.py --json ensemble.json

They take turns; what is printed is the median of the processor's time for each, and how often it goes into torch.nn's
(with one thread that is the wall's time, had the machine nothing else to do).
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap

import fused_rnn
from fused_rnn.commands import machine

SIZES = [(64, 16, 1, 16), (16, 32, 1, 32), (16, 32, 8, 64), (8, 64, 8, 128)]  # members, T, B, D = H
TURNS = 15


def contestants(kind: str, members: int, size: int, x: Tensor, training: bool) -> dict[str, Callable[[], object]]:
    """Each computes every member's outputs of the same x, and, if training, all their gradients."""
    ours = [getattr(fused_rnn, kind)(size, size) for _ in range(members)]
    theirs = [getattr(nn, kind)(size, size) for _ in range(members)]
    parameters, _ = stack_module_state(ours)
    together = vmap(lambda p: functional_call(ours[0], p, (x,))[0])

    def call(outputs: Callable[[], list[Tensor]]) -> Callable[[], object]:
        def run() -> None:
            with torch.set_grad_enabled(training):
                made = outputs()
            if training:
                sum(y.square().sum() for y in made).backward()

        return run

    return {
        "torch.nn, one by one": call(lambda: [m(x)[0] for m in theirs]),
        "ours, one by one": call(lambda: [m(x)[0] for m in ours]),
        "ours, one launch": call(lambda: [together(parameters)]),
    }


def medians(runs: dict[str, Callable[[], object]]) -> dict[str, float]:
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(TURNS + 2):
        for name, run in runs.items():
            start = time.process_time()
            run()
            if turn >= 2:  # the first two warm up
                seconds[name].append(time.process_time() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="where to write the figures")
    options = parser.parse_args()
    torch.manual_seed(0)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} thread(s), {fused_rnn.ops.ISA}")
    rows = []
    for kind in ("LSTM", "GRU"):
        for members, steps, batch, size in SIZES:
            for training in (False, True):
                runs = contestants(kind, members, size, torch.randn(steps, batch, size), training)
                ms = {name: 1e3 * t for name, t in medians(runs).items()}
                base = ms["torch.nn, one by one"]
                shown = ", ".join(f"{name} {t:.2f} ms ({base / t:.1f}×)" for name, t in ms.items())
                what = "training" if training else "inference"
                print(f"{kind} M={members} T={steps} B={batch} H={size} {what}: {shown}", flush=True)
                sizes = {"members": members, "T": steps, "B": batch, "H": size}
                rows.append({"cell": kind, **sizes, "training": training, "ms": ms})
    if options.json:
        facts = machine.describe("cpu") | {"threads": torch.get_num_threads(), "turns": TURNS}
        options.json.write_text(json.dumps({"run": facts, "ensembles": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
