"""Launches of the two loops: from tensors and a plan to grids, arguments, waves of teams, launches a step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from fused_rnn.cells import Cell
from fused_rnn.gpu.directions import direction_bits
from fused_rnn.gpu.loops import Layer
from fused_rnn.triton.backward import bwd_kernel
from fused_rnn.triton.cells import KERNELS
from fused_rnn.triton.forward import fwd_kernel
from fused_rnn.triton.tiles import SPILLS, Device, Plan, replay

COUNTER_STRIDE = 32  # int32: a counter has its own 128 bytes, as the kernels have it

Made = TypeVar("Made")

# Kernels compiled and loaded in this process, with the options they were compiled under: what a capture may use.
_compiled: dict[tuple[Any, ...], dict[str, Any]] = {}


@dataclass(frozen=True)
class How:
    """How a layer's loops run."""

    plan: Plan
    device: Device
    precision: str  # of products, the kernels' PRECISION
    activations: str  # their HOW


def new_counters(layer: Layer, plan: Plan, device: torch.device) -> Tensor:
    """One for each recurrence and batch tile of a team, zero; they serve all launches of one loop over time."""
    count = layer.recurrences * plan.tiles(layer.batch) if plan.loop == "b" else 1
    if plan.loop == "b" and plan.team * (layer.steps + 1) >= 1 << 31:
        raise NotImplementedError(f"{layer.steps} steps of a team of {plan.team} are beyond the 2^31 that it can count")
    return torch.zeros(count, COUNTER_STRIDE, dtype=torch.int32, device=device)


