"""Who runs a point: torch.nn, a loop over torch's cell, fused_rnn with one of its backends, or a rival (rivals/).

Every provider of a point computes the same thing from the same weights, input, state and output gradient. For bf16 on a
GPU torch.nn in float16 is one more: cuDNN has kernels for it that it lacks for bf16, and torch copies the weights of a
bf16 module in each call.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import fused_rnn
from fused_rnn.commands.bench import variants
from fused_rnn.commands.bench.calls import Call, CellLoop, GraphCall
from fused_rnn.commands.bench.grid import CELLS, DTYPES, SEQUENCES, Point
from fused_rnn.commands.bench.rivals import RIVALS

BASELINE = "torch"
STEP_BASELINE = "cell"
HALF = "torch-fp16"
# name → what the tables call it; any other name is a backend of fused_rnn, run alone
TITLES = {
    "torch": "torch.nn",
    HALF: "torch.nn in fp16",
    "loop": "loop over torch cell",
    "cell": "torch.nn cell",
    "auto": "fused_rnn, auto",
} | {name: rival.title for name, rival in RIVALS.items()}
OTHERS = tuple(TITLES)  # every other provider is one of our backends, run alone


def baseline(point: Point) -> str:
    """The provider that a point's results are compared with."""
    return STEP_BASELINE if point.mode in ("step", "stream") else BASELINE


def ways_in_torch(point: Point) -> tuple[str, ...]:
    """The providers of which the faster is what a point's speed-ups are counted against."""
    return (baseline(point), HALF) if point.dtype == "bf16" and point.mode in SEQUENCES else (baseline(point),)


def supports(provider: str, point: Point) -> str | None:
    """None, or why this provider does not run this point."""
    if provider in RIVALS:
        return RIVALS[provider].supports(point)
    plain = point.variant in ("plain", "graph") and point.layers == point.directions == 1
    if provider in ("loop", "cell") and not plain:
        return "the loop over a cell has one layer, one direction, no lengths and no resets"
    if provider == HALF and HALF not in ways_in_torch(point):
        return "it stands beside bf16 sequences alone"
    if (provider == "cell") != (point.mode == "step") and provider in ("cell", "loop"):
        return "the cell alone is compared in single steps, the loop in sequences"
    return None


def build(provider: str, point: Point, device: str = "cpu", **options: str) -> Call:
    """Make `provider`'s call for `point`. The same seed every time, so the same numbers for every provider.

    options go to the modules of fused_rnn alone (`save="recompute"`).
    """
    if point.variant == "graph" and device != "cuda":
        raise ValueError(f"device: got {device!r} with the variant 'graph', expected 'cuda'")
    call = _call(provider, point, device, options)
    return GraphCall(call) if point.variant == "graph" else call


def _call(provider: str, point: Point, device: str, options: dict[str, str]) -> Call:
    factory: dict[str, Any] = {"device": device, "dtype": DTYPES[point.dtype]}
    kwargs: dict[str, Any] = {"num_layers": point.layers, "bidirectional": point.directions == 2}
    torch.manual_seed(0)
    reference = getattr(nn, point.cell)(point.width, point.H, **kwargs, **factory)
    x = torch.randn(point.T, point.B, point.width, **factory).requires_grad_(point.mode == "training")
    dy = torch.randn(point.T, point.B, point.H * point.directions, **factory)
    hx: Any = None
    if point.mode == "step":
        h, c = torch.randn(2, 1, point.B, point.H, **factory).unbind(0)
        hx = (h, c) if point.cell == "LSTM" else h

    if provider in ("cell", "loop"):
        loop = CellLoop(point.cell, point.width, point.H, **factory)
        loop.cell.load_state_dict({k.removesuffix("_l0"): v for k, v in reference.state_dict().items()})
        return Call(point, loop, _step(loop.cell, x, hx) if provider == "cell" else lambda: loop(x), x, dy)

    if provider == HALF:
        reference, dy = reference.half(), dy.half()
        x = x.detach().half().requires_grad_(x.requires_grad)
    if provider in (BASELINE, HALF):
        module = reference
    else:
        backend = None if provider == "auto" else provider
        module = getattr(fused_rnn, point.cell)(point.width, point.H, backend=backend, **options, **kwargs, **factory)
        module.load_state_dict(reference.state_dict())
    forward = variants.forward(point, module, x, hx, ours=provider not in (BASELINE, HALF))
    return Call(point, module, forward, x, variants.rows(point, dy))


def _step(cell: nn.Module, x: Tensor, hx: Any) -> Callable[[], Tensor]:
    """The bare call of a cell, with nothing around it that would count against it."""
    x_0 = x[0]
    if isinstance(hx, tuple):
        state = hx[0][0], hx[1][0]
        return lambda: cell(x_0, state)[0]
    h_0 = hx[0]
    return lambda: cell(x_0, h_0)


class _Operations(TorchDispatchMode):
    """The names of the operations that torch runs."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: set[str] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(str(function))
        return function(*args, **(kwargs or {}))


def kernels_of_torch(dtype: str) -> dict[str, str]:
    """Whose kernels torch.nn runs for each cell on a CPU, by what it does: oneDNN's for a whole layer, or its own."""
    found = {}
    for cell in CELLS:
        with _Operations() as seen:
            build(BASELINE, Point(cell, "inference", dtype, 2, 1, 8)).run()
        found[cell] = "oneDNN" if any("mkldnn_rnn_layer" in name for name in seen.names) else "ATen"
    return found
