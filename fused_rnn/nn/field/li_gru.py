"""LiGRU."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fused_rnn import checks
from fused_rnn.flex import cell
from fused_rnn.nn.field.base import Field, known, orthogonal
from fused_rnn.nn.field.batch_norm import EPSILON, normed
from fused_rnn.nn.recurrent import read_weights
from fused_rnn.reference.loop import without_autocast
from fused_rnn.reference.sequence import past_end

_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
_NORMS = {"batch": True, "none": False}
MOMENTUM = 0.05


@cell(gates=("n", "z"))
def li_gru(x: Any, r: Any, s: Any, p: Any) -> Any:
    """The step of :class:`LiGRU`."""
    n = torch.relu(x[0] + r[0])
    return n + torch.sigmoid(x[1] + r[1]) * (s.h - n)


class LiGRU(Field):
    r"""__init__(input_size,hidden_size,num_layers=1,bias=True,batch_first=False,dropout=0.0,bidirectional=False,device=None,dtype=None,*,norm='batch',return_sequences='h',backend=None,save='gates',recurrent_dropout=0.0,zoneout=0.0,weight_dropout=0.0,return_gates=False)

    The light GRU: no reset gate, relu, and batch norm of the input side. ::

        n_t = relu(BN(W_n x_t) + U_n h_{t-1})
        z_t = σ(BN(W_z x_t) + U_z h_{t-1})
        h_t = z_t h_{t-1} + (1 - z_t) n_t
        BN(v) = γ (v - mean) / √(variance + 1e-5) + β

    Arguments, inputs, results and errors are :class:`FlexRNN`'s, without heads, and

    Args:
        norm: "batch", or "none" for W x + b and U h + d in the place of BN(W x) and U h.
        bias: of norm="batch": whether there is a β.

    In training mean and variance are those of all steps of the batch, past no sequence's end, and move running ones by
    0.05 of the way, as torch.nn.BatchNorm1d's; in eval mode and in a stream the running ones count. Each direction has
    weights and statistics of its own, where SpeechBrain's share them. The norm is folded into the weights: the loop has
    no more to do than without.

    Its parameters are weight_ih_l0 [2·H, D] and weight_hh_l0 [2·H, H], n before z; gamma_l0 and beta_l0 [2·H], or
    without the norm bias_ih_l0 and bias_hh_l0; its buffers running_mean_l0 and running_var_l0 [2·H],
    num_batches_tracked_l0 []. SpeechBrain's `w.weight`, `u.weight` and `norm.*` are these, in this order. Initial
    values: weight_ih's uniform in ±1/√D, weight_hh orthogonal, γ one, all others zero.

    Source: Ravanelli et al. 2018, "Light gated recurrent units for speech recognition", as SpeechBrain's LiGRU.

    Examples:
        >>> gru = fused_rnn.LiGRU(10, 20, bidirectional=True)
        >>> output, h_n = gru(torch.randn(5, 3, 10))
        >>> gru.running_mean_l0_reverse.shape
        torch.Size([40])
    """

    _fused_step = li_gru

    def __init__(self, *args: Any, norm: str = "batch", **kwargs: Any) -> None:
        self._fused_normed = known("norm", norm, _NORMS)
        super().__init__(*args, **kwargs)
        if not self._fused_normed:
            return
        for names in self._all_weights:
            weight = getattr(self, names[0])
            suffix = names[0].removeprefix("weight_ih")
            for name in _STATISTICS:
                size, dtype = ((), torch.int64) if name == "num_batches_tracked" else (weight.shape[:1], weight.dtype)
                self.register_buffer(name + suffix, torch.zeros(size, dtype=dtype, device=weight.device))
        self.reset_running_stats()

    @property
    def norm(self) -> str:
        """ "batch" or "none"."""
        return "batch" if self._fused_normed else "none"

    def _shapes(self, input_size: int) -> dict[str, tuple[int, ...]]:
        shapes = super()._shapes(input_size)
        if self._fused_normed:
            rows = 2 * self.hidden_size
            shapes = {name: shapes[name] for name in ("weight_ih", "weight_hh")} | {"gamma": (rows,)}
            shapes |= {"beta": (rows,)} if self.bias else {}
        return shapes

    def reset_running_stats(self) -> None:
        """Set the running means to zero and the variances to one."""
        for names in self._all_weights:
            suffix = names[0].removeprefix("weight_ih")
            for name in _STATISTICS:
                if (buffer := self._buffers.get(name + suffix)) is not None:
                    buffer.fill_(float(name == "running_var"))

    def reset_parameters(self) -> None:
        """Draw the weights anew, as the class's docstring says, and forget the running statistics."""
        super().reset_parameters()
        self.reset_running_stats()

    def _fused_draw(self, weights: Mapping[str, Tensor]) -> None:
        for name, weight in weights.items():
            if name == "weight_ih":
                bound = max(weight.shape[1], 1) ** -0.5
                nn.init.uniform_(weight, -bound, bound)
            elif name == "weight_hh":
                orthogonal(weight)
            else:
                nn.init.constant_(weight, float(name == "gamma"))

    def _fused_is_plain(self) -> bool:
        return not (self._fused_normed and self.training) and super()._fused_is_plain()

    def _fused_by_name(self) -> tuple[Mapping[str, Any], bool]:
        if not self._fused_normed:
            return super()._fused_by_name()
        names = ("weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0")
        return dict(zip(names, self._fused_read(), strict=True)), True

    def _fused_names(self) -> list[str] | None:
        return None if self._fused_normed else super()._fused_names()

    @property
    def _fused_by_layer(self) -> bool:  # type: ignore[override]
        return self._fused_normed and self.training

    def _fused_weights(self) -> list[Tensor]:
        """Of a call: in training what `_fused_of_layer` makes the weights of."""
        if not self._fused_by_layer:
            return self._fused_read()
        weights, count = read_weights(self), len(self._all_weights[0])
        made = []
        for k, names in enumerate(self._all_weights):
            suffix = names[0].removeprefix("weight_ih")
            made += [*weights[k * count : (k + 1) * count], *(getattr(self, name + suffix) for name in _STATISTICS)]
        return made

    def _fused_read(self) -> list[Tensor]:
        """The weights with the norm by the running statistics in them."""
        weights, count, sides = read_weights(self), len(self._all_weights[0]), 1 + self.bidirectional
        if not self._fused_normed:
            return weights
        made = []
        for k, names in enumerate(self._all_weights):
            own, suffix = weights[k * count : (k + 1) * count], names[0].removeprefix("weight_ih")
            self._check_shapes(self.input_size if k < sides else self.hidden_size * sides, own, k * count)
            mean, variance = (getattr(self, name + suffix) for name in _STATISTICS[:2])
            made += _folded(own, mean, variance)
        return made

    def _fused_of_layer(self, x: Tensor, weights: Sequence[Tensor], lengths: Any) -> tuple[Tensor, list[Tensor]]:
        """x [T, B, D] about its mean, and the weights of a layer in training with the norm by its statistics in them.

        About its mean, for else gamma's gradient would be a difference of two large sums.
        """
        count = len(self._all_weights[0])
        each = count + len(_STATISTICS)
        of_one = [weights[first : first + each] for first in range(0, len(weights), each)]
        for own in of_one:
            self._check_shapes(of_one[0][0].shape[1], own[:count], 0)
        w_ih = weights[0]
        casts = not x.is_meta and torch.is_autocast_enabled(x.device.type)
        if (
            x.dim() != 3
            or x.shape[2] != w_ih.shape[1]
            or not (x.dtype == w_ih.dtype or casts)
            or x.device != w_ih.device
        ):
            return x, [w for own in of_one for w in _folded(own[:count], *own[count : count + 2])]  # layers.run refuses
        with without_autocast(x):
            wide, past, steps = _within(x, lengths)
            pairs = [(own[0].to(wide.dtype), own[2].to(wide.dtype)) for own in of_one]
            made = normed(wide, past, steps, pairs)
            all_weights: list[Tensor] = []
            for own, variance, weight in zip(of_one, made.variances, made.weights, strict=True):
                _move(own[count:], own[0], made.mean, variance, steps)
                bias = own[3] if self.bias else torch.zeros_like(own[2])
                all_weights += [weight.to(w_ih.dtype), own[1], bias, torch.zeros_like(own[2])]
            return made.x.to(x.dtype), all_weights

    def extra_repr(self) -> str:
        """FlexRNN's, and the norm where it is not the default."""
        return super().extra_repr() + ("" if self._fused_normed else ", norm='none'")


