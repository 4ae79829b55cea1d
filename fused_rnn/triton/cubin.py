"""Every Triton kernel in every shipped tile, compiled ahead of time with no GPU: `make cubin`.

    python -m fused_rnn.triton.cubin [--arch sm_90 ...] [--cell lstm ...] [--hidden 256 ...] [--kind half ...]

A cell is a built-in one's name, MODULE:NAME of a user's own in a module that can be imported, or a program's text.

Prints registers, spills and shared memory of each, and with a resident W_hh on NVIDIA a step's trips to memory. Exits
with 1 if a kernel does not compile, spills more than a few bytes, takes more shared memory than its architecture has,
or asks for one part of h after the other (of dgates: for every part).
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import NamedTuple

from fused_rnn.cells import CELLS, title
from fused_rnn.cells.program import is_program
from fused_rnn.flex import UserCell
from fused_rnn.flex.scan import scan_of
from fused_rnn.triton import planner
from fused_rnn.triton.compile import SPILLS, fewest_spills
from fused_rnn.triton.schedule import Schedule, Shape, shape_of
from fused_rnn.triton.target import ARCHITECTURES

ARCHS = ("sm_80", "sm_90", "sm_100", "sm_120", "gfx942")
KINDS = {"half": ("bfloat16", "ieee"), "tf32": ("float32", "tf32"), "ieee": ("float32", "ieee")}
# Each side of every border in the tile tables; at 130 rows are not a multiple of 16 bytes, 768 is no power of two.
HIDDEN = (32, 64, 128, 130, 256, 512, 768, 1024, 2048)
COMPILED = ("lstm", "gru", "rnn_tanh")  # rnn_relu is rnn_tanh but for one line of its cell: at one H
RNN_HIDDEN = (32, 130, 512)  # of the same tiles as the others' kernels, and with a quarter of their registers


class Job(NamedTuple):
    """A kernel to compile. variant: what it is compiled for besides its schedule, as aot.compile_kernel takes it."""

    arch: str
    shape: Shape
    dtype: str
    precision: str
    schedule: Schedule
    variant: tuple[str, ...]

    def __str__(self) -> str:
        name, hidden = "bwd" if self.shape.backward else "fwd", self.shape.hidden
        what = "+".join(self.variant) or "plain"
        return (
            f"{self.arch:<7} {name} {title(self.shape.cell):<8} {self.dtype:<8} {self.precision} H={hidden:<5}"
            f"{what:<18} {self.schedule}"
        )

    @property
    def trips(self) -> int:
        """The most that a step's product may take if W_hh is resident.

        Forward asks for all of h at once, of more than four gates some versions of Triton in parts. Backward may take
        less than one for each depth of its tile, and of a user's cell, whose values may be in the way, one more.
        """
        if not self.shape.backward:
            return 1 if self.shape.gates <= 4 else 3
        return max(1, -(-self.shape.hidden // self.schedule.tile.depth) - 1) + is_program(self.shape.cell)


class Outcome(NamedTuple):
    job: Job
    registers: int = 0
    spills: int = 0
    shared: int = 0
    trips: int = 0
    error: str = ""

    @property
    def said(self) -> str:
        spills = f", {self.spills} bytes spilled" if self.spills else ""
        trips = f", {self.trips} trips to memory" if self.trips else ""
        return f"{self.registers} registers{spills}, {self.shared} bytes shared{trips}"

    @property
    def fault(self) -> str:
        """Why this kernel may not be shipped; empty if it may."""
        limit = ARCHITECTURES[self.job.arch].shared
        if self.error:
            return self.error
        if self.spills > SPILLS:
            return f"spills {self.spills} bytes a thread"
        if self.trips > self.job.trips:
            return f"takes {self.trips} trips to memory for a step's product, not {self.job.trips}"
        return f"takes {self.shared} bytes of shared memory, there are {limit}" if self.shared > limit else ""


def _of_shape(arch: str, shape: Shape, dtype: str, precision: str) -> Iterator[Job]:
    # Training with everything in it is what runs short of registers; plain inference is the other end.
    variants = [("lengths", "reset")] if shape.backward else [("lengths", "reset", "save"), ()]
    schedules = planner.shipped(shape, ARCHITECTURES[arch])
    for schedule in schedules:
        for variant in variants if schedule in schedules[:2] else variants[:1]:
            yield Job(arch, shape, dtype, precision, schedule, variant)
    if is_program(shape.cell) and scan_of(shape.cell) is not None:
        for way in ("scan", "chunked"):
            yield Job(arch, shape, dtype, precision, schedules[0], (way, *variants[0]))
    if not shape.backward and shape.cell == "lstm":
        yield Job(arch, shape, dtype, precision, schedules[0], ("checkpoint",))
    if shape.backward and shape.cell == "lstm" and shape.kind == "half":
        yield Job(arch, shape, dtype, precision, schedules[0], ("lengths", "reset", "replay"))
    if not shape.backward and shape.hidden <= 130:
        yield Job(arch, shape, dtype, precision, planner.replay(shape.hidden), ("replay", "save"))


def jobs(archs: list[str], cells: list[str], kinds: list[str], hidden: list[int]) -> Iterator[Job]:
    """What to compile, the kernels of one architecture after another."""
    for arch in archs:
        for kind in kinds:
            if kind == "tf32" and not ARCHITECTURES[arch].nvidia:
                continue
            dtype, precision = KINDS[kind]
            for cell in cells:
                gates = CELLS[cell].gates
                few = [size for size in hidden if size in RNN_HIDDEN] or hidden[:1]
                for size in hidden if gates > 1 or is_program(cell) else few:
                    for backward in (False, True):
                        yield from _of_shape(arch, shape_of(CELLS[cell], kind, size, backward), dtype, precision)
        for cell, dtype in (("rnn_relu", "bfloat16"), ("lstm", "float16"), ("gru", "float16")):
            if "half" in kinds and 256 in hidden and cell in (*cells, "rnn_relu"):
                for backward in (False, True):
                    yield from _of_shape(arch, shape_of(CELLS[cell], "half", 256, backward), dtype, "ieee")


def compile_job(job: Job) -> Outcome:
    """Compile as a launch would: under its register bound and, of a user's cell, in its tile."""
    from fused_rnn.triton import aot

    shape = job.shape
    cell, products = CELLS[shape.cell], (job.dtype, job.precision, shape.hidden)

    def compiled(schedule: Schedule, bound: int | None) -> tuple[int, Outcome]:
        kernel = aot.compile_kernel(cell, *products, schedule, job.arch, shape.backward, job.variant, bound)
        # With stages there are more waits in a step, and no one chain of loads.
        report = aot.report(kernel, job.arch, schedule.hold and not shape.staged)
        made = job._replace(schedule=schedule)
        return report.spills, Outcome(made, report.registers, report.spills, report.shared, report.trips)

    try:
        return fewest_spills(cell, job.schedule, job.arch, compiled)
    except Exception as error:  # whatever the compiler's passes and its assembler raise, the report names it
        return Outcome(job, error=f"{type(error).__name__}: {error}".splitlines()[0])


