"""The base of LSTM, GRU, RNN and FlexRNN, and their call as type checkers see it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, TypeVar, overload

from torch import Tensor, nn
from torch._jit_internal import unused
from torch.compiler import is_compiling
from torch.nn.utils.rnn import PackedSequence

from fused_rnn.call import known_save
from fused_rnn.cells import CELLS
from fused_rnn.dispatch import known_backend
from fused_rnn.nn import extras
from fused_rnn.nn.base import Fused, overrides_forward
from fused_rnn.nn.frozen import keeper_of
from fused_rnn.stream import Stream

if TYPE_CHECKING:
    from typing_extensions import Self

# Methods of torch.nn's modules that a subclass may override to check its input otherwise.
_CHECKS = (
    "check_input",
    "check_hidden_size",
    "check_forward_args",
    "get_expected_hidden_size",
    "get_expected_cell_size",
)

State = TypeVar("State")


class SequenceCall(Protocol[State]):
    """A call of a module, for type checkers: what comes back is packed if the input is."""

    @overload
    def __call__(
        self,
        input: Tensor,
        hx: State | None = None,
        *,
        lengths: Tensor | Sequence[int] | None = None,
        reset: Tensor | Sequence[Any] | None = None,
    ) -> tuple[Tensor, State]: ...
    @overload
    def __call__(
        self,
        input: PackedSequence,
        hx: State | None = None,
        *,
        lengths: None = None,
        reset: Tensor | Sequence[Any] | None = None,
    ) -> tuple[PackedSequence, State]: ...


class Recurrent(Fused, nn.RNNBase):
    """Base of LSTM, GRU, RNN and FlexRNN: torch.nn.RNNBase, which owns the weights, with a forward of our own.

    It is RNNBase and not torch.nn.LSTM because Dynamo refuses every instance of the latter; both.py has those that are.
    """

    _fused_save: str = "gates"  # on the class too, as Fused._fused_backend is
    _fused_checks: ClassVar[bool] = False  # whether a subclass overrides any of _CHECKS
    _fused_heads: int = 1
    _fused_by_layer: bool = False  # whether `_fused_of_layer` has a word on each layer's call
    _fused_options: tuple[Any, ...] = ()  # of layers.run, beside those that every module has
    _fused_zoned: ClassVar[int | None] = None  # how many states, the first ones, may zone out; None for all
    _fused_refused: ClassVar[tuple[str, ...]] = ()  # regularisers that the cell cannot have
    _fused_extras: bool = False  # whether the module has the attributes of extras.DEFAULTS
    _fused_frozen: Any = None  # what keeps its packed weights, since `freeze`

    def __init__(self, mode: str, *args: Any, backend: str | None = None, save: str = "gates", **kwargs: Any) -> None:
        counterpart = self._fused_counterpart
        if counterpart is None or not isinstance(self, counterpart):
            args = (mode, *args)  # for RNNBase; torch's own class comes before it, and knows its mode
        more = {name: kwargs.pop(name) for name in extras.DEFAULTS if name in kwargs}
        super().__init__(*args, **kwargs)
        self._fused_backend = known_backend(backend)
        self._fused_save = known_save(save)
        if more:
            extras.give(self, more)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls._fused_checks = overrides_checks(cls)

    @property
    def _fused_cell(self) -> str:  # type: ignore[override]
        return self.mode.lower()

    @property
    def _fused_gates(self) -> tuple[str, ...]:
        """The gates' names."""
        spec = CELLS[self._fused_cell]
        return spec.parts.names if spec.parts else tuple(map(str, range(spec.gates)))

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name in extras.DEFAULTS and extras.may_ask(self):
            extras.complete(self)

    @property
    @unused
    def save(self) -> str:
        """What training keeps for backward, "gates" or "recompute". Setting another raises ValueError."""
        return self._fused_save

    @save.setter
    def save(self, value: str) -> None:
        self._fused_save = known_save(value)

    def _slow_forward(self, *input: Any, **kwargs: Any) -> Any:
        """torch.nn.Module's, of a call under torch.jit.trace. The older ONNX exporter hands every argument's default
        over by position, lengths and reset among them."""
        if not overrides_forward(type(self)) and all(value is None for value in input[2:]):
            input = input[:2]
        return super()._slow_forward(*input, **kwargs)  # type: ignore[no-untyped-call]

    def stream(self, batch_size: int = 1, *, weights: str | None = None) -> Stream:
        """These layers for steps that arrive one by one: an object that holds the state and packed weights.

        Args:
            batch_size: how many sequences run side by side.
            weights: None keeps the weights as they are and gives this module's numbers in eval mode; "bf16" or "int8"
                (with a scale for each row) keeps the copy of a float32 module's weights in two bytes or one, on the
                CPU; on the CUDA loops W_hh, and "int8" of a 16-bit module, too.

        Returns:
            A :class:`~fused_rnn.Stream` on a copy of the weights, which only its `refresh()` renews.

        Raises:
            ValueError: for a bidirectional module, whose other direction starts at the end of the sequence, and for
                arguments that do not fit.
            RuntimeError: in training mode with dropout of any kind or zoneout, which a stream does not apply.
            NotImplementedError: for weights="bf16" or "int8" on another backend than "cpu" and "cuda".
        """
        if self.bidirectional:
            raise ValueError("bidirectional: got True, expected False: its other direction starts at the last step")
        if self.training and self.dropout and self.num_layers > 1:
            raise RuntimeError(f"dropout: got {self.dropout} in training mode, which a stream does not apply: eval()")
        cell = extras.stream_cell(self) if self._fused_extras else self._fused_cell
        return Stream(
            cell, self._fused_read, batch_size=batch_size, num_layers=self.num_layers,
            batch_first=self.batch_first, weights=weights, backend=self._fused_backend, heads=self._fused_heads,
        )  # fmt: skip

    def freeze(self) -> Self:
        """Keep the packed weights from call to call, for serving: no call packs them again until they change.

        It speeds up calls without gradient (no_grad, inference_mode) on the CPU, most of all short ones of large
        layers; all others go as ever. The panels take as much memory again as the weights. Each call asks whether the
        weights are the tensors they were, at their addresses, in their versions (`_version`), and packs them anew
        where they are not: after an optimizer's step, load_state_dict, to(), half(), and all that torch's operators
        do. What torch does not count it cannot see: writes through `.data`, a numpy or DLPack alias, or by another
        process to shared memory. After these call `freeze` again.

        Returns:
            The module itself.

        Raises:
            NotImplementedError: for a module whose weights are made anew in each call, with regularisers or heads.
            RuntimeError: for parameters made under inference_mode, which have no version.
        """
        self._fused_frozen = keeper_of(self)
        return self

    def unfreeze(self) -> Self:
        """Undo `freeze`, and give back the panels' memory. Returns the module itself."""
        self.__dict__.pop("_fused_frozen", None)
        return self

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        if self._fused_frozen is not None:
            self._fused_frozen.forget()  # torch lets no tensors change places that are referred to
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]

    def _fused_names(self) -> list[str] | None:
        """The names of the weights that may be kept packed, as the cell has them; None of a module that cannot."""
        computed = any(name not in self._parameters for name in self._flat_weights_names)
        return None if computed or self._fused_checks or self._fused_extras else self._flat_weights_names

    def _fused_read(self) -> list[Tensor]:
        """The weights as a stream reads them."""
        return read_weights(self)

    def _fused_of_layer(self, x: Tensor, weights: Sequence[Tensor], lengths: Any) -> tuple[Tensor, Sequence[Tensor]]:
        """The input and the weights that a layer runs by, of its input x [T, B, D]."""
        raise NotImplementedError

    def _fused_asks(self) -> bool:
        return extras.asks(self)

    def extra_repr(self) -> str:
        """torch.nn's, and the extra arguments where they are not the default."""
        said = [f", backend={self._fused_backend!r}"] if self._fused_backend is not None else []
        said += [f", save={self._fused_save!r}"] if self._fused_save != "gates" else []
        for name, default in extras.DEFAULTS.items() if self._fused_extras else ():
            if name in self.__dict__ and getattr(self, name) != default:
                said.append(f", {name}={getattr(self, name)!r}")
        return super().extra_repr() + "".join(said)


def overrides_checks(cls: type[Recurrent], counterpart: type | None = None) -> bool:
    """Whether a class, or one above it, has other checks than its counterpart.

    A class without a counterpart, as a library may put between ours, is none that anybody calls.
    """
    counterpart = counterpart or getattr(cls, "_fused_counterpart", None) or cls
    return any(getattr(cls, name, None) is not getattr(counterpart, name, None) for name in _CHECKS)


def read_weights(module: Recurrent) -> list[Tensor]:
    """The weights as the attributes are now: tied, swapped by functional_call, parametrized, or set by a hook."""
    names = module._flat_weights_names
    if not is_compiling():
        parameters = module._parameters
        try:
            return [parameters[name] for name in names]  # type: ignore[misc]
        except KeyError:
            pass  # some are not parameters but computed from some
    return [getattr(module, name) for name in names]
