"""Launches of a kernel over time: what members of teams share, waves of teams, launches a step or a stage of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fused_rnn.gpu.directions import direction_bits
from fused_rnn.gpu.loops import Layer
from fused_rnn.triton.compile import constants_schedule, constants_stages, fewest_spills, last_stage, options
from fused_rnn.triton.published import published
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
    if program is None or not program.sees_units:
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


def no_warnings() -> AbstractContextManager[None]:
    """numpy's, of the interpreter: a formula may divide by the zeros beyond H or B, whose results nobody reads."""
    import numpy

    return numpy.errstate(all="ignore")


class Launches:
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
        with no_warnings() if self.config.target.arch == "interpreter" else nullcontext():
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
