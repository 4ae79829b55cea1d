"""Every CUDA kernel, compiled for every architecture with no GPU: `make cubin-cuda`.

    python scripts/cubin.py [--arch sm_90a ...] [--cell lstm ...] [--precision bf16 ...] [--narrow int8] [--json FILE]

Prints registers, spills, stack and static shared memory of each, and for sm_90a the instructions in its time loop by
kind: the loop around the product, in a general kernel with three exchanges in it, of which a launch runs one; of those
of a known team, one by the type of histories, the shorter. Under it, for each team that runs it, the cycles of a step
by part, of one warp alone (step_cycles.py): of a kernel for a known team, for that one; of a general kernel, for the
teams that the planner chooses at the sizes of ARCHITECTURE.md's table if no team were known. Exits with 1 if a kernel
does not compile, spills, has a stack frame, waits for what it has just asked of memory for its next step, or is run by
no plan. --narrow: the forward kernels that keep W_hh so, in the precisions that have them.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import plan_table
import sass
import step_cycles

from fused_rnn import cells, ops
from fused_rnn.plan import DEVICES, NARROWED, PRECISIONS, Forced, make, precision_of, read

CSRC = Path(__file__).parent.parent / "csrc"
ARCHITECTURES = ("sm_80", "sm_86", "sm_89", "sm_90a", "sm_100", "sm_120")
_REGISTERED = [
    name
    for header in sorted((CSRC / "cells").glob("*.h"))
    for name in re.findall(r"^FUSED_RNN_CELL\(\d+, (\w+)\)", header.read_text(), re.MULTILINE)
]
CELLS = {re.sub(r"(?<!^)(?=[A-Z])", "_", name).lower(): name for name in _REGISTERED}  # and their types in C++
FLAGS = ["-std=c++17", "-O3", "--expt-relaxed-constexpr", "-cubin", "-Xptxas", "-v"]
COUNTED = "sm_90a"  # where the time loops' instructions are counted, and a step of these is timed
# Kinds of instructions, by how their names in machine code begin.
KINDS = {
    "mma": ("HMMA",),
    "fma": ("FFMA", "FADD", "FMUL", "DFMA"),
    "mufu": ("MUFU",),
    "lds": ("LDS", "LDSM"),
    "sts": ("STS",),
    "st.async": ("STAS",),
    "ldg": ("LDG", "LDGSTS"),
    "stg": ("STG", "RED", "ATOM"),
    "barrier": ("BAR", "SYNCS", "WARPSYNC", "UCGABAR"),
    "branch": ("BRA", "BSSY", "BSYNC"),
}


class Known(NamedTuple):
    """A team that kernels are compiled for."""

    exchange: str
    members: int
    units: int  # of a member
    rows: int

    def __str__(self) -> str:
        return f"known {self.exchange} of {self.members} x {self.units} units"


# By their places in known_teams.h's table.
KNOWN = [
    Known(exchange, int(members), int(units), 8 * int(nt))
    for exchange, members, units, nt in re.findall(
        r"\{(?:true|false), ExchangeKind::(\w+), (\d+), (\d+), (\d+), \{", (CSRC / "cuda" / "known_teams.h").read_text()
    )
]


class Loop(NamedTuple):
    """What a persistent kernel is compiled for."""

    backward: bool
    rows: int
    known: Known | None


class Kernel(NamedTuple):
    """What the assembler says of a kernel; bytes a thread, but for shared. loop: instructions by kind, None unless
    counted. steps: cycles by part, by sizes and team; waits: the instructions that wait for the next step's input."""

    name: str
    arch: str
    registers: int
    stack: int
    spills: int
    shared: int
    loop: dict[str, int] | None = None
    steps: dict[str, dict[str, int]] = {}  # noqa: RUF012 (a named tuple)
    waits: tuple[str, ...] = ()

    @property
    def fault(self) -> str:
        faults = [f"spills {self.spills} bytes"] * bool(self.spills)
        faults += ["is run by no plan"] * (self.loop is not None and not self.steps)
        faults += [f"waits for its next step's input: {instruction}" for instruction in self.waits]
        return ", ".join(faults + [f"has a stack frame of {self.stack} bytes"] * bool(self.stack))

    def __str__(self) -> str:
        counted = ""
        if self.loop is not None:
            counted = "; time loop " + ", ".join(f"{count} {kind}" for kind, count in self.loop.items() if count)
        line = f"{self.arch:<6} {self.name:<56} {self.registers:>3} registers, {self.shared} bytes shared{counted}"
        for team, parts in self.steps.items():
            line += f"\n       {team}: {sum(parts.values())} cycles a step; "
            line += ", ".join(f"{part} {cycles}" for part, cycles in parts.items())
        return line


