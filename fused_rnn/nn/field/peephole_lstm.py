"""PeepholeLSTM."""

from __future__ import annotations

from typing import Any

import torch

from fused_rnn.flex import cell
from fused_rnn.nn.field.base import Field


@cell(gates=("i", "f", "g", "o"), states=("h", "c"), params=("p_i", "p_f", "p_o"))
def peephole_lstm(x: Any, r: Any, s: Any, p: Any) -> Any:
    """The step of :class:`PeepholeLSTM`."""
    i = torch.sigmoid(x[0] + r[0] + p.p_i * s.c)
    f = torch.sigmoid(x[1] + r[1] + p.p_f * s.c)
    c = f * s.c + i * torch.tanh(x[2] + r[2])
    o = torch.sigmoid(x[3] + r[3] + p.p_o * c)
    return o * torch.tanh(c), c


class PeepholeLSTM(Field):
    r"""__init__(input_size,hidden_size,num_layers=1,bias=True,batch_first=False,dropout=0.0,bidirectional=False,device=None,dtype=None,*,heads=1,return_sequences='h',backend=None,save='gates',recurrent_dropout=0.0,zoneout=0.0,weight_dropout=0.0,return_gates=False)

    An LSTM whose gates see the cell state through a weight of each unit. ::

        i_t = σ(W_i x_t + b_i + U_i h_{t-1} + d_i + p_i c_{t-1})
        f_t = σ(W_f x_t + b_f + U_f h_{t-1} + d_f + p_f c_{t-1})
        g_t = tanh(W_g x_t + b_g + U_g h_{t-1} + d_g)
        c_t = f_t c_{t-1} + i_t g_t
        o_t = σ(W_o x_t + b_o + U_o h_{t-1} + d_o + p_o c_t)
        h_t = o_t tanh(c_t)

    Arguments, inputs, results and errors are :class:`FlexRNN`'s, hx a pair (h_0, c_0). Its parameters are
    :class:`LSTM`'s, gates i, f, g, o, and p_i_l0, p_f_l0, p_o_l0 [H]. All begin uniform in ±1/√H.

    Source: Gers & Schmidhuber 2000, "Recurrent nets that time and count", which lets gradients not through the
    peepholes; here they are the formula's own, as in all frameworks.

    Examples:
        >>> lstm = fused_rnn.PeepholeLSTM(10, 20, num_layers=2)
        >>> output, (h_n, c_n) = lstm(torch.randn(5, 3, 10))
        >>> lstm.p_o_l1.shape
        torch.Size([20])
    """

    _fused_headed = True
    _fused_step = peephole_lstm
