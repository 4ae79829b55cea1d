"""Kernels compiled at first use, over the emulator: what fused_rnn.cuda.printer prints, by g++, loaded by address.

A library holds the kernels of one group, of several cells. The sources' text names it, with that of all headers.
"""

from __future__ import annotations

import ctypes
import hashlib
import re
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import NamedTuple

import emulated_build as build

from fused_rnn.cells import CELLS, Cell
from fused_rnn.cells.program import parse
from fused_rnn.cuda.printer import Kernel, definition, source

FLAGS = ["-O1", "-g0", "-shared"]
ENTRY = """
extern "C" __attribute__((visibility("default"))) void {entry}(
    const fused_rnn::cuda::{loop}& loop, const fused_rnn::cuda::Shape& shape, uint64_t seed, std::string& error) {{
  error = fused_rnn::cuda::emulate(&{name}, loop, shape, seed);
}}
"""


# The known teams: whether backward, exchange, members, units.
SHAPES = [
    (backward == "true", exchange, int(members), int(units))
    for backward, exchange, members, units in re.findall(
        r"\{(true|false), ExchangeKind::(\w+), (\d+), (\d+),", (build.CSRC / "cuda/known_teams.h").read_text()
    )
]


def shapes(members: int, units: int) -> list[int]:
    """Places of a cluster's known teams, forward and backward."""
    return [
        i for i, (_, kind, *team) in enumerate(SHAPES) if kind in ("cluster", "scatter") and team == [members, units]
    ]


class Printed(NamedTuple):
    """A kernel that the module does not have. text: the cell's name.  sequences: with gradients of states over time."""

    text: str
    kernel: Kernel
    sequences: bool = False


def kernels(text: str, precision: str, tiles: Iterable[int] = (1,), known: Iterable[int] = ()) -> list[Printed]:
    """All of a cell in one precision. known: places of the known teams whose kernels are made, too."""
    program = parse(text)
    number = "ieee" if precision == "tf32" else precision  # pointwise, they are the same
    alone = "stages" if CELLS[text].staged else "pointwise"
    made = [Printed(text, Kernel(f"{alone}_{kind}", number)) for kind in ("fwd", "bwd")]
    for nt in tiles if program.recurrent and precision != "f64" else ():
        made.append(Printed(text, Kernel("persistent_fwd", precision, nt)))
        more = (False, True) if len(program.states) > 1 else (False,)
        made += [Printed(text, Kernel("persistent_bwd", precision, nt), sequences) for sequences in more]
    for shape in known:
        backward = SHAPES[shape][0]
        kernel = Kernel("persistent_bwd" if backward else "persistent_fwd", precision, 1, shape=shape)
        both = backward and len(program.states) > 1
        made += [Printed(text, kernel, sequences) for sequences in (False, True)[: 1 + both]]
    return made


@cache
def _headers() -> bytes:
    found = hashlib.sha256()
    for folder in ("cells", "cuda", "cuda/primitives", "emulated", "emulator"):
        for path in sorted((build.CSRC / folder).glob("*.h")):
            found.update(path.read_bytes())
    return found.digest()


def _source(group: tuple[Printed, ...]) -> str:
    """One translation unit."""
    cells = {(one.text, one.sequences, one.kernel.by_stages): f"Cell{i}" for i, one in enumerate(group)}
    structs = [definition(CELLS[text], name, *told) for (text, *told), name in cells.items()]
    parts = [source("\n".join(structs), [one.kernel for one in group], instances=False)]
    parts.append('#include "emulated/emulate.h"\n')
    for i, (text, kernel, sequences) in enumerate(group):
        name = kernel.name(cells[text, sequences, kernel.by_stages])
        parts.append(ENTRY.format(entry=f"entry{i}", loop=kernel.loop, name=name))
    return "".join(parts)


@cache
def library(group: tuple[Printed, ...]) -> Path:
    """The group's library. Its kernels leave the same number of blocks to shared memory."""
    build.CACHE.mkdir(parents=True, exist_ok=True)
    text = _source(group)
    key = hashlib.sha256(repr([build.CXX, build.FLAGS, FLAGS, text]).encode() + _headers()).hexdigest()[:20]
    made = build.CACHE / f"printed-{key}.so"
    if not made.exists():
        written, unfinished = made.with_suffix(".cpp"), made.with_suffix(".unfinished")
        written.write_text(text)
        command = [build.CXX, *build.FLAGS, *FLAGS, *build.DEFINES, f"-I{build.CSRC}", str(written)]
        build._run([*command, "-o", str(unfinished)])
        unfinished.replace(made)
    return made


@cache
def _address(group: tuple[Printed, ...], place: int) -> int:
    entry = getattr(ctypes.CDLL(str(library(group))), f"entry{place}")
    return ctypes.cast(entry, ctypes.c_void_p).value or 0


class Loader:
    """What programs.emulating is given. groups: of kernels that are built together; others are built alone."""

    def __init__(self, groups: Iterable[Iterable[Printed]] = ()) -> None:
        self.groups = [tuple(group) for group in groups]

    def __call__(self, cell: Cell, kernel: Kernel, sequences: bool, device: int) -> int:
        one = Printed(cell.name, kernel, sequences)
        group = next((group for group in self.groups if one in group), (one,))
        return _address(group, group.index(one))
