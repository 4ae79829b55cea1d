"""A layer's two loops over time, by address: persistent where there is a plan, else a product and a launch a step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fused_rnn.cuda import module, plans
from fused_rnn.gpu.directions import direction_bits
from fused_rnn.gpu.loops import Layer, wide

CODES = {"lstm": 0, "gru": 1, "rnn_tanh": 2, "rnn_relu": 3}  # csrc/params.h's Cell


def _at(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


class Loops:
    """fused_rnn.gpu.loops.Loops. Nothing here reads a tensor or waits for the device: all of it can be captured."""

    def __init__(self, layer: Layer, x: Tensor, backward: bool) -> None:
        self.layer, self.kind, self.module = layer, plans.number_kind(x.dtype), module.loaded()
        self.plan = plans.choose(
            module.device_index(x.device), self.kind, backward, layer.cell.gates, layer.batch, layer.hidden,
            layer.recurrences,
        )  # fmt: skip
        bits, self.period = direction_bits(layer.directions)
        self.steps = self.module.Steps(
            T=layer.steps, B=layer.batch, R=layer.recurrences, H=layer.hidden, reversed=bits, period=self.period,
            lengths=_at(layer.lengths), reset=_at(layer.reset),
        )  # fmt: skip
        self.stream = torch.cuda.current_stream(x.device).cuda_stream if x.is_cuda else 0

    def _forward(self, plan: Any, **given: Any) -> Any:
        return self.module.Forward(self.layer.cell.name, self.kind, plan, self.steps, **given)

    def _backward(self, plan: Any, **given: Any) -> Any:
        return self.module.Backward(self.layer.cell.name, self.kind, plan, self.steps, **given)

    def _run(self, loop: Any, like: Tensor) -> None:
        """A persistent loop. Its teams share in global memory what is in the workspace."""
        workspace = torch.empty(loop.workspace_bytes, dtype=torch.uint8, device=like.device)
        loop.run(workspace.data_ptr(), self.stream)

    def forward(
        self,
        *,
        gx: Tensor,
        w: Tensor,
        bias: Tensor | None,
        h0: Tensor,
        state: Tensor | None,
        y: Tensor,
        h_n: Tensor,
        saved: Tensor | None,
        cells: Tensor | None,
        checkpoints: Tensor | None,
        every: int,
    ) -> None:
        given = {
            "gx": gx.data_ptr(), "w": w.data_ptr(), "bias": _at(bias), "h0": h0.data_ptr(), "carried": [_at(state)],
            "y": y.data_ptr(), "h_n": h_n.data_ptr(), "saved": _at(saved), "histories": [_at(cells)],
            "checkpoints": [_at(checkpoints)], "every": every,
        }  # fmt: skip
        if self.plan is not None:
            self._run(self._forward(self.plan, **given), y)
            return
        layer = self.layer
        weights = w.view(layer.recurrences, -1, layer.hidden).transpose(1, 2)
        entering = h0.clone()
        product = gx.new_empty(layer.batch, layer.recurrences, weights.shape[2])
        loop, turned = (
            self._forward(None, given=product.data_ptr(), entering=entering.data_ptr(), **given),
            product.transpose(0, 1),
        )
        for step in range(layer.steps):
            torch.bmm(entering, weights, out=turned)
            loop.run_step(step, self.stream)

    def replay(
        self,
        *,
        gx: Tensor,
        given: Tensor,
        bias: Tensor | None,
        h0: Tensor,
        hidden: Tensor,
        state: Tensor | None,
        saved: Tensor,
        cells: Tensor | None,
        window: tuple[int, int],
    ) -> None:
        if state is None:  # GRU's gates do not depend on it
            state = torch.zeros(h0.shape, dtype=wide(h0.dtype), device=h0.device)
        self._forward(
            None, window=window, gx=gx.data_ptr(), given=given.data_ptr(), bias=_at(bias), h0=h0.data_ptr(),
            carried=[state.data_ptr()], saved=saved.data_ptr(), histories=[_at(cells)], wide=True,
        ).run(0, self.stream)  # fmt: skip

    def backward(
        self,
        *,
        dy: Tensor | None,
        w: Tensor,
        states: Tensor,
        first_state: Tensor,
        saved: Tensor | None,
        dgates: Tensor,
        dh: Tensor,
        dc: Tensor | None,
        window: tuple[int, int] | None = None,
    ) -> None:
        layer = self.layer
        first, last = window = window or (0, layer.steps)
        pad = [0] * layer.cell.has_c
        given = {
            "window": window, "dy": _at(dy), "w": w.data_ptr(), "states": [*pad, states.data_ptr()],
            "first": [*pad, first_state.data_ptr()], "saved": _at(saved), "dgates": dgates.data_ptr(),
            "dstates": [dh.data_ptr(), _at(dc)], "wide": states.dtype != w.dtype,
        }  # fmt: skip
        if self.plan is not None:
            self._run(self._backward(self.plan, **given), w)
            return
        product = w.new_empty(layer.recurrences, layer.batch, layer.hidden)
        loop = self._backward(None, given=product.data_ptr(), **given)
        for step in range(last - 1, first - 1, -1):
            self._to_the_step_before(dgates, w, step + 1, product)
            loop.run_step(step, self.stream)
        if first == 0:
            self._to_the_step_before(dgates, w, 0, product)
            loop.close(self.stream)

    def _to_the_step_before(self, dgates: Tensor, w: Tensor, step: int, product: Tensor) -> None:
        """product [R, B, H] = the recurrent side of a step's dgates times W_hh."""
        layer = self.layer
        if step == layer.steps:
            return
        weights = w.view(layer.recurrences, -1, layer.hidden)
        for i in range(self.period):  # recurrences that are at the same time
            time = step if layer.directions[i] > 0 else layer.steps - 1 - step
            side = dgates[time, :, i :: self.period, layer.cell.gradients - layer.cell.gates :]
            torch.bmm(side.flatten(2).transpose(0, 1), weights[i :: self.period], out=product[i :: self.period])
