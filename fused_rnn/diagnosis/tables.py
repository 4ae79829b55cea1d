"""Rows as text: by rich where it is installed, else in plain columns."""

from __future__ import annotations

from collections.abc import Sequence
from io import StringIO


def as_text(title: str, rows: Sequence[Sequence[str]]) -> str:
    """A table. rows: the columns' names first; the first and the last column stand on the left."""
    try:
        from rich.console import Console
        from rich.table import Table
    except ModuleNotFoundError:
        return _plain(title, rows)
    head, *body = rows
    table = Table(title=title, title_justify="left")
    for place, column in enumerate(head):
        table.add_column(column, justify="left" if place == 0 else "right", no_wrap=True)
    for row in body:
        table.add_row(*row)
    text = StringIO()
    Console(file=text, width=1000).print(table)
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines()) + "\n"


def _plain(title: str, rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for first, *others in rows:
        cells = [first.ljust(widths[0]), *(c.rjust(w) for c, w in zip(others, widths[1:], strict=True))]
        lines.append("  ".join(cells).rstrip())
    return "\n".join((title, *lines)) + "\n"
