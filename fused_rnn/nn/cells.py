"""LSTMCell, GRUCell and RNNCell: drop-in for torch.nn's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, is_grad_enabled, nn
from torch.compiler import is_compiling

# Bound now, as in rnn.py.
from torch.nn import GRUCell as TorchGRUCell
from torch.nn import LSTMCell as TorchLSTMCell
from torch.nn import RNNCell as TorchRNNCell

from fused_rnn import layers
from fused_rnn.dispatch import known_backend
from fused_rnn.nn import quick
from fused_rnn.nn.base import Fused, prefers_counterpart
from fused_rnn.nn.counterpart import refuse, run_counterpart
from fused_rnn.nn.plain import FAST_PATH, STEPPING, are_plain, is_plain_hx

_WEIGHTS = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")  # the latter two None where there is no bias
_RNN = {"tanh": "rnn_tanh", "relu": "rnn_relu"}


class Cell(Fused, nn.RNNCellBase):
    """Base of the cells: torch.nn.RNNCellBase, which owns the weights, with a forward of our own."""

    def __init__(self, *args: Any, num_chunks: int, backend: str | None = None, **kwargs: Any) -> None:
        if not isinstance(self, self._fused_counterpart):
            kwargs["num_chunks"] = num_chunks  # for RNNCellBase; torch's own class comes before it, and knows its gates
        super().__init__(*args, **kwargs)
        self._fused_backend = known_backend(backend)

    def extra_repr(self) -> str:
        """torch.nn's, and the extra argument where it is not the default."""
        backend = self._fused_backend
        return super().extra_repr() + ("" if backend is None else f", backend={backend!r}")


def _step(module: Cell, input: Any, hx: Any, cell: str) -> Sequence[Tensor] | None:
    """The new states without gradient, by the op alone; None where the call is another one. As quick.call."""
    if is_grad_enabled() or is_compiling() or FAST_PATH is None or module._fused_backend not in STEPPING:
        return None
    return FAST_PATH(module._parameters, module.bias, input, hx, cell, -1)


def _run(module: Cell, input: Any, hx: Any) -> Any:
    """forward, of any call."""
    weights, pair, backend = _read_weights(module), module._fused_states == 2, module._fused_backend
    if is_grad_enabled() and (made := quick.step(module, input, hx, module._fused_cell, weights)) is not None:
        return tuple(made) if pair else made[0]
    plain = are_plain((input, *weights)) and is_plain_hx(hx, module._fused_states)
    if not plain or prefers_counterpart(module, weights, input):
        return run_counterpart(module, weights, input, hx)
    try:
        states = () if hx is None else hx if pair else (hx,)
        if input.dim() != 1:
            after = layers.step(module._fused_cell, input, states, weights, backend)
        else:
            states = [state.unsqueeze(0) for state in states]
            after = layers.step(module._fused_cell, input.unsqueeze(0), states, weights, backend)
            after = [state.squeeze(0) for state in after]
        return tuple(after) if pair else after[0]
    except ValueError as error:
        return refuse(module, weights, input, hx, error)


def _read_weights(module: Cell) -> list[Tensor]:
    """The weights as the attributes are now: tied, swapped by functional_call, parametrized, or set by a hook."""
    if not is_compiling():
        try:
            parameters = module._parameters
            return [w for w in (parameters[name] for name in _WEIGHTS) if w is not None]
        except KeyError:
            pass  # some are not parameters but computed from some
    return [w for w in (getattr(module, name) for name in _WEIGHTS) if w is not None]


