"""Who runs a point: torch.nn, a loop over torch's cell, or fused_rnn with one of its backends.

Every provider of a point computes the same thing from the same weights, input, state and output gradient. For bf16 on a
GPU torch.nn in float16 is one more: cuDNN has kernels for it that it lacks for bf16, and torch copies the weights of a
bf16 module in each call.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import fused_rnn
from fused_rnn.commands.bench import variants
from fused_rnn.commands.bench.grid import DTYPES, SEQUENCES, Point

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
}
OTHERS = tuple(TITLES)  # every other provider is one of our backends, run alone


def baseline(point: Point) -> str:
    """The provider that a point's results are compared with."""
    return STEP_BASELINE if point.mode in ("step", "stream") else BASELINE


def ways_in_torch(point: Point) -> tuple[str, ...]:
    """The providers of which the faster is what a point's speed-ups are counted against."""
    return (baseline(point), HALF) if point.dtype == "bf16" and point.mode in SEQUENCES else (baseline(point),)


class Call:
    """One provider at one point: `prepare()` is outside the clock, `run()` inside it.

    results: after `run()`, the tensors by which two providers are compared: outputs, then in training the
    gradients of the input and of every parameter.
    """

    def __init__(self, point: Point, module: nn.Module, forward: Callable[[], Tensor], x: Tensor, dy: Tensor) -> None:
        self.point, self.training = point, point.mode == "training"
        self.module, self.forward, self.x, self.dy = module, forward, x, dy
        self.module.train(self.training)  # else cuDNN keeps what a backward would want
        self.parameters = list(module.parameters())
        self.y: Tensor | None = None

    def prepare(self) -> None:
        """Drop the last results and, in training, write the weights as an optimiser would.

        Without the write a backend could keep weights packed from one iteration to the next, which no training run
        allows. The factor is one, so every provider keeps computing the same thing.
        """
        self.y = None
        if self.training:
            self.x.grad = None
            for parameter in self.parameters:
                parameter.grad = None
            with torch.no_grad():
                for parameter in self.parameters:
                    parameter.mul_(1)

    def run(self) -> None:
        if self.training:
            self.y = self.forward()
            self.y.backward(self.dy)
        else:
            with torch.no_grad():
                self.y = self.forward()

    def results(self) -> list[Tensor]:
        assert self.y is not None
        gradients = [self.x.grad, *(parameter.grad for parameter in self.parameters)] if self.training else []
        return [self.y.detach(), *(gradient for gradient in gradients if gradient is not None)]


class GraphCall(Call):
    """A call without gradient as a CUDA graph: captured when it first runs, replayed from then on."""

    def __init__(self, call: Call) -> None:
        super().__init__(call.point, call.module, call.forward, call.x, call.dy)
        self.graph: torch.cuda.CUDAGraph | None = None

    def prepare(self) -> None:
        """Nothing: the outputs are the graph's own."""

    def run(self) -> None:
        if self.graph is None:
            self._capture()
        assert self.graph is not None
        self.graph.replay()

    @torch.no_grad()
    def _capture(self) -> None:
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(3):  # what is done once, by us and by cuDNN, is done before
                self.forward()
        torch.cuda.current_stream().wait_stream(aside)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.y = self.forward()


class CellLoop(nn.Module):
    """What people write when a fused layer will not do: a Python loop over `torch.nn.<Kind>Cell`."""

    def __init__(self, kind: str, width: int, size: int, **factory: Any) -> None:
        super().__init__()
        self.cell = getattr(nn, kind + "Cell")(width, size, **factory)

    def forward(self, x: Tensor) -> Tensor:
        outputs, hx = [], None
        for x_t in x.unbind(0):
            hx = self.cell(x_t, hx)
            outputs.append(hx[0] if isinstance(hx, tuple) else hx)
        return torch.stack(outputs)


def supports(provider: str, point: Point) -> str | None:
    """None, or why this provider does not run this point."""
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
