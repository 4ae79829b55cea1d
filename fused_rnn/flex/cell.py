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
from torch.nn.functional import linear

from fused_rnn.cells import CELLS, Cell
from fused_rnn.cells.program import Program
from fused_rnn.flex.compile import Shape, program_of
from fused_rnn.flex.source import StepError


class UserCell:
    """A cell made by :func:`cell`. Callable as the plain step: `cell(x, r, s, p)` → the states after.

    Attributes:
        step: the function it was made of.
        name: the function's.
        gates, states, params, recurrent, matrices, diagonal: as given to :func:`cell`, gates as their number, matrices
            with n alone.
        gate_names: the gates' names, if they have none "0", "1", and so on.

    Examples:
        >>> @fused_rnn.cell(gates=1)
        ... def elman(x, r, s, p):
        ...     return torch.tanh(x[0] + r[0])
        >>> elman
        <cell elman: gates=1, states=('h',)>
        >>> (h,) = elman([torch.ones(2, 3)], [torch.zeros(2, 3)], {"h": torch.zeros(2, 3)})
    """

    def __init__(self, step: Callable[..., Any], shape: Shape, gate_names: tuple[str, ...] | None = None) -> None:
        self.step, self.shape = step, shape
        self.gate_names = gate_names or tuple(map(str, range(shape.gates)))
        self.gates, self.states, self.params, self.recurrent = shape[:4]
        self.matrices, self.diagonal = dict(shape.matrices), shape.diagonal
        self._base, self._others = self, dict[int, UserCell]()  # the cell in its module; by blocks, if it is this one
        self.__name__ = getattr(step, "__name__", type(step).__name__)
        # A program's text has its own signs, and is one line.
        self.name = "".join(c if c.isprintable() and c != "|" else "_" for c in self.__name__)
        self.__qualname__ = getattr(step, "__qualname__", self.__name__)
        self.__module__ = getattr(step, "__module__", None) or "__main__"
        self.__doc__ = step.__doc__
        self._states, self._params = namedtuple("States", self.states), namedtuple("Params", self.params)
        self._matrices: Any = namedtuple("Matrices", tuple(self.matrices))  # type: ignore[misc]
        self._lock, self._traced = threading.RLock(), False
        self._descriptor: Cell | None = None

    def __call__(
        self, x: Sequence[Tensor], r: Sequence[Tensor] | None, s: Any, p: Any = (), m: Any = ()
    ) -> tuple[Tensor, ...]:
        """One step in plain PyTorch.

        Args:
            x, r: of each gate the input side and the recurrent side, [B, H]; r is None if not recurrent.
            s, p: the states and the params, in order, by name, or as an object with these attributes.
            m: likewise the matrices, [n·H, H].

        Returns:
            The states after, in the order of `states`.
        """
        more = []
        if self.matrices:
            given = _named(self._matrices, m)
            more.append(self._matrices(*[_multiplier(getattr(given, name), n) for name, n in self.matrices.items()]))
        result = self.step(x, r, _named(self._states, s), _named(self._params, p), *more)
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
                    self._descriptor = CELLS[program_of(self.name, self.step, self.plain, self.shape).text]
                finally:
                    self._traced = False
                KNOWN.setdefault(self._descriptor.name, self)
            return self._descriptor

    def plain(
        self,
        x: Sequence[Tensor],
        r: Sequence[Tensor] | None,
        s: Sequence[Tensor],
        p: Sequence[Tensor],
        m: Sequence[Callable[[Tensor], Any]],
        masks: Sequence[Tensor] = (),
    ) -> Any:
        """The step on plain sequences, with functions that multiply by the matrices."""
        more = (self._matrices(*m),) if self.matrices else ()
        return self.step(x, r, self._states(*s), self._params(*p), *more)

    def _fused_diagonal(self, blocks: int) -> UserCell:
        """The same step with a W_hh of so many blocks."""
        if blocks == self.diagonal:
            return self
        with self._lock:
            if blocks not in self._others:
                made = UserCell(self.step, self.shape._replace(diagonal=blocks), self.gate_names)
                made._base = self
                self._others[blocks] = made
            return self._others[blocks]

    def __repr__(self) -> str:
        more = "" if self.recurrent else ", recurrent=False"
        params = f", params={self.params}" if self.params else ""
        more += f", matrices={self.matrices}" if self.matrices else ""
        more += f", diagonal={self.diagonal}" if self.diagonal > 1 else ""
        return f"<cell {self.__name__}: gates={self.gates}, states={self.states}{params}{more}>"

    def __copy__(self) -> UserCell:
        return self

    def __deepcopy__(self, memo: Any) -> UserCell:
        return self

    def __reduce__(self) -> Any:
        """By its name in its module, as functions are."""
        if self._base is not self:
            return _of_blocks, (self._base, self.diagonal)
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


KNOWN: dict[str, UserCell] = {}  # of a program's text a cell that it was made of


def _multiplier(w: Tensor, count: int) -> Callable[[Tensor], Any]:
    """What multiplies by a matrix of so many blocks, as a step has it."""

    def multiply(v: Tensor) -> Any:
        y = linear(v, w)
        return y if count == 1 else y.chunk(count, -1)

    return multiply


def _find(module: str, name: str) -> Any:
    found: Any = importlib.import_module(module)
    for part in name.split("."):
        found = getattr(found, part)
    return found