def loop_of(mangled: str) -> Loop | None:
    """Of a mangled name; None where it is no persistent kernel's."""
    found = re.search(r"persistent_(fwd|bwd)_kernel.*?Li(\d+)E(?:.*?KnownTeamILi(\d+)E)?", mangled)
    return Loop(found[1] == "bwd", 8 * int(found[2]), KNOWN[int(found[3])] if found[3] else None) if found else None


def kernel_name(mangled: str, cell: str, precision: str) -> str:
    """lstm bf16 persistent_fwd NT=2, of a mangled name; or lstm bf16 persistent_bwd known scatter of 8 x 16 units."""
    kind, loop = re.search(r"(persistent|pointwise)_(fwd|bwd)", mangled), loop_of(mangled)
    team = f" {loop.known or f'NT={loop.rows // 8}'}" if loop else ""
    return f"{cell} {precision} {kind[0] if kind else mangled}{team}"


def read_ptxas(text: str, cell: str, precision: str, arch: str) -> list[tuple[str, Kernel]]:
    """(mangled name, kernel) for each in what ptxas -v prints."""
    found = []
    for part in text.split("Compiling entry function '")[1:]:
        mangled = part.split("'")[0]
        stack, stores, loads = (
            int(re.search(rf"(\d+) bytes {what}", part)[1])  # type: ignore[index]
            for what in ("stack frame", "spill stores", "spill loads")
        )
        registers = int(re.search(r"Used (\d+) registers", part)[1])  # type: ignore[index]
        shared = re.search(r"(\d+) bytes smem", part)
        name = kernel_name(mangled, cell, precision)
        found.append((mangled, Kernel(name, arch, registers, stack, stores + loads, int(shared[1]) if shared else 0)))
    return found


def time_loop(code: str) -> dict[str, int] | None:
    """Instructions by kind in the shortest loop with a product, a barrier and remote stores, or a counter in their
    place; None if there is none."""
    lines = [(int(at, 16), text) for at, text in re.findall(r"/\*([0-9a-f]{4,6})\*/\s+(.*?);", code)]
    places = {at: i for i, (at, _) in enumerate(lines)}
    loops = []
    for end, (at, text) in enumerate(lines):
        target = re.search(r"BRA.*?(?:`\(\S+?\)|0x([0-9a-f]+))", text)
        begin = places.get(int(target[1], 16)) if target and target[1] else None
        if begin is not None and lines[begin][0] < at:
            names = [re.sub(r"^@!?U?P\w+\s+", "", body).split()[0].split(".")[0] for _, body in lines[begin : end + 1]]
            if "BAR" in names and {"STAS", "REDG"} & set(names) and ("HMMA" in names or names.count("FFMA") > 64):
                loops.append(names)
    if not loops:
        return None
    shortest: list[str] = min(loops, key=len)
    counts = Counter(shortest)
    kinds = {kind: sum(counts[name] for name in names) for kind, names in KINDS.items()}
    return {"in all": counts.total(), **kinds, "other": counts.total() - sum(kinds.values())}


def launches(
    cell: str, precision: str, backward: bool, narrow: str | None, sizes: Iterable[int], forced: Forced
) -> Iterator[step_cycles.Launch]:
    """What the planner has run at these H and the B of ARCHITECTURE.md's table, where a step of it can be timed; by
    kernels for known teams, or by general ones, as `forced` says."""
    device = DEVICES[COUNTED[:5]]
    for hidden, batch in product(sizes, plan_table.BATCH):
        numbers = (PRECISIONS.index(precision), backward, cells.CELLS[cell].gates, batch, hidden, 1)
        plan = read(make(ops._C, numbers, ops._C.Device(*device), forced, narrow=narrow), precision, device)
        if plan.exchange in step_cycles.MARKS and plan.known == forced.known:
            yield step_cycles.Launch(cell, plan, batch, hidden, backward)


def teams(cell: str, precision: str, loop: Loop, narrow: str | None = None) -> dict[str, step_cycles.Launch]:
    """Each team that runs this kernel, once: the known one; or those of so many rows at the H of that table. Where
    there is none, one is forced, at the smallest H: so every kernel is looked at."""
    asked = cell, precision, loop.backward, narrow
    if loop.known:
        exchange, members, units, rows = loop.known
        hot = list(launches(*asked, [members * units], Forced(exchange, members, rows)))
        forced = []
    else:
        general = launches(*asked, plan_table.HIDDEN, Forced(known=False))
        hot = [one for one in general if one.plan.rows == loop.rows]
        forced = list(launches(*asked, plan_table.HIDDEN[:1], Forced("cluster", rows=loop.rows, known=False)))
    found: dict[str, list[step_cycles.Launch]] = {}
    for one in hot or forced:
        plan = one.plan
        team = f"{'' if hot else 'forced '}{plan.exchange} of {plan.members}, {plan.warps[0]} x {plan.warps[1]} warps"
        found.setdefault(f"H={one.hidden}, {team}", []).append(one)
    return {f"{team}, B={', '.join(str(one.batch) for one in same)}": same[0] for team, same in found.items()}


