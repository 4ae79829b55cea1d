"""The Triton backend's test cases: every cell, dtype and loop; odd shapes and options meet in pairs.

On a GPU they run there; without one in Triton's interpreter, on the cpu, a program after the other.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import itertools
import random
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from cases import Case, Inputs
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed")

import fused_rnn
from fused_rnn.triton.schedule import Tile

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
MARKS = [pytest.mark.gpu] if DEVICE == "cuda" else []  # where they run on a GPU, `pytest -m gpu` runs them


# Forced schedules with tiles small enough that odd shapes have several, and a rest.
LOOPS: dict[str, dict[str, Any]] = {
    "solo-registers": {"loop": "solo", "registers": True},
    "solo-streamed": {"loop": "solo", "tile": Tile(16, 32, 16, 4)},
    "cooperative-streamed": {"loop": "cooperative", "tile": Tile(32, 64, 32, 4)},
    "cooperative-resident": {"loop": "cooperative", "tile": Tile(16, 32, 32, 4), "hold": True},
    "cooperative-spread": {"loop": "cooperative", "tile": Tile(16, 16, 16, 4), "spread": 2},
    "stepwise": {"loop": "stepwise", "tile": Tile(16, 64, 32, 4)},
}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CHOICES: dict[str, tuple[Any, ...]] = {
    "cell": ("lstm", "gru", "rnn_tanh", "rnn_relu"),
    "dtype": DTYPES,
    "loop": tuple(LOOPS),
    "T": (1, 2, 65),
    "B": (1, 3, 33),
    "H": (1, 3, 17, 130),
    "D": (1, 5),
    "bidirectional": (False, True),
    "lengths": (False, True),
    "reset": (False, True),
    "save": ("gates", "recompute"),
    "bias": (True, False),
    "hx": (True, False),
}
Row = dict[str, Any]


def _possible(row: Row) -> bool:
    if row["loop"] == "solo-registers" and row["H"] == 130:
        return False  # W_hh of 256 x 256 does not fit
    return not (row["T"] == 65 and row["B"] == 33 and row["H"] == 130)  # takes the interpreter a minute


def _pairs(row: Row) -> Iterator[tuple[Any, ...]]:
    return itertools.combinations(row.items(), 2)


def _cost(row: Row) -> float:
    """What the interpreter takes, roughly in seconds."""
    schedule = LOOPS[row["loop"]]
    tile = schedule.get("tile", Tile(16, 256, 256, 4))
    blocks = (2 if row["bidirectional"] else 1) * -(-row["B"] // tile.batch) * -(-row["H"] // tile.units)
    depth = 1 if schedule.get("registers") else -(-row["H"] // tile.depth)
    gates = {"lstm": 4, "gru": 3}.get(row["cell"], 1)
    return 0.03 * row["T"] * (blocks * (1 + 0.1 * gates * (1 + depth)) + (schedule["loop"] != "solo"))


def _pick(dice: random.Random, met: set[Any], fixed: Row) -> Row:
    """Of some rows with the fixed choices, the one with most pairs that have not met, cheap rather than dear."""
    rows = []
    while len(rows) < 100:
        row = {name: dice.choice(values) for name, values in CHOICES.items()} | fixed
        if _possible(row):
            rows.append(row)
    return max(rows, key=lambda row: sum(pair not in met for pair in _pairs(row)) - 2 * _cost(row))


def _every_pair() -> set[Any]:
    pairs = set()
    for (one, ones), (other, others) in itertools.combinations(CHOICES.items(), 2):
        pairs |= {((one, a), (other, b)) for a in ones for b in others}
    return pairs - {(("loop", "solo-registers"), ("H", 130))}


def _rows() -> list[Row]:
    """Every cell with every dtype by every loop, the rest so that all pairs of choices meet."""
    dice, unmet, met, rows = random.Random(0), _every_pair(), set(), []
    first = ("cell", "dtype", "loop")
    bases = [dict(zip(first, base, strict=True)) for base in itertools.product(*(CHOICES[name] for name in first))]
    while bases or unmet:
        row = _pick(dice, met, bases.pop(0) if bases else dict(min(unmet, key=str)))
        rows.append(row)
        met.update(_pairs(row))
        unmet.difference_update(_pairs(row))
    return rows


ROWS = _rows()


def quicker_interpreter() -> None:
    """Integer additions without the interpreter's check for overflow, which is half of its time."""
    if DEVICE == "cpu":
        from triton.runtime.interpreter import interpreter_builder

        interpreter_builder.options = dataclasses.replace(interpreter_builder.options, sanitize_overflow=False)


def case_of(row: Row) -> Case:
    return Case(**{name: value for name, value in row.items() if name != "loop"})


def here(given: Inputs) -> Inputs:
    """The inputs on the device under test."""

    def move(t: Tensor | None) -> Tensor | None:
        return None if t is None else t.to(DEVICE)

    x, weights, hx, lengths, reset, dout = given
    moved = [[t.to(DEVICE) for t in tensors] for tensors in (weights, hx, dout)]
    return Inputs(x.to(DEVICE), moved[0], moved[1], move(lengths), move(reset), moved[2])


def planted(name: str, old: str, new: str, folder: Path) -> ModuleType:
    """The kernels' module with one edit. Triton reads a kernel's source from its file."""
    kernels = Path(fused_rnn.__file__).parent / "triton"
    source = (
        kernels / ("" if name in ("forward", "backward", "scan", "stages") else "cells") / f"{name}.py"
    ).read_text()
    assert source.count(old) == 1, f"{name}.py has {old!r} {source.count(old)} times"
    path = folder / f"planted_{name}.py"
    path.write_text(source.replace(old, new))
    spec = importlib.util.spec_from_file_location(f"planted_{name}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
