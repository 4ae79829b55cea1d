"""A run in words: how many times as fast as torch.nn training and inference are, and whether to take it."""

from __future__ import annotations

import math
from collections.abc import Iterator

from rich.text import Text

from fused_rnn.commands.bench.grid import CELLS, SEQUENCES, Point
from fused_rnn.commands.bench.measure import DISTURBED
from fused_rnn.commands.bench.providers import ways_in_torch
from fused_rnn.commands.bench.results import TIME, Results, Row, geometric_mean
from fused_rnn.commands.bench.tables import EVEN, ratio, style

TAKE, LEAVE, EITHER, AGAIN = "take it", "leave it", "no difference", "measure again"


def judge(speedup: float) -> str:
    """What a speed-up says; one within 5 % says nothing."""
    return LEAVE if speedup < EVEN else EITHER if speedup < 1 / EVEN else TAKE


def verdict(results: Results, provider: str | None = None) -> Text:
    """A sentence for each mode and cell, the worst point named. provider: the automatic choice if it was measured."""
    names = results.providers()
    ours = provider or ("auto" if "auto" in names else names[-1] if names else "auto")
    text = Text()
    for mode in SEQUENCES:
        found = results.speedups(ours, lambda point, mode=mode: point.mode == mode)  # type: ignore[misc]
        for cell, sentence in _sentences(results, ours, found):
            text.append(f"{mode.capitalize()}: {cell} ", style="bold").append(sentence).append("\n")
    return text


def _sentences(results: Results, provider: str, found: dict[Point, float]) -> Iterator[tuple[str, Text]]:
    for cell in CELLS:
        mine = {point: speedup for point, speedup in found.items() if point.cell == cell}
        if mine:
            yield cell, _sentence(results, provider, mine)


def _sentence(results: Results, provider: str, found: dict[Point, float]) -> Text:
    mean = geometric_mean(found.values())
    worst = min(found, key=lambda point: found[point])
    sure = [_sure(results, provider, point) for point in found]
    least = geometric_mean(sure)
    disturbed = least < mean / DISTURBED
    said = judge(mean) if not disturbed or judge(least) == judge(mean) == TAKE else AGAIN
    text = Text.assemble((f"{ratio(mean)}×", style(mean)), " as fast as torch.nn: ", (said, style(mean)))
    if disturbed:
        text.append(f" (the machine was disturbed: {ratio(least)}× at least)")
    if len(found) > 1:
        but = ", but not for the worst" if said == TAKE and judge(found[worst]) == LEAVE else "; the worst"
        text.append(but).append(f" of {len(found)}, {ratio(found[worst])}× at {worst.shape}")
    return text.append(".")


def _sure(results: Results, provider: str, point: Point) -> float:
    """The speed-up if ours had been disturbed most of the time, and the fastest way in torch hardly."""
    ways = ways_in_torch(point)
    run = results.common_run(point, provider, ways[0])

    def rows(*names: str) -> Iterator[Row]:
        return (row for name in names for row in results.of((point, name, TIME)) if row.run == run)

    low = min(row.p20 for row in rows(*ways) if row.p20 is not None)
    return low / (next(rows(provider)).p80 or math.inf)
