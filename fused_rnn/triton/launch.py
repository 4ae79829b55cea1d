"""Launches of the two loops: from tensors and a schedule to grids, arguments, waves of teams, launches a step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fused_rnn.gpu.directions import direction_bits
from fused_rnn.gpu.loops import Layer
from fused_rnn.triton import planner
from fused_rnn.triton.backward import bwd_kernel
from fused_rnn.triton.cells import kernels
from fused_rnn.triton.compile import (
    constants_backward,
    constants_forward,
    constants_schedule,
    constants_stages,
    fewest_spills,
    last_stage,
    options,
)
from fused_rnn.triton.forward import fwd_kernel
from fused_rnn.triton.published import published, takes_team
from fused_rnn.triton.scan import join_kernel, scan_bwd_kernel, scan_fwd_kernel
from fused_rnn.triton.schedule import Schedule
from fused_rnn.triton.target import Target

COUNTER_STRIDE = 32  # int32: a counter has its own 128 bytes, as the kernels have it

# Kernels compiled and loaded in this process, with the schedule's constants and the options they were compiled under:
# what a capture may use.
_compiled: dict[tuple[Any, ...], dict[str, Any]] = {}


@dataclass(frozen=True)
class LaunchConfig:
    """How a layer's loops run."""

    schedule: Schedule
    target: Target
    precision: str  # of products, the kernels' PRECISION
    activation: str  # their ACTIVATION
    again: Schedule | None = None  # by which replay makes the stages of a step again


def new_counters(layer: Layer, schedule: Schedule, device: torch.device) -> Tensor:
    """One for each recurrence and batch tile of a team, zero; they serve all launches of one loop over time."""
    cooperative, team = schedule.loop == "cooperative", schedule.team
    count = layer.recurrences * schedule.tiles(layer.batch) if cooperative else 1
    stages = layer.cell.program.stages if layer.cell.program else 1
    if cooperative and team * (layer.steps + 1) * stages >= 1 << 31:
        raise NotImplementedError(f"{layer.steps} steps of a team of {team} are beyond the 2^31 that it can count")
    return torch.zeros(count, COUNTER_STRIDE, dtype=torch.int32, device=device)


def new_shared(layer: Layer, schedule: Schedule, matrices: Tensor | None, like: Tensor, backward: bool) -> Any:
    """The kernels' `shared`: what the members of each team tell each other, in one step and in the next."""
    program = layer.cell.program
    if program is None or not takes_team(program):
        return ()
    made = published(program.backward if backward else program.forward)
    pairs, rows = 2 * layer.recurrences * schedule.tiles(layer.batch), schedule.tile.batch
    partials = like.new_empty(pairs * made.slots * schedule.team * rows + 1, dtype=torch.float32)
    operands = like.new_empty(pairs * made.operands * rows * layer.hidden + 1)
    return partials, operands, operands if matrices is None else matrices


