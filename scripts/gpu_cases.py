"""A small case of every GPU kernel, forward and backward: gpu_smoke.py launches one at a time, gpu_sanitize.py all."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fused_rnn.cells import CELLS
from fused_rnn.cuda import plans
from fused_rnn.functional import gru, lstm, rnn

NUMBERS = {
    "bf16": (torch.bfloat16, False),
    "f16": (torch.float16, False),
    "tf32": (torch.float32, True),
    "ieee": (torch.float32, False),
    "f64": (torch.float64, False),
}
# How a backend is made to run: the CUDA loops' exchanges, the Triton loops; or H and B for its planner to choose by.
SIZES = {"H512-B64": (512, 64), "H1024-B8": (1024, 8)}
WAYS = {
    "cuda": ("cta", "cluster", "grid", "scatter", "stepwise", *SIZES),
    "triton": ("solo", "cooperative", "stepwise", *SIZES),
}


class Kernel(NamedTuple):
    """rows: a batch tile's, 0 for the planner's choice."""

    backend: str
    cell: str
    number: str
    way: str
    rows: int = 0

    def __str__(self) -> str:
        return " ".join((*self[:4], *([f"rows={self.rows}"] if self.rows else [])))


def exists(kernel: Kernel, clusters: bool) -> bool:
    """Whether there is such a kernel; clusters: whether the GPU has them (sm_90 on)."""
    backend, _, number, way, rows = kernel
    if backend == "triton":
        return number in ("bf16", "tf32")
    if way == "scatter" and (CELLS[kernel.cell].gates == 1 or number not in ("bf16", "f16", "tf32")):
        return False
    if rows and (way not in ("cluster", "grid") or (number == "ieee" and rows > 16)):
        return False
    return way == "stepwise" if number == "f64" else clusters or way not in ("cluster", "scatter")


def kernels(backend: str, clusters: bool, rows: tuple[int, ...] = (0,)) -> list[Kernel]:
    """All there are, those of one number of rows after the other: a run that is cut short has seen every kind."""
    every = itertools.product(rows, CELLS, NUMBERS, WAYS[backend])
    found = (Kernel(backend, cell, number, way, tile) for tile, cell, number, way in every)
    return [kernel for kernel in found if exists(kernel, clusters)]


@contextmanager
def forced(kernel: Kernel) -> Iterator[None]:
    """Its plan, and its precision of float32."""
    flags = torch.backends.cudnn
    precision = flags.flags(flags.enabled, flags.benchmark, allow_tf32=NUMBERS[kernel.number][1])
    with precision, _plan(kernel):
        yield


def _plan(kernel: Kernel) -> AbstractContextManager[None]:
    if kernel.backend == "cuda":
        return plans.override(None if kernel.way in SIZES else kernel.way, rows=kernel.rows)
    from fused_rnn.triton import planner
    from fused_rnn.triton.schedule import Tile

    if kernel.way in SIZES:
        return planner.override()
    return planner.override(loop=kernel.way, tile=Tile(16, 32, 32, 4))


class Given(NamedTuple):
    """One bidirectional layer with lengths and resets.

    H = 20: two members, the second of them filled in part; by scatter 64, for known teams are full.
    """

    x: Tensor
    weights: list[Tensor]
    options: dict[str, Any]

    def double(self) -> Given:
        """The same numbers in float64."""
        x, *weights = (t.detach().double().requires_grad_() for t in (self.x, *self.weights))
        return Given(x, weights, self.options)


def size(kernel: Kernel) -> tuple[int, int]:
    """H and B."""
    return SIZES.get(kernel.way, (64 if kernel.way == "scatter" else 20, (kernel.rows or 8) + 3))


def given(kernel: Kernel, save: str, device: str = "cuda") -> Given:
    hidden, batch = size(kernel)
    gates, steps, dtype = CELLS[kernel.cell].gates, 3, NUMBERS[kernel.number][0]
    random = torch.Generator().manual_seed(0)

    def uniform(*shape: int) -> Tensor:
        return ((2 * torch.rand(shape, generator=random) - 1) * hidden**-0.5).to(device, dtype).requires_grad_()

    rows = gates * hidden
    weights = [uniform(*shape) for shape in [(rows, 4), (rows, hidden), (rows,), (rows,)] * 2]
    x = torch.randn(steps, batch, 4, generator=random).to(device, dtype).requires_grad_()
    lengths = (torch.arange(batch) % (steps + 1)).to(device)
    reset = (torch.rand(steps, batch, generator=random) < 0.2).to(device)
    return Given(x, weights, {"bidirectional": True, "lengths": lengths, "reset": reset, "save": save})


def forward(kernel: Kernel, given: Given, backend: str) -> Tensor:
    """y."""
    x, weights, options = given
    if kernel.cell == "lstm":
        return lstm(x, weights, **options, backend=backend)[0]
    if kernel.cell == "gru":
        return gru(x, weights, **options, backend=backend)[0]
    return rnn(x, weights, nonlinearity=kernel.cell.removeprefix("rnn_"), **options, backend=backend)[0]


def backward(given: Given, y: Tensor) -> list[Tensor]:
    """The gradients of a sum of y with fixed weights, in x and all weights."""
    dy = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view(y.shape).to(y)
    return list(torch.autograd.grad(y, [given.x, *given.weights], dy))
