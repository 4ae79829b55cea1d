"""SLSTM."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from fused_rnn.flex import cell
from fused_rnn.nn.field.base import Field


@cell(gates=("i", "f", "z", "o"), states=("h", "c", "n", "m"))
def slstm(x: Any, r: Any, s: Any, p: Any) -> Any:
    """The step of :class:`SLSTM`."""
    i, f, z, o = (x[k] + r[k] for k in range(4))
    kept = s.m + logsigmoid(f)
    m = torch.where(s.n == 0, i, torch.maximum(i, kept))
    i, f = torch.exp(i - m), torch.exp(torch.clamp(kept - m, max=0.0))  # more than 0 where n is 0 alone
    c, n = f * s.c + i * torch.tanh(z), f * s.n + i
    return torch.sigmoid(o) * c / n, c, n, m


class SLSTM(Field):
    r"""__init__(input_size,hidden_size,num_layers=1,bias=True,batch_first=False,dropout=0.0,bidirectional=False,device=None,dtype=None,*,heads=1,return_sequences='h',backend=None,save='gates',recurrent_dropout=0.0,zoneout=0.0,weight_dropout=0.0,return_gates=False)

    xLSTM's sLSTM: exponential gates, their normaliser n and stabiliser m, a block-diagonal W_hh of `heads` blocks. ::

        i_t, f_t, z_t, o_t = W x_t + b + U h_{t-1} + d
        m_t = max(i_t, m_{t-1} + log σ(f_t)), and i_t where n_{t-1} = 0, at the beginning and after a reset
        c_t = exp(m_{t-1} + log σ(f_t) - m_t) c_{t-1} + exp(i_t - m_t) tanh(z_t)
        n_t = exp(m_{t-1} + log σ(f_t) - m_t) n_{t-1} + exp(i_t - m_t)
        h_t = σ(o_t) c_t / n_t

    Arguments, inputs, results and errors are :class:`FlexRNN`'s, hx a tuple (h_0, c_0, n_0, m_0); zoneout is h's alone.
    Its parameters are weight_ih_l0 [4·H, D]; weight_hh_l0 [4·H, H], with heads [N, 4·H/N, H/N], the layout of xlstm's
    vanilla cell; bias_ih_l0 and bias_hh_l0 [4·H]; gates i, f, z, o. Initial values are the package's: weight_ih normal
    with a variance of 2/(5·D), weight_hh zero, b_f = 5 - 12 (j/(H/N - 1))^0.3 for unit j of a head, all other biases
    zero.

    Source: Beck et al. 2024, "xLSTM: extended long short-term memory", as the package xlstm computes it.
    :func:`convert` has that package's own cells run in these loops.

    Examples:
        >>> slstm = fused_rnn.SLSTM(10, 20, heads=4)
        >>> output, (h_n, c_n, n_n, m_n) = slstm(torch.randn(5, 3, 10))
        >>> slstm.weight_hh_l0.shape
        torch.Size([4, 20, 5])
    """

    _fused_headed = True
    _fused_step = slstm
    _fused_zoned = 1  # c, n and m mean something together alone

    def _fused_draw(self, weights: Mapping[str, Tensor]) -> None:
        width, units = weights["weight_ih"].shape[1], self.hidden_size // self.heads
        nn.init.normal_(weights["weight_ih"], std=math.sqrt(0.4 / max(width, 1)))
        nn.init.zeros_(weights["weight_hh"])
        if not self.bias:
            return
        nn.init.zeros_(weights["bias_hh"])
        bias = weights["bias_ih"]
        places = torch.linspace(0, 1, units, dtype=torch.float64, device=bias.device)
        nn.init.zeros_(bias)
        forget = (5 - 12 * places**0.3).repeat(self.heads)
        bias[self.hidden_size : 2 * self.hidden_size] = forget
