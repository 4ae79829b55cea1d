"""What a program's operations publish to the other units of a row, and where it lies. Imports no Triton."""

from __future__ import annotations

from typing import NamedTuple

from fused_rnn.cells.program import MATRIX_PRODUCTS, PUBLISHING, Graph

SLOTS = {"sum": 1, "variance": 2}  # numbers that a member of a team gives for a row: a variance's are mean and squares


class Published(NamedTuple):
    """runs: the operations that end each stage, as values.  slots: of them all.  operands: what matrices multiply.
    place: of each operation its first slot, or which operand it reads."""

    runs: tuple[tuple[int, ...], ...]
    slots: int
    operands: int
    place: dict[int, int]


def published(graph: Graph) -> Published:
    """What a graph publishes. Operations of a stage that multiply the same value share an operand."""
    runs, place, slots, operands = [], dict[int, int](), 0, 0
    for stage in graph.stages[:-1]:
        run = tuple(graph.inputs + k for k in stage if graph.code[k].op in PUBLISHING)
        shared: dict[int, int] = {}
        for i in run:
            op, args, _ = graph.code[i - graph.inputs]
            if op in MATRIX_PRODUCTS:
                operands += args[0] not in shared
                place[i] = shared.setdefault(args[0], operands - 1)
            else:
                place[i], slots = slots, slots + SLOTS[op]
        runs.append(run)
    return Published(tuple(runs), slots, operands, place)
