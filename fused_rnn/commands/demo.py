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
SHARED = ("material", "side_by_side")


def folder() -> Path:
    """Where the programs are. Raises FileNotFoundError where they are not."""
    package = Path(fused_rnn.__file__).parent
    for place in (package / "examples", package.parent / "examples"):
        if all((place / f"{name}.py").is_file() for name in (*PROGRAMS, *SHARED)):
            return place
    raise FileNotFoundError(f"the demos' programs are not with this installation: {package / 'examples'} is missing")


def run(program: Path, arguments: Sequence[str]) -> None:
    """Run a program as `python PROGRAM ARGUMENTS` does. Ends by SystemExit, with its exit code."""
    sys.argv = [str(program), *arguments]
    sys.path.insert(0, str(program.parent))
    runpy.run_path(str(program), run_name="__main__")
