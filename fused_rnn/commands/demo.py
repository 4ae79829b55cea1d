"""The demos: programs of the folder examples, which a wheel has a copy of inside the package."""

from __future__ import annotations

import runpy
import sys
from collections.abc import Sequence
from pathlib import Path

import fused_rnn

PROGRAMS = {
    "text": "a character model learns Python, and writes some",
    "speech": "spoken digits, learnt from synthetic voices, recognised from real ones",
    "translation": "Middle English to modern English, with attention and without",
    "sentiment": "what film reviewers felt",
    "prices": "tomorrow's share prices: their direction and volatility",
    "memory": "how far back each cell remembers, and where gradients vanish",
}
SHARED = "side_by_side.py"


def folder() -> Path:
    """Where the programs are. Raises FileNotFoundError where they are not."""
    package = Path(fused_rnn.__file__).parent
    for place in (package / "examples", package.parent / "examples"):
        if (place / SHARED).is_file():
            return place
    raise FileNotFoundError(f"the demos' programs are not with this installation: {package / 'examples'} is missing")


def run(name: str, arguments: Sequence[str]) -> None:
    """Run a program as `python examples/NAME.py ARGUMENTS` does. Ends by SystemExit, with its exit code."""
    place = folder()
    path = str(place / f"{name}.py")
    sys.argv = [path, *arguments]
    sys.path.insert(0, str(place))
    runpy.run_path(path, run_name="__main__")
