"""Launches of the two loops: from tensors and a plan to grids, arguments, waves of teams, launches a step."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fused_rnn.triton_kernels.backward import bwd_kernel
from fused_rnn.triton_kernels.cells import Cell
from fused_rnn.triton_kernels.forward import fwd_kernel
from fused_rnn.triton_kernels.tiles import Device, Plan

COUNTER_STRIDE = 32  # int32: a counter has its own 128 bytes, as the kernels have it

# Kernels compiled and loaded in this process, with the options they were compiled under: what a capture may use.
_compiled: dict[tuple[Any, ...], dict[str, Any]] = {}


@dataclass(frozen=True)
class Layer:
    """What all launches of one layer share. lengths: [B] int64, reset: [T, B] int32, or None."""

    cell: Cell
    steps: int
    batch: int
    hidden: int
    directions: tuple[int, ...]
    lengths: Tensor | None
    reset: Tensor | None
    precision: str  # of products, the kernels' PRECISION
    activations: str  # their HOW
    device: Device

    @property
    def recurrences(self) -> int:
        return len(self.directions)


def direction_bits(directions: Sequence[int]) -> tuple[int, int]:
    """Which recurrences run backwards, as the kernels read it: (bits, period), bit r % period for recurrence r."""
    backwards = [d < 0 for d in directions]
    count = len(backwards)
    for period in range(1, min(count, 62) + 1):
        if count % period == 0 and backwards == backwards[:period] * (count // period):
            return sum(1 << i for i, b in enumerate(backwards[:period]) if b), period
    raise NotImplementedError(f"directions: {count} in no pattern that repeats within 62; run them in two calls")


def new_counters(layer: Layer, plan: Plan, device: torch.device) -> Tensor:
    """One for each recurrence and batch tile of a team, zero; they serve all launches of one loop over time."""
    count = layer.recurrences * plan.tiles(layer.batch) if plan.loop == "b" else 1
    return torch.zeros(count, COUNTER_STRIDE, dtype=torch.int32, device=device)


def waves(layer: Layer, plan: Plan) -> list[tuple[int, int]]:
    """(first batch tile, tiles) of each launch. The programs of a cooperative launch must all be resident at once."""
    tiles = plan.tiles(layer.batch)
    if tiles == 0:
        return []
    if plan.loop != "b":
        return [(0, tiles)]
    at_once = layer.device.processors // (plan.team * layer.recurrences)
    if at_once == 0:
        raise NotImplementedError(
            f"a team of {plan.team} programs for each of {layer.recurrences} recurrences needs more than the "
            f"{layer.device.processors} multiprocessors there are"
        )
    count = -(-tiles // at_once)
    each = -(-tiles // count)
    return [(tile, min(each, tiles - tile)) for tile in range(0, tiles, each)]


def _ranges(layer: Layer, plan: Plan, first: int, last: int) -> Iterator[tuple[int, int]]:
    """Step ranges of the launches that together run first .. last - 1, in the order of the steps."""
    if plan.loop == "c" or (plan.loop == "b" and layer.device.arch == "interpreter"):
        # The interpreter runs programs one after the other, so none may wait for a step that another has yet to make.
        yield from ((s, s + 1) for s in range(first, last))
    elif last > first:
        yield first, last


def constants_forward(cell: Cell, hidden: int, size: int, save: bool, checkpoint: bool, replay: bool) -> dict[str, Any]:
    """What fwd_kernel is compiled for, less the plan's part."""
    return {
        "CELL": cell.fwd,
        "G": cell.gates,
        "S": cell.stored,
        "H": hidden,
        "ALIGN": math.gcd(hidden * size, 16),
        "HAS_C": cell.has_c,
        "HAS_STATE": cell.has_state,
        "HIDDEN_BIAS": cell.hidden_bias,
        "SAVE": save,
        "CHECKPOINT": checkpoint,
        "REPLAY": replay,
    }


def constants_backward(cell: Cell, hidden: int, size: int, has_dy: bool) -> dict[str, Any]:
    """What bwd_kernel is compiled for, less the plan's part."""
    return {
        "CELL": cell.bwd,
        "G": cell.gates,
        "S": cell.stored,
        "DG": cell.gradients,
        "H": hidden,
        "ALIGN": math.gcd(hidden * size, 16),
        "HAS_C": cell.has_c,
        "NEEDS_STATE": cell.needs_state,
        "NEEDS_BEFORE": cell.needs_before,
        "HAS_DY": has_dy,
    }


