"""A layer's two loops over time, by address: persistent where there is a plan, else a product and a launch a step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fused_rnn.call import wide
from fused_rnn.cuda import module, plans
from fused_rnn.gpu.directions import direction_bits
from fused_rnn.gpu.loops import Layer

CODES = {"lstm": 0, "gru": 1, "rnn_tanh": 2, "rnn_relu": 3}  # csrc/params.h's Cell


def _at(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


class Loops:
    """fused_rnn.gpu.loops.Loops. Nothing here reads a tensor or waits for the device: all of it can be captured."""

    def __init__(self, layer: Layer, x: Tensor, backward: bool) -> None:
        self.layer, self.kind = layer, plans.number_kind(x.dtype)
        self.plan = plans.choose(
            module.device_index(x.device), self.kind, backward, layer.cell.gates, layer.batch, layer.hidden,
            layer.recurrences,
        )  # fmt: skip
        bits, self.period = direction_bits(layer.directions)
        self.common = {
            "T": layer.steps, "B": layer.batch, "R": layer.recurrences, "H": layer.hidden, "reversed": bits,
            "period": self.period, "lengths": _at(layer.lengths), "reset": _at(layer.reset),
        }  # fmt: skip
        self.stream = torch.cuda.current_stream(x.device).cuda_stream if x.is_cuda else 0

    def _workspace(self, like: Tensor) -> Tensor:
        """What the members of teams share in global memory."""
        size = module.loaded().workspace_bytes(self.plan, self.kind, self.layer.recurrences)
        return torch.empty(size, dtype=torch.uint8, device=like.device)

    def _run(self, name: str, like: Tensor, given: dict[str, Any]) -> None:
        """A persistent loop."""
        workspace = self._workspace(like)
        code, run = CODES[self.layer.cell.name], getattr(module.loaded(), name)
        run(code, self.kind, self.plan, workspace.data_ptr(), self.stream, self.common | given)

    def _run_pointwise(self, name: str, given: dict[str, Any]) -> None:
        run = getattr(module.loaded(), f"pointwise_{name}")
        run(CODES[self.layer.cell.name], self.kind, self.stream, self.common | given)

    def forward(
        self,
        *,
        gx: Tensor,
        w: Tensor,
        bias: Tensor | None,
        h0: Tensor,
        carried: list[Tensor],
        y: Tensor,
        h_n: Tensor,
        saved: Tensor | None,
        histories: list[Tensor],
        checkpoints: list[Tensor],
        every: int,
    ) -> None:
        state, cells = carried[0] if carried else None, histories[0] if histories else None
        given = {
            "gx": gx.data_ptr(), "w": w.data_ptr(), "bias": _at(bias), "h0": h0.data_ptr(), "state": _at(state),
            "y": y.data_ptr(), "h_n": h_n.data_ptr(), "saved": _at(saved), "cells": _at(cells),
            "checkpoints": _at(checkpoints[0] if checkpoints else None), "every": every,
        }  # fmt: skip
        if self.plan is not None:
            self._run("forward", y, given)
            return
        layer = self.layer
        weights = w.view(layer.recurrences, -1, layer.hidden).transpose(1, 2)
        entering = h0.clone()
        product = gx.new_empty(layer.batch, layer.recurrences, weights.shape[2])
        given |= {"given": product.data_ptr(), "entering": entering.data_ptr()}
        for step in range(layer.steps):
            torch.bmm(entering, weights, out=product.transpose(0, 1))
            self._run_pointwise("forward", given | {"step0": step, "step1": step + 1})

    def replay(
        self,
        *,
        gx: Tensor,
        given: Tensor,
        bias: Tensor | None,
        h0: Tensor,
        hidden: Tensor,
        carried: list[Tensor],
        saved: Tensor,
        histories: list[Tensor],
        window: tuple[int, int],
    ) -> None:
        first, last = window
        state, cells = carried[0] if carried else None, histories[0] if histories else None
        if state is None:  # GRU's gates do not depend on it
            state = torch.zeros(h0.shape, dtype=wide(h0.dtype), device=h0.device)
        self._run_pointwise("forward", {
            "gx": gx.data_ptr(), "given": given.data_ptr(), "bias": _at(bias), "h0": h0.data_ptr(),
            "state": state.data_ptr(), "saved": saved.data_ptr(), "cells": _at(cells), "cells_are_wide": 1,
            "step0": first, "step1": last, "window0": first, "window1": last,
        })  # fmt: skip

    def backward(
        self,
        *,
        dy: Tensor | None,
        w: Tensor,
        states: list[Tensor],
        first: list[Tensor],
        saved: Tensor | None,
        dgates: Tensor,
        dstates: list[Tensor],
        window: tuple[int, int] | None = None,
    ) -> None:
        read, entering, dh, dc = states[-1], first[-1], dstates[0], dstates[1] if len(dstates) > 1 else None
        begin, last = window or (0, self.layer.steps)
        given = {
            "dy": _at(dy), "w": w.data_ptr(), "states": read.data_ptr(), "first_state": entering.data_ptr(),
            "saved": _at(saved), "dgates": dgates.data_ptr(), "dh": dh.data_ptr(), "dc": _at(dc),
            "states_are_wide": int(read.dtype != w.dtype), "window0": begin, "window1": last,
        }  # fmt: skip
        if self.plan is not None:
            self._run("backward", w, given | {"step0": begin, "step1": last, "close": int(begin == 0)})
            return
        product = w.new_empty(self.layer.recurrences, self.layer.batch, self.layer.hidden)
        for step in range(last - 1, begin - 1, -1):
            self._to_the_step_before(dgates, w, step + 1, product)
            product_of = {"given": product.data_ptr() if step + 1 < self.layer.steps else 0}
            self._run_pointwise("backward", given | product_of | {"step0": step, "step1": step + 1})
        if begin == 0:
            self._to_the_step_before(dgates, w, 0, product)
            self._run_pointwise("backward", given | {"given": product.data_ptr(), "step0": 0, "step1": 0, "close": 1})

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
