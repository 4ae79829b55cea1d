"""The layer's Function as LSTM, GRU and RNN call it: for users who want it below fused_rnn.functional."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from fused_rnn.autograd import Outputs, function, together
from fused_rnn.call import LayerCall, known_save


def _function(cell: str, states: Sequence[Tensor | None], x: Tensor, *rest: Any) -> Outputs:
    """The layer's Function, as LSTMFunction and its like call it. rest: lengths … backend, *weights."""
    lengths, reset, directions, save, keep_hidden, backend, *weights = rest
    call = LayerCall(x, weights, (), lengths, reset, cell, directions, known_save(save), keep_hidden)
    return function(backend, call._replace(states=together(call.state_shapes(), x, states)))


class LSTMFunction:
    """One LSTM layer. ::

        apply(x, h0, c0, lengths, reset, directions, save, keep_hidden, backend, *weights)
            → (y, h_n, c_n, saved, cells, hidden)

    Inputs:
        x: [T, B, D] or [T, B, R, D] with an input per recurrence.
        h0, c0: [R, B, P] and [R, B, H], None for zeros.
        lengths, reset: [B] int64 and [T, B] bool, or None.
        directions: R of +1 or -1.  save: "gates" or "recompute".
        keep_hidden: keep a copy of y for backward, so that y may be changed in place.
        backend: one whose ops have no autograd of their own: "cpu", "cuda" or "triton".
        weights: per recurrence w_ih [4H, D], w_hh [4H, P], (b_ih, b_hh [4H]), (w_hr [P, H]), gate order i, f, g, o.

    Returns:
        y [T, B, R·P], h_n [R, B, P], c_n [R, B, H] in x's dtype; saved, cells and hidden are what backward reads, and
        not differentiable.

    Raises:
        RuntimeError: from the op on inputs that do not fit together, which fused_rnn.functional would name.

    Twice differentiable in x, h0, c0 and the weights; works under torch.func.vmap; has no forward-mode derivative.
    Source: Hochreiter & Schmidhuber 1997; gates as in torch.nn.LSTM.

    Examples:
        >>> x, weights = torch.randn(5, 3, 10), [torch.randn(80, 10), torch.randn(80, 20)]
        >>> call = (x, None, None, None, None, (1,), "gates", False, "cpu", *weights)
        >>> y, h_n, c_n, *_ = fused_rnn.LSTMFunction.apply(*call)
    """

    @staticmethod
    def apply(x: Tensor, h0: Tensor | None, c0: Tensor | None, *rest: Any) -> Outputs:
        return _function("lstm", (h0, c0), x, *rest)


class GRUFunction:
    """One GRU layer (the reset gate after the recurrent product). ::

        apply(x, h0, lengths, reset, directions, save, keep_hidden, backend, *weights) → (y, h_n, saved, hidden)

    Weights of 3H rows, gate order r, z, n; all else as in :class:`LSTMFunction`.
    Source: Cho et al. 2014; gates as in torch.nn.GRU.

    Examples:
        >>> x, weights = torch.randn(5, 3, 10), [torch.randn(60, 10), torch.randn(60, 20)]
        >>> y, h_n, *_ = fused_rnn.GRUFunction.apply(x, None, None, None, (1,), "gates", False, "cpu", *weights)
    """

    @staticmethod
    def apply(x: Tensor, h0: Tensor | None, *rest: Any) -> Outputs:
        return _function("gru", (h0,), x, *rest)


class RNNFunction:
    """One plain recurrent layer. ::

        apply(x, h0, lengths, reset, nonlinearity, directions, save, keep_hidden, backend, *weights)
            → (y, h_n, saved, hidden)

    nonlinearity: "tanh" or "relu".  Weights of H rows; all else as in :class:`LSTMFunction`.
    Source: Elman 1990; as in torch.nn.RNN.

    Examples:
        >>> x, weights = torch.randn(5, 3, 10), [torch.randn(20, 10), torch.randn(20, 20)]
        >>> y, h_n, *_ = fused_rnn.RNNFunction.apply(x, None, None, None, "tanh", (1,), "gates", False, "cpu", *weights)
    """

    @staticmethod
    def apply(
        x: Tensor, h0: Tensor | None, lengths: Tensor | None, reset: Tensor | None, nonlinearity: str, *rest: Any
    ) -> Outputs:
        return _function(f"rnn_{nonlinearity}", (h0,), x, lengths, reset, *rest)
