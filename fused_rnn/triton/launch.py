"""The two loops of a layer: from tensors and a schedule to their kernels' arguments, whole or in chunks of time."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fused_rnn.gpu.loops import Layer
from fused_rnn.triton import planner
from fused_rnn.triton.backward import bwd_kernel
from fused_rnn.triton.compile import constants_backward, constants_forward, constants_scan
from fused_rnn.triton.forward import fwd_kernel
from fused_rnn.triton.launches import LaunchConfig, Launches, new_counters, new_shared, no_warnings
from fused_rnn.triton.scan import join_kernel, scan_bwd_kernel, scan_fwd_kernel


def _over_time(masks: Sequence[Tensor]) -> tuple[bool, ...]:
    return tuple(mask.shape[1] > 1 for mask in masks)


class Loops:
    """The two loops over time of one layer, for one call: fused_rnn.gpu.loops.Loops."""

    def __init__(self, layer: Layer, config: LaunchConfig) -> None:
        self.layer, self.config = layer, config
        self.counters: Tensor | None = None  # of backward, whose windows count on where the one before stopped

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
        shared = new_shared(self.layer, self.config.schedule, matrices, gx, False)
        tensors = (gx, None, w, bias, params, list(masks), shared, h0, carried, y, h_n, saved, histories, checkpoints)
        self._forward(self.config, (0, self.layer.steps), tensors, every)

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
        config = replace(self.config, schedule=self.config.again or planner.replay(self.layer.hidden))
        shared = new_shared(self.layer, config.schedule, matrices, gx, False)
        told = (gx, given, None, bias, params, list(masks), shared)
        tensors: Sequence[Any] = (*told, h0, carried, hidden, h0, saved, histories, [])
        self._forward(config, window, tensors, 1, replay=True)

    def _forward(
        self, config: LaunchConfig, window: tuple[int, int], tensors: Sequence[Any], every: int, replay: bool = False
    ) -> None:
        """The forward loop over a window of time. tensors: fwd_kernel's, in its order."""
        layer, (gx, *_, saved, _, checkpoints) = self.layer, tensors
        made = (saved is not None, bool(checkpoints), replay, _over_time(tensors[5]))
        constants = constants_forward(layer.cell, layer.hidden, gx.element_size(), *made)
        if not replay and (chunks := chunks_of(layer, config)) is not None:
            _forward_in_chunks(layer, config, constants, chunks, tensors, every)
            return
        launches = Launches(fwd_kernel, layer, config, constants, False)
        counters = new_counters(layer, config.schedule, gx.device)
        launches.run(tensors, counters, window, [(*steps, every) for steps in launches.ranges(*window)])

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
        layer, schedule, window = self.layer, self.config.schedule, window or (0, self.layer.steps)
        if self.counters is None:
            self.counters = new_counters(layer, schedule, dgates.device)
        given = (dy is not None, dparams is not None, _over_time(masks))
        constants = constants_backward(layer.cell, layer.hidden, dgates.element_size(), *given)
        shared = new_shared(layer, schedule, matrices, dgates, True)
        kept = (states, first, saved, dgates, dstates, dparams)
        tensors = (dy, dsequences, w, params, list(masks), shared, *kept)
        if window == (0, layer.steps) and (chunks := chunks_of(layer, self.config)) is not None:
            _backward_in_chunks(layer, self.config, constants, chunks, tensors)
            return
        launches = Launches(bwd_kernel, layer, self.config, constants, True)
        ranges = [(*steps, 0) for steps in launches.ranges(*window)][::-1]
        if (
            layer.cell.recurrent and window[0] == 0 and not schedule.registers
        ):  # the product of step 0, for the gradient of h0
            if schedule.loop != "stepwise" and self.config.target.arch != "interpreter":
                ranges[-1] = (*ranges[-1][:2], 1)
            else:
                ranges.append((0, 0, 1))
        launches.run(tensors, self.counters, window, ranges)


