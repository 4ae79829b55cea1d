"""Cells in stages for the loops alone: printed as a user's are, and compiled as built-in ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import emulated_build as build
import torch
from stage_cells import MASKED, STAGED

import fused_rnn
from fused_rnn.cells import CELLS, Cell
from fused_rnn.cuda.printer import struct


@fused_rnn.cell(gates=1)
def centred(x: Any, r: Any, s: Any, p: Any) -> Any:
    """Three sums, each of what the one before has made."""
    a = x[0] + r[0]
    a = a - a.mean(-1, keepdim=True)
    a = a * torch.rsqrt((a * a).mean(-1, keepdim=True) + 0.1)
    return torch.tanh(a) / (1 + torch.tanh(a).abs().mean(-1, keepdim=True))


# Sums and a variance; a product, then a sum beside another one; masks, a product, then a norm.
_TEXTS = {
    "layer_norm": STAGED["layer_norm"].descriptor().name,
    "deep": STAGED["deep"].descriptor().name,
    "masked_product": MASKED["masked_product"],
    "centred": centred.descriptor().name,
}
STAGED_CELLS: dict[str, Cell] = {name: CELLS[text]._replace(name=name) for name, text in _TEXTS.items()}


def header() -> Path:
    """A header with all of them."""
    lines = ["#pragma once", '#include "cells/cell.h"', "namespace fused_rnn {", ""]
    for number, (name, cell) in enumerate(STAGED_CELLS.items(), 10):
        assert cell.program is not None
        lines += [struct(cell.program, name, len(cell.states) > 1, late=True), f"FUSED_RNN_CELL({number}, {name})", ""]
    build.CACHE.mkdir(parents=True, exist_ok=True)
    return build._text("staged", "\n".join([*lines, "}  // namespace fused_rnn", ""]))
