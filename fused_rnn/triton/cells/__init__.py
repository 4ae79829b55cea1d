"""The cells by name: a cell is a module. A new one is a file of its own and an entry here. Imports no Triton.

fwd(x, r, bias, states, params, ACTIVATION) → (the states after, what backward wants kept), all of them tuples of tiles.
  x, r: each gate's input side and recurrent side.  bias: of the recurrent side of the gates that are apart.
  states: those before, all float32; h is zero where the cell does not read it.  params: [1, BH] each, and behind them
    the masks of a cell that has any.
bwd(dstates, kept, after, before, params, ACTIVATION)
  → (the gates' gradients, what of dstates reaches the states before, what this step gives each param)
  dstates: the whole gradient of each state after.  after, before: the states; zero those that are not read.
  Gradients: of the input side of the gates that are apart, then of all gates' recurrent side. What reaches h by the
  product with W_hh the loop adds.
Of a cell with stages both take (team, HOW) before ACTIVATION, which they hand to stages.py, and with the gates'
gradients come those of the products with its own matrices.
AFTER, BEFORE: the states that bwd reads as the step leaves them, and as they enter it.
"""

from __future__ import annotations

import importlib
from types import ModuleType

from fused_rnn.cells.program import is_program
from fused_rnn.triton import printer

MODULES: dict[str, str] = {}


def register(cell: str, module: str) -> None:
    """Make a cell of the descriptor's name known by the module of its kernels, which is imported when first wanted."""
    MODULES[cell] = module


def kernels(cell: str) -> ModuleType:
    """The module of a cell of this name; of a program it is printed."""
    if is_program(cell):
        return printer.module(cell)
    return importlib.import_module(MODULES[cell])


register("lstm", "fused_rnn.triton.cells.lstm")
register("gru", "fused_rnn.triton.cells.gru")
register("rnn_tanh", "fused_rnn.triton.cells.rnn_tanh")
register("rnn_relu", "fused_rnn.triton.cells.rnn_relu")
