"""Chunks of time side by side, of cells that are linear in their states (flex/scan.py): of how many steps; and the cell
by which the loops find out what a chunk makes of no state, and by what it multiplies the one that enters."""

from __future__ import annotations

from functools import lru_cache

from fused_rnn.cells import CELLS, Cell
from fused_rnn.cells.program import MOST_STATES, Graph, Program, parse
from fused_rnn.flex.builder import Builder, emit
from fused_rnn.flex.scan import Scan, scan_of
from fused_rnn.gpu import chunks

_THREADS = 256  # csrc/cuda/layout.h's kPointwiseThreads


def chunk_of(cell: Cell, steps: int, units: int, multiprocessors: int) -> int:
    """How many steps a chunk has, where chunks of time run side by side; all of them where the cell is not linear in
    its states, or where they do not pay (gpu/chunks.py). units: R·B·H."""
    if cell.program is None or units == 0 or summary_of(cell.name) is None:
        return steps
    return chunks.chunk_of(steps, -(-units // _THREADS), multiprocessors)


@lru_cache(maxsize=4096)
def summary_of(name: str) -> Cell | None:
    """The cell that is run over each chunk from zero; None of a program that is not linear in its states, or has too
    many of them.

    Its states are the cell's own; for each that a step hands on the product of its factors so far; and last a number
    that stays as it is, until a reset makes it 0. Backward their gradients are the same of the cell's gradients. It
    makes nothing else: what it keeps, and the gradients of its gates and params, are zeros.
    """
    scan, program = scan_of(name), parse(name)
    count = 0 if scan is None else len(program.states) + len(scan.states) + 1
    if scan is None or count > MOST_STATES:
        return None
    names = (*program.states, *(f"factor{j}" for j in scan.states), "uncut")
    forward, backward = _forward(program, scan, count), _backward(program, scan, count)
    made = Program(program.title, program.gates, 0, False, names, program.params, forward, backward)
    # A factor that is zero whatever h is leaves no one who reads it, and so h would not be carried.
    return CELLS[made.text] if made.reads_h == program.reads_h else None


def _linear(builder: Builder, graph: Graph, given: list[int], own: list[int], products: list[int]) -> list[list[int]]:
    """What comes of states, and of products of their factors. graph: of a Scan.  given: its inputs, as values of the
    builder.  own: the states whose factors and rests it makes.  products: of the last of them."""
    values = list(given)
    for instruction in graph.code:
        values.append(builder.again(instruction, [values[i] for i in instruction.args]))
    factors, rests = ([values[i] for i in group] for group in graph.outputs)

    def times(factor: int, state: int) -> int:
        return factor if builder.value(factor) == 0 else builder.add("mul", factor, state)

    states = [builder.add("add", times(f, state), rest) for f, state, rest in zip(factors, own, rests, strict=True)]
    handed_on = factors[len(factors) - len(products) :]
    return [states, [times(f, product) for f, product in zip(handed_on, products, strict=True)]]


def _forward(program: Program, scan: Scan, count: int) -> Graph:
    gates, states, params = program.gates, len(program.states), len(program.params)
    builder, first = Builder(gates + count + params), gates + count
    given = [*range(gates + states), *range(first, first + params)]
    own, products = [gates + j for j in scan.states], [gates + states + j for j in range(len(scan.states))]
    after, factors = _linear(builder, scan.forward, given, own, products)
    zero = builder.const(0.0)
    outputs = [[zero] * (states - len(after)) + after + factors + [first - 1], [zero] * program.saved]
    return emit(builder, {i: i for i in range(first + params)}, first + params, outputs)


def _backward(program: Program, scan: Scan, count: int) -> Graph:
    saved, states, params = program.saved, len(program.states), len(program.params)
    vectors = saved + 2 * count
    first = vectors + params
    builder = Builder(first + count)
    own = list(range(first, first + states))
    given = [
        *range(saved + states), *range(saved + count, saved + count + states), *range(vectors, vectors + params), *own
    ]  # fmt: skip
    products = [first + states + j for j in range(len(scan.states))]
    before, factors = _linear(builder, scan.backward, given, own, products)
    zero = builder.const(0.0)
    outputs = [[zero] * program.gates, [*before, *factors, first + count - 1], [zero] * params]
    return emit(builder, {i: i for i in range(first + count)}, first + count, outputs)
