"""fused_rnn.cell: a step written in PyTorch becomes a cell that every loop runs."""

from __future__ import annotations

import importlib
import pickle
import threading
from collections import namedtuple
from collections.abc import Callable, Iterable, Mapping, Sequence
from keyword import iskeyword
from typing import Any

from torch import Tensor

from fused_rnn.cells import CELLS, Cell
from fused_rnn.cells.program import Program
from fused_rnn.flex.compile import program_of
from fused_rnn.flex.source import StepError


class UserCell:
    """A cell made by :func:`cell`. Callable as the plain step: `cell(x, r, s, p)` → the states after.

    Attributes:
        step: the function it was made of.
        name: the function's.
        gates, states, params, recurrent: as given to :func:`cell`.

    Examples:
        >>> @fused_rnn.cell(gates=1)
        ... def elman(x, r, s, p):
        ...     return torch.tanh(x[0] + r[0])
        >>> elman
        <cell elman: gates=1, states=('h',)>
        >>> (h,) = elman([torch.ones(2, 3)], [torch.zeros(2, 3)], {"h": torch.zeros(2, 3)})
    """

    def __init__(
        self, step: Callable[..., Any], gates: int, states: tuple[str, ...], params: tuple[str, ...], recurrent: bool
    ) -> None:
        self.step, self.gates, self.states, self.params, self.recurrent = step, gates, states, params, recurrent
        self.__name__ = getattr(step, "__name__", type(step).__name__)
        # A program's text has its own signs, and is one line.
        self.name = "".join(c if c.isprintable() and c != "|" else "_" for c in self.__name__)
        self.__qualname__ = getattr(step, "__qualname__", self.__name__)
        self.__module__ = getattr(step, "__module__", None) or "__main__"
        self.__doc__ = step.__doc__
        self._states, self._params = namedtuple("States", states), namedtuple("Params", params)
        self._lock, self._traced = threading.RLock(), False
        self._descriptor: Cell | None = None

    def __call__(self, x: Sequence[Tensor], r: Sequence[Tensor] | None, s: Any, p: Any = ()) -> tuple[Tensor, ...]:
        """One step in plain PyTorch.

        Args:
            x, r: of each gate the input side and the recurrent side, [B, H]; r is None if not recurrent.
            s, p: the states and the params, in order, by name, or as an object with these attributes.

        Returns:
            The states after, in the order of `states`.
        """
        result = self.step(x, r, _named(self._states, s), _named(self._params, p))
        return tuple(result) if isinstance(result, (tuple, list)) else (result,)

    @property
    def program(self) -> Program:
        """The step and its gradient as the loops run them, traced once. Raises ValueError for what no loop runs."""
        return self.descriptor().program  # type: ignore[return-value]

    def descriptor(self) -> Cell:
        """The cell as the loops know it, whose name is the program's text."""
        with self._lock:
            if self._descriptor is None:
                if self._traced:
                    raise StepError(f"cell {self.name!r}: the step asks for its own program, as a FlexRNN of it does")
                self._traced = True
                try:
                    shape = (self.gates, self.states, self.params, self.recurrent)
                    self._descriptor = CELLS[program_of(self.name, self.step, self._plain, *shape).text]
                finally:
                    self._traced = False
            return self._descriptor

    def _plain(
        self, x: Sequence[Tensor], r: Sequence[Tensor] | None, s: Sequence[Tensor], p: Sequence[Tensor]
    ) -> tuple[Tensor, ...]:
        return self.step(x, r, self._states(*s), self._params(*p))  # type: ignore[no-any-return]

    def __repr__(self) -> str:
        more = "" if self.recurrent else ", recurrent=False"
        params = f", params={self.params}" if self.params else ""
        return f"<cell {self.__name__}: gates={self.gates}, states={self.states}{params}{more}>"

    def __copy__(self) -> UserCell:
        return self

    def __deepcopy__(self, memo: Any) -> UserCell:
        return self

    def __reduce__(self) -> Any:
        """By its name in its module, as functions are."""
        try:
            found = _find(self.__module__, self.__qualname__)
        except (AttributeError, ImportError):
            found = None
        if found is not self:
            raise pickle.PicklingError(
                f"cell {self.__name__!r}: pickled by its name, and {self.__module__}.{self.__qualname__} is not it;"
                " define the cell at the top of a module, under its function's name"
            )
        return _find, (self.__module__, self.__qualname__)