def _within(x: Tensor, lengths: Any) -> tuple[Tensor, Tensor | None, int | Tensor]:
    """x, of 16 bits in float32, zero past an end; where that is, [T, B, 1]; how many steps are not. Raises as
    layers.run."""
    wide = x if x.dtype == torch.float64 else x.float()
    past: Tensor | None = None
    steps: int | Tensor = x.shape[0] * x.shape[1]
    if lengths is not None:
        lengths = checks.check_lengths(lengths, x)
        past = past_end(lengths, x.shape[0]).unsqueeze(2)
        wide, steps = wide.masked_fill(past, 0), lengths.sum()
    if (lengths is None or checks.can_be_read(lengths)) and steps < 2:
        raise ValueError(
            f"input: got {int(steps)} steps in all, expected two or more, of which batch norm has a variance"
        )
    if isinstance(steps, Tensor):
        steps = steps.clamp(min=1).to(wide.dtype)
    return wide, past, steps


def _move(statistics: Sequence[Tensor], weight: Tensor, mean: Tensor, variance: Tensor, steps: int | Tensor) -> None:
    """The running statistics, towards those of the batch. mean: of the input.  variance: of weight times it."""
    running_mean, running_var, batches = statistics
    # Of lengths that cannot be read there may be one step, or none, whose variance is zero: it leaves no NaN behind.
    others = (steps - 1).clamp(min=1) if isinstance(steps, Tensor) else steps - 1
    with torch.no_grad():
        for running, now in (
            (running_mean, torch.mv(weight.to(mean.dtype), mean)),
            (running_var, variance * (steps / others)),
        ):
            running.mul_(1 - MOMENTUM).add_(now.to(running.dtype), alpha=MOMENTUM)  # lerp_ has no rule under vmap
        batches.add_(1)


def _folded(weights: Sequence[Tensor], mean: Tensor, variance: Tensor) -> list[Tensor]:
    """Weights, with gamma and beta behind them, as a cell's with bias."""
    w_ih, w_hh, gamma, *beta = weights
    scale = gamma * torch.rsqrt(variance + EPSILON)
    bias = -mean * scale if not beta else torch.addcmul(beta[0], mean, scale, value=-1)
    return [(w_ih * scale.unsqueeze(1)).to(w_ih.dtype), w_hh, bias.to(w_ih.dtype), torch.zeros_like(gamma)]
