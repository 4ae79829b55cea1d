"""LSTMCell, GRUCell and RNNCell: drop-in for torch.nn's."""

from __future__ import annotations

from collections.abc import Sequence
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor, nn

# Bound now, as in rnn.py.
from torch.nn import GRUCell as TorchGRUCell
from torch.nn import LSTMCell as TorchLSTMCell
from torch.nn import RNNCell as TorchRNNCell

from fused_rnn import functional
from fused_rnn.nn.plain import CELL_CODES, PLAIN, STEP, Fused, are_plain, check_backend, is_jit_tracing, may_step

# Read the weights in one C call; through nn.Module.__getattr__ each would cost 0.4 µs. Without biases these are None.
_READ = itemgetter("weight_ih", "weight_hh", "bias_ih", "bias_hh")

_LSTM, _GRU = CELL_CODES["lstm"], CELL_CODES["gru"]
_RNN = {"tanh": CELL_CODES["rnn_tanh"], "relu": CELL_CODES["rnn_relu"]}


class Cell(Fused, nn.RNNCellBase):
    """Base of the cells: torch.nn.RNNCellBase, which owns the weights, with a forward of our own."""

    def __init__(self, *args: Any, backend: str | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        check_backend(backend)
        self.backend = backend

    def extra_repr(self) -> str:
        """torch.nn's, and the extra argument where it is not the default."""
        return super().extra_repr() + ("" if self.backend is None else f", backend={self.backend!r}")

    def _call(self, x: Tensor, hx: Any, weights: Sequence[Tensor]) -> Any:
        """functional.lstm_cell, gru_cell or rnn_cell: x [B, D], hx of [B, H] or None → the new hx."""
        raise NotImplementedError

    def _step(self, input: Any, h: Any, c: Any, code: int) -> list[Tensor] | None:
        """The new states without gradient, by the op alone; None where the call is another one. As Recurrent._step."""
        if (
            STEP is None
            or not may_step()
            or type(input) is not Tensor
            or input.dim() != 2
            or (self.backend is not None and self.backend != "cpu")
            or not input.is_cpu
        ):
            return None
        try:
            return STEP(input, h, c, *_READ(self._parameters), None, code)
        except (KeyError, RuntimeError):
            return None  # a computed weight, or an input that the op refuses, as the slow way will in torch's words

    def _run(self, input: Any, hx: Any) -> Any:
        """forward, of any call."""
        if self.backend == "torch" or (self.backend is None and is_jit_tracing()):
            return self._as_twin(input, hx)
        weights = self._weights()
        if type(input) not in PLAIN or not are_plain(weights) or not self._has_plain_states(hx):
            return self._as_twin(input, hx)
        try:
            if input.dim() != 1:
                return self._call(input, hx, weights)
            if self._states == 1:
                return self._call(input.unsqueeze(0), None if hx is None else hx.unsqueeze(0), weights).squeeze(0)
            batched = None if hx is None else (hx[0].unsqueeze(0), hx[1].unsqueeze(0))
            h, c = self._call(input.unsqueeze(0), batched, weights)
            return h.squeeze(0), c.squeeze(0)
        except ValueError:
            # functional refused an argument. torch's modules do that in words, and with exceptions, of their own.
            result = self._twin.forward(self, input, hx)
            if self.backend is not None:
                raise
            return result

    def _has_plain_states(self, hx: Any) -> bool:
        if hx is None:
            return True
        if self._states == 1:
            return type(hx) in PLAIN
        return isinstance(hx, (tuple, list)) and len(hx) == 2 and are_plain(hx)

    def _weights(self) -> list[Tensor]:
        """The weights as the attributes are now: tied, swapped by functional_call, parametrized, or set by a hook."""
        if not torch.compiler.is_compiling():
            try:
                return [w for w in _READ(self._parameters) if w is not None]
            except KeyError:
                pass  # some are not parameters but computed from some
        return [w for w in (self.weight_ih, self.weight_hh, self.bias_ih, self.bias_hh) if w is not None]


class LSTMCell(Cell):
    r"""One step of an LSTM, in place of torch.nn.LSTMCell, whose arguments, attributes, state_dict and errors it has.

    Args:
        input_size, hidden_size, bias, device, dtype: as torch.nn.LSTMCell's, in the same positions.
        backend: "cpu", "torch" or "reference" to force one; None takes the one that measured fastest. Keyword only.

    Inputs: input [B, D] or [D]; hx = (h [B, H], c [B, H]), without B for unbatched input, zeros if None.
    Returns (h', c'), shaped as hx, of the input's dtype.
    Raises what torch.nn.LSTMCell raises; NotImplementedError where the backend asked for cannot run the call.
    Twice differentiable in input, hx and the weights. Formula and source: :class:`LSTM`.

    Examples::

        >>> cell = fused_rnn.LSTMCell(10, 20)
        >>> h, c = cell(torch.randn(3, 10), (torch.randn(3, 20), torch.randn(3, 20)))
    """

    _twin = TorchLSTMCell
    _states = 2

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        backend: str | None = None,
    ) -> None:
        super().__init__(input_size, hidden_size, bias, num_chunks=4, device=device, dtype=dtype, backend=backend)

    def forward(self, input: Tensor, hx: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
        """One step: (h', c'). Shapes and errors stand in the class's docstring."""
        if hx is None:
            stepped = self._step(input, None, None, _LSTM)
        elif type(hx) is tuple and len(hx) == 2 and hx[0] is not None and hx[1] is not None:
            stepped = self._step(input, hx[0], hx[1], _LSTM)
        else:
            stepped = None
        return self._run(input, hx) if stepped is None else (stepped[0], stepped[1])

    def _call(self, x: Tensor, hx: Any, weights: Sequence[Tensor]) -> Any:
        return functional.lstm_cell(x, hx, weights, backend=self.backend)


class GRUCell(Cell):
    r"""One step of a GRU, in place of torch.nn.GRUCell, whose arguments, attributes, state_dict and errors it has.

    Args:
        input_size, hidden_size, bias, device, dtype: as torch.nn.GRUCell's, in the same positions.
        backend: keyword only, as :class:`LSTMCell`'s.

    Inputs: input [B, D] or [D]; hx = h [B, H], without B for unbatched input, zeros if None.
    Returns h', shaped as h, of the input's dtype.
    Raises what torch.nn.GRUCell raises; NotImplementedError where the backend asked for cannot run the call.
    Twice differentiable in input, hx and the weights. Formula and source: :class:`GRU`.

    Examples::

        >>> cell = fused_rnn.GRUCell(10, 20)
        >>> h = cell(torch.randn(3, 10), torch.randn(3, 20))
    """

    _twin = TorchGRUCell

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        backend: str | None = None,
    ) -> None:
        super().__init__(input_size, hidden_size, bias, num_chunks=3, device=device, dtype=dtype, backend=backend)

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        """One step: h'. Shapes and errors stand in the class's docstring."""
        stepped = self._step(input, hx, None, _GRU)
        return self._run(input, hx) if stepped is None else stepped[0]

    def _call(self, x: Tensor, hx: Any, weights: Sequence[Tensor]) -> Any:
        return functional.gru_cell(x, hx, weights, backend=self.backend)