class LSTMCell(Cell):
    r"""One step of an LSTM, in place of torch.nn.LSTMCell, whose arguments, attributes, state_dict and errors it has.

    Beside torch.nn.LSTMCell's arguments, which stand in the same positions, there is:

    Args:
        backend: "cpu", "torch", "reference", "cuda" or "triton" to force one; None takes the one that measured
            fastest. Keyword only.

    Inputs:
        input: [B, D] or [D].
        hx: (h [B, H], c [B, H]), without B for unbatched input; zeros if None.

    Returns:
        (h', c'), shaped as hx, of the input's dtype.

    Raises:
        Exception: what torch.nn.LSTMCell raises, in its words.
        TypeError: for an input that is no tensor, and an hx that is not a pair of tensors.
        NotImplementedError: where the backend asked for cannot run the call.

    Twice differentiable in input, hx and the weights. Formula and source: :class:`LSTM`.

    Examples:
        >>> cell = fused_rnn.LSTMCell(10, 20)
        >>> h, c = cell(torch.randn(3, 10))
        >>> h, c = cell(torch.randn(3, 10), (h, c))
        >>> h.shape, c.shape
        (torch.Size([3, 20]), torch.Size([3, 20]))
    """

    _fused_counterpart = TorchLSTMCell
    _fused_cell = "lstm"
    _fused_states = 2

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        *,
        backend: str | None = None,
    ) -> None:
        super().__init__(input_size, hidden_size, bias, num_chunks=4, device=device, dtype=dtype, backend=backend)

    if TYPE_CHECKING:

        def __call__(self, input: Tensor, hx: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]: ...

    def forward(self, input: Tensor, hx: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
        """One step: (h', c'). Shapes and errors stand in the class's docstring."""
        stepped = _step(self, input, hx, "lstm")
        return _run(self, input, hx) if stepped is None else (stepped[0], stepped[1])


class GRUCell(Cell):
    r"""One step of a GRU, in place of torch.nn.GRUCell, whose arguments, attributes, state_dict and errors it has.

    Beside torch.nn.GRUCell's arguments, which stand in the same positions, there is:

    Args:
        backend: keyword only, as :class:`LSTMCell`'s.

    Inputs:
        input: [B, D] or [D].
        hx: h [B, H], without B for unbatched input; zeros if None.

    Returns:
        h', shaped as hx, of the input's dtype.

    Raises:
        Exception: what torch.nn.GRUCell raises, in its words.
        TypeError: for an input that is no tensor, and an hx that is not a tensor.
        NotImplementedError: where the backend asked for cannot run the call.

    Twice differentiable in input, hx and the weights. Formula and source: :class:`GRU`.

    Examples:
        >>> cell = fused_rnn.GRUCell(10, 20)
        >>> cell(torch.randn(3, 10), torch.randn(3, 20)).shape
        torch.Size([3, 20])
    """

    _fused_counterpart = TorchGRUCell
    _fused_cell = "gru"

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        *,
        backend: str | None = None,
    ) -> None:
        super().__init__(input_size, hidden_size, bias, num_chunks=3, device=device, dtype=dtype, backend=backend)

    if TYPE_CHECKING:

        def __call__(self, input: Tensor, hx: Tensor | None = None) -> Tensor: ...

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        """One step: h'. Shapes and errors stand in the class's docstring."""
        stepped = _step(self, input, hx, "gru")
        return _run(self, input, hx) if stepped is None else stepped[0]


class RNNCell(Cell):
    r"""One step of an Elman RNN, in place of torch.nn.RNNCell, whose arguments, attributes, state and errors it has.

    Beside torch.nn.RNNCell's arguments, which stand in the same positions, there is:

    Args:
        backend: keyword only, as :class:`LSTMCell`'s.

    Inputs:
        input: [B, D] or [D].
        hx: h [B, H], without B for unbatched input; zeros if None.

    Returns:
        h', shaped as hx, of the input's dtype.

    Raises:
        Exception: what torch.nn.RNNCell raises, in its words.
        TypeError: for an input that is no tensor, and an hx that is not a tensor.
        NotImplementedError: where the backend asked for cannot run the call.

    Twice differentiable in input, hx and the weights. Formula and source: :class:`RNN`.

    Examples:
        >>> cell = fused_rnn.RNNCell(10, 20, nonlinearity="relu")
        >>> cell(torch.randn(3, 10), torch.randn(3, 20)).shape
        torch.Size([3, 20])
    """

    __constants__: list[str] = TorchRNNCell.__constants__
    nonlinearity: str

    _fused_counterpart = TorchRNNCell

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        nonlinearity: str = "tanh",
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        *,
        backend: str | None = None,
    ) -> None:
        super().__init__(input_size, hidden_size, bias, num_chunks=1, device=device, dtype=dtype, backend=backend)
        self.nonlinearity = nonlinearity

    if TYPE_CHECKING:

        def __call__(self, input: Tensor, hx: Tensor | None = None) -> Tensor: ...

    @property
    def _fused_cell(self) -> str:  # type: ignore[override]
        return "rnn_relu" if self.nonlinearity == "relu" else "rnn_tanh"

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        """One step: h'. Shapes and errors stand in the class's docstring."""
        if self.nonlinearity not in _RNN:  # torch.nn refuses it here, not in __init__
            refused: Tensor = run_counterpart(self, _read_weights(self), input, hx)
            return refused
        stepped = _step(self, input, hx, _RNN[self.nonlinearity])
        return _run(self, input, hx) if stepped is None else stepped[0]
