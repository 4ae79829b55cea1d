"""A layer's two loops over time, by address: persistent where there is a plan, else a product and a launch a step.
Without W_hh a launch for all steps, or chunks of them side by side."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from fused_rnn import ops
from fused_rnn.call import wide
from fused_rnn.cells import Cell
from fused_rnn.cuda import module, plans, programs, scan, stepwise
from fused_rnn.flex.scan import scan_of
from fused_rnn.gpu.directions import direction_bits
from fused_rnn.gpu.loops import Layer
from fused_rnn.gpu.narrow import Narrow, widened

# a, b and out of a product before each step, and the direction in which a is over time; 0 where it is over none.
_Product = tuple[Tensor, Tensor, Tensor, int]


def _at(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _each(tensors: Iterable[Tensor]) -> list[int]:
    return [tensor.data_ptr() for tensor in tensors]


class Loops:
    """fused_rnn.gpu.loops.Loops. Nothing here reads a tensor or waits for the device: all of it can be captured.

    narrow: what the W_hh that `forward` is given are kept in, where it is not x's dtype.
    """

    def __init__(self, layer: Layer, x: Tensor, backward: bool, narrow: Narrow | None = None) -> None:
        self.layer, self.precision, self.module = layer, plans.precision(x.dtype), module.loaded()
        self.device, self.dtype = module.device_index(x.device), x.dtype
        self.sizes = (self.precision, backward, layer.cell.gates, layer.batch, layer.hidden, layer.recurrences)
        self.narrow = narrow
        self.plan, self.loaded = programs.planned(
            layer.cell, self.device, self.sizes, narrow=None if narrow is None else narrow.kind
        )
        bits, self.period = direction_bits(layer.directions)
        self.steps = self.module.Steps(
            T=layer.steps, B=layer.batch, R=layer.recurrences, H=layer.hidden, reversed=bits, period=self.period,
            lengths=_at(layer.lengths), reset=_at(layer.reset),
        )  # fmt: skip
        self.on_gpu = x.is_cuda

    @property
    def stream(self) -> int:
        """The current one, on which torch's products run as well; layers that run side by side share these loops."""
        return torch.cuda.current_stream(self.device).cuda_stream if self.on_gpu else 0

    def _bind(
        self, loop: str, given: dict[str, Any], plan: Any = None, loaded: int = 0, cell: Cell | None = None
    ) -> Any:
        """The module's Forward or Backward with its arrays; without a plan it is told the products."""
        cell = cell or self.layer.cell
        if plan is None:
            loaded = programs.pointwise(cell, loop, self.dtype, self.device)
        name = "" if loaded else cell.name  # of what the module itself has
        return getattr(self.module, loop)(name, self.precision, plan, self.steps, **given, loaded=loaded)

    @property
    def _chunk(self) -> int:
        """How many steps a chunk of time has; all of them where there are no chunks."""
        layer = self.layer
        units = layer.recurrences * layer.batch * layer.hidden
        return plans.chunk_of_time(layer.cell, self.device, layer.steps, units)

    @staticmethod
    def _beside(matrices: Tensor | None, masks: Sequence[Tensor]) -> dict[str, Any]:
        return {"matrices": _at(matrices), "masks": _each(masks), "times": [mask.shape[1] for mask in masks]}

    def _run(self, loop: Any, like: Tensor) -> None:
        """A persistent loop. Its teams share in global memory what is in the workspace."""
        workspace = torch.empty(loop.workspace_bytes, dtype=torch.uint8, device=like.device)
        loop.run(workspace.data_ptr(), self.stream)

    def forward(
        self,
        *,
        gx: Tensor,
        w: Tensor | None,
        bias: Tensor | None,
        params: Tensor | None,
        h0: Tensor,
        carried: list[Tensor],
        y: Tensor,
        h_n: Tensor,
        saved: Tensor | None,
        histories: list[Tensor],
        checkpoints: list[Tensor],
        every: int,
        matrices: Tensor | None = None,
        masks: Sequence[Tensor] = (),
    ) -> None:
        scale = None if self.narrow is None else self.narrow.scale
        given = {
            "gx": gx.data_ptr(), "w": _at(w), "scale": _at(scale), "bias": _at(bias), "params": _at(params),
            "h0": h0.data_ptr(), "carried": _each(carried), "y": y.data_ptr(), "h_n": h_n.data_ptr(),
            "saved": _at(saved), "histories": _each(histories), "checkpoints": _each(checkpoints), "every": every,
            **self._beside(matrices, masks),
        }  # fmt: skip
        if self.plan is not None:
            self._run(self._bind("Forward", given, self.plan, self.loaded), y)
            return
        layer = self.layer
        if layer.cell.staged:
            self._forward_by_stages(given, w, h0, gx, matrices)
            return
        if w is None:  # a unit's thread runs all of its steps
            if (chunk := self._chunk) < layer.steps:
                self._forward_in_chunks(given, carried, chunk)
            else:
                self._bind("Forward", given).run(0, self.stream)
            return
        if self.narrow is not None:
            w = widened(w, scale, gx.dtype)
        weights = w.view(layer.recurrences, -1, layer.hidden).transpose(1, 2)
        entering = h0.clone()
        product = gx.new_empty(layer.batch, layer.recurrences, weights.shape[2])
        given |= {"given": product.data_ptr(), "entering": entering.data_ptr()}
        self._run_steps(
            self._bind("Forward", given), [(entering, weights, product.transpose(0, 1), 0)], 0, layer.steps - 1
        )

    def replay(
        self,
        *,
        gx: Tensor,
        given: Tensor | None,
        bias: Tensor | None,
        params: Tensor | None,
        h0: Tensor,
        hidden: Tensor,
        carried: list[Tensor],
        saved: Tensor,
        histories: list[Tensor],
        window: tuple[int, int],
        matrices: Tensor | None = None,
        masks: Sequence[Tensor] = (),
    ) -> None:
        # Of h there is but the hidden one, from which the loop takes what it carries.
        h = [torch.empty(h0.shape, dtype=wide(h0.dtype), device=h0.device)] * self.layer.cell.reads_h
        told = {
            "window": window, "gx": gx.data_ptr(), "given": _at(given), "bias": _at(bias), "params": _at(params),
            "h0": h0.data_ptr(), "hidden": hidden.data_ptr(), "carried": _each([*h, *carried]),
            "saved": saved.data_ptr(), "histories": _each(histories), "wide": True,
            **self._beside(matrices, masks),
        }  # fmt: skip
        if not self.layer.cell.staged:
            self._bind("Forward", told).run(0, self.stream)
            return
        sizes = (self.precision, 0, *self.sizes[2:])  # forward's team, without weights
        plan, loaded = programs.planned(self.layer.cell, self.device, sizes)
        if plan is not None:
            self._run(self._bind("Forward", told, plan, loaded), gx)
            return
        steps = self._steps(False, h0, matrices)
        loop = self._bind("Forward", told | {"crossing": steps.crossing.data_ptr()})
        for step in range(*window):
            steps.run(loop, step)

    def backward(
        self,
        *,
        dy: Tensor | None,
        dsequences: list[Tensor],
        w: Tensor | None,
        params: Tensor | None,
        states: list[Tensor],
        first: list[Tensor],
        saved: Tensor | None,
        dgates: Tensor,
        dstates: list[Tensor],
        dparams: Tensor | None,
        window: tuple[int, int] | None = None,
        matrices: Tensor | None = None,
        masks: Sequence[Tensor] = (),
    ) -> None:
        layer = self.layer
        begin, end = window = window or (0, layer.steps)
        given = {
            "window": window, "dy": _at(dy), "dsequences": _each(dsequences), "w": _at(w), "params": _at(params),
            "states": _each(states), "first": _each(first), "saved": _at(saved), "dgates": dgates.data_ptr(),
            "dstates": _each(dstates), "dparams": _at(dparams), "wide": states[-1].dtype != states[0].dtype,
            **self._beside(matrices, masks),
        }  # fmt: skip
        plan, loaded = self.plan, self.loaded
        if plan is not None and dsequences:  # a built-in cell's persistent kernels have no registers for them
            plan, loaded = programs.planned(layer.cell, self.device, self.sizes, sequences=True)
        if plan is not None:
            self._run(self._bind("Backward", given, plan, loaded), dgates)
            return
        if layer.cell.staged:
            self._backward_by_stages(given, w, dstates[0], dgates, window, matrices)
            return
        if w is None:
            if window == (0, layer.steps) and (chunk := self._chunk) < layer.steps:
                self._backward_in_chunks(given, dstates, dparams, chunk)
            else:
                self._bind("Backward", given).run(0, self.stream)
            return
        product, products = self._gradient_products(w, dgates)
        loop = self._bind("Backward", given | {"given": product.data_ptr()})
        self._run_steps(loop, products, end - 1, begin if begin > 0 else -1)

    def _run_steps(self, loop: Any, products: Sequence[_Product], first: int, last: int) -> None:
        """A step at a time. products: before each of them, as the op has them."""
        a, b, out, directions = zip(*products, strict=True)
        ops.run_steps(a, b, out, directions, first, last, *loop.stepper, self.stream)

    def _steps(self, backward: bool, like: Tensor, matrices: Tensor | None) -> stepwise.Steps:
        like = like.new_empty(like.shape, dtype=wide(self.dtype))
        return stepwise.Steps(self.layer.cell.name, backward, like, matrices, self.stream)

    def _forward_by_stages(
        self, given: dict[str, Any], w: Tensor | None, h0: Tensor, gx: Tensor, matrices: Tensor | None
    ) -> None:
        layer, steps = self.layer, self._steps(False, h0, matrices)
        given["crossing"] = steps.crossing.data_ptr()
        if w is not None:
            weights = w.view(layer.recurrences, -1, layer.hidden).transpose(1, 2)
            entering, product = h0.clone(), gx.new_empty(layer.batch, layer.recurrences, weights.shape[2])
            given |= {"given": product.data_ptr(), "entering": entering.data_ptr()}
        loop = self._bind("Forward", given)
        for step in range(layer.steps):
            if w is not None:
                torch.bmm(entering, weights, out=product.transpose(0, 1))
            steps.run(loop, step)

    def _backward_by_stages(
        self,
        given: dict[str, Any],
        w: Tensor | None,
        like: Tensor,
        dgates: Tensor,
        window: tuple[int, int],
        matrices: Tensor | None,
    ) -> None:
        (begin, end), steps, products = window, self._steps(True, like, matrices), list[_Product]()
        given["crossing"] = steps.crossing.data_ptr()
        if w is not None:
            product, products = self._gradient_products(w, dgates)
            given["given"] = product.data_ptr()
        loop = self._bind("Backward", given)
        for step in range(end - 1, begin - 1 - (w is not None and begin == 0), -1):
            for side, weights, out, way in products if step + 1 < self.layer.steps else ():
                t = step + 1 if way > 0 else self.layer.steps - 2 - step
                torch.bmm(side[t], weights, out=out)
            steps.run(loop, step)

    def _gradient_products(self, w: Tensor, dgates: Tensor) -> tuple[Tensor, list[_Product]]:
        """Each step's recurrent side [R, B, G·H] times W_hh, and where the product goes, [R, B, H]; recurrences that
        are at the same time go together."""
        layer = self.layer
        product = w.new_empty(layer.recurrences, layer.batch, layer.hidden)
        weights, apart, gates = w.view(layer.recurrences, -1, layer.hidden), layer.cell.apart, layer.cell.gates
        sides = dgates[..., apart : apart + gates, :].flatten(3).transpose(1, 2)
        each = [slice(i, None, self.period) for i in range(self.period)]
        return product, [
            (sides[:, own], weights[own], product[own], way) for own, way in zip(each, layer.directions, strict=False)
        ]

    def _forward_in_chunks(self, given: dict[str, Any], carried: list[Tensor], chunk: int) -> None:
        """The loop in chunks of so many steps: what each makes of no state, what enters each, and then the loop."""
        steps, summary, count = self.layer.steps, scan.summary_of(self.layer.cell.name), len(carried)
        made = _chunks(carried, count, -(-steps // chunk))
        told = {name: given[name] for name in ("gx", "params", "h0")}
        told |= {"carried": _each(made), "chunks": (0, (made.shape[1] - 1) * chunk, chunk)}
        self._bind("Forward", told, cell=summary).run(0, self.stream)
        self._join(made, carried, False)
        told = {"carried": _each(made[:count]), "chunks": (0, steps, chunk)}
        self._bind("Forward", given | told).run(0, self.stream)
        torch._foreach_copy_(carried, list(made[:count, -1]))

    def _backward_in_chunks(
        self, given: dict[str, Any], dstates: list[Tensor], dparams: Tensor | None, chunk: int
    ) -> None:
        """Likewise from the last chunk back."""
        layer, summary, count = self.layer, scan.summary_of(self.layer.cell.name), len(dstates)
        own = layer.cell.carried
        made = _chunks(dstates, own, -(-layer.steps // chunk))
        given["last"] = dstates[0].data_ptr()
        told = {"dgates": 0, "dparams": 0, "dstates": _each(made[:, 1:]), "chunks": (chunk, layer.steps, chunk)}
        self._bind("Backward", given | told, cell=summary).run(0, self.stream)
        self._join(made[count - own :], dstates[count - own :], True)
        parts = None if dparams is None else dparams.new_zeros(made.shape[1], *dparams.shape)
        told = {"dparams": _at(parts), "dstates": _each(made[:count]), "chunks": (0, layer.steps, chunk)}
        self._bind("Backward", given | told).run(0, self.stream)
        torch._foreach_copy_(dstates, list(made[:count, 0]))
        if dparams is not None and parts is not None:
            dparams += parts.sum(0)

    def _join(self, made: Tensor, initial: list[Tensor], backward: bool) -> None:
        """What enters each chunk, in the place of what it made of no state. made: of the states that are handed on
        that, then their factors, then what no reset has cut."""
        count, found = len(initial), scan_of(self.layer.cell.name)
        assert found is not None
        forgets = sum(1 << i for i, known in enumerate(found.forgets(backward)[-count:]) if known)
        self.module.join(
            sums=_each(made[:count]), factors=_each(made[count : 2 * count]), uncut=made[-1].data_ptr(),
            initial=_each(initial), size=initial[0].numel(), chunks=made.shape[1], backward=backward, forgets=forgets,
            is_double=made.dtype == torch.float64, stream=self.stream,
        )  # fmt: skip


def _chunks(states: list[Tensor], own: int, chunks: int) -> Tensor:
    """[states + own + 1, chunks, R, B, H]: zeros for the states, then ones."""
    made = states[0].new_zeros(len(states) + own + 1, chunks, *states[0].shape)
    made[len(states) :] = 1
    return made
