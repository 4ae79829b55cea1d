"""Sources of kernels that are compiled at first use; and a user's cell as C++, in the form of csrc/cells/*.h."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from fused_rnn.cells import Cell
from fused_rnn.cells.program import MATRIX_PRODUCTS, PUBLISHING, Graph, Program
from fused_rnn.flex.scan import scan_of

# Operations that are not functions of csrc/cells/math.h's policies. A comparison is a number, and so is a condition.
_OPERATORS = {
    "neg": "-{0}",
    "add": "{0} + {1}",
    "sub": "{0} - {1}",
    "mul": "{0} * {1}",
    "div": "{0} / {1}",
    "lt": "N({0} < {1})",
    "le": "N({0} <= {1})",
    "gt": "N({0} > {1})",
    "ge": "N({0} >= {1})",
    "eq": "N({0} == {1})",
    "ne": "N({0} != {1})",
    "and": "N({0} != 0 && {1} != 0)",
    "or": "N({0} != 0 || {1} != 0)",
    "sigmoid_backward": "{0} * ({1} * (M::one - {1}))",
    "tanh_backward": "{0} * (M::one - {1} * {1})",
    "relu_backward": "M::relu_gradient({1}, {0})",
    "where": "{0} != 0 ? {1} : {2}",
    "fma": "{0} * {1} + {2}",
}
# Those of Graph.rounded.
_ROUNDED = {
    "mul": "M::product({0}, {1})",
    "sigmoid_backward": "M::product({0}, {1} * (M::one - {1}))",
    "tanh_backward": "M::product({0}, M::one - {1} * {1})",
}
_FROM_DOUBLE = {"inf": "-M::log(N(0))", "-inf": "M::log(N(0))", "nan": "M::sqrt(N(-1))"}


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


def _array(name: str, count: int, used: bool, const: bool = True) -> str:
    """A parameter; an array of nothing has one element, and one that nobody reads no name."""
    return f"{'const ' * const}N (&{name * used})[{max(count, 1)}]"


def _value(op: str, args: Sequence[str], value: float, rounded: bool) -> str:
    if rounded:
        return _ROUNDED[op].format(*args)
    if op == "const":
        return _FROM_DOUBLE.get(repr(value), f"N({value!r})")
    return _OPERATORS[op].format(*args) if op in _OPERATORS else f"M::{op}({', '.join(args)})"


def _body(graph: Graph, inputs: Sequence[str], targets: Sequence[Sequence[str]]) -> list[str]:
    """The statements of a graph. targets: where each group of outputs goes; none of them may be an input."""
    names, lines, rounded = list(inputs), list[str](), graph.rounded()
    for i, (op, args, value) in enumerate(graph.code):
        names.append(f"v{i}")
        text = _value(op, [names[k] for k in args], value, graph.inputs + i in rounded)
        lines.append(f"const N v{i} = {text};")
    for group, places in zip(graph.outputs, targets, strict=True):
        lines += [f"{place} = {names[k]};" for k, place in zip(group, places, strict=True)]
    return lines


def _each(name: str, count: int) -> list[str]:
    return [f"{name}[{i}]" for i in range(count)]


def _function(name: str, arguments: Sequence[str], lines: Iterable[str], parameters: str = "class M") -> list[str]:
    head = f"  static FUSED_RNN_HD void {name}({', '.join(arguments)}) {{"
    return [f"  template <{parameters}, class N>", head, *(f"    {line}" for line in lines), "  }"]


class _Staged(NamedTuple):
    """A graph in stages. crossing: of each value that a later stage reads, or that is published, or made by that, its
    place.  published: by stages what runs between two of them.  lines: those of each stage."""

    crossing: dict[int, int]
    published: list[Published]
    lines: list[list[str]]


class Published(NamedTuple):
    """csrc/cells/cell.h's: what ends a stage, of which block of the cell's matrices; places of operand and result."""

    stage: int
    what: str
    block: int
    operand: int
    result: int


def _staged(
    graph: Graph, inputs: Sequence[str], targets: Sequence[Sequence[str]], own: Sequence[int], late: bool
) -> _Staged:
    """Arguments as `_body` has them. own: inputs that the first stage alone can read, as their targets are theirs.
    late: all outputs are written in the last stage."""
    first, rounded = graph.inputs, graph.rounded()
    stages = [number for number, stage in enumerate(graph.stages) for _ in stage]
    stage_of = dict.fromkeys(own, 0) | {first + i: stage for i, stage in enumerate(stages)}
    anywhere = {first + i for i, (op, *_) in enumerate(graph.code) if op in ("const", "units")}
    crossing: dict[int, int] = {}
    published: list[Published] = []

    def place(value: int) -> int:
        return crossing.setdefault(value, len(crossing))

    for i, (op, args, value) in enumerate(graph.code):
        if op in PUBLISHING:
            block = int(value) if op in MATRIX_PRODUCTS else 0
            published.append(Published(stages[i], op, block, place(args[0]), place(first + i)))
            stage_of[first + i] += 1  # what it makes is there in the next one
        else:
            for a in args:
                if a in stage_of and a not in anywhere and stage_of[a] < stages[i]:
                    place(a)
    lines: list[list[str]] = [[] for _ in graph.stages]
    last = len(lines) - 1
    for k in (k for group in graph.outputs for k in group):
        if late and k in stage_of and k not in anywhere and stage_of[k] < last:
            place(k)
    for stage, text in enumerate(lines):
        there: dict[int, str] = {}

        def named(value: int, stage: int = stage, text: list[str] = text, there: dict[int, str] = there) -> str:
            """A value as this stage has it."""
            if value < first and (value not in own or stage == 0):
                return inputs[value]
            if value in there:
                return there[value]
            if value in anywhere:
                op, _, number = graph.code[value - first]
                there[value] = f"v{value - first}"
                made = "units" if op == "units" else _value("const", (), number, False)
                text.append(f"const N v{value - first} = {made};")
                return there[value]
            return f"c[{crossing[value]}]"

        for i, (op, args, number) in enumerate(graph.code):
            value = first + i
            if stages[i] != stage or value in anywhere or op in PUBLISHING:
                continue
            made = _value(op, [named(a) for a in args], number, value in rounded)
            there[value] = f"v{i}"
            text.append(f"const N v{i} = {made};")
        for value, at in crossing.items():
            if stage_of.get(value, 0) == stage and not (value >= first and graph.code[value - first].op in PUBLISHING):
                text.append(f"c[{at}] = {named(value)};")
        for group, places in zip(graph.outputs, targets, strict=True):
            text += [
                f"{to} = {named(k)};"
                for k, to in zip(group, places, strict=True)
                if (last if late or k in anywhere or k not in stage_of else stage_of[k]) == stage
            ]
    return _Staged(crossing, published, lines)


def _staged_function(name: str, staged: _Staged, arguments: Sequence[str], own: Sequence[str]) -> list[str]:
    """own: statements of the first stage."""
    lines = []
    for stage, text in enumerate(staged.lines):
        body = [*own, *text] if stage == 0 else text
        lines += [f"if constexpr (stage == {stage}) {{", *(f"  {line}" for line in body), "}"]
    return _function(name, [f"[[maybe_unused]] {one}" for one in arguments], lines, "class M, int stage")


def _own_arguments(program: Program, crossing: int) -> list[str]:
    """Those that cells in stages have alone."""
    return [_array("m", len(program.masks), True), "N units", _array("c", crossing, True, const=False)]


def stages(program: Program, late: bool) -> tuple[_Staged, _Staged]:
    """Forward and backward of a staged cell."""
    vectors, states, params = program.gates + program.apart, len(program.states), len(program.params)
    masks, saved = _each("m", len(program.masks)), program.saved
    inputs = [*_each("a", vectors), *_each("before", states), *_each("p", params), *masks]
    forward = _staged(program.forward, inputs, [_each("after", states), _each("s", saved)], (), late)
    dafter = [f"dafter{i}" for i in range(states)]
    first = saved + 2 * states + params + len(masks)
    inputs = [
        *_each("s", saved), *_each("before", states), *_each("after", states), *_each("p", params), *masks, *dafter
    ]  # fmt: skip
    d = _each("d", vectors + program.blocks)
    targets = [d[:vectors], _each("dstate", states), _each("dp", params), d[vectors:]]
    own = range(first, first + states)
    return forward, _staged(program.backward, inputs, targets[: len(program.backward.outputs)], own, late)


def _in_stages(program: Program, late: bool) -> list[str]:
    """A staged cell's constants and formulas."""
    vectors, states, params = program.gates + program.apart, len(program.states), len(program.params)
    saved, (forward, backward) = program.saved, stages(program, late)
    used, first = program.backward.uses(), program.backward.inputs - states
    own = [f"const N dafter{i} = dstate[{i}];" for i in range(states) if first + i in used]
    lines = []
    for name, staged in (("forward", forward), ("backward", backward)):
        lines.append(
            f"  static constexpr int {name}_stages = {len(staged.lines)}, {name}_crossing = {len(staged.crossing)};"
        )
        if staged.published:
            each = (f"{{{stage}, Publish::{what}, {block}, {a}, {b}}}" for stage, what, block, a, b in staged.published)
            lines.append(f"  static constexpr Published {name}_published[] = {{{', '.join(each)}}};")
    after = _array("after", states, True, const=False)
    arguments = [
        _array("a", vectors, True), _array("before", states, True), _array("p", params, True),
        *_own_arguments(program, len(forward.crossing)), after, _array("s", saved, True, const=False),
    ]  # fmt: skip
    lines += ["", *_staged_function("forward", forward, arguments, ())]
    arguments = [
        _array("s", saved, True), _array("before", states, True), _array("p", params, True),
        *_own_arguments(program, len(backward.crossing)), after, _array("dstate", states, True, const=False),
        _array("d", vectors + program.blocks, True, const=False), _array("dp", params, True, const=False),
    ]  # fmt: skip
    return [*lines, "", *_staged_function("backward", backward, arguments, own)]


