"""The README's picture, drawn from a committed result file and from nothing else.

    python scripts/readme_picture.py         writes docs/speed.svg

A bar for each cell, mode and region of the benchmark's grid: the geometric mean of the speed-ups, pale up to torch.nn's
speed, and a mark at the worst.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from html import escape
from pathlib import Path

from fused_rnn.commands.bench.results import Results, geometric_mean, setting
from fused_rnn.commands.bench.tables import regions

ROOT = Path(__file__).parent.parent
RESULTS, PICTURE = ROOT / "benchmarks/results/cpu/fp32-1t.json", ROOT / "docs/speed.svg"

# As wide as a phone shows without shrinking the letters much.
WIDTH, LEFT, RIGHT = 480, 52, 436  # of the picture; where bars begin; where the longest may end
BAR, ROW, MARGIN = 11, 15, 14
COLOURS = {"LSTM": "#1b6ca8", "GRU": "#2a9d8f", "RNN": "#e9a03b"}
WORDS = {
    "B=1, T≥32": "one sequence at a time (B = 1)",
    "B≥8, H≤128": "batches, small layers (B ≥ 8, H ≤ 128)",
    "B≥8, H≥256": "batches, large layers (B ≥ 8, H ≥ 256)",
}
STYLE = """
text { font-family: system-ui, -apple-system, "Segoe UI", "DejaVu Sans", sans-serif; font-size: 12px; fill: #22223b }
.title { font-size: 16px; font-weight: 600 } .mode { font-size: 14px; font-weight: 600 } .small { fill: #5c5c70 }
.end { text-anchor: end } .worst { stroke: #22223b; stroke-width: 2 }
"""


def draw(results: Results, provider: str = "cpu") -> str:
    """The picture as SVG."""
    found = list(regions(results, provider))
    most = math.ceil(max(geometric_mean(values) for *_, cells in found for values in cells.values()))
    body, height = [], 68

    def x(speedup: float) -> float:
        return round(LEFT + (RIGHT - LEFT) * speedup / most, 1)

    for mode in dict.fromkeys(mode for mode, *_ in found):
        body.append(text(0, height + 16, mode, "mode"))
        height += 24
        for region, cells in ((region, cells) for of, region, cells in found if of == mode):
            body.append(text(LEFT, height + 12, WORDS.get(region, region), "small"))
            height += 18
            for cell, values in cells.items():
                body += bar(cell, values, x, height)
                height += ROW
            height += 6
        height += 8
    return page(height + 20, [*heading(results), *body, *legend(height)])


def bar(cell: str, values: list[float], x: Callable[[float], float], y: float) -> Iterator[str]:
    """One cell in one region. x: where a speed-up stands."""
    mean, worst = geometric_mean(values), x(min(values))
    yield text(LEFT - 6, y + BAR - 1, cell, "end")
    yield box(LEFT, y, min(x(mean), x(1)) - LEFT, COLOURS[cell], pale=True)
    yield box(x(1), y, max(0, x(mean) - x(1)), COLOURS[cell])
    yield f'<line class="worst" x1="{worst}" x2="{worst}" y1="{y}" y2="{y + BAR}"/>'
    yield text(x(mean) + 5, y + BAR - 1, f"{mean:.1f}×")


def heading(results: Results) -> Iterator[str]:
    run = results.runs[-1]
    name = run["device_name"].replace("(R)", "")
    yield text(0, 20, "How many times as fast as torch.nn", "title")
    yield text(0, 40, f"{setting(run)}, {name}", "small")
    yield text(0, 56, f"torch {run['torch']}, {run['date'][:10]}", "small")


def legend(y: float) -> Iterator[str]:
    for column, colour in enumerate(COLOURS.values()):
        yield box(LEFT + 12 * column, y, 12, colour, pale=True)
    yield text(LEFT + 42, y + BAR - 1, "torch.nn's speed", "small")
    yield f'<line class="worst" x1="{LEFT + 160}" x2="{LEFT + 160}" y1="{y}" y2="{y + BAR}"/>'
    yield text(LEFT + 167, y + BAR - 1, "the worst size of the region", "small")


def box(x: float, y: float, width: float, colour: str, *, pale: bool = False) -> str:
    opacity = ' fill-opacity="0.4"' * pale
    return f'<rect x="{x}" y="{y}" width="{width:.1f}" height="{BAR}" fill="{colour}"{opacity}/>'


def text(x: float, y: float, words: str, kind: str = "plain") -> str:
    return f'<text class="{kind}" x="{x}" y="{y}">{escape(words)}</text>'


def page(height: float, body: list[str]) -> str:
    across, down = WIDTH + MARGIN, height + MARGIN
    frame = f'width="{across}" height="{down}"'
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" {frame} viewBox="{-MARGIN} {-MARGIN // 2} {across} {down}">',
        f"<style>{STYLE}</style>",
        f'<rect x="{-MARGIN}" y="{-MARGIN // 2}" {frame} fill="#ffffff"/>',
        *body,
        "</svg>\n",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    PICTURE.write_text(draw(Results.load(RESULTS)), encoding="utf-8")
    print(PICTURE.relative_to(ROOT))