def _cell(name: str) -> str:
    """The name by which the loops know a cell that was asked for."""
    if name in CELLS or is_program(name):
        return CELLS[name].name
    module, _, attribute = name.partition(":")
    try:
        own = getattr(importlib.import_module(module), attribute, None) if attribute else None
    except ModuleNotFoundError as error:
        if error.name != module:
            raise
        own = None
    if not isinstance(own, UserCell):
        known = f"one of {', '.join(CELLS)}, MODULE:NAME of a user's cell or a program's text"
        raise argparse.ArgumentTypeError(f"got {name!r}, expected {known}")
    return own.descriptor().name


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="cubin", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--arch", nargs="+", default=list(ARCHS), choices=list(ARCHITECTURES))
    parser.add_argument("--cell", nargs="+", default=list(COMPILED), type=_cell, help="see above")
    parser.add_argument("--kind", nargs="+", default=list(KINDS), choices=list(KINDS))
    parser.add_argument("--hidden", nargs="+", type=int, default=list(HIDDEN))
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes")
    parser.add_argument("--quiet", action="store_true", help="print faults and totals alone")
    chosen = parser.parse_args(arguments)
    os.environ.pop("TRITON_INTERPRET", None)  # the interpreter's kernels are not to be compiled
    todo = list(jobs(chosen.arch, chosen.cell, chosen.kind, chosen.hidden))
    faults = done = 0
    with ProcessPoolExecutor(chosen.jobs, mp_context=get_context("spawn")) as pool:
        for outcome in pool.map(compile_job, todo):
            done += 1
            if outcome.fault:
                faults += 1
                print(f"FAULT {outcome.job}: {outcome.fault}", flush=True)
            elif not chosen.quiet:
                print(f"{outcome.job}: {outcome.said}", flush=True)
    print(f"{done} kernels compiled for {', '.join(chosen.arch)}; {faults} with a fault")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
