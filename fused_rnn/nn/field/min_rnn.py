"""MinGRU and MinLSTM."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import softplus

from fused_rnn.flex import cell
from fused_rnn.nn.field.base import Field, uniform_by_inputs


def _positive(x: Any) -> Any:
    """The paper's g: x + 1/2 from zero on, σ(x) below."""
    return torch.where(x >= 0, x + 0.5, torch.sigmoid(x))


@cell(gates=("z", "h"), recurrent=False)
def min_gru(x: Any, r: Any, s: Any, p: Any) -> Any:
    """The step of :class:`MinGRU`."""
    return s.h + torch.sigmoid(x[0]) * (_positive(x[1]) - s.h)


@cell(gates=("f", "i", "h"), recurrent=False)
def min_lstm(x: Any, r: Any, s: Any, p: Any) -> Any:
    """The step of :class:`MinLSTM`: i / (f + i) as one sigmoid, for both may underflow."""
    i = torch.sigmoid(softplus(-x[0]) - softplus(-x[1]))
    return s.h + i * (_positive(x[2]) - s.h)


class _Min(Field):
    def _fused_draw(self, weights: Mapping[str, Tensor]) -> None:
        uniform_by_inputs(weights)


class MinGRU(_Min):
    r"""__init__(input_size,hidden_size,num_layers=1,bias=True,batch_first=False,dropout=0.0,bidirectional=False,device=None,dtype=None,*,return_sequences='h',backend=None,save='gates',zoneout=0.0,return_gates=False)

    A GRU whose gate and candidate see the input alone. ::

        z_t = σ(W_z x_t + b_z)
        h_t = (1 - z_t) h_{t-1} + z_t g(W_h x_t + b_h),   g(v) = v + 1/2 for v ≥ 0, σ(v) below

    Arguments, inputs, results and errors are :class:`FlexRNN`'s, without heads. hx is h_{t-1} itself, as in the paper's
    sequential mode; its parallel mode takes the logarithm of g(h_0), so there give g(h_0). Its parameters are
    weight_ih_l0 [2·H, D] and bias_ih_l0 [2·H], z before h. They begin uniform in ±1/√D, as torch.nn.Linear's.

    Source: Feng et al. 2024, "Were RNNs all we needed?", minGRU; g by its appendix on the log-space version.

    Examples:
        >>> gru = fused_rnn.MinGRU(10, 20)
        >>> output, h_n = gru(torch.randn(5, 3, 10))
        >>> gru.weight_ih_l0.shape
        torch.Size([40, 10])
    """

    _fused_step = min_gru


class MinLSTM(_Min):
    r"""__init__(input_size,hidden_size,num_layers=1,bias=True,batch_first=False,dropout=0.0,bidirectional=False,device=None,dtype=None,*,return_sequences='h',backend=None,save='gates',zoneout=0.0,return_gates=False)

    An LSTM whose gates and candidate see the input alone. ::

        f_t = σ(W_f x_t + b_f),   i_t = σ(W_i x_t + b_i)
        h_t = f_t / (f_t + i_t) h_{t-1} + i_t / (f_t + i_t) g(W_h x_t + b_h),   g as MinGRU's

    i / (f + i) is computed as σ(softplus(-a_f) - softplus(-a_i)), of the gates before their σ: both may be zero in
    floating point.

    Arguments, inputs, results and errors are :class:`FlexRNN`'s, without heads; hx as :class:`MinGRU`'s: one state. Its
    parameters are weight_ih_l0 [3·H, D] and bias_ih_l0 [3·H], gates f, i, h. They begin uniform in ±1/√D.

    Source: Feng et al. 2024, "Were RNNs all we needed?", minLSTM; g by its appendix on the log-space version.

    Examples:
        >>> lstm = fused_rnn.MinLSTM(10, 20)
        >>> output, h_n = lstm(torch.randn(5, 3, 10))
        >>> lstm.weight_ih_l0.shape
        torch.Size([60, 10])
    """

    _fused_step = min_lstm