def constants_plan(plan: Plan, lengths: bool, reset: bool, precision: str, activations: str) -> dict[str, Any]:
    """What both kernels are compiled for besides."""
    return {
        "HAS_LENGTHS": lengths,
        "HAS_RESET": reset,
        "REGISTERS": plan.registers,
        "HOLD": plan.hold,
        "COUNT": plan.loop == "b",
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
    """Register bounds to try until a kernel compiles without spills, ptxas' own choice first.

    Left alone it may spill a few bytes to fit more programs on a multiprocessor than these loops ever have there.
    """
    return (None, 255, 224, 192, 160) if arch.startswith("sm_") and plan.tile.warps <= 8 else (None,)


def _launch(kernel: Any, layer: Layer, plan: Plan, tiles: int, args: Sequence[Any], constants: dict[str, Any]) -> None:
    constants |= constants_plan(
        plan, layer.lengths is not None, layer.reset is not None, layer.precision, layer.activations
    )
    grid = (layer.recurrences * tiles * plan.team,)
    arch = layer.device.arch
    if arch == "interpreter":
        kernel[grid](*args, **constants)
        return
    key = (kernel, torch.cuda.current_device(), plan, *constants.values(), *(_kind(a) for a in args))
    if key not in _compiled:
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "this problem's Triton kernels are not compiled yet, and nothing is compiled inside a CUDA graph"
                " capture: run it once before capturing"
            )
        _compiled[key] = _compile(kernel, plan, arch, grid, args, constants)
    kernel[grid](*args, **constants, **_compiled[key])


def _compile(
    kernel: Any, plan: Plan, arch: str, grid: tuple[int, ...], args: Sequence[Any], constants: dict[str, Any]
) -> dict[str, Any]:
    """Options under which the kernel, compiled and loaded here, does not spill; with no bound if it always does."""
    for bound in bounds(plan, arch):
        chosen = options(plan, arch, bound)
        compiled = kernel.warmup(*args, grid=grid, **constants, **chosen)
        _ = compiled.run  # loads it, which is what makes n_spills known
        if not compiled.n_spills:
            return chosen
    return options(plan, arch)


def _kind(argument: Any) -> Any:
    """What of an argument Triton compiles for."""
    if isinstance(argument, Tensor):
        return argument.dtype, argument.data_ptr() % 16 == 0
    return argument >= 1 << 31


def run_forward(
    layer: Layer,
    plan: Plan,
    *,
    gx: Tensor,
    w: Tensor,
    bias: Tensor,
    h0: Tensor,
    state: Tensor,
    y: Tensor,
    h_n: Tensor,
    saved: Tensor,
    cells: Tensor,
    checkpoints: Tensor,
    given: Tensor | None = None,
    window: tuple[int, int] | None = None,
    every: int = 1,
    save: bool = False,
) -> None:
    """The forward loop over all of time, or over `window`, the recurrent product `given`: shapes as in fwd_kernel."""
    cell = layer.cell
    first, last = window or (0, layer.steps)
    bits, period = direction_bits(layer.directions)
    counters = new_counters(layer, plan, y.device)
    constants = constants_forward(
        cell, layer.hidden, w.element_size(), save, checkpoints.numel() > 0, given is not None
    )
    lengths = y if layer.lengths is None else layer.lengths
    reset = y if layer.reset is None else layer.reset
    for tile0, tiles in waves(layer, plan):
        own = counters[tile0 * layer.recurrences :] if plan.loop == "b" else counters
        for step0, step1 in _ranges(layer, plan, first, last):
            args = (
                gx, gx if given is None else given, w, bias, h0, state, lengths, reset, y, h_n, saved, cells,
                checkpoints, own, layer.steps, layer.batch, layer.recurrences, tiles, tile0, step0, step1, first, last,
                every, bits, period,
            )  # fmt: skip
            _launch(fwd_kernel, layer, plan, tiles, args, dict(constants))


def run_backward(
    layer: Layer,
    plan: Plan,
    *,
    dy: Tensor | None,
    w: Tensor,
    states: Tensor,
    first_state: Tensor,
    saved: Tensor,
    dgates: Tensor,
    dh: Tensor,
    dc: Tensor,
    counters: Tensor | None = None,
    window: tuple[int, int] | None = None,
) -> None:
    """The backward loop over all of time or over `window`, from its last step to its first: shapes as in bwd_kernel."""
    cell = layer.cell
    first, last = window or (0, layer.steps)
    bits, period = direction_bits(layer.directions)
    counters = new_counters(layer, plan, dgates.device) if counters is None else counters
    constants = constants_backward(cell, layer.hidden, w.element_size(), dy is not None)
    lengths = dgates if layer.lengths is None else layer.lengths
    reset = dgates if layer.reset is None else layer.reset
    ranges = [(a, b, 0) for a, b in _ranges(layer, plan, first, last)][::-1]
    if first == 0 and not plan.registers:
        if plan.loop != "c" and layer.device.arch != "interpreter":
            ranges[-1] = (*ranges[-1][:2], 1)
        else:
            ranges.append((0, 0, 1))
    for tile0, tiles in waves(layer, plan):
        own = counters[tile0 * layer.recurrences :] if plan.loop == "b" else counters
        for step0, step1, close in ranges:
            args = (
                dgates if dy is None else dy, w, states, first_state, lengths, reset, saved, dgates, dh, dc, own,
                layer.steps, layer.batch, layer.recurrences, tiles, tile0, step0, step1, first, last, close, bits,
                period,
            )  # fmt: skip
            _launch(bwd_kernel, layer, plan, tiles, args, dict(constants))
