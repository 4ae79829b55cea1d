"""`python -m fused_rnn bench`: its options, and which of them go together. A run imports what it needs."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import click
import torch
from rich.console import Console

from fused_rnn import ops
from fused_rnn.commands.bench.grid import CELLS, DTYPES, GRIDS, MODES, SEQUENCES, VARIANTS, Point, Shape

GRID_NAMES = ("full", *(name for name in GRIDS if name not in ("cpu", "cuda", "quick-cuda")))


class ShapeType(click.ParamType):  # type: ignore[type-arg]  # generic in newer versions alone
    """T,B,D,H as four positive integers."""

    name = "T,B,D,H"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        parts = str(value).split(",")
        if len(parts) != 4 or not all(part.strip().isdecimal() and int(part) > 0 for part in parts):
            self.fail(f"got {value!r}, expected T,B,D,H: four positive integers, as 128,32,80,256", param, ctx)
        return tuple(map(int, parts))


# What goes with what: the first of these that is given says what kind of run it is. Then why that is no place for most
# options, for the error, and which have a meaning there. None: no such option, the grid.
EVERY_GRID = {"cells", "dtypes", "threads", "modes", "variants", "providers", "device", "minutes", "memory", "out"}
EVERY_GRID |= {"jax_python"}
CPU_SCALING = {"cells", "dtypes", "threads", "shapes", "layers", "bidirectional", "modes", "minutes", "out"}
KINDS: dict[str | None, tuple[str, set[str]]] = {
    "readme": ("which measures nothing", {"device", "out"}),
    "choose": ("which measures nothing", {"device", "out"}),
    "model": ("which is measured as it is", {"threads", "modes", "device", "minutes"}),
    "stream": ("which has sizes of its own, float32 on the CPU", {"cells", "threads", "minutes", "out"}),
    "flex": ("which has sizes of its own, float32 by one thread", {"cells", "jax_python", "minutes", "out"}),
    "field": ("which has sizes of its own, float32 by one thread", {"minutes", "out"}),
    "isas": ("which has sizes of its own, by one thread", {"cells", "dtypes", "modes", "minutes", "out"}),
    "scaling": ("which goes by the CPU's threads and processes, ours by torch.nn's", CPU_SCALING),
    "shapes": ("which is in the place of a grid", EVERY_GRID | {"layers", "bidirectional"}),
    None: (
        "and with --scaling; of the grid --variant layers or bidirectional can be measured",
        EVERY_GRID | {"quick", "grid"},
    ),
}


def _check_kind() -> None:
    """Refuse the options that would have no effect in this kind of run."""
    context = click.get_current_context()
    given = {
        param.name: param.opts[0]
        for param in context.command.params
        if (value := context.params[str(param.name)]) is not None
        and value is not False
        and value != ()
        and value != param.default
    }
    kind = next((name for name in KINDS if name in given), None)
    why, takes = KINDS[kind]
    for name, option in given.items():
        if name != kind and name not in takes:
            said = f"does not go with {given[kind]}, {why}" if kind else f"goes with --shape {why}"
            raise click.BadParameter(said, param_hint=option)


@click.command()
@click.option("--cell", "cells", type=click.Choice(CELLS, case_sensitive=False), multiple=True, help="Default: all.")
@click.option("--dtype", "dtypes", type=click.Choice(list(DTYPES)), multiple=True, help="Default: fp32 or tf32, bf16.")
@click.option(
    "--threads",
    type=click.IntRange(1),
    multiple=True,
    help="Default: 1 and 2, as far as there are cores; of --shape what torch uses; beside rivals 1.",
)
@click.option(
    "--shape",
    "shapes",
    type=ShapeType(),
    multiple=True,
    help="Time, batch, input size and hidden size of your own layer, in the place of a grid; may be repeated.",
)
@click.option("--layers", type=click.IntRange(1), help="Of --shape and --scaling. [default: 1]")
@click.option("--bidirectional", is_flag=True, help="Of --shape and --scaling.")
@click.option("--mode", "modes", type=click.Choice(MODES), multiple=True, help="Default: all.")
@click.option("--variant", "variants", type=click.Choice(VARIANTS), multiple=True, help="Default: plain.")
@click.option(
    "--provider",
    "providers",
    multiple=True,
    help="torch, loop, cell, auto or a backend's name; on a CPU onnxruntime, scan (JAX's lax.scan), compile-loop, "
    "compile-scan.",
)
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu")
@click.option(
    "--grid",
    type=click.Choice(GRID_NAMES),
    help="full; quick: in a minute; rivals, compiled: beside those that can be installed; deepbench: DeepBench's "
    "sizes up to H=1024. [default: full]",
)
@click.option("--quick", is_flag=True, help="The same as --grid quick.")
@click.option(
    "--minutes",
    type=click.FloatRange(0),
    help="For each dtype and thread count. "
    "[default: 9; 1 of --quick, --shape, --model; 3 of --scaling, --flex, --field; 4 of --isas; 4 or 5 of other grids]",
)
@click.option(
    "--memory/--no-memory",
    default=None,
    help="Measure peak memory as well. [default: yes; no of --shape and beside rivals]",
)
@click.option("--stream", is_flag=True, help="Measure module.stream() alone, against torch's cells and T=1 calls.")
@click.option(
    "--model",
    metavar="MODULE:FACTORY",
    help="Measure your own model before and after fused_rnn.convert, layer by layer. The factory, of a module or a "
    "file.py, takes no arguments and returns (module, inputs) or (module, inputs, loss).",
)
@click.option(
    "--scaling",
    is_flag=True,
    help="Measure 1, 2, … threads, and as many processes of one thread each: sequences a second.",
)
@click.option(
    "--flex", is_flag=True, help="Measure FlexRNN against the built-in modules, a loop over its step, and JAX."
)
@click.option(
    "--field", is_flag=True, help="Measure the cells of the literature against the closest built-in and a plain loop."
)
@click.option(
    "--isas", is_flag=True, help="Measure every instruction set of this CPU in a process of its own: % of the limit."
)
@click.option("--jax-python", metavar="PATH", help="A Python that has jax, for lax.scan. [default: this one]")
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    help="Folder of the results. [default: bench-out/cpu or /GPU; of --readme: benchmarks/results/cpu or /GPU]",
)
@click.option("--choose", is_flag=True, help="Measure nothing: make the table backend=None goes by of a GPU's files.")
@click.option(
    "--readme",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="Measure nothing: write the result files' tables into this page, condensed, and into docs/measurements.md "
    "beside it, between their markers.",
)
def bench(
    cells: tuple[str, ...],
    dtypes: tuple[str, ...],
    threads: tuple[int, ...],
    shapes: tuple[Shape, ...],
    layers: int | None,
    bidirectional: bool,
    modes: tuple[str, ...],
    variants: tuple[str, ...],
    providers: tuple[str, ...],
    device: str,
    grid: str | None,
    quick: bool,
    minutes: float | None,
    memory: bool | None,
    stream: bool,
    model: str | None,
    scaling: bool,
    flex: bool,
    field: bool,
    isas: bool,
    jax_python: str | None,
    out: Path | None,
    choose: bool,
    readme: Path | None,
) -> None:
    """Measure fused_rnn against torch.nn, a loop over cells and rivals, interleaved in one process.

    Your own layer, in a minute: bench --shape 128,32,80,256 --cell LSTM --layers 2 --bidirectional

    Writes one JSON file and one plot per dtype and thread count into a folder that git ignores, or into --out. Rows
    measured again replace the old ones; nothing else in a file is touched, and a file from another machine or torch is
    left alone. An option that would have no effect is refused.
    """
    from fused_rnn.commands.bench.run import execute
    from fused_rnn.commands.bench.workload import asked, check_providers
    from fused_rnn.commands.machine import OUT, folder, make_ignored

    _check_kind()
    if readme is not None:
        _fill_readme(readme, out or folder(device), device)
        return
    if choose:
        _choose(out or folder(device, OUT))
        return
    if device == "cuda" and not torch.cuda.is_available():
        raise click.ClickException("--device cuda: torch finds no GPU here (python -m fused_rnn info says more)")
    if device == "cpu" and "tf32" in dtypes:
        raise click.BadParameter("got 'tf32', which is a GPU's: --device cuda", param_hint="--dtype")
    if device == "cpu" and ops.MISSING is not None:
        raise click.ClickException(f"torch would be measured beside itself: {ops.MISSING}")
    if model is not None:
        _model(model, threads, modes, device, minutes)
        return
    if quick and grid not in (None, "quick"):
        raise click.BadParameter(f"got {grid!r} with --quick, expected one of the two", param_hint="--grid")
    check_providers(providers, device, jax_python or sys.executable)
    if out is None:
        make_ignored(OUT)
        out = folder(device, OUT)
    if stream:
        from fused_rnn.commands.bench.stream import execute as execute_stream

        for count in threads or (1,):
            execute_stream(cells or CELLS, count, 60 * (minutes if minutes is not None else 2), out, Console())
        return
    if flex:
        from fused_rnn.commands.bench.flex import execute as execute_flex

        budget = 60 * (minutes if minutes is not None else 3)
        execute_flex(cells or CELLS, jax_python or sys.executable, budget, out, Console())
        return
    if field:
        from fused_rnn.commands.bench.field import execute as execute_field

        execute_field(60 * (minutes if minutes is not None else 3), out, Console())
        return
    if isas:
        if len(dtypes) > 1 or "step" in modes:
            raise click.BadParameter("goes with one --dtype, and with inference and training", param_hint="--isas")
        from fused_rnn.commands.bench.isas import execute as execute_isas

        budget = 60 * (minutes if minutes is not None else 4)
        execute_isas(cells or CELLS, modes or SEQUENCES, (dtypes or ("fp32",))[0], budget, out, Console())
        return
    if scaling:
        points = partial(_scaling_points, cells, modes, shapes, layers or 1, bidirectional)
        _scaling(points, dtypes, threads, minutes, out)
        return
    if shapes and "step" in modes:
        raise click.BadParameter("got 'step' with --shape: give a shape with T=1", param_hint="--mode")
    if layers and "layers" in variants:
        raise click.BadParameter("got 'layers', which has three, with --layers", param_hint="--variant")
    jax = jax_python or sys.executable
    workload = asked(shapes, "quick" if quick else grid or "full", device, providers, dtypes, threads, modes, jax)
    workload = replace(
        workload,
        cells=cells or CELLS,
        variants=variants or ("plain",),
        layers=layers or 1,
        bidirectional=bidirectional,
        memory=workload.memory if memory is None else memory,
        budget_s=workload.budget_s if minutes is None else 60 * minutes,
        out=out,
    )
    if jax_python is not None and "scan" not in workload.providers:
        raise click.BadParameter("goes with --flex and --provider scan", param_hint="--jax-python")
    execute(workload, Console())


def _scaling_points(
    cells: tuple[str, ...], modes: tuple[str, ...], shapes: tuple[Shape, ...], layers: int, both: bool, dtype: str
) -> list[Point]:
    from fused_rnn.commands.bench.scaling import points

    if "step" in modes:
        raise click.BadParameter("got 'step' with --scaling, expected inference or training", param_hint="--mode")
    return points(dtype, cells or CELLS, modes or SEQUENCES, shapes, layers, both)


def _scaling(
    points: Callable[[str], list[Point]],
    dtypes: tuple[str, ...],
    threads: tuple[int, ...],
    minutes: float | None,
    out: Path,
) -> None:
    from fused_rnn.commands.bench.scaling import counts, execute

    ways = sorted({1, *(threads or counts(torch.get_num_threads()))})
    for dtype in dtypes or ("fp32",):
        execute(points(dtype), ways, 60 * (minutes if minutes is not None else 3), out, Console())


def _model(model: str, threads: tuple[int, ...], modes: tuple[str, ...], device: str, minutes: float | None) -> None:
    from fused_rnn.commands.bench.factory import ModelError
    from fused_rnn.commands.bench.model import execute

    if "step" in modes:
        raise click.BadParameter("got 'step' with --model, expected inference or training", param_hint="--mode")
    budget = 60 * (minutes if minutes is not None else 1)
    moved = None if device == "cpu" else device
    try:
        execute(model, modes or SEQUENCES, threads or (torch.get_num_threads(),), budget, moved, Console())
    except ModelError as error:
        raise click.BadParameter(str(error), param_hint="--model") from error


def _choose(out: Path) -> None:
    from fused_rnn.commands.bench.choose import write

    try:
        click.echo(f"Written to {write(out)}")
    except (ValueError, FileNotFoundError) as error:
        raise click.ClickException(str(error)) from error


def _fill_readme(readme: Path, out: Path, device: str) -> None:
    from fused_rnn.commands.bench.readme import update

    try:
        changed = update(readme, out, provider=device)
    except (ValueError, FileNotFoundError) as error:
        raise click.ClickException(str(error)) from error
    click.echo(f"{readme}: {'tables written' if changed else 'already up to date'}")
