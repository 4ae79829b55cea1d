"""From a step in PyTorch to a program: traced, its gates joined, differentiated, and cut where values are kept."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from fused_rnn.cells.program import Program
from fused_rnn.flex.builder import COMMUTES, Builder, emit
from fused_rnn.flex.gradient import differentiate
from fused_rnn.flex.kept import keep
from fused_rnn.flex.source import StepError, line_of_step, line_of_traceback
from fused_rnn.flex.trace import Trace

# (the gates' input sides, their recurrent sides or None, states, params, of each matrix the function that multiplies by
# it, masks) → a tensor a state.
Call = Callable[..., Any]


class Shape(NamedTuple):
    """What a step gets and returns. gates: their number.  states, params, masks: names.  matrices: names, each with how
    many blocks of H rows it has.  diagonal: the blocks of W_hh."""

    gates: int
    states: tuple[str, ...]
    params: tuple[str, ...] = ()
    recurrent: bool = True
    matrices: tuple[tuple[str, int], ...] = ()
    masks: tuple[str, ...] = ()
    diagonal: int = 1

    @property
    def sides(self) -> int:
        """How many pre-activations a step gets, those of a gate's two sides apart."""
        return self.gates * (1 + self.recurrent)

    @property
    def rest(self) -> int:
        """How many inputs follow the pre-activations."""
        return len(self.states) + len(self.params) + len(self.masks)


def program_of(title: str, step: Callable[..., Any], call: Call, shape: Shape) -> Program:
    """The program of a step. call: the step on plain sequences. Raises StepError for what is none."""
    traced, after = _trace(title, step, call, shape)
    builder, after, apart = _joined(traced, after, shape)
    gates, count, vectors = shape.gates, len(shape.states), len(shape.params)
    width = gates + apart
    forward_inputs = width + shape.rest
    before = range(width, width + count)
    params = range(width + count, width + count + vectors)
    constant = range(width + count, forward_inputs)  # of a step's own: params and masks
    dafter = range(forward_inputs, forward_inputs + count)

    products, operands = _products(builder, after, shape, title, step)
    made = len(builder.nodes)  # all later values are backward's
    grads = differentiate(builder, after, dafter, [*range(forward_inputs), *products])
    joined = gates - apart
    dgates = [grads[i] for i in (*range(joined, gates), *range(joined), *range(gates, width))]
    outputs = [dgates, [grads[i] for i in before], [grads[i] for i in params]]
    if products:
        outputs.append(grads[forward_inputs:])

    needed = _needed(builder, set(dafter), [i for group in outputs for i in group])
    saved = operands + keep(builder, needed, {*before, *constant, *after, *operands}, made)
    forward = emit(builder, {i: i for i in range(forward_inputs)}, forward_inputs, [after, saved])
    inputs = [*saved, *before, *after, *constant, *dafter]
    given = {value: i for i, value in reversed(list(enumerate(inputs))) if not builder.is_number(value)}
    backward = emit(builder, given, len(inputs), outputs)
    names = (shape.states, shape.params)
    return Program(
        title, gates, apart, shape.recurrent, *names, forward, backward, shape.matrices, shape.masks, shape.diagonal
    )


def _products(
    builder: Builder, after: list[int], shape: Shape, title: str, step: Callable[..., Any]
) -> tuple[list[int], list[int]]:
    """What each block of the matrices made, and what each matrix multiplied."""
    made: dict[int, int] = {}
    reached = builder.reachable(after)
    for i in sorted(reached):
        if builder.nodes[i].op == "product":
            made[int(builder.nodes[i].value)] = i
    operands, block = [], 0
    for name, count in shape.matrices:
        own = [made[k] for k in range(block, block + count) if k in made]
        if not own:
            raise StepError(f"cell {title!r}: the step does not multiply by its matrix {name!r}{line_of_step(step)}")
        operands.append(builder.nodes[own[0]].args[0])
        for k in range(block, block + count):  # of which nobody reads the product
            made.setdefault(k, builder.product("product", k, operands[-1]))
        block += count
    return [made[k] for k in range(block)], operands


def _trace(title: str, step: Callable[..., Any], call: Call, shape: Shape) -> tuple[Builder, list[int]]:
    """The builder after the step has run: inputs x, r, the states, the params, the masks; and its values of the states.

    Run twice, on other sizes, numbers and another dtype, it has to do the same: else it depends on what is not seen
    here. The wider dtype comes last, for its constants are what the step has in any other, before rounding.
    """

    def run(sizes: tuple[int, int], fill: float, dtype: torch.dtype) -> tuple[Builder, list[int]]:
        return _run(Trace(Builder(shape.sides + shape.rest), title, step, sizes, fill, dtype), call, shape)

    with _alone():
        first = run((5, 7), -997.0, torch.float32)
        try:
            again = run((6, 11), 1013.0, torch.float64)
        except TorchRefuses:  # a step in float32 alone
            again = run((6, 11), 1013.0, torch.float32)
    if not _alike(first, again):
        raise StepError(
            f"cell {title!r}: the step did something else when it ran again: it depends on sizes, on values, on dtypes,"
            f" on random numbers, or on what it changes outside{line_of_step(step)}"
        )
    return again