def _of_blocks(base: UserCell, blocks: int) -> UserCell:
    return base._fused_diagonal(blocks)


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
    *,
    gates: int | Sequence[str],
    states: Sequence[str] = ("h",),
    params: Sequence[str] = (),
    recurrent: bool = True,
    matrices: Mapping[str, tuple[int, str]] | None = None,
    diagonal: int = 1,
) -> Callable[[Callable[..., Any]], UserCell]:
    """Make a recurrent cell of a step written in PyTorch, for :class:`~fused_rnn.FlexRNN`. A decorator. ::

        @fused_rnn.cell(gates=1, params=("a",))
        def leaky(x, r, s, p):
            return s.h + p.a * (torch.tanh(x[0] + r[0]) - s.h)

    The step is called with

    - x, r: sequences of G tensors [B, H], of each gate its input side W_ih x + b_ih and its recurrent side
      W_hh h + b_hh; r is None with recurrent=False.
    - s, p: the states before the step [B, H], and vectors of one number per unit [H], as attributes.

    - m, of a cell with matrices: a function for each, as an attribute: ``m.u(v)`` is U v, [B, H], of a v [B, H] that
      the step has made; of a matrix of n·H rows it is a tuple of n such. One product a step for each matrix.

    and returns the states after, in the order of `states`; for one state a tensor will do. The first is the output, and
    what W_hh multiplies. It may do what torch has of pointwise arithmetic, comparisons, torch.where, clamp,
    exponentials and activations; and over the units of a row sum, mean, var, std and vector_norm with dim=-1 and
    keepdim=True, F.layer_norm and F.rms_norm of the shape v.shape[-1:]. With `heads` these see the units of one head.
    It runs when it is first needed, on tensors that stand for its arguments.
    Numbers that it closes over, and tensors of one number without a gradient, are taken as they are then. Loops run
    what it did then, forward and backward, as one fused kernel.

    Args:
        gates: G, how many pre-activations [B, H] a step gets; or their names, by which `return_gates` returns them.
        states: names of what a step hands to the next one.
        params: names of vectors of one number per unit, which are trained as the matrices are.
        recurrent: False leaves out W_hh: what a step knows of the one before are its states alone.
        matrices: matrices beside W_hh by name, each (n, "H"): n·H rows, H columns.
        diagonal: N, how many blocks W_hh has on its diagonal, a divisor of H: a unit reads the H/N units of its own
            block, and costs as much. Unlike `heads`, they are one recurrence: the step's sums are over all H units.

    Returns:
        A decorator that makes a :class:`UserCell` of a function.

    Raises:
        TypeError, ValueError: for arguments that do not fit; when it is first needed, a ValueError with the line of the
            step that does what a cell cannot: a branch on the value of a tensor, an operation that no loop has, a
            tensor that is not [B, H], another number of states, a tensor of the closure that requires a gradient.

    Examples:
        >>> @fused_rnn.cell(gates=1)
        ... def elman(x, r, s, p):
        ...     return torch.sin(x[0] + r[0])
        >>> y, h_n = fused_rnn.FlexRNN(elman, 10, 20)(torch.randn(5, 3, 10))
    """
    names = None
    if isinstance(gates, (tuple, list)) and gates:
        names = _names("gates", gates)
        gates = len(names)
    if isinstance(gates, bool) or not isinstance(gates, int) or gates < 1:
        raise ValueError(f"gates: got {gates!r}, expected a number of at least 1, or names")
    own, vectors = _names("states", states), _names("params", params)
    if not own:
        raise ValueError("states: got none, expected at least the one that is the output")
    if both := [name for name in vectors if name in own]:
        raise ValueError(f"params: got {both[0]!r}, which is a state, expected another name")
    if not isinstance(recurrent, bool):
        raise TypeError(f"recurrent: got {recurrent!r}, expected True or False")
    if isinstance(diagonal, bool) or not isinstance(diagonal, int) or diagonal < 1:
        raise ValueError(f"diagonal: got {diagonal!r}, expected a positive number of blocks")
    if diagonal > 1 and not recurrent:
        raise ValueError(f"diagonal: got {diagonal}, expected 1: without W_hh there are no blocks of it")
    blocks = _checked_matrices(matrices, own, vectors)

    def decorate(step: Callable[..., Any]) -> UserCell:
        if not callable(step):
            raise TypeError(f"step: got {type(step).__name__}, expected a function of (x, r, s, p)")
        return UserCell(step, Shape(gates, own, vectors, recurrent, blocks, diagonal=diagonal), names)

    return decorate


def _checked_matrices(given: Any, states: tuple[str, ...], params: tuple[str, ...]) -> tuple[tuple[str, int], ...]:
    """The matrices, each with its blocks of H rows. Raises TypeError, ValueError."""
    if given is None:
        return ()
    if not isinstance(given, Mapping):
        raise TypeError(f"matrices: got {given!r}, expected shapes by name, as {{'u': (1, 'H')}}")
    names = _names("matrices", tuple(given))
    for name in names:
        if name in states or name in params:
            raise ValueError(f"matrices: got {name!r}, which is a state or a param, expected another name")
        shape = given[name]
        fits = isinstance(shape, (tuple, list)) and len(shape) == 2 and shape[1] == "H"
        if not fits or isinstance(shape[0], bool) or not isinstance(shape[0], int) or shape[0] < 1:
            raise ValueError(f"matrices: got {shape!r} for {name!r}, expected (n, 'H') of n·H rows and H columns")
    return tuple((name, given[name][0]) for name in names)


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