def timed(kernel: Kernel, code: str, cell: str, precision: str, loop: Loop | None, narrow: str | None) -> Kernel:
    """With its time loop counted, and a step of each team that runs it timed: its input is in DRAM, but that of a known
    team with a short step has been brought to L2 (ahead.h)."""
    kernel = kernel._replace(loop=time_loop(code))
    if loop is None:
        return kernel
    steps, waits = {}, set[str]()
    known = loop.known  # csrc/cuda/known_teams.h's brings_ahead
    brought = known is not None and known.exchange != "direct" and known.units * known.rows <= 256
    memory = sass.L2 if brought else step_cycles.DRAM
    for team, launch in teams(cell, precision, loop, narrow).items():
        for rare in (True, False):
            step = step_cycles.replay(code, launch, memory, rare)
            steps[team] = step.cycles
            waits |= set(step.waits)
    return kernel._replace(steps=steps, waits=tuple(sorted(waits)))


def find_cuobjdump() -> str | None:
    """The toolkit's, or the one in Triton's wheel."""
    triton = importlib.util.find_spec("triton")
    near = Path(triton.origin).parent / "backends/nvidia/bin" if triton and triton.origin else Path()
    return shutil.which("cuobjdump") or shutil.which("cuobjdump", path=str(near))


def compile_one(cell: str, precision: str, arch: str, narrow: str | None = None) -> tuple[list[Kernel], str]:
    """The kernels of one object file, and what went wrong."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernels.cubin"
        defines = [f"-DFUSED_RNN_FORMULA={CELLS[cell]}", f"-DFUSED_RNN_PRECISION={precision}"]
        defines += [] if narrow is None else [f"-DFUSED_RNN_NARROW={narrow}"]
        command = ["nvcc", *FLAGS, f"-arch={arch}", *defines, str(CSRC / "cuda" / "instantiate.cu")]
        done = subprocess.run([*command, "-o", str(cubin)], capture_output=True, text=True, check=False)
        if done.returncode != 0:
            return [], f"{arch} {cell} {precision}: {done.stderr.strip()[-2000:]}"
        label = precision if narrow is None else f"{precision} {narrow}"
        found = read_ptxas(done.stdout + done.stderr, cell, label, arch)
        tool = find_cuobjdump() if arch == COUNTED else None
        if tool is None:
            return [kernel for _, kernel in found], ""
        code = subprocess.run([tool, "-sass", str(cubin)], capture_output=True, text=True, check=True).stdout
        functions = dict(part.split("\n", 1) for part in code.split("Function : ")[1:])
        return [timed(kernel, functions[name], cell, precision, loop_of(name), narrow) for name, kernel in found], ""


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="cubin", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--arch", nargs="+", default=list(ARCHITECTURES))
    parser.add_argument("--cell", nargs="+", default=list(CELLS), choices=list(CELLS))
    parser.add_argument("--precision", nargs="+", default=list(PRECISIONS), choices=PRECISIONS)
    parser.add_argument("--narrow", choices=list(NARROWED))
    parser.add_argument("--jobs", type=int, default=int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1))
    parser.add_argument("--json", type=Path, help="write the figures into this file, too")
    chosen = parser.parse_args(arguments)
    if shutil.which("nvcc") is None:
        print("cubin: nvcc is not on the PATH", file=sys.stderr)
        return 1
    precisions = chosen.precision
    if chosen.narrow is not None:
        having = {precision_of(dtype, tf32) for dtype in NARROWED[chosen.narrow] for tf32 in (False, True)}
        precisions = [precision for precision in precisions if precision in having]
    todo = [(cell, precision, arch) for arch in chosen.arch for cell in chosen.cell for precision in precisions]
    kernels: list[Kernel] = []
    faults = 0
    with ThreadPoolExecutor(chosen.jobs) as pool:
        for found, error in pool.map(lambda job: compile_one(*job, chosen.narrow), todo):
            kernels += found
            faults += bool(error) + sum(bool(kernel.fault) for kernel in found)
            for line in [*found, *[f"FAULT {error}"] * bool(error)]:
                fault = line.fault if isinstance(line, Kernel) else ""
                print(f"FAULT {line}: {fault}" if fault else line, flush=True)
    if chosen.json is not None:
        rows: list[dict[str, Any]] = [kernel._asdict() for kernel in kernels]
        chosen.json.write_text(json.dumps(rows, indent=1) + "\n")
    print(f"{len(kernels)} kernels compiled for {', '.join(chosen.arch)}; {faults} with a fault")
    return 1 if faults or not kernels else 0


if __name__ == "__main__":
    sys.exit(main())
