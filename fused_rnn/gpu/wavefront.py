"""A stack of layers as a wavefront: a layer is at one chunk of time while the layer above is at the chunk before.

A recurrence of one direction leaves most of a GPU idle. Layer l can begin as soon as layer l - 1 has the first of its
steps, and in backward the other way round: so every layer has a lane of its own, on which it goes through the chunks,
and waits at each for the layer that it reads. The loops and the products are those of single layers, over fewer steps.

Memory. All that lanes share is allocated by the caller's lane before they begin, and held until they have joined it.
What a lane allocates itself nobody else touches. So an allocator that hands memory on in the order of one lane gives
none to another lane's reader.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from math import gcd
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from fused_rnn.call import BackwardCall, LayerCall, StackCall
from fused_rnn.gpu import op
from fused_rnn.gpu.loops import Layer
from fused_rnn.gpu.run import Backward, Forward
from fused_rnn.gpu.weights import aligned
from fused_rnn.problem import Problem

Window = tuple[int, int]


class Lanes(Protocol):
    """Sequences of work side by side. Lane 0 is the caller's own, on which all else of his runs."""

    def on(self, lane: int) -> AbstractContextManager[Any]:
        """What is asked for within it is this lane's work."""

    def record(self, lane: int) -> Any:
        """The point that a lane's work has come to."""

    def wait(self, lane: int, point: Any) -> None:
        """What this lane does next waits for another one's point."""


class OneThread:
    """Lanes where work is done as it is asked for: on a CPU."""

    def on(self, lane: int) -> AbstractContextManager[None]:
        return nullcontext()

    def record(self, lane: int) -> None:
        pass

    def wait(self, lane: int, point: None) -> None:
        pass


