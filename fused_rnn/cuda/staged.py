"""A cell in stages as C++: its formulas cut where something is published (csrc/cells/cell.h)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from fused_rnn.cells.program import MATRIX_PRODUCTS, PUBLISHING, Graph, Program
from fused_rnn.cuda.statements import array, each, function, value_of


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
                made = "units" if op == "units" else value_of("const", (), number, False)
                text.append(f"const N v{value - first} = {made};")
                return there[value]
            return f"c[{crossing[value]}]"

        for i, (op, args, number) in enumerate(graph.code):
            value = first + i
            if stages[i] != stage or value in anywhere or op in PUBLISHING:
                continue
            made = value_of(op, [named(a) for a in args], number, value in rounded)
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
    return function(name, [f"[[maybe_unused]] {one}" for one in arguments], lines, "class M, int stage")


def _own_arguments(program: Program, crossing: int) -> list[str]:
    """Those that cells in stages have alone."""
    return [array("m", len(program.masks), True), "N units", array("c", crossing, True, const=False)]


def stages(program: Program, late: bool) -> tuple[_Staged, _Staged]:
    """Forward and backward of a staged cell."""
    vectors, states, params = program.gates + program.apart, len(program.states), len(program.params)
    masks, saved = each("m", len(program.masks)), program.saved
    inputs = [*each("a", vectors), *each("before", states), *each("p", params), *masks]
    forward = _staged(program.forward, inputs, [each("after", states), each("s", saved)], (), late)
    dafter = [f"dafter{i}" for i in range(states)]
    first = saved + 2 * states + params + len(masks)
    inputs = [
        *each("s", saved), *each("before", states), *each("after", states), *each("p", params), *masks, *dafter
    ]  # fmt: skip
    d = each("d", vectors + program.blocks)
    targets = [d[:vectors], each("dstate", states), each("dp", params), d[vectors:]]
    own = range(first, first + states)
    return forward, _staged(program.backward, inputs, targets[: len(program.backward.outputs)], own, late)


def in_stages(program: Program, late: bool) -> list[str]:
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
    after = array("after", states, True, const=False)
    arguments = [
        array("a", vectors, True), array("before", states, True), array("p", params, True),
        *_own_arguments(program, len(forward.crossing)), after, array("s", saved, True, const=False),
    ]  # fmt: skip
    lines += ["", *_staged_function("forward", forward, arguments, ())]
    arguments = [
        array("s", saved, True), array("before", states, True), array("p", params, True),
        *_own_arguments(program, len(backward.crossing)), after, array("dstate", states, True, const=False),
        array("d", vectors + program.blocks, True, const=False), array("dp", params, True, const=False),
    ]  # fmt: skip
    return [*lines, "", *_staged_function("backward", backward, arguments, own)]


def is_staged(program: Program) -> bool:
    """Whether the cell is printed in the form that has masks, matrices of its own and sums over units."""
    return bool(program.masks or program.matrices) or program.sees_units
