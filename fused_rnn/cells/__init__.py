"""The cells by name: data and plain PyTorch, the judge of every other backend. Imports torch alone."""

from fused_rnn.cells import lstm, gru, rnn  # noqa: F401, I001 - each registers its own, in this order
from fused_rnn.cells.descriptor import CELLS, Cell, cell_of, register, title, unknown
from fused_rnn.cells.program import is_program

__all__ = ["CELLS", "Cell", "cell_of", "is_program", "register", "title", "unknown"]
