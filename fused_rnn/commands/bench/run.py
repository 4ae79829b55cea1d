"""A benchmark run: every point of a workload, in a budget of time, into one result file per dtype and thread count."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from fused_rnn.commands.bench.beside_rivals import terminal
from fused_rnn.commands.bench.cudnn import accepted_dtypes
from fused_rnn.commands.bench.goals import goal_table
from fused_rnn.commands.bench.grid import Point
from fused_rnn.commands.bench.heat import heat_map, step_plot
from fused_rnn.commands.bench.limits import Ceilings, measure_limits
from fused_rnn.commands.bench.measure import Timing, counts_core_time, float32_as, measure
from fused_rnn.commands.bench.memory import peak_memory
from fused_rnn.commands.bench.plot import plot
from fused_rnn.commands.bench.providers import BASELINE, OTHERS, kernels_of_torch
from fused_rnn.commands.bench.results import FLOOR, MEMORY, Results, Row, continued, setting, time_row, torch_of
from fused_rnn.commands.bench.rivals import opened, versions
from fused_rnn.commands.bench.tables import report
from fused_rnn.commands.bench.verdict import verdict
from fused_rnn.commands.bench.workload import Workload
from fused_rnn.commands.machine import crowded, describe

SAVE_EVERY = 30.0  # seconds: who is killed, by a kernel that hangs for one, has lost no more than that


def execute(workload: Workload, console: Console) -> list[Path]:
    """Measure everything in the workload, print the tables, write the files; returns their paths.

    What has been measured so far is written now and then, and when an interrupt or an error ends the run.
    """
    paths = []
    before = torch.get_num_threads()
    try:
        for dtype in workload.dtypes:
            for threads in workload.threads:
                torch.set_num_threads(threads)
                with float32_as(dtype, workload.device):
                    paths.append(_execute_one(workload, dtype, threads, console))
    finally:
        torch.set_num_threads(before)
    return paths


def _execute_one(workload: Workload, dtype: str, threads: int, console: Console) -> Path:
    path = workload.path(dtype, threads)
    before = crowded(threads)
    facts = describe(workload.device) | {"dtype": dtype, "threads": threads}
    if workload.device == "cuda":
        facts |= {"cudnn_dtypes": accepted_dtypes()}
    else:
        facts |= {
            "clock": "core" if counts_core_time("cpu") else "wall",
            "torch_runs": kernels_of_torch(dtype),
        } | versions(workload.providers, workload.jax_python)
    limits = measure_limits(dtype, workload.device)
    facts["limits"] = asdict(limits)
    console.rule(f"{facts['device_name']}, {setting(facts)}")
    small, large = limits.read[0][1], limits.read[-1][1]
    console.print(
        f"Limits: {limits.flops / 1e9:.0f} GFLOP/s ({limits.by}); reads {small / 1e9:.0f} GB/s from the first cache, "
        f"{large / 1e9:.0f} GB/s from memory.\n"
        f"Our kernels: {facts['kernels']}. {torch_of(facts)}, commit {facts['commit'] or 'unknown'}."
    )
    path, results, said = continued(path, facts)
    if said is not None:
        console.print(said)
    results.runs.append(facts)
    rows: list[Row] = []
    try:
        run = len(results.runs) - 1
        ceilings = Ceilings(limits, lambda: measure_limits(dtype, workload.device), workload.device)
        _times(workload, dtype, ceilings, run, console, rows, save=lambda so_far: results.with_(so_far).save(path))
        facts["limits"] = asdict(ceilings.limits)
        if ceilings.said():
            console.print(ceilings.said())
        if workload.memory:
            _memory(workload, dtype, threads, run, console, rows)
    finally:
        results.replace(rows)
        if results.rows:
            results.save(path)
    measured = results.of_run(len(results.runs) - 1) if rows else Results([facts])
    console.print(report(measured))
    for beside in terminal(measured):
        console.print(beside, "")
    if (table := goal_table(measured)) is not None:
        console.print(table)
    if (why := before or crowded(threads)) is not None:
        console.print(why, style="yellow")
    elif (words := verdict(measured)).plain:
        console.print(words)
    console.print(f"Written to {path}{_draw(workload, results, path)}", soft_wrap=True)
    return path


def _ours(workload: Workload) -> list[str]:
    """Our backends that are measured alone; the automatic choice where there is none."""
    alone = [provider for provider in workload.providers if provider not in OTHERS]
    return alone or [provider for provider in workload.providers if provider == "auto"]


def _draw(workload: Workload, results: Results, path: Path) -> str:
    """The pictures of a grid beside its file; their names, to be read behind the file's."""
    if workload.shapes:
        return ""
    ours = _ours(workload) or ["auto"]
    pictures = [path.with_suffix(".png"), *(path.with_name(f"{path.stem}-{p}.png") for p in ours[1:])]
    for provider, picture in zip(ours, pictures, strict=True):
        plot(results, provider, picture)
        if workload.device == "cuda":
            heat_map(results, provider, picture.with_stem(f"{picture.stem}-map"))
            step_plot(results, provider, picture.with_stem(f"{picture.stem}-steps"))
    drawn = ", ".join(picture.name for picture in pictures if picture.exists())
    return f" and {drawn}" if drawn else ""


def _times(
    workload: Workload,
    dtype: str,
    ceilings: Ceilings,
    run: int,
    console: Console,
    rows: list[Row],
    save: Callable[[list[Row]], None],
) -> None:
    """Append to `rows`, which has what was measured whatever ends this."""
    points = workload.points(dtype)

    def limits() -> list[Row]:
        """The last word on them is that of the last point."""
        floors = {row.point: ceilings.limits.floor(row.point, workload.device) for row in rows}
        return [time_row(point, FLOOR, Timing(s, s, s, 1), run) for point, s in floors.items()]

    saved = time.perf_counter()
    end = saved + workload.budget_s
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    try:
        with (
            opened(workload.providers, workload.jax_python) as rivals,
            Progress(*columns, console=console, transient=True) as progress,
        ):
            task = progress.add_task("", total=len(points))
            for index, point in enumerate(points):
                progress.update(task, description=str(point))
                share = max(0.0, end - time.perf_counter()) / (len(points) - index)
                timings = measure(point, list(workload.providers), workload.device, share, rivals)
                rows += [time_row(point, provider, timing, run) for provider, timing in timings.items()]
                for timing in timings.values():
                    if timing.refused is None:
                        ceilings.check(point, timing.p50)
                progress.advance(task)
                if time.perf_counter() - saved > SAVE_EVERY:
                    save(rows + limits())
                    saved = time.perf_counter()
    finally:
        rows += limits()


def _memory(workload: Workload, dtype: str, threads: int, run: int, console: Console, rows: list[Row]) -> None:
    """Append to `rows` the peak memory of torch.nn and of each of our backends, both ways to save."""
    ours = _ours(workload)
    points = workload.memory_points(dtype)
    wanted: list[tuple[Point, str, str | None]]
    wanted = [(point, provider, None) for point in points for provider in (BASELINE, *ours)]
    wanted += [(point, provider, "recompute") for point in points if point.mode == "training" for provider in ours]
    with console.status("Peak memory, each in a process of its own"):
        for point, provider, save in wanted:
            name = provider if save is None else f"{provider} save={save}"
            try:
                mib = round(peak_memory(point, provider, workload.device, threads, save) / 2**20, 1)
                rows.append(Row(point, name, MEMORY, run, mib, mib, mib, 1))
            except RuntimeError as error:
                rows.append(Row(point, name, MEMORY, run, refused=str(error)))
