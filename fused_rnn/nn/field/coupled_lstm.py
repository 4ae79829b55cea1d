"""CoupledLSTM."""

from __future__ import annotations

from typing import Any

import torch

from fused_rnn.flex import cell
from fused_rnn.nn.field.base import Field


@cell(gates=("f", "g", "o"), states=("h", "c"))
def coupled_lstm(x: Any, r: Any, s: Any, p: Any) -> Any:
    """The step of :class:`CoupledLSTM`."""
    f = torch.sigmoid(x[0] + r[0])
    g = torch.tanh(x[1] + r[1])
    c = g + f * (s.c - g)
    return torch.sigmoid(x[2] + r[2]) * torch.tanh(c), c


class CoupledLSTM(Field):
    r"""__init__(input_size,hidden_size,num_layers=1,bias=True,batch_first=False,dropout=0.0,bidirectional=False,device=None,dtype=None,*,heads=1,return_sequences='h',backend=None,save='gates',recurrent_dropout=0.0,zoneout=0.0,weight_dropout=0.0,return_gates=False)

    An LSTM whose input gate is 1 - f: three quarters of the weights, and of the work. ::

        f_t = σ(W_f x_t + b_f + U_f h_{t-1} + d_f)
        g_t = tanh(W_g x_t + b_g + U_g h_{t-1} + d_g)
        o_t = σ(W_o x_t + b_o + U_o h_{t-1} + d_o)
        c_t = f_t c_{t-1} + (1 - f_t) g_t
        h_t = o_t tanh(c_t)

    Arguments, inputs, results and errors are :class:`FlexRNN`'s, hx a pair (h_0, c_0). Its parameters are weight_ih_l0
    [3·H, D], weight_hh_l0 [3·H, H], bias_ih_l0 and bias_hh_l0 [3·H], gates f, g, o. All begin uniform in ±1/√H.

    Source: Greff et al. 2017, "LSTM: a search space odyssey", CIFG, without peepholes.

    Examples:
        >>> lstm = fused_rnn.CoupledLSTM(10, 20)
        >>> output, (h_n, c_n) = lstm(torch.randn(5, 3, 10))
        >>> lstm.weight_hh_l0.shape
        torch.Size([60, 20])
    """

    _fused_headed = True
    _fused_step = coupled_lstm
