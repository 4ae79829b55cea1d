"""Which programs are linear in their states, each in itself alone: s' = A s + B, with A and B made of a step's input.

A step (A, B) after a step (A', B') is the step (A A', A B' + B), so stretches of time can be run side by side, and
joined. h may be read out of the other states, as o · tanh(c) is, where no step reads it.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

from fused_rnn.cells.program import Graph, Instruction, parse
from fused_rnn.flex.builder import Builder, emit


class Scan(NamedTuple):
    """A program as a scan.

    states: places of those that a step hands on: h, if the program reads it, and all others.
    forward: of each of these the factor A, and the rest B; inputs as of the program's forward, of which it reads no
        state.
    backward: of every state's gradient the factor and the rest, from after a step to before it; inputs as of the
        program's backward, of which it reads no gradient of what is handed on. h that is read out has the factor 0.
    """

    states: tuple[int, ...]
    forward: Graph
    backward: Graph

    def forgets(self, backward: bool) -> tuple[bool, ...]:
        """Of which factors it is known that they are zero: nothing is multiplied by those, not infinity either."""
        graph = self.backward if backward else self.forward
        made = (graph.code[i - graph.inputs] if i >= graph.inputs else None for i in graph.outputs[0])
        return tuple(one is not None and one.op == "const" and one.value == 0 for one in made)


@lru_cache(maxsize=4096)
def scan_of(cell: str) -> Scan | None:
    """The scan of a program's text; None where it is none."""
    program = parse(cell)
    if program.recurrent or program.stages > 1 or program.masks:
        return None
    count, width = len(program.states), program.gates + program.apart
    states = tuple(range(0 if program.reads_h else 1, count))
    first = program.backward.inputs - count
    before, after = [width + j for j in states], [program.forward.outputs[0][j] for j in states]
    forward = _split(program.forward, after, before, before)
    gradients = [first + j for j in range(count)]
    backward = _split(program.backward, program.backward.outputs[1], gradients, [first + j for j in states])
    return Scan(states, forward, backward) if states and forward and backward else None


def _split(graph: Graph, outputs: Sequence[int], own: Sequence[int], vary: Sequence[int]) -> Graph | None:
    """The graph of every output's factor and of its rest; None where one is not linear in its own input, or reads
    another one of those that vary."""
    builder = Builder(graph.inputs)
    values = [_Linear(builder, {}, i) for i in range(graph.inputs)]
    for i in vary:
        values[i] = _Linear(builder, {i: builder.const(1.0)}, None)
    for instruction in graph.code:
        values.append(_apply(builder, instruction, [values[i] for i in instruction.args]))
    zero = builder.const(0.0)
    factors, rests = [], []
    for output, i in zip(outputs, own, strict=True):
        value = values[output]
        if value.factors is None or not value.factors.keys() <= {i}:
            return None
        factors.append(value.factors.get(i, zero))
        rests.append(zero if value.rest is None else value.rest)
    return emit(builder, {i: i for i in range(graph.inputs)}, graph.inputs, [factors, rests])


class _Linear(NamedTuple):
    """factors: of each input that varies, by its number; None of what is not linear in them.  rest: None for zero."""

    builder: Builder
    factors: dict[int, int] | None
    rest: int | None

    @property
    def fixed(self) -> int | None:
        """Its value, if it does not vary."""
        if self.factors != {}:
            return None
        return self.builder.const(0.0) if self.rest is None else self.rest

    def each(self, op: str, *args: int | None) -> _Linear:
        """An operation on every part, which stands where there is None, and in which the operation is linear."""

        def made(part: int) -> int:
            return self.builder.add(op, *(part if i is None else i for i in args))

        assert self.factors is not None
        factors = {i: made(part) for i, part in self.factors.items()}
        return _Linear(self.builder, factors, None if self.rest is None else made(self.rest))

    def plus(self, other: _Linear) -> _Linear:
        if self.factors is None or other.factors is None:
            return _Linear(self.builder, None, None)
        factors = dict(self.factors)
        for i, part in other.factors.items():
            factors[i] = self.builder.add("add", factors[i], part) if i in factors else part
        if self.rest is None or other.rest is None:
            return _Linear(self.builder, factors, other.rest if self.rest is None else self.rest)
        return _Linear(self.builder, factors, self.builder.add("add", self.rest, other.rest))


def _apply(builder: Builder, instruction: Instruction, args: list[_Linear]) -> _Linear:
    """What an operation makes."""
    op, fixed = instruction.op, [arg.fixed for arg in args]
    if None not in fixed:
        return _Linear(builder, {}, builder.again(instruction, fixed))  # type: ignore[arg-type]
    if any(arg.factors is None for arg in args):
        return _Linear(builder, None, None)
    first, second = (*fixed, None)[:2]
    if op == "neg":
        return args[0].each("neg", None)
    if op == "add":
        return args[0].plus(args[1])
    if op == "sub":
        return args[0].plus(args[1].each("neg", None))
    if op in ("mul", "fma"):
        product = _Linear(builder, None, None)
        if first is not None:
            product = args[1].each("mul", first, None)
        elif second is not None:
            product = args[0].each("mul", None, second)
        return product.plus(args[2]) if op == "fma" else product
    if op in ("div", "sigmoid_backward", "tanh_backward") and second is not None:
        return args[0].each(op, None, second)
    # Of a choice, too: what is not chosen may be infinite or NaN, which no factor 0 forgets.
    return _Linear(builder, None, None)
