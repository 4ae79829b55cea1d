"""SRU."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fused_rnn.flex import UserCell, cell
from fused_rnn.nn.field.base import Made


def _step(s: Any, own: Any, f: Any, r: Any) -> tuple[Any, Any]:
    """(c after, the reset gate)."""
    return own + torch.sigmoid(f) * (s.c - own), torch.sigmoid(r)


@cell(gates=("x", "f", "r", "s"), states=("h", "c"), params=("v_f", "v_r"), recurrent=False)
def sru(x: Any, r: Any, s: Any, p: Any) -> Any:
    """The step of :class:`SRU`."""
    c, gate = _step(s, x[0], x[1] + p.v_f * s.c, x[2] + p.v_r * s.c)
    return x[3] + gate * (c - x[3]), c


@cell(gates=("x", "f", "r", "s"), states=("h", "c"), recurrent=False)
def sru_without_recurrent_terms(x: Any, r: Any, s: Any, p: Any) -> Any:
    """The step of :class:`SRU` with recurrent_terms=False."""
    c, gate = _step(s, x[0], x[1], x[2])
    return x[3] + gate * (c - x[3]), c


@cell(gates=("x", "f", "r"), states=("h", "c"), params=("v_f", "v_r"), recurrent=False)
def sru_without_skip(x: Any, r: Any, s: Any, p: Any) -> Any:
    """The step of :class:`SRU` with skip=False."""
    c, gate = _step(s, x[0], x[1] + p.v_f * s.c, x[2] + p.v_r * s.c)
    return gate * c, c


@cell(gates=("x", "f", "r"), states=("h", "c"), recurrent=False)
def sru_without_either(x: Any, r: Any, s: Any, p: Any) -> Any:
    """The step of :class:`SRU` with recurrent_terms=False and skip=False."""
    c, gate = _step(s, x[0], x[1], x[2])
    return gate * c, c


_STEPS = {
    (True, True): sru, (False, True): sru_without_recurrent_terms,
    (True, False): sru_without_skip, (False, False): sru_without_either,
}  # fmt: skip
_SCALE = math.sqrt(3)  # α of the paper's section 3.3, for gates whose bias begins at zero


class SRU(Made):
    r"""__init__(input_size,hidden_size,num_layers=1,bias=True,batch_first=False,dropout=0.0,bidirectional=False,device=None,dtype=None,*,recurrent_terms=True,skip=True,return_sequences='h',backend=None,save='gates',zoneout=0.0,return_gates=False)

    The simple recurrent unit: all products are the input's. ::

        f_t = σ(W_f x_t + b_f + v_f c_{t-1})
        c_t = f_t c_{t-1} + (1 - f_t) W x_t
        r_t = σ(W_r x_t + b_r + v_r c_{t-1})
        h_t = r_t c_t + (1 - r_t) α x_t,   α = √3; W_s x_t in the place of α x_t where a layer's input is not H wide

    Arguments, inputs, results and errors are :class:`FlexRNN`'s, without heads, hx a pair (h_0, c_0) of which h_0 is
    not read, and

    Args:
        recurrent_terms: False leaves out v_f c and v_r c, as the paper's first version does.
        skip: False leaves out the highway: h_t = r_t c_t.

    Its parameters are weight_ih_l0 [3·H, D], blocks W, W_f, W_r, or [4·H, D] with W_s; bias_ih_l0 [2·H], b_f and b_r;
    v_f_l0 and v_r_l0 [H]. Weights begin with a variance of 1/D, W_f and W_r of half of that, W_s of α²/D; v_f and v_r
    with one of 1/2; biases at zero: the paper's, and its package's, whose weights [D, H, 3 or 4] are these transposed.

    Source: Lei et al. 2018, "Simple recurrent units for highly parallelizable recurrence".

    Examples:
        >>> sru = fused_rnn.SRU(20, 20, num_layers=2)
        >>> output, (h_n, c_n) = sru(torch.randn(5, 3, 20))
        >>> list(sru.state_dict())[:4]
        ['weight_ih_l0', 'bias_ih_l0', 'v_f_l0', 'v_r_l0']
    """

    def __init__(self, *args: Any, recurrent_terms: bool = True, skip: bool = True, **kwargs: Any) -> None:
        for name, value in (("recurrent_terms", recurrent_terms), ("skip", skip)):
            if not isinstance(value, bool):
                raise TypeError(f"{name}: got {value!r}, expected True or False")
        self.recurrent_terms, self.skip = recurrent_terms, skip
        super().__init__(*args, **kwargs)

    def _fused_choose(self) -> UserCell:
        return _STEPS[self.recurrent_terms, self.skip]

    def _shapes(self, input_size: int) -> dict[str, tuple[int, ...]]:
        hidden = self.hidden_size
        blocks = 4 if self.skip and input_size != hidden else 3
        shapes: dict[str, tuple[int, ...]] = {"weight_ih": (blocks * hidden, input_size)}
        if self.bias:
            shapes["bias_ih"] = (2 * hidden,)
        return shapes | dict.fromkeys(self._fused_user.params, (hidden,))

    def _fused_draw(self, weights: Mapping[str, Tensor]) -> None:
        width = weights["weight_ih"].shape[1]
        bound = math.sqrt(3 / max(width, 1))
        for block, scale in zip(
            weights["weight_ih"].split(self.hidden_size), (1, math.sqrt(0.5), math.sqrt(0.5), _SCALE), strict=False
        ):
            nn.init.uniform_(block, -bound * scale, bound * scale)
        if self.bias:
            nn.init.zeros_(weights["bias_ih"])
        for name in self._fused_user.params:
            nn.init.uniform_(weights[name], -math.sqrt(1.5), math.sqrt(1.5))

    def _fused_is_plain(self) -> bool:
        return False  # the weights are not the cell's as they are

    def _fused_parts(self, own: Mapping[str, Tensor]) -> list[Tensor]:
        """With the skip's identity, and biases for all gates."""
        hidden, (w, *rest) = self.hidden_size, own.values()
        if self.skip and w.shape[1] == hidden:
            w = torch.cat([w, _SCALE * torch.eye(hidden, dtype=w.dtype, device=w.device)])
        if self.bias:
            rest[0] = nn.functional.pad(rest[0], (hidden, hidden if self.skip else 0))
        return [w, *rest]

    def extra_repr(self) -> str:
        """FlexRNN's, and the options where they are not the default."""
        more = "".join(f", {name}=False" for name in ("recurrent_terms", "skip") if not getattr(self, name))
        return super().extra_repr() + more
