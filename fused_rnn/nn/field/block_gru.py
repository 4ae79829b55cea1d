"""BlockGRU."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fused_rnn.cells.diagonal import by_gate
from fused_rnn.flex import UserCell, cell
from fused_rnn.nn.field.base import Parted, normed

EPSILON = 1e-3  # DreamerV3's
UPDATE = -1.0


@cell(gates=("r", "n", "z"), params=tuple(f"{name}_{gate}" for name in ("gamma", "beta") for gate in "rnz"))
def block_gru(x: Any, r: Any, s: Any, p: Any) -> Any:
    """The step of :class:`BlockGRU`."""
    r_, n, z = normed([a + b for a, b in zip(x, r, strict=True)], EPSILON)
    n = torch.tanh(torch.sigmoid(r_ * p.gamma_r + p.beta_r) * (n * p.gamma_n + p.beta_n))
    return s.h + torch.sigmoid(z * p.gamma_z + p.beta_z + UPDATE) * (n - s.h)


class BlockGRU(Parted):
    r"""__init__(input_size,hidden_size,num_layers=1,bias=True,batch_first=False,dropout=0.0,bidirectional=False,device=None,dtype=None,*,blocks=1,return_sequences='h',backend=None,save='gates',recurrent_dropout=0.0,zoneout=0.0,weight_dropout=0.0,return_gates=False)

    DreamerV3's GRU: layer norm of all pre-activations together, a block-diagonal W_hh, an update gate that begins
    closed. ::

        r_t, n_t, z_t = LN(W x_t + b + U h_{t-1}) γ + β, LN over all 3·H
        n_t ← tanh(σ(r_t) n_t),   z_t ← σ(z_t - 1)
        h_t = z_t n_t + (1 - z_t) h_{t-1}
        LN(v) = (v - mean(v)) / √(variance(v) + 1e-3)

    Arguments, inputs, results and errors are :class:`FlexRNN`'s, without heads, and

    Args:
        blocks: N, how many blocks U has, a divisor of H. The norm is over the units of all of them.
        bias: whether there is a b, which the norm makes little of.

    Its parameters are weight_ih_l0 [3·H, D], bias_ih_l0 [3·H], weight_hh_l0 [3·H, H], with blocks [N, 3·H/N, H/N], rows
    of a block gate by gate, gamma_l0 and beta_l0 [3·H]; gates r, n, z. Of a cell that has one matrix over h and x, as
    sheeprl's LayerNormGRUCell, weight_hh and weight_ih are its columns. Weights begin by a normal distribution cut at
    two standard deviations, of variance 1/(D + H/N), gains with one, all else with zero.

    Source: Hafner et al. 2023, "Mastering diverse domains through world models".

    Examples:
        >>> gru = fused_rnn.BlockGRU(10, 16, blocks=4)
        >>> output, h_n = gru(torch.randn(5, 3, 10))
        >>> gru.weight_hh_l0.shape
        torch.Size([4, 12, 4])
    """

    _fused_step = block_gru
    _fused_vectors: ClassVar = {"gamma": 3, "beta": 3}

    def __init__(self, input_size: int, hidden_size: int, *args: Any, blocks: int = 1, **kwargs: Any) -> None:
        divides = isinstance(blocks, int) and blocks > 0 and not (isinstance(hidden_size, int) and hidden_size % blocks)
        if isinstance(blocks, bool) or not divides:  # of what is no int, torch says what it is
            raise ValueError(f"blocks: got {blocks!r}, expected a positive divisor of hidden_size = {hidden_size}")
        self.blocks = blocks
        super().__init__(input_size, hidden_size, *args, **kwargs)

    def _fused_choose(self) -> UserCell:
        return block_gru._fused_diagonal(self.blocks)

    def _shapes(self, input_size: int) -> dict[str, tuple[int, ...]]:
        return super()._shapes(input_size) | ({"bias_ih": (3 * self.hidden_size,)} if self.bias else {})

    def _fused_draw(self, weights: Mapping[str, Tensor]) -> None:
        fan = weights["weight_ih"].shape[1] + self.hidden_size // self.blocks
        std = 1.1368 / math.sqrt(fan)  # of the whole distribution: cut, it has 1/√fan
        for name, weight in weights.items():
            if name.startswith("weight"):
                nn.init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std)
            else:
                nn.init.constant_(weight, float(name == "gamma"))

    def _fused_by_name(self) -> tuple[Mapping[str, Any], bool]:
        biases = ("bias_ih", "bias_hh") if self.bias else ()
        return self._fused_viewing(("weight_ih", "weight_hh", *biases, *self._fused_user.params), self.bias)

    def _fused_parts(self, own: Mapping[str, Tensor]) -> list[Tensor]:
        w_ih, w_hh, *vectors = super()._fused_parts(own)
        if self.blocks > 1:
            w_hh = by_gate(w_hh, 3)
        bias = [own["bias_ih"], torch.zeros_like(own["bias_ih"])] if self.bias else []
        return [w_ih, w_hh, *bias, *vectors]

    def extra_repr(self) -> str:
        """FlexRNN's, and the blocks where there are some."""
        return super().extra_repr() + (f", blocks={self.blocks}" if self.blocks > 1 else "")
