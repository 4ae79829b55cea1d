"""Sources of kernels that are compiled at first use; and a user's cell as C++, in the form of csrc/cells/*.h."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from fused_rnn.cells import Cell
from fused_rnn.cells.program import Graph, Program

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
    """One kernel of csrc/cuda. kind: "persistent_fwd", "persistent_bwd", "pointwise_fwd" or "pointwise_bwd".
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


def _function(name: str, arguments: Sequence[str], lines: Iterable[str]) -> list[str]:
    head = f"  static FUSED_RNN_HD void {name}({', '.join(arguments)}) {{"
    return ["  template <class M, class N>", head, *(f"    {line}" for line in lines), "  }"]


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


def struct(program: Program, name: str = "Printed", sequences: bool = False) -> str:
    """The cell as a struct of this name. sequences: its backward takes gradients of the other states over time."""
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
    constants = [f"  static constexpr {what} = {value};" for what, value in says.items()]
    names = ", ".join(map(_word, (*program.states, *program.params)))
    head = [f"// {_word(program.title)}: {names}", f"struct {name} : CellDefaults {{"]
    return "\n".join([*head, *constants, "", *_forward(program), "", *_backward(program), "};"]) + "\n"


def definition(cell: Cell, name: str = "Printed", sequences: bool = False) -> str:
    """The cell by this name: a user's as `struct` writes it, a built-in one as csrc/cells has it."""
    if cell.program is not None:
        return struct(cell.program, name, sequences)
    return f"using {name} = {''.join(part.capitalize() for part in cell.name.split('_'))};\n"


def _word(name: str) -> str:
    """A name of the user's, as far as it may stand in a source."""
    return re.sub(r"[^A-Za-z0-9_]", "_", name)


def source(cells: str, kernels: Sequence[Kernel], instances: bool = True) -> str:
    """A translation unit with cells that `definition` has written, and what kernels of the same `fewer` need.
    instances: with these kernels of the struct Printed."""
    headers = {f'#include "cuda/{k.kind if k.tiles else "pointwise"}.h"': None for k in kernels}
    policies = '#include "cuda/precision.h"'
    loop = "const FUSED_RNN_GRID_CONSTANT"
    made = [f"template FUSED_RNN_INSTANCE {k.name('Printed')}({loop} fused_rnn::cuda::{k.loop});" for k in kernels]
    return "\n".join([
        f"#define FUSED_RNN_FEWER_BLOCKS {kernels[0].fewer}",
        '#include "cells/all.h"', *headers, policies, "",
        "namespace fused_rnn {", "", cells, "}  // namespace fused_rnn", "", *made * instances, "",
    ])  # fmt: skip
