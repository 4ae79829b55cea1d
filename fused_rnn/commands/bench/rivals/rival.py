"""What the benchmark asks of whoever else runs a layer on a CPU. None of them is needed, so all may be missing."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

from fused_rnn.commands.bench.calls import Call
from fused_rnn.commands.bench.grid import Point

Build = Callable[[Call], Call]  # of torch.nn's call, which has the numbers


@dataclass(frozen=True)
class Rival:
    """title: what tables call it. supports: None, or why it does not run a point. missing: None, or what to install.
    versions: what it is made of. opened: with it open, what builds its calls.

    The last three are told the Python that has JAX.
    """

    title: str
    supports: Callable[[Point], str | None]
    missing: Callable[[str], str | None]
    versions: Callable[[str], dict[str, str]]
    opened: Callable[[str], AbstractContextManager[Build]]


def restricted(point: Point, modes: tuple[str, ...], dtypes: tuple[str, ...]) -> str | None:
    """None for a plain layer in one of these modes and dtypes, or the reason why not."""
    if point.variant != "plain" or point.layers > 1 or point.directions > 1:
        return "it is measured with one layer, one direction, no lengths and no resets"
    if point.mode not in modes or point.dtype not in dtypes:
        return f"it is measured in {' and '.join(modes)}, {' and '.join(dtypes)}"
    return None


def installed(*packages: str) -> dict[str, str]:
    """The versions of those that this Python has."""
    found = {}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
