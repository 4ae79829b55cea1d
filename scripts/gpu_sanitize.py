"""A small case of every CUDA kernel, forward and backward, for compute-sanitizer: run by scripts/gpu.py."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))  # a checkout built in place, with nothing installed

import torch

from fused_rnn.cells import CELLS
from fused_rnn.cuda_loops import plans
from fused_rnn.functional import gru, lstm, rnn

NUMBERS = {
    "bf16": (torch.bfloat16, False),
    "f16": (torch.float16, False),
    "tf32": (torch.float32, True),
    "ieee": (torch.float32, False),
    "f64": (torch.float64, False),
}


def train(cell: str, dtype: torch.dtype, batch: int, save: str) -> None:
    """One bidirectional layer with lengths and resets, H = 20: two members, the second of them filled in part."""
    gates, hidden, steps = CELLS[cell].gates, 20, 3
    shapes = [(gates * hidden, 4), (gates * hidden, hidden), (gates * hidden,), (gates * hidden,)] * 2
    weights = [torch.randn(shape, device="cuda", dtype=dtype, requires_grad=True) for shape in shapes]
    x = torch.randn(steps, batch, 4, device="cuda", dtype=dtype, requires_grad=True)
    lengths = torch.arange(batch, device="cuda") % (steps + 1)
    reset = torch.rand(steps, batch, device="cuda") < 0.2
    options = {"bidirectional": True, "lengths": lengths, "reset": reset, "save": save, "backend": "cuda"}
    if cell == "lstm":
        y = lstm(x, weights, **options)[0]
    elif cell == "gru":
        y = gru(x, weights, **options)[0]
    else:
        y = rnn(x, weights, nonlinearity=cell.removeprefix("rnn_"), **options)[0]
    torch.autograd.grad(y.sum(), [x, *weights])


def main() -> None:
    done = 0
    for cell, (number, (dtype, tf32)) in itertools.product(CELLS, NUMBERS.items()):
        torch.backends.cudnn.allow_tf32 = tf32
        exchanges = ("stepwise",) if number == "f64" else ("cluster", "grid", "stepwise")
        for exchange, rows in itertools.product(exchanges, (8, 16, 32)):
            if exchange == "cluster" and torch.cuda.get_device_capability() < (9, 0):
                continue
            if (exchange == "stepwise" and rows > 8) or (number == "ieee" and rows > 16):
                continue
            with plans.override(exchange, rows=0 if exchange == "stepwise" else rows):
                train(cell, dtype, rows + 3, "recompute" if rows == 16 else "gates")
            done += 1
    torch.cuda.synchronize()
    print(f"{done} cases ran")


if __name__ == "__main__":
    main()
