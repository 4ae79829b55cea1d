"""A provider's call at a point, as the clock knows it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fused_rnn.commands.bench.grid import Point


class Call:
    """One provider at one point: `prepare()` is outside the clock, `run()` inside it.

    results: after `run()`, the tensors by which two providers are compared: outputs, then in training the
    gradients of the input and of every parameter.
    compile_s: what it took once, before the first result, for those who compile.
    """

    compile_s: float | None = None

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
