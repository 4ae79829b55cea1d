"""What a run measures: as it was asked for, and what is usual where nothing was."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import click
import torch

from fused_rnn.commands.bench.grid import CELLS, GRIDS, MODES, SEQUENCES, Point, Shape
from fused_rnn.commands.bench.memory import SIZES
from fused_rnn.commands.bench.providers import HALF, TITLES
from fused_rnn.commands.bench.rivals import RIVALS, missing
from fused_rnn.commands.machine import OUT, kernels_isa
from fused_rnn.dispatch import BACKENDS

THREADS = (1, 2)
PROVIDERS = {
    "cpu": ("torch", "cell", "loop", "cpu", "auto"),
    "cuda": ("torch", HALF, "cell", *(name for name in ("cuda", "triton") if name in BACKENDS), "auto"),
}
DEFAULT_DTYPES = {"cpu": ("fp32", "bf16"), "cuda": ("tf32", "bf16")}


@dataclass(frozen=True)
class Workload:
    """What to measure: a grid or, where some are given, shapes (T, B, D, H), with layers and bidirectional.

    budget_s is for each pair of dtype and thread count.
    """

    device: str = "cpu"
    grid: str = "cpu"
    cells: tuple[str, ...] = CELLS
    dtypes: tuple[str, ...] = ("fp32", "bf16")
    threads: tuple[int, ...] = (1, 2)
    modes: tuple[str, ...] = MODES
    variants: tuple[str, ...] = ("plain",)
    providers: tuple[str, ...] = PROVIDERS["cpu"]
    budget_s: float = 600.0
    memory: bool = True
    shapes: tuple[Shape, ...] = ()
    layers: int = 1
    bidirectional: bool = False
    out: Path = OUT / "cpu"
    jax_python: str = sys.executable

    def path(self, dtype: str, threads: int) -> Path:
        """The result file. All but the careful run of the whole grid have others: one with rivals, shapes, another
        grid, and one by the instruction set that FUSED_RNN_ISA names."""
        kind = "rivals" if RIVALS.keys() & {*self.providers} else self.grid.removesuffix(f"-{self.device}")
        kind = "shapes" if self.shapes else "" if kind == self.device else kind
        isa = f"isa-{kernels_isa()}" if os.environ.get("FUSED_RNN_ISA") and self.device == "cpu" else ""
        prefix = "".join(f"{part}-" for part in (isa, kind) if part)
        suffix = f"-{threads}t" if self.device == "cpu" else ""
        return self.out / f"{prefix}{dtype}{suffix}.json"

    def points(self, dtype: str) -> list[Point]:
        """Every point, the dearest first: they take what they must, and the others share evenly what is left."""
        if self.shapes:
            kinds = product(self.cells, self.modes, self.variants, self.shapes)
            points = [
                Point(cell, mode, dtype, T, B, H, variant, D, self.layers, self.bidirectional)
                for cell, mode, variant, (T, B, D, H) in kinds
            ]
        else:
            points = list(GRIDS[self.grid].points(dtype, self.cells, self.modes, self.variants))
        return sorted(points, key=lambda point: -point.flops)

    def memory_points(self, dtype: str) -> list[Point]:
        """Where peak memory is measured: the shapes, or one long point of each cell and mode."""
        if self.shapes:
            return self.points(dtype)
        modes = [mode for mode in self.modes if mode != "step"]
        return [Point(cell, mode, dtype, *SIZES) for cell, mode in product(self.cells, modes)]


def asked(
    shapes: tuple[Shape, ...],
    name: str,
    device: str,
    providers: tuple[str, ...],
    dtypes: tuple[str, ...],
    threads: tuple[int, ...],
    modes: tuple[str, ...],
    jax_python: str,
) -> Workload:
    """What a grid or shapes measure where nothing else is asked for."""
    full = {"full": device, "quick": f"quick-{device}"}.get(name, name)
    grid = full if full in GRIDS else name
    rivals = GRIDS[grid].rivals
    if device != "cpu" and rivals:
        raise click.BadParameter(f"got {name!r} with --device {device}, expected cpu", param_hint="--grid")
    short = bool(shapes or rivals)
    usual = ("torch", "auto") if short else PROVIDERS[device]
    return Workload(
        device=device,
        grid=grid,
        dtypes=dtypes or DEFAULT_DTYPES[device][: 1 if short else None],
        threads=threads or ((torch.get_num_threads(),) if shapes else (1,) if rivals else _default_threads(device)),
        modes=modes or (SEQUENCES if shapes else MODES),
        providers=providers or (*usual, *(() if shapes else _there(rivals, jax_python))),
        budget_s=60 * (1 if shapes else GRIDS[grid].minutes),
        memory=not short,
        shapes=shapes,
        jax_python=jax_python,
    )


def _there(rivals: tuple[str, ...], jax_python: str) -> Iterator[str]:
    """Those that are installed; of the others it is said what they need."""
    for name in rivals:
        if lacking := missing(name, jax_python):
            click.echo(lacking)
        else:
            yield name


def check_providers(providers: tuple[str, ...], device: str, jax_python: str) -> None:
    known = dict.fromkeys((*TITLES, *BACKENDS))
    for provider in providers:
        if provider not in known:
            raise click.BadParameter(f"got {provider!r}, expected one of {', '.join(known)}", param_hint="--provider")
        if provider in RIVALS and device != "cpu":
            raise click.BadParameter(f"got {provider!r}, which is measured on a CPU alone", param_hint="--provider")
        if provider in RIVALS and (lacking := missing(provider, jax_python)):
            raise click.BadParameter(lacking, param_hint="--provider")


def _default_threads(device: str) -> tuple[int, ...]:
    if device != "cpu":
        return (torch.get_num_threads(),)
    return tuple(count for count in THREADS if count <= torch.get_num_threads())
