"""ResetBeforeGRU and MGU: a gate before the recurrent product of the candidate."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fused_rnn.flex import cell
from fused_rnn.nn.field.base import Made


@cell(gates=("r", "z", "n"), params=("d",), matrices={"u": (1, "H")})
def reset_before_gru(x: Any, r: Any, s: Any, p: Any, m: Any) -> Any:
    """The step of :class:`ResetBeforeGRU`. Nobody reads r[2]: u has those rows of W_hh, and d those of its bias."""
    n = torch.tanh(x[2] + p.d + m.u(torch.sigmoid(x[0] + r[0]) * s.h))
    return n + torch.sigmoid(x[1] + r[1]) * (s.h - n)


@cell(gates=("f", "n"), params=("d",), matrices={"u": (1, "H")})
def mgu(x: Any, r: Any, s: Any, p: Any, m: Any) -> Any:
    """The step of :class:`MGU`. Nobody reads r[1]: u has those rows of W_hh, and d those of its bias."""
    f = torch.sigmoid(x[0] + r[0])
    return s.h + f * (torch.tanh(x[1] + p.d + m.u(f * s.h)) - s.h)


class _Before(Made):
    """The weights are a GRU's: of W_hh and its bias the cell has the last rows once more, as a matrix and a param."""

    _fused_refused = ("recurrent_dropout", "weight_dropout")

    def _shapes(self, input_size: int) -> dict[str, tuple[int, ...]]:
        return {name: shape for name, shape in super()._shapes(input_size).items() if name not in ("u", "d")}

    def _fused_by_name(self) -> tuple[Mapping[str, Any], bool]:
        biases = ("bias_ih", "bias_hh") if self.bias else ()
        return self._fused_viewing(("weight_ih", "weight_hh", *biases, "u", "d"), self.bias)

    def _fused_parts(self, own: Mapping[str, Tensor]) -> list[Tensor]:
        w_hh, units = own["weight_hh"], self.hidden_size
        d = own["bias_hh"][-units:] if self.bias else w_hh.new_zeros(units)
        return [*own.values(), w_hh[-units:], d]


class ResetBeforeGRU(_Before):
    r"""__init__(input_size,hidden_size,num_layers=1,bias=True,batch_first=False,dropout=0.0,bidirectional=False,device=None,dtype=None,*,return_sequences='h',backend=None,save='gates',zoneout=0.0,return_gates=False)

    The GRU that resets its state before the recurrent product, and not after it. ::

        r_t = σ(W_r x_t + b_r + U_r h_{t-1} + d_r)
        z_t = σ(W_z x_t + b_z + U_z h_{t-1} + d_z)
        n_t = tanh(W_n x_t + b_n + U_n (r_t h_{t-1}) + d_n)
        h_t = (1 - z_t) n_t + z_t h_{t-1}

    Arguments, inputs, results and errors are :class:`FlexRNN`'s, without heads, recurrent and weight dropout. Its
    parameters are :class:`GRU`'s, gates r, z, n. All begin uniform in ±1/√H.

    Source: Cho et al. 2014, "Learning phrase representations using RNN encoder-decoder", arXiv:1406.1078v3; Keras's GRU
    with reset_after=False, ONNX's with linear_before_reset=0.

    Examples:
        >>> gru = fused_rnn.ResetBeforeGRU(10, 20)
        >>> output, h_n = gru(torch.randn(5, 3, 10))
        >>> list(gru.state_dict())
        ['weight_ih_l0', 'weight_hh_l0', 'bias_ih_l0', 'bias_hh_l0']
    """

    _fused_step = reset_before_gru


class MGU(_Before):
    r"""__init__(input_size,hidden_size,num_layers=1,bias=True,batch_first=False,dropout=0.0,bidirectional=False,device=None,dtype=None,*,return_sequences='h',backend=None,save='gates',zoneout=0.0,return_gates=False)

    The minimal gated unit: one gate, which forgets and resets. ::

        f_t = σ(W_f x_t + b_f + U_f h_{t-1} + d_f)
        n_t = tanh(W_n x_t + b_n + U_n (f_t h_{t-1}) + d_n)
        h_t = (1 - f_t) h_{t-1} + f_t n_t

    Arguments, inputs, results and errors are :class:`ResetBeforeGRU`'s. Its parameters are weight_ih_l0 [2·H, D],
    weight_hh_l0 [2·H, H], bias_ih_l0 and bias_hh_l0 [2·H], f before n. All begin uniform in ±1/√H.

    Source: Zhou et al. 2016, "Minimal gated unit for recurrent neural networks".

    Examples:
        >>> mgu = fused_rnn.MGU(10, 20)
        >>> output, h_n = mgu(torch.randn(5, 3, 10))
        >>> mgu.weight_hh_l0.shape
        torch.Size([40, 20])
    """

    _fused_step = mgu