def chunks_of(layer: Layer, config: LaunchConfig) -> tuple[int, int] | None:
    """How many chunks of time run side by side, and of how many steps each; None for one loop over all of it."""
    sizes = (layer.steps, layer.batch, layer.recurrences)
    chunk = planner.chunk_of(layer.cell, config.schedule, config.target, *sizes)
    return None if chunk >= layer.steps else (-(-layer.steps // chunk), chunk)


def _forward_in_chunks(
    layer: Layer,
    config: LaunchConfig,
    constants: dict[str, Any],
    chunks: tuple[int, int],
    tensors: Sequence[Any],
    every: int,
) -> None:
    """The forward loop in chunks: what each makes of no state, what enters each, and then the loop itself."""
    gx, given, w, bias, params, masks, shared, h0, carried, *made = tensors
    count, chunk = chunks
    sums, products = _each_chunk(carried, count), _each_chunk(carried, count)
    window, counters = (0, layer.steps), new_counters(layer, config.schedule, gx.device)
    scan = constants_scan(layer.cell, False)
    launches = Launches(scan_fwd_kernel, layer, config, constants | scan, False, (count - 1, chunk))
    launches.run((gx, params, sums, products), counters, window, [(*window, every)])
    _join(sums, products, carried, False, config, scan["FORGETS"])
    launches = Launches(fwd_kernel, layer, config, constants | {"CHUNKED": True}, False, chunks)
    told = (gx, given, w, bias, params, masks, shared, h0, sums, *made)
    launches.run(told, counters, window, [(*window, every)])
    for state, each in zip(carried, sums, strict=True):
        state.copy_(each[-1])


def _backward_in_chunks(
    layer: Layer, config: LaunchConfig, constants: dict[str, Any], chunks: tuple[int, int], tensors: Sequence[Any]
) -> None:
    """The backward loop in chunks, from the last one back."""
    dy, dsequences, _, params, _, _, states, first, saved, dgates, dstates, dparams = tensors
    count, chunk = chunks
    sums, products = _each_chunk(dstates, count), _each_chunk(dstates, count)
    window, counters = (0, layer.steps), new_counters(layer, config.schedule, dgates.device)
    entering = sums[0]
    if not layer.cell.reads_h:
        entering = _at_the_end(layer, dstates[0], chunk, count)
    scan = constants_scan(layer.cell, True)
    launches = Launches(scan_bwd_kernel, layer, config, constants | scan, True, (count - 1, chunk))
    given = (dy, dsequences, params, states, first, saved, entering, sums, products)
    launches.run(given, counters, window, [(*window, 0)])
    _join(sums, products, dstates, True, config, scan["FORGETS"])
    if not layer.cell.reads_h:
        sums[0] = entering
    parts = None if dparams is None else dparams.new_zeros(count, *dparams.shape)
    launches = Launches(bwd_kernel, layer, config, constants | {"CHUNKED": True}, True, chunks)
    launches.run((*tensors[:10], sums, parts), counters, window, [(*window, 0)])
    for state, each in zip(dstates, sums, strict=True):
        state.copy_(each[0])
    if dparams is not None and parts is not None:
        dparams += parts.sum(0)


def _each_chunk(states: list[Tensor], chunks: int) -> list[Tensor]:
    return [state.new_empty(chunks, *state.shape) for state in states]


def _at_the_end(layer: Layer, dh: Tensor, chunk: int, chunks: int) -> Tensor:
    """[chunks, R, B, H]: the gradient of the last h, which no step hands on, for the chunk that has a sequence's last
    step, and those behind it, which it passes through; zeros for the others."""
    entering = dh.new_zeros(chunks, *dh.shape)
    if layer.lengths is None:
        entering[-1] = dh
        return entering
    lengths = layer.lengths
    every = [lengths if d > 0 else layer.steps * (lengths > 0) for d in layer.directions]  # steps up to the last one
    ends = torch.arange(1, chunks + 1, device=dh.device) * chunk
    behind = torch.stack(every) <= ends.view(-1, 1, 1)
    behind[-1] = True
    return entering.where(~behind.unsqueeze(-1), dh)


def _join(
    sums: list[Tensor],
    products: list[Tensor],
    initial: list[Tensor],
    backward: bool,
    config: LaunchConfig,
    forgets: tuple[bool, ...],
) -> None:
    """What enters each chunk, in the place of sums."""
    size, chunks, block = initial[0].numel(), sums[0].shape[0], 512
    interpreted = config.target.arch == "interpreter"
    options = {} if interpreted else {"enable_fp_fusion": True}  # Triton 3.9 warns of who does not say it
    with no_warnings() if interpreted else nullcontext():
        join_kernel[(-(-size // block),)](
            tuple(sums),
            tuple(products),
            tuple(initial),
            size,
            chunks,
            FORGETS=forgets,
            BACKWARD=backward,
            BLOCK=block,
            **options,
        )
