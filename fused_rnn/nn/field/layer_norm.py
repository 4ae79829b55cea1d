"""LayerNormLSTM and LayerNormGRU."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import layer_norm

from fused_rnn.flex import cell
from fused_rnn.nn.field.base import Parted, normed

EPSILON = 1e-5


def _names(*vectors: str, gates: str) -> tuple[str, ...]:
    return tuple(f"{vector}_{gate}" for vector in vectors for gate in gates)


def _of(p: Any, vector: str, gates: str) -> list[Any]:
    return [getattr(p, f"{vector}_{gate}") for gate in gates]


def _scaled(gates: Any, gains: Any) -> list[Any]:
    return [a * gain for a, gain in zip(normed(gates, EPSILON), gains, strict=True)]


@cell(
    gates=("i", "f", "g", "o"),
    states=("h", "c"),
    params=(*_names("gamma_ih", "gamma_hh", "bias_ih", gates="ifgo"), "gamma_c", "beta_c"),
)
def layer_norm_lstm(x: Any, r: Any, s: Any, p: Any) -> Any:
    """The step of :class:`LayerNormLSTM`."""
    own, other = _scaled(x, _of(p, "gamma_ih", "ifgo")), _scaled(r, _of(p, "gamma_hh", "ifgo"))
    i, f, g, o = (a + bias + b for a, b, bias in zip(own, other, _of(p, "bias_ih", "ifgo"), strict=True))
    c = torch.sigmoid(f) * s.c + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(layer_norm(c, c.shape[-1:], p.gamma_c, p.beta_c, EPSILON)), c


@cell(gates=("r", "z", "n"), params=_names("gamma_ih", "gamma_hh", "bias_ih", "bias_hh", gates="rzn"))
def layer_norm_gru(x: Any, r: Any, s: Any, p: Any) -> Any:
    """The step of :class:`LayerNormGRU`."""
    own, other = _scaled(x, _of(p, "gamma_ih", "rzn")), _scaled(r, _of(p, "gamma_hh", "rzn"))
    x_r, x_z, x_n = (a + bias for a, bias in zip(own, _of(p, "bias_ih", "rzn"), strict=True))
    h_r, h_z, h_n = (a + bias for a, bias in zip(other, _of(p, "bias_hh", "rzn"), strict=True))
    n = torch.tanh(x_n + torch.sigmoid(x_r + h_r) * h_n)
    return n + torch.sigmoid(x_z + h_z) * (s.h - n)


class _Haste(Parted):
    """Loads what Haste's layer of the same name has saved, too.

    _fused_haste: of each of its parameters ours, one or two; _fused_order: the places of our gates among its.
    """

    _fused_haste: ClassVar[Mapping[str, tuple[str, ...]]]
    _fused_order: ClassVar[tuple[int, ...]]

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        if f"{prefix}recurrent_kernel" in state_dict and self.num_layers == 1 and not self.bidirectional:
            for theirs, ours in self._fused_haste.items():
                if f"{prefix}{theirs}" not in state_dict:
                    continue
                value, order = state_dict.pop(f"{prefix}{theirs}"), self._fused_order
                parts = value.unbind(0) if len(ours) == len(value) == 2 else [value]
                for name, part in zip(ours, parts, strict=False):  # of another shape, which torch.nn then names
                    part = part.t() if part.dim() <= 2 else part
                    if len(part) == len(order) * self.hidden_size:
                        gates = part.chunk(len(order))
                        part = torch.cat([gates[k] for k in order])
                    state_dict[f"{prefix}{name}_l0"] = part
        super()._load_from_state_dict(state_dict, prefix, *args)


class LayerNormLSTM(_Haste):
    r"""__init__(input_size,hidden_size,num_layers=1,bias=True,batch_first=False,dropout=0.0,bidirectional=False,device=None,dtype=None,*,forget_bias=1.0,return_sequences='h',backend=None,save='gates',recurrent_dropout=0.0,zoneout=0.0,weight_dropout=0.0,return_gates=False)

    An LSTM with layer norm of both sides of its gates, and of the cell state on its way out. ::

        i_t, f_t, g_t, o_t = LN(W x_t) γ_ih + LN(U h_{t-1}) γ_hh + b, each LN over all 4·H
        c_t = σ(f_t) c_{t-1} + σ(i_t) tanh(g_t)
        h_t = σ(o_t) tanh(LN(c_t) γ_c + β_c)
        LN(v) = (v - mean(v)) / √(variance(v) + 1e-5)

    Arguments, inputs, results and errors are :class:`FlexRNN`'s, without heads, hx a pair (h_0, c_0), and

    Args:
        forget_bias: what the forget gate's part of b begins with.

    Its parameters are weight_ih_l0 [4·H, D], weight_hh_l0 [4·H, H], gamma_ih_l0, gamma_hh_l0 and bias_ih_l0 [4·H],
    gates i, f, g, o; gamma_c_l0 and beta_c_l0 [H]. load_state_dict takes those of Haste's LayerNormLSTM, too: kernel,
    recurrent_kernel, bias, gamma, gamma_h, beta_h, whose gates are i, g, f, o. Initial values are Haste's: weight_ih
    Glorot's uniform ones of each gate, weight_hh orthogonal, gains one, biases but the forget gate's zero.

    Source: Ba, Kiros, Hinton 2016, "Layer normalization", equations 20 to 22, with one bias; Haste's LayerNormLSTM.

    Examples:
        >>> lstm = fused_rnn.LayerNormLSTM(10, 20)
        >>> output, (h_n, c_n) = lstm(torch.randn(5, 3, 10))
        >>> lstm.gamma_hh_l0.shape
        torch.Size([80])
    """

    _fused_step = layer_norm_lstm
    _fused_vectors: ClassVar = {"gamma_ih": 4, "gamma_hh": 4, "bias_ih": 4, "gamma_c": 1, "beta_c": 1}
    _fused_haste: ClassVar = {
        "kernel": ("weight_ih",), "recurrent_kernel": ("weight_hh",), "bias": ("bias_ih",),
        "gamma": ("gamma_ih", "gamma_hh"), "gamma_h": ("gamma_c",), "beta_h": ("beta_c",),
    }  # fmt: skip
    _fused_order = (0, 2, 1, 3)

    def __init__(self, *args: Any, forget_bias: float = 1.0, **kwargs: Any) -> None:
        if isinstance(forget_bias, bool) or not isinstance(forget_bias, (int, float)):
            raise TypeError(f"forget_bias: got {forget_bias!r}, expected a number")
        self.forget_bias = forget_bias
        super().__init__(*args, **kwargs)

    def _fused_draw(self, weights: Mapping[str, Tensor]) -> None:
        super()._fused_draw(weights)
        if self.bias:
            weights["bias_ih"][self.hidden_size : 2 * self.hidden_size] = self.forget_bias


class LayerNormGRU(_Haste):
    r"""__init__(input_size,hidden_size,num_layers=1,bias=True,batch_first=False,dropout=0.0,bidirectional=False,device=None,dtype=None,*,return_sequences='h',backend=None,save='gates',recurrent_dropout=0.0,zoneout=0.0,weight_dropout=0.0,return_gates=False)

    A GRU with layer norm of both sides of its gates. ::

        a_t = LN(W x_t) γ_ih + b,   e_t = LN(U h_{t-1}) γ_hh + d,   each LN over all 3·H
        r_t = σ(a_r + e_r),   z_t = σ(a_z + e_z)
        n_t = tanh(a_n + r_t e_n)
        h_t = (1 - z_t) n_t + z_t h_{t-1}
        LN(v) = (v - mean(v)) / √(variance(v) + 1e-5)

    Arguments, inputs, results and errors are :class:`FlexRNN`'s, without heads. Its parameters are weight_ih_l0
    [3·H, D], weight_hh_l0 [3·H, H], gamma_ih_l0, gamma_hh_l0, bias_ih_l0 and bias_hh_l0 [3·H], gates r, z, n.
    load_state_dict takes those of Haste's LayerNormGRU, too: kernel, recurrent_kernel, bias, recurrent_bias, gamma,
    whose gates are z, r, n. Initial values are :class:`LayerNormLSTM`'s, biases zero.

    Source: Ba, Kiros, Hinton 2016, "Layer normalization"; Haste's LayerNormGRU.

    Examples:
        >>> gru = fused_rnn.LayerNormGRU(10, 20)
        >>> output, h_n = gru(torch.randn(5, 3, 10))
        >>> gru.gamma_ih_l0.shape
        torch.Size([60])
    """

    _fused_step = layer_norm_gru
    _fused_vectors: ClassVar = {"gamma_ih": 3, "gamma_hh": 3, "bias_ih": 3, "bias_hh": 3}
    _fused_haste: ClassVar = {
        "kernel": ("weight_ih",), "recurrent_kernel": ("weight_hh",), "bias": ("bias_ih",),
        "recurrent_bias": ("bias_hh",), "gamma": ("gamma_ih", "gamma_hh"),
    }  # fmt: skip
    _fused_order = (1, 0, 2)