def is_staged(program: Program) -> bool:
    """Whether the cell is printed in the form that has masks, matrices of its own and sums over units."""
    return bool(program.masks or program.matrices) or program.sees_units


def _forward(program: Program) -> list[str]:
    vectors, states, params = program.gates + program.apart, len(program.states), len(program.params)
    inputs = [*_each("a", vectors), *_each("before", states), *_each("p", params)]
    lines = _body(program.forward, inputs, [_each("after", states), _each("s", program.saved)])
    used = program.forward.uses()
    reads = [any(first <= i < last for i in used) for first, last in _ranges(vectors, states, params)]
    arguments = [
        _array("a", vectors, reads[0]), _array("before", states, reads[1]), _array("p", params, reads[2]),
        _array("after", states, True, const=False), _array("s", program.saved, program.saved > 0, const=False),
    ]  # fmt: skip
    return _function("forward", arguments, lines)


def _backward(program: Program) -> list[str]:
    saved, vectors = program.saved, program.gates + program.apart
    states, params = len(program.states), len(program.params)
    ranges = list(_ranges(saved, states, states, params, states))
    used = program.backward.uses()
    reads = [any(first <= i < last for i in used) for first, last in ranges]
    # The gradients of the states are overwritten: what comes in has a name of its own.
    gradients = [f"dafter{i}" for i in range(states)]
    inputs = [*_each("s", saved), *_each("before", states), *_each("after", states), *_each("p", params), *gradients]
    own = [f"const N dafter{i} = dstate[{i}];" for i in range(states) if ranges[4][0] + i in used]
    targets = [_each("d", vectors), _each("dstate", states), _each("dp", params)]
    arguments = [
        _array("s", saved, reads[0]), _array("before", states, reads[1]), _array("p", params, reads[3]),
        _array("after", states, reads[2], const=False), _array("dstate", states, True, const=False),
        _array("d", vectors, True, const=False), _array("dp", params, params > 0, const=False),
    ]  # fmt: skip
    return _function("backward", arguments, own + _body(program.backward, inputs, targets))


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
    formulas = _in_stages(program, late) if staged else ["", *_forward(program), "", *_backward(program)]
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