def _find(module: str, name: str) -> Any:
    found: Any = importlib.import_module(module)
    for part in name.split("."):
        found = getattr(found, part)
    return found


def _named(kind: Any, given: Any) -> Any:
    """Values with names."""
    if isinstance(given, Mapping):
        return kind(**given)
    names = kind._fields
    if isinstance(given, (tuple, list)) and not hasattr(given, "_fields"):
        return kind(*given)
    if isinstance(given, Tensor) and len(names) == 1:
        return kind(given)
    return given


def cell(
    *, gates: int, states: Sequence[str] = ("h",), params: Sequence[str] = (), recurrent: bool = True
) -> Callable[[Callable[..., Any]], UserCell]:
    """Make a recurrent cell of a step written in PyTorch, for :class:`~fused_rnn.FlexRNN`. A decorator. ::

        @fused_rnn.cell(gates=1, params=("a",))
        def leaky(x, r, s, p):
            return s.h + p.a * (torch.tanh(x[0] + r[0]) - s.h)

    The step is called with

    - x, r: sequences of G tensors [B, H], of each gate its input side W_ih x + b_ih and its recurrent side
      W_hh h + b_hh; r is None with recurrent=False.
    - s, p: the states before the step [B, H], and vectors of one number per unit [H], as attributes.

    and returns the states after, in the order of `states`; for one state a tensor will do. The first is the output, and
    what W_hh multiplies. It may do what torch has of pointwise arithmetic, comparisons, torch.where, clamp,
    exponentials and activations. It runs when it is first needed, on tensors that stand for its arguments.
    Numbers that it closes over, and tensors of one number without a gradient, are taken as they are then. Loops run
    what it did then, forward and backward, as one fused kernel.

    Args:
        gates: G, how many pre-activations [B, H] a step gets.
        states: names of what a step hands to the next one.
        params: names of vectors of one number per unit, which are trained as the matrices are.
        recurrent: False leaves out W_hh: what a step knows of the one before are its states alone.

    Returns:
        A decorator that makes a :class:`UserCell` of a function.

    Raises:
        TypeError, ValueError: for arguments that do not fit; when it is first needed, a ValueError with the line of the
            step that does what a cell cannot: a branch on the value of a tensor, an operation that is not pointwise, a
            tensor that is not [B, H], another number of states, a tensor of the closure that requires a gradient.

    Examples:
        >>> @fused_rnn.cell(gates=1)
        ... def elman(x, r, s, p):
        ...     return torch.sin(x[0] + r[0])
        >>> y, h_n = fused_rnn.FlexRNN(elman, 10, 20)(torch.randn(5, 3, 10))
    """
    if isinstance(gates, bool) or not isinstance(gates, int) or gates < 1:
        raise ValueError(f"gates: got {gates!r}, expected a number of at least 1")
    own, vectors = _names("states", states), _names("params", params)
    if not own:
        raise ValueError("states: got none, expected at least the one that is the output")
    if both := [name for name in vectors if name in own]:
        raise ValueError(f"params: got {both[0]!r}, which is a state, expected another name")
    if not isinstance(recurrent, bool):
        raise TypeError(f"recurrent: got {recurrent!r}, expected True or False")

    def decorate(step: Callable[..., Any]) -> UserCell:
        if not callable(step):
            raise TypeError(f"step: got {type(step).__name__}, expected a function of (x, r, s, p)")
        return UserCell(step, gates, own, vectors, recurrent)

    return decorate


def _names(argument: str, given: Sequence[str]) -> tuple[str, ...]:
    if isinstance(given, str):
        raise TypeError(f"{argument}: got the string {given!r}, expected a sequence of names, as ({given!r},)")
    if not isinstance(given, Iterable):
        raise TypeError(f"{argument}: got {given!r}, expected a sequence of names")
    names = tuple(given)
    for name in names:
        if not isinstance(name, str) or not name.isidentifier() or name[0] == "_" or iskeyword(name):
            raise ValueError(
                f"{argument}: got {name!r}, expected names that are Python's, without a leading underscore"
            )
    if len(set(names)) < len(names):
        raise ValueError(f"{argument}: got {names}, expected different names")
    return names
