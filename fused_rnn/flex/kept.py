"""Which values forward keeps for backward: as few as will do, by a minimum cut.

Backward can make a value again from others. The states before and after a step and the params are at hand, so what is
made of them alone is kept by nobody: an LSTM's tanh(c). Of all else the fewest values are kept that everything else
backward needs can be made of; of equally few, the latest, so that the least is computed again. What forward makes of
all units of a row is not made again.
"""

from __future__ import annotations

from itertools import pairwise

from fused_rnn.cells.program import PUBLISHING
from fused_rnn.flex.builder import Builder, made_of


def keep(b: Builder, needed: set[int], free: set[int], made: int) -> list[int]:
    """The values to keep, of the first `made` ones, for `needed` to be made of them and of `free`."""
    between = _between(b, needed, free, made)
    sources = [i for i in between if _is_source(b, i, made)]
    # A value is two vertices, in (2 i) and out (2 i + 1), with room for one path between them if it may be kept.
    flow: dict[tuple[int, int], int] = {}
    room: dict[int, dict[int, int]] = {}

    def edge(a: int, z: int, most: int) -> None:
        room.setdefault(a, {})[z] = most
        room.setdefault(z, {}).setdefault(a, 0)

    start, end, many = -1, -2, 1 << 30
    for i in between:
        edge(2 * i, 2 * i + 1, 1 if i < made else many)
        if i not in sources:
            for a in made_of(b.nodes[i]):
                if a in between:
                    edge(2 * a + 1, 2 * i, many)
        if i in needed:
            edge(2 * i + 1, end, many)
    for i in sources:
        edge(start, 2 * i, many)
    flow.update({(a, z): 0 for a in room for z in room[a]})

    def path() -> list[int] | None:
        before = {start: start}
        todo = [start]
        for a in todo:
            for z, most in room.get(a, {}).items():
                if z not in before and flow[a, z] < most:
                    before[z] = a
                    todo.append(z)
        if end not in before:
            return None
        way = [end]
        while way[-1] != start:
            way.append(before[way[-1]])
        return way[::-1]

    while (way := path()) is not None:
        for a, z in pairwise(way):
            flow[a, z] += 1
            flow[z, a] -= 1
    # What still reaches the end lies behind the latest cut.
    behind, todo = {end}, [end]
    for z in todo:
        for a in room.get(z, {}):
            if a not in behind and flow[a, z] < room[a].get(z, 0):
                behind.add(a)
                todo.append(a)
    return sorted(i for i in between if 2 * i + 1 in behind and 2 * i not in behind)


def _is_source(b: Builder, i: int, made: int) -> bool:
    """Whether backward cannot make a value of others."""
    return b.nodes[i].op == "input" or (b.nodes[i].op in PUBLISHING and i < made)


def _between(b: Builder, needed: set[int], free: set[int], made: int) -> set[int]:
    """What the needed values are made of, as far as it is not free or made of what is free alone."""
    kept: list[bool] = []  # of each value whether it is not to be had without something kept
    for i, node in enumerate(b.nodes):  # arguments come before what is made of them
        if i in free or b.is_number(i):
            kept.append(False)
        else:
            kept.append(_is_source(b, i, made) or any(kept[a] for a in made_of(node)))
    found: set[int] = set()
    todo = list(needed)
    while todo:
        i = todo.pop()
        if i not in found and kept[i]:
            found.add(i)
            if not _is_source(b, i, made):
                todo += made_of(b.nodes[i])
    return found
