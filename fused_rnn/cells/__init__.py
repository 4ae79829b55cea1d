"""The cells by name: data and plain PyTorch, the judge of every other backend. Imports torch alone."""

from fused_rnn.cells.descriptor import Cell, unknown
from fused_rnn.cells.gru import GRU
from fused_rnn.cells.lstm import LSTM
from fused_rnn.cells.rnn import RNN_RELU, RNN_TANH

CELLS: dict[str, Cell] = {}


def register(*cells: Cell) -> None:
    """Make cells known by their names; raises ValueError for a name that another one has."""
    for cell in cells:
        if CELLS.setdefault(cell.name, cell) is not cell:
            raise ValueError(f"cell: got {cell.name!r}, expected a name that no other cell has")


register(LSTM, GRU, RNN_TANH, RNN_RELU)

__all__ = ["CELLS", "Cell", "register", "unknown"]