def waves(batch: int, recurrences: int, plan: Plan, device: Device) -> list[tuple[int, int]]:
    """(first batch tile, tiles) of each launch. The programs of a cooperative launch must all be resident at once."""
    tiles = plan.tiles(batch)
    if tiles == 0:
        return []
    if plan.loop != "b":
        return [(0, tiles)]
    at_once = device.processors // (plan.team * recurrences)
    if at_once == 0:
        raise NotImplementedError(
            f"a team of {plan.team} programs for each of {recurrences} recurrences needs more than the "
            f"{device.processors} multiprocessors there are"
        )
    count = -(-tiles // at_once)
    each = -(-tiles // count)
    return [(tile, min(each, tiles - tile)) for tile in range(0, tiles, each)]


def _ranges(how: How, first: int, last: int) -> Iterator[tuple[int, int]]:
    """Step ranges of the launches that together run first .. last - 1, in the order of the steps."""
    if how.plan.loop == "c" or (how.plan.loop == "b" and how.device.arch == "interpreter"):
        # The interpreter runs programs one after the other, so none may wait for a step that another has yet to make.
        yield from ((s, s + 1) for s in range(first, last))
    elif last > first:
        yield first, last


def constants_forward(cell: Cell, hidden: int, size: int, save: bool, checkpoint: bool, replay: bool) -> dict[str, Any]:
    """What fwd_kernel is compiled for, less the plan's part."""
    return {
        "CELL": KERNELS[cell.name].fwd,
        "G": cell.gates,
        "S": cell.saved,
        "H": hidden,
        "ALIGN": math.gcd(hidden * size, 16),
        "HAS_C": len(cell.states) > 1,
        "HAS_STATE": cell.carried > 0,
        "HIDDEN_BIAS": cell.apart > 0,
        "SAVE": save,
        "CHECKPOINT": checkpoint,
        "REPLAY": replay,
    }


def constants_backward(cell: Cell, hidden: int, size: int, has_dy: bool) -> dict[str, Any]:
    """What bwd_kernel is compiled for, less the plan's part."""
    return {
        "CELL": KERNELS[cell.name].bwd,
        "G": cell.gates,
        "S": cell.saved,
        "DG": cell.gradients,
        "H": hidden,
        "ALIGN": math.gcd(hidden * size, 16),
        "HAS_C": len(cell.states) > 1,
        "NEEDS_STATE": KERNELS[cell.name].needs_state,
        "NEEDS_BEFORE": KERNELS[cell.name].needs_before,
        "HAS_DY": has_dy,
    }


def constants_plan(
    plan: Plan, device: Device, lengths: bool, reset: bool, precision: str, activations: str
) -> dict[str, Any]:
    """What both kernels are compiled for besides."""
    return {
        "HAS_LENGTHS": lengths,
        "HAS_RESET": reset,
        "REGISTERS": plan.registers,
        "HOLD": plan.hold,
        "COUNT": plan.loop == "b",
        "LANES": 64 * plan.tile.warps if device.amd else 0,
        "AHEAD": plan.ahead,
        "TEAM": plan.team,
        "NT": plan.spread,
        "BB": plan.tile.batch,
        "BH": plan.tile.units,
        "BK": plan.tile.depth,
        "PRECISION": precision,
        "HOW": activations,
    }


def options(plan: Plan, arch: str, bound: int | None = None) -> dict[str, Any]:
    """How a kernel is compiled and launched; the interpreter knows none of it. bound: one of `bounds`."""
    if arch == "interpreter":
        return {}
    chosen: dict[str, Any] = {
        "num_warps": plan.tile.warps,
        "num_stages": plan.tile.stages,
        "enable_fp_fusion": True,
        "launch_cooperative_grid": plan.loop == "b",
    }
    return chosen if bound is None else {**chosen, "maxnreg": bound}


def bounds(plan: Plan, arch: str) -> tuple[int | None, ...]:
    """Register bounds to try.

    Left alone ptxas may spill, or let loads wait for each other, to fit more programs on a multiprocessor than these
    loops ever have there: all registers come first, its own choice second.
    """
    return (255, None) if arch.startswith("sm_") and plan.tile.warps <= 8 else (None,)


def fewest_spills(plan: Plan, arch: str, compiled: Callable[[int | None], tuple[int, Made]]) -> Made:
    """What `compiled` makes under the best of the bounds: for each it gives bytes spilled and the result."""
    best = None
    for bound in bounds(plan, arch):
        made = compiled(bound)
        if best is None or made[0] < best[0]:
            best = made
        if best[0] <= SPILLS:
            break
    assert best is not None
    return best[1]


class _Launches:
    """The launches of one loop over time. How to compile is looked up at the first of them, as dear as the launch."""

    def __init__(self, kernel: Any, layer: Layer, how: How, constants: dict[str, Any]) -> None:
        self.kernel, self.how = kernel, how
        self.programs = layer.recurrences * how.plan.team  # of a batch tile
        self.constants = constants | constants_plan(
            how.plan, how.device, layer.lengths is not None, layer.reset is not None, how.precision, how.activations
        )
        self.options: dict[str, Any] | None = None

    def __call__(self, tiles: int, args: Sequence[Any]) -> None:
        grid = (self.programs * tiles,)
        if self.options is None:
            self.options = self._options(grid, args)
        self.kernel[grid](*args, **self.constants, **self.options)

    def _options(self, grid: tuple[int, ...], args: Sequence[Any]) -> dict[str, Any]:
        plan, arch = self.how.plan, self.how.device.arch
        if arch == "interpreter":
            return {}
        key = (
            self.kernel, torch.cuda.current_device(), plan, *self.constants.values(), *(_kind(a) for a in args)
        )  # fmt: skip
        if key not in _compiled:
            if torch.cuda.is_current_stream_capturing():
                raise RuntimeError(
                    "this problem's Triton kernels are not compiled yet, and nothing is compiled inside a CUDA graph"
                    " capture: run it once before capturing"
                )
            _compiled[key] = fewest_spills(plan, arch, lambda bound: self._compiled(bound, grid, args))
        return _compiled[key]

    def _compiled(self, bound: int | None, grid: tuple[int, ...], args: Sequence[Any]) -> tuple[int, dict[str, Any]]:
        chosen = options(self.how.plan, self.how.device.arch, bound)
        kernel = self.kernel.warmup(*args, grid=grid, **self.constants, **chosen)
        _ = kernel.run  # loads it, which is what makes n_spills known
        return 4 * kernel.n_spills, chosen


def _kind(argument: Any) -> Any:
    """What of an argument Triton compiles for."""
    if isinstance(argument, Tensor):
        return argument.dtype, argument.data_ptr() % 16 == 0
    return argument >= 1 << 31


class Loops:
    """The two loops over time of one layer, for one call: fused_rnn.gpu.loops.Loops."""

    def __init__(self, layer: Layer, how: How) -> None:
        self.layer, self.how = layer, how
        self.counters: Tensor | None = None  # of backward, whose windows count on where the one before stopped

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
        state, cells, kept = (each[0] if each else None for each in (carried, histories, checkpoints))
        self._forward(self.how, (0, self.layer.steps), gx, None, w, bias, h0, state, y, h_n, saved, cells, kept, every)

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
        state, cells = (each[0] if each else None for each in (carried, histories))
        if state is None:  # GRU's gates do not depend on it
            state = torch.zeros(h0.shape, dtype=torch.float32, device=h0.device)
        how = replace(self.how, plan=replay(self.layer.hidden))
        self._forward(how, window, gx, given, None, bias, h0, state, hidden, h0, saved, cells, None, 1)

    def _forward(
        self,
        how: How,
        window: tuple[int, int],
        gx: Tensor,
        given: Tensor | None,
        w: Tensor | None,
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
        """The forward loop over a window of time: shapes as in fwd_kernel."""
        layer, plan = self.layer, how.plan
        bits, period = direction_bits(layer.directions)
        counters = new_counters(layer, plan, y.device)
        constants = constants_forward(
            layer.cell, layer.hidden, gx.element_size(), saved is not None, checkpoints is not None, given is not None
        )
        # What the kernel is not compiled for it does not touch: h0 stands for it.
        given, w, bias, state, lengths, reset, saved, cells, checkpoints = (
            h0 if t is None else t
            for t in (given, w, bias, state, layer.lengths, layer.reset, saved, cells, checkpoints)
        )
        launch = _Launches(fwd_kernel, layer, how, constants)
        for tile0, tiles in waves(layer.batch, layer.recurrences, plan, how.device):
            own = counters[tile0 * layer.recurrences :] if plan.loop == "b" else counters
            for step0, step1 in _ranges(how, *window):
                args = (
                    gx, given, w, bias, h0, state, lengths, reset, y, h_n, saved, cells, checkpoints, own, layer.steps,
                    layer.batch, layer.recurrences, tiles, tile0, step0, step1, *window, every, bits, period,
                )  # fmt: skip
                launch(tiles, args)

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
        layer, how, plan = self.layer, self.how, self.how.plan
        read, entering, dh, dc = states[-1], first[-1], dstates[0], dstates[1] if len(dstates) > 1 else None
        begin, last = window or (0, layer.steps)
        bits, period = direction_bits(layer.directions)
        if self.counters is None:
            self.counters = new_counters(layer, plan, dgates.device)
        constants = constants_backward(layer.cell, layer.hidden, w.element_size(), dy is not None)
        dy, lengths, reset, saved, dc = (
            w if t is None else t for t in (dy, layer.lengths, layer.reset, saved, dc)
        )  # as in forward
        ranges = [(a, b, 0) for a, b in _ranges(how, begin, last)][::-1]
        if begin == 0 and not plan.registers:
            if plan.loop != "c" and how.device.arch != "interpreter":
                ranges[-1] = (*ranges[-1][:2], 1)
            else:
                ranges.append((0, 0, 1))
        launch = _Launches(bwd_kernel, layer, how, constants)
        for tile0, tiles in waves(layer.batch, layer.recurrences, plan, how.device):
            own = self.counters[tile0 * layer.recurrences :] if plan.loop == "b" else self.counters
            for step0, step1, close in ranges:
                args = (
                    dy, w, read, entering, lengths, reset, saved, dgates, dh, dc, own, layer.steps, layer.batch,
                    layer.recurrences, tiles, tile0, step0, step1, begin, last, close, bits, period,
                )  # fmt: skip
                launch(tiles, args)