def windows_of(steps: int, chunks: int, step_bytes: int) -> list[Window]:
    """Windows of equal length, but for the last, at most as many as asked for. They begin where 16 divides an address,
    as loops want it. step_bytes: of the least that one step of any array takes."""
    least = 16 // gcd(16, step_bytes)
    length = -(-steps // (chunks * least)) * least
    return [(first, min(first + length, steps)) for first in range(0, steps, length)]


def schedule(lanes: Lanes, rows: int, chunks: int, work: Callable[[int, int], None]) -> None:
    """work(row, chunk) for all of them, a lane for each row. It may read what the row before has made of this chunk,
    and what its own row has made of the chunks before.

    The first row's lane is the caller's, and each other row waits for the one before: so all that he has asked for so
    far comes before any of the work. All of it comes before what he asks for next, also where an error ends it.
    """
    points: list[Any] = [None] * rows  # which each row has come to
    try:
        for stage in range(rows + chunks - 1):
            # From the last row on: the row before has then been asked for no more than the chunk that is waited for.
            for row in reversed(range(max(0, stage - chunks + 1), min(rows, stage + 1))):
                with lanes.on(row):
                    if row > 0:
                        lanes.wait(row, points[row - 1])
                    work(row, stage - row)
                    points[row] = lanes.record(row)
    finally:
        for row in range(1, rows):
            lanes.wait(0, lanes.record(row))


class Kept(NamedTuple):
    """What backward reads of a stack's forward: of each layer, and of each that is not the first its dropout's mask."""

    inputs: Sequence[Tensor]
    hidden: Sequence[Tensor]
    saved: Sequence[Tensor]
    histories: Sequence[Sequence[Tensor]]
    masks: Sequence[Tensor]


class Pulled(NamedTuple):
    """Gradients of a layer: of its input if it was asked for, of the states given, of the weights or nothing."""

    dx: Tensor
    states: list[Tensor]
    weights: list[Tensor]


class Wavefront:
    """Stacks of a backend.

    make: its loops, as fused_rnn.gpu.op has them; they hold nothing between calls, for all layers share them.
    lanes: so many for a tensor's device.
    chunks: (x, the cell's name, H, L, whether backward) → in how many chunks of time a stack runs fastest, 1 for one
        layer after the other.
    """

    def __init__(
        self,
        make: op.Make,
        lanes: Callable[[Tensor, int], Lanes],
        chunks: Callable[[Tensor, str, int, int, bool], int],
    ) -> None:
        self._make, self._lanes, self._chunks = make, lanes, chunks

    def pays(self, problem: Problem, x: Tensor) -> bool:
        """Whether the layers are to run side by side: forward or, if there will be one, backward."""
        if 0 in x.shape:
            return False
        sizes = (x, problem.cell, problem.hidden_size, problem.layers)
        return any(self._chunks(*sizes, backward) > 1 for backward in (False, True)[: 1 + problem.needs_grad])

    def _windows(self, call: StackCall, layer: Layer, layers: int, backward: bool) -> list[Window]:
        """layers: that run. One alone has nobody to run beside."""
        chunks = 1 if layers == 1 else self._chunks(call.x, call.cell, layer.hidden, layers, backward)
        return windows_of(layer.steps, chunks, layer.batch * layer.hidden * call.x.itemsize)

    def forward(self, call: StackCall) -> tuple[list[list[Tensor]], list[Tensor], list[Tensor]]:
        """Of each layer the outputs of its forward op; with dropout, of each but the first its input and its mask."""
        with op.on(call.x):
            x, layers, inputs, masks = call.x.contiguous(), list[Forward](), list[Tensor](), list[Tensor]()
            for place in range(len(call.weights)):
                if place > 0:
                    x = layers[-1].y
                    if call.dropout > 0:
                        masks.append(torch.native_dropout(x, call.dropout, True)[1])  # of whatever is there
                        inputs.append(x := torch.empty_like(x))
                own = call.layer(place, x)
                layer, weights = op.layer_of(own if not layers else _unmasked(own))
                if place == 0:
                    shared, windows = layer, self._windows(call, layer, len(call.weights), False)
                layers.append(Forward(shared, own, weights, windows))
            loops = [self._make(_part(shared, *window), x, False) for window in windows]

            def work(row: int, chunk: int) -> None:
                first, last = windows[chunk]
                if row > 0 and masks:
                    _dropped(layers[row - 1].y, masks[row - 1], call.scale, inputs[row - 1], first, last)
                layers[row].run(loops[chunk], first, last)

            schedule(self._lanes(x, len(layers)), len(layers), len(windows), work)
            return [layer.outputs() for layer in layers], inputs, masks

    def backward(
        self,
        call: StackCall,
        kept: Kept,
        dy: Tensor | None,
        dstates: Sequence[Sequence[Tensor]],
        first: int,
        need_dx: bool,
        need_dw: Sequence[bool],
    ) -> list[Pulled]:
        """Gradients of the layers from the last of dstates down to `first`, in this order.

        dy: of the last one's output.  dstates: of the states after, of each layer from 0 on, () for zero.
        need_dx: of layer `first`.  need_dw: whether each layer's weights want theirs.
        """
        with op.on(call.x):
            layers = list[Backward]()
            for place in reversed(range(first, len(dstates))):
                own, x = call.layer(place, kept.inputs[place]), kept.inputs[place].contiguous()
                layer, weights = op.layer_of(own if not layers else _unmasked(own))
                if not layers:
                    shared, windows = layer, self._windows(call, layer, len(dstates) - first, True)[::-1]
                wants = BackwardCall(
                    dy, dstates[place], x, *own[1:5], kept.hidden[place], aligned(kept.saved[place]),
                    [aligned(history) for history in kept.histories[place]], *own[5:8], place > first or need_dx,
                    need_dw[place],
                )  # fmt: skip
                layers.append(Backward(shared, wants, weights, windows))
                dy = layers[-1].dx
            loops = self._make(shared, call.x, True)

            def work(row: int, chunk: int) -> None:
                window = windows[chunk]
                layers[row].run(loops, *window)
                if row + 1 < len(layers) and kept.masks:
                    dx = layers[row].dx
                    _dropped(dx, kept.masks[len(dstates) - 2 - row], call.scale, dx, *window)

            schedule(self._lanes(call.x, len(layers)), len(layers), len(windows), work)
            pulled = [layer.outputs() for layer in layers]
        given = len(call.states[0])
        return [Pulled(dx, grads[:given], grads[given:]) for dx, *grads in pulled]


def _unmasked(call: LayerCall) -> LayerCall:
    """All layers have the masks of the first that is looked at: they are checked, and turned into integers, once."""
    return call._replace(lengths=None, reset=None)


def _dropped(x: Tensor, mask: Tensor, scale: float, out: Tensor, first: int, last: int) -> None:
    """Dropout of steps first .. last - 1, or its gradient."""
    torch.mul(x[first:last], mask[first:last], out=out[first:last]).mul_(scale)


def _part(layer: Layer, first: int, last: int) -> Layer:
    """Steps first .. last - 1 as a layer by itself."""
    lengths = None if layer.lengths is None else (layer.lengths - first).clamp_(0, last - first)
    reset = None if layer.reset is None else aligned(layer.reset[first:last])
    return replace(layer, steps=last - first, lengths=lengths, reset=reset)