class RNNCell(Cell):
    r"""One step of an Elman RNN, in place of torch.nn.RNNCell, whose arguments, attributes, state and errors it has.

    Args:
        input_size, hidden_size, bias, nonlinearity, device, dtype: as torch.nn.RNNCell's, in the same positions;
            nonlinearity is "tanh" or "relu".
        backend: keyword only, as :class:`LSTMCell`'s.

    Inputs: input [B, D] or [D]; hx = h [B, H], without B for unbatched input, zeros if None.
    Returns h', shaped as h, of the input's dtype.
    Raises what torch.nn.RNNCell raises; NotImplementedError where the backend asked for cannot run the call.
    Twice differentiable in input, hx and the weights. Formula and source: :class:`RNN`.

    Examples::

        >>> cell = fused_rnn.RNNCell(10, 20)
        >>> h = cell(torch.randn(3, 10), torch.randn(3, 20))
    """

    __constants__ = TorchRNNCell.__constants__
    nonlinearity: str

    _twin = TorchRNNCell

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        nonlinearity: str = "tanh",
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        backend: str | None = None,
    ) -> None:
        super().__init__(input_size, hidden_size, bias, num_chunks=1, device=device, dtype=dtype, backend=backend)
        self.nonlinearity = nonlinearity

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        """One step: h'. Shapes and errors stand in the class's docstring."""
        code = _RNN.get(self.nonlinearity)
        if code is None:  # torch.nn refuses it here, not in __init__
            refused: Tensor = self._as_twin(input, hx)
            return refused
        stepped = self._step(input, hx, None, code)
        return self._run(input, hx) if stepped is None else stepped[0]

    def _call(self, x: Tensor, hx: Any, weights: Sequence[Tensor]) -> Any:
        return functional.rnn_cell(x, hx, weights, nonlinearity=self.nonlinearity, backend=self.backend)
