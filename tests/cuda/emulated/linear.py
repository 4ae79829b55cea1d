"""Cells that are linear in their states for the loops alone, and what is run over their chunks of time: printed as a
user's are, and compiled as built-in ones."""

from __future__ import annotations

from pathlib import Path

import emulated_build as build
from linear_cells import SCANS

from fused_rnn.cells import Cell
from fused_rnn.cuda import scan
from fused_rnn.cuda.printer import struct


def _both(name: str) -> dict[str, Cell]:
    cell = SCANS[name].descriptor()
    summary = scan.summary_of(cell.name)
    assert summary is not None
    return {name: cell._replace(name=name), f"{name}_summary": summary._replace(name=f"{name}_summary")}


# h is read out of another state; it is handed on, and there is a param; it is read out of two others.
NAMES = ("sru", "linear_indrnn", "many")
LINEAR_CELLS: dict[str, Cell] = {own: cell for name in NAMES for own, cell in _both(name).items()}


def instances(instance: build.Instance) -> list[build.Instance]:
    """A cell's kernels, with those of its summary, if it has one."""
    summary = f"{instance.cell}_summary"
    return [instance, instance._replace(cell=summary)] if summary in LINEAR_CELLS else [instance]


def header() -> Path:
    """A header with all of them."""
    lines = ["#pragma once", '#include "cells/cell.h"', "namespace fused_rnn {", ""]
    for number, (name, cell) in enumerate(LINEAR_CELLS.items(), 10):
        assert cell.program is not None
        lines += [struct(cell.program, name), f"FUSED_RNN_CELL({number}, {name})", ""]
    build.CACHE.mkdir(parents=True, exist_ok=True)
    return build._text("linear", "\n".join([*lines, "}  // namespace fused_rnn", ""]))