def _alike(*runs: tuple[Builder, list[int]]) -> bool:
    """Whether two runs made the same, but for what float32 rounds of a constant."""
    kinds: dict[Any, int] = {}
    constants: list[float] = []

    def constant(value: float) -> int:
        for i, known in enumerate(constants):
            if known == value or math.isclose(known, value, rel_tol=1e-6) or (known != known and value != value):
                return i
        constants.append(value)
        return len(constants) - 1

    made = []
    for builder, after in runs:
        own: list[int] = []
        for op, args, value in builder.nodes:
            of = args if op == "input" else [own[i] for i in args]
            key = (op, tuple(sorted(of) if op in COMMUTES else of), None if value is None else constant(value))
            own.append(kinds.setdefault(key, len(kinds)))
        made.append([own[i] for i in after])
    return made[0] == made[1]


class TorchRefuses(StepError):
    """torch itself raised, before any operation that is seen here."""


@contextmanager
def _alone() -> Iterator[None]:
    """Whatever else is under way: modes, transforms, inference. A step has gradients, whoever first needs it."""
    clear = torch._functorch.pyfunctorch.temporarily_clear_interpreter_stack
    with _disable_current_modes(), clear(), torch.inference_mode(False), torch.enable_grad():
        yield


def _run(trace: Trace, call: Call, shape: Shape) -> tuple[Builder, list[int]]:
    (b, h), gates, sides, states = trace.sizes, shape.gates, shape.sides, shape.states
    first = sides + len(states)
    if shape.recurrent:
        trace.partners = {**{g: gates + g for g in range(gates)}, **{gates + g: g for g in range(gates)}}
    rows = [trace.input(i, (b, h)) for i in range(first)]
    vectors = [trace.input(first + i, (h,)) for i in range(len(shape.params))]
    masks = [trace.input(sides + shape.rest - len(shape.masks) + i, (b, h)) for i in range(len(shape.masks))]
    matrices, block = [], 0
    for name, count in shape.matrices:
        matrices.append(trace.matrix(name, range(block, block + count)))
        block += count
    try:
        with torch.device("cpu"), trace:
            recurrent = tuple(rows[gates:sides]) or None
            result = call(tuple(rows[:gates]), recurrent, rows[sides:], vectors, matrices, masks)
    except RuntimeError as error:
        if "ambiguous" in str(error):  # bool(tensor), which Python refuses before any operation
            line = line_of_traceback(error.__traceback__)
            raise trace.error("it branches on the value of a tensor; use torch.where", line) from error
        text = f"torch says {str(error).splitlines()[0]!r}"
        raise TorchRefuses(str(trace.error(text, line_of_traceback(error.__traceback__)))) from error
    results, line = tuple(result) if isinstance(result, (tuple, list)) else (result,), line_of_step(trace.step)
    if len(results) != len(states):
        text = f"the step returned {len(results)} values, expected {len(states)}: {', '.join(states)}"
        raise trace.error(text, line)
    for name, value in zip(states, results, strict=True):
        if not isinstance(value, (Tensor, float, int)):
            text = f"the step returned {type(value).__name__} for state {name!r}, expected a tensor [B, H]"
            raise trace.error(text, line)
    return trace.builder, [trace.value(value) for value in results]


def _joined(traced: Builder, after: list[int], shape: Shape) -> tuple[Builder, list[int], int]:
    """The same with one input for each gate of which the step sees the sum of both sides alone; how many of the last
    gates are apart. Room for the gradients of the states follows the inputs."""
    gates, recurrent, sides = shape.gates, shape.recurrent, shape.sides
    nodes, reached = traced.nodes, traced.reachable(after)
    uses: dict[int, set[int]] = {}
    for i in reached:
        for a in nodes[i].args if nodes[i].op != "input" else ():
            uses.setdefault(a, set()).add(i)

    def sum_of(g: int) -> int | None:
        """The one value that both sides of a gate go into."""
        own, other = uses.get(g, set()), uses.get(gates + g, set())
        if g in after or gates + g in after or own != other or len(own) != 1:
            return None
        (i,) = own
        return i if nodes[i].op == "add" and nodes[i].args == (g, gates + g) else None

    sums: dict[int, int] = {}
    joined = gates
    if recurrent:
        joined = 0
        while joined < gates:
            unused = not uses.get(joined) and not uses.get(gates + joined) and not {joined, gates + joined} & {*after}
            if (both := sum_of(joined)) is not None:
                sums[both] = joined
            elif not unused:
                break
            joined += 1
    apart = gates - joined
    builder = Builder(gates + apart + shape.rest + len(shape.states))
    numbers: dict[int, int] = {i: i for i in range(joined, gates)}
    numbers |= {i: i - joined for i in range(gates + joined, sides)}
    numbers |= {sides + i: gates + apart + i for i in range(shape.rest)}
    if not recurrent:
        numbers |= {g: g for g in range(gates)}
    for i in sorted(reached):
        if i in sums:
            numbers[i] = sums[i]
        elif nodes[i].op != "input":
            numbers[i] = builder.again(nodes[i], [numbers[a] for a in nodes[i].args])
    return builder, [numbers[i] for i in after], apart


def _needed(builder: Builder, dafter: set[int], outputs: list[int]) -> set[int]:
    """Of the values that do not depend on gradients those that backward reads."""
    reached = builder.reachable(outputs)
    dependent: set[int] = set()
    for i in sorted(reached):
        if i in dafter or (builder.nodes[i].op != "input" and any(a in dependent for a in builder.nodes[i].args)):
            dependent.add(i)
    needed = {i for i in outputs if i not in dependent}
    for i in dependent:
        if builder.nodes[i].op != "input":
            needed |= {a for a in builder.nodes[i].args if a not in dependent}
    return needed
