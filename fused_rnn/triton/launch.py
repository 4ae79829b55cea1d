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
from fused_rnn.triton.compile import constants_backward, constants_forward, constants_schedule, fewest_spills, options
from fused_rnn.triton.forward import fwd_kernel
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


def new_counters(layer: Layer, schedule: Schedule, device: torch.device) -> Tensor:
    """One for each recurrence and batch tile of a team, zero; they serve all launches of one loop over time."""
    cooperative, team = schedule.loop == "cooperative", schedule.team
    count = layer.recurrences * schedule.tiles(layer.batch) if cooperative else 1
    if cooperative and team * (layer.steps + 1) >= 1 << 31:
        raise NotImplementedError(f"{layer.steps} steps of a team of {team} are beyond the 2^31 that it can count")
    return torch.zeros(count, COUNTER_STRIDE, dtype=torch.int32, device=device)


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

    def __init__(self, kernel: Any, layer: Layer, config: LaunchConfig, constants: dict[str, Any]) -> None:
        self.kernel, self.layer, self.config = kernel, layer, config
        self.constants = constants
        self.settled: dict[str, Any] | None = None

    def ranges(self, first: int, last: int) -> Iterator[tuple[int, int]]:
        """Step ranges of the launches that together run first .. last - 1, in the order of the steps."""
        loop = self.config.schedule.loop
        if loop == "stepwise" or (loop == "cooperative" and self.config.target.arch == "interpreter"):
            # The interpreter runs a program after the other: none may wait for a step that another has yet to make.
            yield from ((s, s + 1) for s in range(first, last))
        elif last > first:
            yield first, last

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
                self(tiles, (*tensors, own, *sizes, tiles, tile0, *window, *steps, *bits))

    def __call__(self, tiles: int, args: Sequence[Any]) -> None:
        grid = (self.layer.recurrences * self.config.schedule.team * tiles,)
        if self.settled is None:
            self.settled = self._settled(grid, args)
        with _no_warnings() if self.config.target.arch == "interpreter" else nullcontext():
            self.kernel[grid](*args, **self.constants, **self.settled)

    def _settled(self, grid: tuple[int, ...], args: Sequence[Any]) -> dict[str, Any]:
        """The schedule's constants, and the options."""
        schedule, arch = self.config.schedule, self.config.target.arch
        if arch == "interpreter":
            return self._of_schedule(schedule)
        wanted = (*self.constants.values(), *self._of_schedule(schedule).values())
        key = (self.kernel, torch.cuda.current_device(), schedule, *wanted, *map(_kind, args))
        if key not in _compiled:
            if torch.cuda.is_current_stream_capturing():
                raise RuntimeError(
                    "this problem's Triton kernels are not compiled yet, and nothing is compiled inside a CUDA graph"
                    " capture: run it once before capturing"
                )

            def compiled(candidate: Schedule, bound: int | None) -> tuple[int, dict[str, Any]]:
                chosen = self._of_schedule(candidate) | options(candidate, arch, bound)
                kernel = self.kernel.warmup(*args, grid=grid, **self.constants, **chosen)
                _ = kernel.run  # loads it, which is what makes n_spills known
                return 4 * kernel.n_spills, chosen

            _compiled[key] = fewest_spills(self.layer.cell, schedule, arch, compiled)
        return _compiled[key]

    def _of_schedule(self, schedule: Schedule) -> dict[str, Any]:
        layer, config = self.layer, self.config
        masks = (layer.lengths is not None, layer.reset is not None)
        return constants_schedule(schedule, config.target, *masks, config.precision, config.activation)


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
    ) -> None:
        tensors = (gx, None, w, bias, params, h0, carried, y, h_n, saved, histories, checkpoints)
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
    ) -> None:
        config = replace(self.config, schedule=planner.replay(self.layer.hidden))
        tensors: Sequence[Any] = (gx, given, None, bias, params, h0, carried, hidden, h0, saved, histories, [])
        self._forward(config, window, tensors, 1, replay=True)

    def _forward(
        self, config: LaunchConfig, window: tuple[int, int], tensors: Sequence[Any], every: int, replay: bool = False
    ) -> None:
        """The forward loop over a window of time. tensors: fwd_kernel's, in its order."""
        layer, (gx, *_, saved, _, checkpoints) = self.layer, tensors
        made = (saved is not None, bool(checkpoints), replay)
        constants = constants_forward(layer.cell, layer.hidden, gx.element_size(), *made)
        launches = _Launches(fwd_kernel, layer, config, constants)
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
    ) -> None:
        layer, schedule, window = self.layer, self.config.schedule, window or (0, self.layer.steps)
        if self.counters is None:
            self.counters = new_counters(layer, schedule, dgates.device)
        given = (dy is not None, dparams is not None)
        constants = constants_backward(layer.cell, layer.hidden, dgates.element_size(), *given)
        launches = _Launches(bwd_kernel, layer, self.config, constants)
        ranges = [(*steps, 0) for steps in launches.ranges(*window)][::-1]
        if (
            layer.cell.recurrent and window[0] == 0 and not schedule.registers
        ):  # the product of step 0, for the gradient of h0
            if schedule.loop != "stepwise" and self.config.target.arch != "interpreter":
                ranges[-1] = (*ranges[-1][:2], 1)
            else:
                ranges.append((0, 0, 1))
        tensors = (dy, dsequences, w, params, states, first, saved, dgates, dstates, dparams)
        launches.run(tensors, self.counters, window, ranges)