def waves(batch: int, recurrences: int, schedule: Schedule, target: Target) -> list[tuple[int, int]]:
    """(first batch tile, tiles) of each launch. The programs of a cooperative launch must all be resident at once."""
    tiles = schedule.tiles(batch)
    if tiles == 0:
        return []
    if schedule.loop != "cooperative":
        return [(0, tiles)]
    at_once = target.processors // (schedule.team * recurrences)
    if at_once == 0:
        raise NotImplementedError(
            f"a team of {schedule.team} programs for each of {recurrences} recurrences needs more than the "
            f"{target.processors} multiprocessors there are"
        )
    count = -(-tiles // at_once)
    each = -(-tiles // count)
    return [(tile, min(each, tiles - tile)) for tile in range(0, tiles, each)]


def _kind(argument: Any) -> Any:
    """What of an argument Triton compiles for."""
    if isinstance(argument, tuple):
        return tuple(map(_kind, argument))
    if isinstance(argument, Tensor):
        return argument.dtype, argument.data_ptr() % 16 == 0
    return argument >= 1 << 31


def _no_warnings() -> AbstractContextManager[None]:
    """numpy's, of the interpreter: a formula may divide by the zeros beyond H or B, whose results nobody reads."""
    import numpy

    return numpy.errstate(all="ignore")


class _Launches:
    """The launches of one loop over time. How to compile is looked up at the first of them, as dear as the launch."""

    def __init__(
        self,
        kernel: Any,
        layer: Layer,
        config: LaunchConfig,
        constants: dict[str, Any],
        backward: bool,
        chunks: tuple[int, int] | None = None,
    ) -> None:
        """chunks: how many run side by side, and of how many steps each."""
        self.kernel, self.layer, self.config, self.backward = kernel, layer, config, backward
        self.names = set(kernel.arg_names)
        self.constants = {name: value for name, value in constants.items() if name in self.names}
        self.chunks, self.chunk = chunks or (1, 0)
        self.settled: dict[int, dict[str, Any]] = {}  # by stage

    def ranges(self, first: int, last: int) -> Iterator[tuple[int, int]]:
        """Step ranges of the launches that together run first .. last - 1, in the order of the steps."""
        if self.by_step:
            yield from ((s, s + 1) for s in range(first, last))
        elif last > first:
            yield first, last

    @property
    def by_step(self) -> bool:
        """Whether a launch is one step, or of a cell with stages one of them."""
        # The interpreter runs a program after the other: none may wait for a step that another has yet to make.
        loop = self.config.schedule.loop
        return loop == "stepwise" or (loop == "cooperative" and self.config.target.arch == "interpreter")

    @property
    def stages(self) -> Sequence[int]:
        """The stages of a step's launches; -1 for all of them in one."""
        last = last_stage(self.layer.cell, self.backward)
        return range(last + 1) if self.by_step and last > 0 else (-1,)

    def run(
        self, tensors: Sequence[Any], counters: Tensor, window: tuple[int, int], ranges: Sequence[tuple[int, int, int]]
    ) -> None:
        """A launch for each wave of teams and each range of steps, with `every` of forward or `close` of backward."""
        layer, schedule = self.layer, self.config.schedule
        # What the kernel is not compiled for it does not touch: another tensor stands for it.
        given = (*tensors, layer.lengths, layer.reset)
        absent = next(t for t in given if isinstance(t, Tensor))
        tensors = [tuple(t) if isinstance(t, list) else absent if t is None else t for t in given]
        sizes, bits = (layer.steps, layer.batch, layer.recurrences), direction_bits(layer.directions)
        for tile0, tiles in waves(layer.batch, layer.recurrences, schedule, self.config.target):
            own = counters[tile0 * layer.recurrences :] if schedule.loop == "cooperative" else counters
            for steps in ranges:
                for stage in self.stages:
                    self(tiles, (*tensors, own, *sizes, tiles, tile0, *window, *steps, self.chunk, *bits), stage)

    def __call__(self, tiles: int, args: Sequence[Any], stage: int) -> None:
        grid = (self.layer.recurrences * self.config.schedule.team * tiles, self.chunks)
        if stage not in self.settled:
            self.settled[stage] = self._settled(grid, args, stage)
        with _no_warnings() if self.config.target.arch == "interpreter" else nullcontext():
            self.kernel[grid](*args, **self.constants, **self.settled[stage])

    def _settled(self, grid: tuple[int, ...], args: Sequence[Any], stage: int) -> dict[str, Any]:
        """The schedule's constants, and the options."""
        schedule, arch = self.config.schedule, self.config.target.arch
        if arch == "interpreter":
            return self._of_schedule(schedule, stage)
        wanted = (*self.constants.values(), *self._of_schedule(schedule, stage).values())
        key = (self.kernel, torch.cuda.current_device(), schedule, *wanted, *map(_kind, args))
        if key not in _compiled:
            if torch.cuda.is_current_stream_capturing():
                raise RuntimeError(
                    "this problem's Triton kernels are not compiled yet, and nothing is compiled inside a CUDA graph"
                    " capture: run it once before capturing"
                )

            def compiled(candidate: Schedule, bound: int | None) -> tuple[int, dict[str, Any]]:
                chosen = self._of_schedule(candidate, stage) | options(candidate, arch, bound)
                kernel = self.kernel.warmup(*args, grid=grid, **self.constants, **chosen)
                _ = kernel.run  # loads it, which is what makes n_spills known
                return 4 * kernel.n_spills, chosen

            _compiled[key] = fewest_spills(self.layer.cell, schedule, arch, compiled)
        return _compiled[key]

    def _of_schedule(self, schedule: Schedule, stage: int) -> dict[str, Any]:
        layer, config = self.layer, self.config
        masks = (layer.lengths is not None, layer.reset is not None)
        constants = constants_schedule(schedule, config.target, *masks, config.precision, config.activation)
        how = (
            layer.hidden,
            self.constants.get("ALIGN", 1),
            schedule,
            config.target,
            config.precision,
            self.backward,
            stage,
        )
        constants |= constants_stages(layer.cell, *how)
        return {name: value for name, value in constants.items() if name in self.names}


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
        launches = _Launches(fwd_kernel, layer, config, constants, False)
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
        launches = _Launches(bwd_kernel, layer, self.config, constants, True)
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
    scan = constants | {"SCAN": kernels(layer.cell.name).scan_fwd}
    launches = _Launches(scan_fwd_kernel, layer, config, scan, False, (count - 1, chunk))
    launches.run((gx, params, sums, products), counters, window, [(*window, every)])
    _join(sums, products, carried, False, config)
    launches = _Launches(fwd_kernel, layer, config, constants | {"CHUNKED": True}, False, chunks)
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
    scan = constants | {"SCAN": kernels(layer.cell.name).scan_bwd}
    launches = _Launches(scan_bwd_kernel, layer, config, scan, True, (count - 1, chunk))
    given = (dy, dsequences, params, states, first, saved, entering, sums, products)
    launches.run(given, counters, window, [(*window, 0)])
    _join(sums, products, dstates, True, config)
    if not layer.cell.reads_h:
        sums[0] = entering
    parts = None if dparams is None else dparams.new_zeros(count, *dparams.shape)
    launches = _Launches(bwd_kernel, layer, config, constants | {"CHUNKED": True}, True, chunks)
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
    sums: list[Tensor], products: list[Tensor], initial: list[Tensor], backward: bool, config: LaunchConfig
) -> None:
    """What enters each chunk, in the place of sums."""
    size, chunks, block = initial[0].numel(), sums[0].shape[0], 512
    with _no_warnings() if config.target.arch == "interpreter" else nullcontext():
        join_kernel[(-(-size // block),)](
            tuple(sums), tuple(products), tuple(initial), size, chunks, BACKWARD=backward, BLOCK=block
        )
