"""IndRNN."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fused_rnn.flex import UserCell, cell
from fused_rnn.nn.field.base import Field, known, uniform_by_inputs


@cell(gates=1, params=("u",), recurrent=False)
def ind_rnn_relu(x: Any, r: Any, s: Any, p: Any) -> Any:
    """The step of :class:`IndRNN`."""
    return torch.relu(x[0] + p.u * s.h)


@cell(gates=1, params=("u",), recurrent=False)
def ind_rnn_tanh(x: Any, r: Any, s: Any, p: Any) -> Any:
    """The step of :class:`IndRNN` with nonlinearity="tanh"."""
    return torch.tanh(x[0] + p.u * s.h)


@cell(gates=1, params=("u",), recurrent=False)
def ind_rnn_linear(x: Any, r: Any, s: Any, p: Any) -> Any:
    """The step of :class:`IndRNN` with nonlinearity="none"."""
    return x[0] + p.u * s.h


_STEPS = {"relu": ind_rnn_relu, "tanh": ind_rnn_tanh, "none": ind_rnn_linear}


class IndRNN(Field):
    r"""__init__(input_size,hidden_size,num_layers=1,bias=True,batch_first=False,dropout=0.0,bidirectional=False,device=None,dtype=None,*,nonlinearity='relu',return_sequences='h',backend=None,save='gates',zoneout=0.0,return_gates=False)

    An RNN of independent units: each sees of the step before itself alone. ::

        h_t = relu(W x_t + b + u h_{t-1}), or with tanh, or with neither

    Arguments, inputs, results and errors are :class:`FlexRNN`'s, without heads, and

    Args:
        nonlinearity: "relu", "tanh" or "none".

    Its parameters are weight_ih_l0 [H, D], bias_ih_l0 [H] and u_l0 [H]. u begins uniform in [0, 1], the others in
    ±1/√D. The paper keeps `|u|` at most 2^(1/T): clamp `u_l0` after an optimizer's step.

    Source: Li et al. 2018, "Independently recurrent neural network (IndRNN)".

    Examples:
        >>> rnn = fused_rnn.IndRNN(10, 20, num_layers=3, nonlinearity="tanh")
        >>> output, h_n = rnn(torch.randn(5, 3, 10))
        >>> list(rnn.state_dict())[:3]
        ['weight_ih_l0', 'bias_ih_l0', 'u_l0']
    """

    def __init__(self, *args: Any, nonlinearity: str = "relu", **kwargs: Any) -> None:
        known("nonlinearity", nonlinearity, _STEPS)
        self.nonlinearity = nonlinearity
        super().__init__(*args, **kwargs)

    def _fused_choose(self) -> UserCell:
        return _STEPS[self.nonlinearity]

    def _fused_draw(self, weights: Mapping[str, Tensor]) -> None:
        uniform_by_inputs(weights)
        nn.init.uniform_(weights["u"], 0, 1)

    def extra_repr(self) -> str:
        """FlexRNN's, and the nonlinearity where it is not the default."""
        more = f", nonlinearity={self.nonlinearity!r}" if self.nonlinearity != "relu" else ""
        return super().extra_repr() + more
