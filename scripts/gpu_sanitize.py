"""A small case of every CUDA kernel, forward and backward, for compute-sanitizer: run by scripts/gpu.py.

python scripts/gpu_sanitize.py [--cell lstm ...] [--number bf16 ...]
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))  # a checkout built in place, with nothing installed

import gpu_cases as cases
import torch

from fused_rnn.cells import CELLS


def main() -> None:
    parser = argparse.ArgumentParser(prog="gpu_sanitize", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cell", nargs="+", default=list(CELLS), choices=list(CELLS))
    parser.add_argument("--number", nargs="+", default=list(cases.NUMBERS), choices=list(cases.NUMBERS))
    chosen = parser.parse_args()
    clusters = torch.cuda.get_device_capability() >= (9, 0)
    every = [
        kernel
        for kernel in cases.kernels("cuda", clusters, rows=(8, 16, 32, 0))
        if kernel.cell in chosen.cell and kernel.number in chosen.number
        if kernel.way not in cases.SIZES and bool(kernel.rows) == (kernel.way in ("cluster", "grid"))
    ]
    for done, kernel in enumerate(every):
        print(f"{done} of {len(every)} ran; next: {kernel}", flush=True)
        given = cases.given(kernel, "recompute" if kernel.rows == 16 else "gates")
        with cases.forced(kernel):
            cases.backward(given, cases.forward(kernel, given, "cuda"))
            torch.cuda.synchronize()
    print(f"all {len(every)} cases ran")


if __name__ == "__main__":
    main()
