"""Sources of kernels that are compiled at first use; and a user's cell as C++, in the form of csrc/cells/*.h."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from fused_rnn.cells import Cell
from fused_rnn.cells.program import Program
from fused_rnn.cuda.staged import in_stages, is_staged
from fused_rnn.cuda.statements import array, body, each, function
from fused_rnn.flex.scan import scan_of


class Kernel(NamedTuple):
    """One kernel of csrc/cuda. kind: "persistent_fwd", "persistent_bwd", "pointwise_fwd", .. or "stages_fwd", ..
    precision: one of fused_rnn.plan.PRECISIONS.  tiles: of a persistent one, rows of the batch in eights.
    fewer: csrc/cuda/tiles.h's kFewerBlocks.  shape: of a known team, its place in csrc/cuda/known_teams.h.
    narrow: of a persistent forward one, what W_hh is kept in, one of fused_rnn.call.NARROW."""

    kind: str
    precision: str
    tiles: int = 0
    fewer: int = 0
    shape: int = -1
    narrow: str | None = None

    @property
    def loop(self) -> str:
        """What it is told, a type of csrc/cuda/params.h."""
        return "ForwardLoop" if self.kind.endswith("fwd") else "BackwardLoop"

    @property
    def by_stages(self) -> bool:
        """Whether a launch of it may be a part of a step."""
        return self.kind.startswith("stages")

    @property
    def header(self) -> str:
        """Where it is, in csrc/cuda."""
        return f"{self.kind}.h" if self.tiles else "by_stages.h" if self.by_stages else "pointwise.h"

    def name(self, cell: str) -> str:
        """Of a cell's kernel in C++."""
        if self.tiles:
            policy = f"fused_rnn::cuda::{self.precision.capitalize()}Product"
            narrow = "" if self.narrow is None else f", fused_rnn::cuda::Narrow::{self.narrow}"
            known = (
                f", fused_rnn::cuda::KnownTeam<{self.shape}, {policy}::kPrecision, fused_rnn::{cell}::gates{narrow}>"
            )
            more = known if self.shape >= 0 else ""
            policy = f"fused_rnn::cuda::NarrowProduct<{policy}{narrow}>" if narrow else policy
            return f"fused_rnn::cuda::{self.kind}_kernel<fused_rnn::{cell}, {policy}, {self.tiles}{more}>"
        space = "fused_rnn::cuda::"
        storage, math = {
            "bf16": (space + "bf16", space + "Fast"),
            "f16": (space + "f16", space + "Fast"),
            "f64": ("double", "fused_rnn::Libm<double>"),
        }.get(self.precision, ("float", space + "Exact"))
        return f"{space}{self.kind}_kernel<fused_rnn::{cell}, {storage}, {math}>"


def _forward(program: Program) -> list[str]:
    vectors, states, params = program.gates + program.apart, len(program.states), len(program.params)
    inputs = [*each("a", vectors), *each("before", states), *each("p", params)]
    lines = body(program.forward, inputs, [each("after", states), each("s", program.saved)])
    used = program.forward.uses()
    reads = [any(first <= i < last for i in used) for first, last in _ranges(vectors, states, params)]
    arguments = [
        array("a", vectors, reads[0]), array("before", states, reads[1]), array("p", params, reads[2]),
        array("after", states, True, const=False), array("s", program.saved, program.saved > 0, const=False),
    ]  # fmt: skip
    return function("forward", arguments, lines)


def _backward(program: Program) -> list[str]:
    saved, vectors = program.saved, program.gates + program.apart
    states, params = len(program.states), len(program.params)
    ranges = list(_ranges(saved, states, states, params, states))
    used = program.backward.uses()
    reads = [any(first <= i < last for i in used) for first, last in ranges]
    # The gradients of the states are overwritten: what comes in has a name of its own.
    gradients = [f"dafter{i}" for i in range(states)]
    inputs = [*each("s", saved), *each("before", states), *each("after", states), *each("p", params), *gradients]
    own = [f"const N dafter{i} = dstate[{i}];" for i in range(states) if ranges[4][0] + i in used]
    targets = [each("d", vectors), each("dstate", states), each("dp", params)]
    arguments = [
        array("s", saved, reads[0]), array("before", states, reads[1]), array("p", params, reads[3]),
        array("after", states, reads[2], const=False), array("dstate", states, True, const=False),
        array("d", vectors, True, const=False), array("dp", params, params > 0, const=False),
    ]  # fmt: skip
    return function("backward", arguments, own + body(program.backward, inputs, targets))


def _ranges(*counts: int) -> Iterable[tuple[int, int]]:
    first = 0
    for count in counts:
        yield first, first + count
        first += count


def struct(program: Program, name: str = "Printed", sequences: bool = False, late: bool = False) -> str:
    """The cell as a struct of this name. sequences: its backward takes gradients of the other states over time.  late:
    in stages, its outputs are written in the last one, for who keeps what crosses alone: a team's kernels have fewer
    registers then."""
    before, after = (sum(1 << i for i, reads in enumerate(flags) if reads) for flags in program.backward_reads())
    says = {
        "const char* name": f'"{name}"',
        "int gates": program.gates,
        "int states": len(program.states),
        "const char* state_names[]": "{" + ", ".join(f'"{state}"' for state in map(_word, program.states)) + "}",
        "int saved": program.saved,
        "int params": len(program.params),
        "bool recurrent": str(program.recurrent).lower(),
        "int apart": program.apart,
        "bool reads_h": str(program.reads_h).lower(),
        "bool sequences": str(sequences).lower(),
        "unsigned backward_after": after,
        "unsigned backward_before": before,
    }
    staged = is_staged(program)
    if staged:
        says |= {"bool staged": "true", "int masks": len(program.masks), "int blocks": program.blocks}
    if scan_of(program.text) is not None:
        says |= {"bool linear": "true"}
    constants = [f"  static constexpr {what} = {value};" for what, value in says.items()]
    names = ", ".join(map(_word, (*program.states, *program.params)))
    head = [f"// {_word(program.title)}: {names}", f"struct {name} : CellDefaults {{"]
    formulas = in_stages(program, late) if staged else ["", *_forward(program), "", *_backward(program)]
    return "\n".join([*head, *constants, *formulas, "};"]) + "\n"


def definition(cell: Cell, name: str = "Printed", sequences: bool = False, late: bool = False) -> str:
    """The cell by this name: a user's as `struct` writes it, a built-in one as csrc/cells has it."""
    if cell.program is not None:
        return struct(cell.program, name, sequences, late)
    return f"using {name} = {''.join(part.capitalize() for part in cell.name.split('_'))};\n"


def _word(name: str) -> str:
    """A name of the user's, as far as it may stand in a source."""
    return re.sub(r"[^A-Za-z0-9_]", "_", name)


def source(cells: str, kernels: Sequence[Kernel], instances: bool = True) -> str:
    """A translation unit with cells that `definition` has written, and what kernels of the same `fewer` need.
    instances: with these kernels of the struct Printed."""
    headers = {f'#include "cuda/{k.header}"': None for k in kernels}
    policies = '#include "cuda/precision.h"'
    loop = "const FUSED_RNN_GRID_CONSTANT"
    made = [f"template FUSED_RNN_INSTANCE {k.name('Printed')}({loop} fused_rnn::cuda::{k.loop});" for k in kernels]
    return "\n".join([
        f"#define FUSED_RNN_FEWER_BLOCKS {kernels[0].fewer}",
        '#include "cells/all.h"', *headers, policies, "",
        "namespace fused_rnn {", "", cells, "}  // namespace fused_rnn", "", *made * instances, "",
    ])  # fmt: skip
