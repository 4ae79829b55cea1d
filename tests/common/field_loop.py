"""The modules of nn/field, and what judges them: each paper's formula over a module's parameters, in a plain loop."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from plain_loop import UNITS, Given, Results, by_module, differentiate
from tolerances import assert_as_good_as_torch
from torch import Tensor, relu, sigmoid, tanh
from torch.nn import functional as F
from torch.nn.functional import linear

import fused_rnn
from fused_rnn.reference.sequence import past_end

Weights = Mapping[str, Tensor]  # of one recurrence, by name without its layer
States = Sequence[Tensor]


def gates(x: Tensor, h: Tensor, w: Weights, number: int) -> tuple[Tensor, ...]:
    """W x + b + U h + d by gate; weight_hh may have heads."""
    w_hh = w["weight_hh"]
    if w_hh.dim() == 3:
        parts = [linear(own, u).chunk(number, -1) for own, u in zip(h.chunk(len(w_hh), -1), w_hh, strict=True)]
        sides = torch.cat([part[g] for g in range(number) for part in parts], -1)
    else:
        sides = linear(h, w_hh)
    return (linear(x, w["weight_ih"], w.get("bias_ih")) + sides + w.get("bias_hh", 0)).chunk(number, -1)


def peephole_lstm(x: Tensor, s: States, w: Weights) -> States:
    h, c = s
    i, f, g, o = gates(x, h, w, 4)
    new = sigmoid(f + w["p_f"] * c) * c + sigmoid(i + w["p_i"] * c) * tanh(g)
    return sigmoid(o + w["p_o"] * new) * tanh(new), new


def coupled_lstm(x: Tensor, s: States, w: Weights) -> States:
    h, c = s
    f, g, o = gates(x, h, w, 3)
    c = sigmoid(f) * c + (1 - sigmoid(f)) * tanh(g)
    return sigmoid(o) * tanh(c), c


def ind_rnn(activation: Callable[[Tensor], Tensor]) -> Callable[..., States]:
    return lambda x, s, w: (activation(linear(x, w["weight_ih"], w.get("bias_ih")) + w["u"] * s[0]),)


def li_gru(x: Tensor, s: States, w: Weights) -> States:
    """x: of norm="batch" what the norm has made already."""
    sides = linear(x, w["weight_ih"], w.get("bias_ih")) if "gamma" not in w else x
    n, z = (sides + linear(s[0], w["weight_hh"], w.get("bias_hh"))).chunk(2, -1)
    return (sigmoid(z) * s[0] + (1 - sigmoid(z)) * relu(n),)


def batch_normed(x: Tensor, w: Weights, lengths: Tensor | None) -> Tensor:
    """BN(W x) over the steps within the sequences, by torch's batch norm."""
    sides = linear(x, w["weight_ih"])
    within = torch.ones(x.shape[:2], dtype=torch.bool) if lengths is None else ~past_end(lengths, len(x))
    made = F.batch_norm(sides[within], None, None, w["gamma"], w.get("beta"), training=True)
    return torch.zeros_like(sides).index_put((within,), made)


def g(x: Tensor) -> Tensor:
    return torch.where(x >= 0, x + 0.5, sigmoid(x))


def min_gru(x: Tensor, s: States, w: Weights) -> States:
    z, own = linear(x, w["weight_ih"], w.get("bias_ih")).chunk(2, -1)
    return ((1 - sigmoid(z)) * s[0] + sigmoid(z) * g(own),)


def min_lstm(x: Tensor, s: States, w: Weights) -> States:
    f, i, own = linear(x, w["weight_ih"], w.get("bias_ih")).chunk(3, -1)
    f, i = sigmoid(f), sigmoid(i)
    return (f / (f + i) * s[0] + i / (f + i) * g(own),)


def sru(x: Tensor, s: States, w: Weights) -> States:
    c, hidden = s[1], s[1].shape[-1]
    own, f, r, *skip = linear(x, w["weight_ih"]).split(hidden, -1)
    b_f, b_r = w["bias_ih"].chunk(2) if "bias_ih" in w else (0, 0)
    f = sigmoid(f + w.get("v_f", 0) * c + b_f)
    r = sigmoid(r + w.get("v_r", 0) * c + b_r)
    c = f * c + (1 - f) * own
    return r * c + (1 - r) * (skip[0] if skip else math.sqrt(3) * x), c


def sru_without_skip(x: Tensor, s: States, w: Weights) -> States:
    own, f, r = linear(x, w["weight_ih"]).chunk(3, -1)
    b_f, b_r = w["bias_ih"].chunk(2) if "bias_ih" in w else (0, 0)
    f = sigmoid(f + w.get("v_f", 0) * s[1] + b_f)
    r = sigmoid(r + w.get("v_r", 0) * s[1] + b_r)
    c = f * s[1] + (1 - f) * own
    return r * c, c


def slstm(x: Tensor, s: States, w: Weights) -> States:
    h, c, n, m = s
    i, f, z, o = gates(x, h, w, 4)
    new = torch.where(n == 0, i, torch.max(F.logsigmoid(f) + m, i))
    kept, taken = torch.exp(F.logsigmoid(f) + m - new), torch.exp(i - new)
    c, n = kept * c + taken * tanh(z), kept * n + taken
    return sigmoid(o) * c / n, c, n, new


def normed(v: Tensor, epsilon: float) -> Tensor:
    return F.layer_norm(v, v.shape[-1:], eps=epsilon)


def layer_norm_lstm(x: Tensor, s: States, w: Weights) -> States:
    h, c = s
    own = normed(linear(x, w["weight_ih"]), 1e-5) * w["gamma_ih"]
    other = normed(linear(h, w["weight_hh"]), 1e-5) * w["gamma_hh"]
    i, f, g, o = (own + other + w.get("bias_ih", 0)).chunk(4, -1)
    c = sigmoid(f) * c + sigmoid(i) * tanh(g)
    return sigmoid(o) * tanh(normed(c, 1e-5) * w["gamma_c"] + w["beta_c"]), c


def layer_norm_gru(x: Tensor, s: States, w: Weights) -> States:
    own = normed(linear(x, w["weight_ih"]), 1e-5) * w["gamma_ih"] + w.get("bias_ih", 0)
    other = normed(linear(s[0], w["weight_hh"]), 1e-5) * w["gamma_hh"] + w.get("bias_hh", 0)
    (x_r, x_z, x_n), (h_r, h_z, h_n) = own.chunk(3, -1), other.chunk(3, -1)
    z = sigmoid(x_z + h_z)
    return ((1 - z) * tanh(x_n + sigmoid(x_r + h_r) * h_n) + z * s[0],)


def block_gru(x: Tensor, s: States, w: Weights) -> States:
    made = torch.cat(gates(x, s[0], w, 3), -1)
    r, n, z = (normed(made, 1e-3) * w["gamma"] + w["beta"]).chunk(3, -1)
    z = sigmoid(z - 1)
    return (z * tanh(sigmoid(r) * n) + (1 - z) * s[0],)


def reset_before_gru(x: Tensor, s: States, w: Weights) -> States:
    x_r, x_z, x_n = linear(x, w["weight_ih"], w.get("bias_ih")).chunk(3, -1)
    u_r, u_z, u_n = w["weight_hh"].chunk(3)
    d_r, d_z, d_n = w["bias_hh"].chunk(3) if "bias_hh" in w else (0, 0, 0)
    r, z = sigmoid(x_r + linear(s[0], u_r) + d_r), sigmoid(x_z + linear(s[0], u_z) + d_z)
    return ((1 - z) * tanh(x_n + linear(r * s[0], u_n) + d_n) + z * s[0],)


def mgu(x: Tensor, s: States, w: Weights) -> States:
    x_f, x_n = linear(x, w["weight_ih"], w.get("bias_ih")).chunk(2, -1)
    u_f, u_n = w["weight_hh"].chunk(2)
    d_f, d_n = w["bias_hh"].chunk(2) if "bias_hh" in w else (0, 0)
    f = sigmoid(x_f + linear(s[0], u_f) + d_f)
    return ((1 - f) * s[0] + f * tanh(x_n + linear(f * s[0], u_n) + d_n),)


class Variant(NamedTuple):
    """A module by its class's name, the options that choose its formula, and that formula."""

    module: str
    step: Callable[..., States]
    options: Mapping[str, Any] = {}
    prepare: Callable[..., Tensor] | None = None  # what is done to the input before the loop


VARIANTS: dict[str, Variant] = {
    "PeepholeLSTM": Variant("PeepholeLSTM", peephole_lstm),
    "CoupledLSTM": Variant("CoupledLSTM", coupled_lstm),
    "IndRNN": Variant("IndRNN", ind_rnn(relu)),
    "IndRNN-tanh": Variant("IndRNN", ind_rnn(tanh), {"nonlinearity": "tanh"}),
    "IndRNN-none": Variant("IndRNN", ind_rnn(lambda a: a), {"nonlinearity": "none"}),
    "LiGRU": Variant("LiGRU", li_gru, prepare=batch_normed),
    "LiGRU-none": Variant("LiGRU", li_gru, {"norm": "none"}),
    "MinGRU": Variant("MinGRU", min_gru),
    "MinLSTM": Variant("MinLSTM", min_lstm),
    "SRU": Variant("SRU", sru),
    "SRU-no-terms": Variant("SRU", sru, {"recurrent_terms": False}),
    "SRU-no-skip": Variant("SRU", sru_without_skip, {"skip": False}),
    "SRU-neither": Variant("SRU", sru_without_skip, {"skip": False, "recurrent_terms": False}),
    "LayerNormLSTM": Variant("LayerNormLSTM", layer_norm_lstm),
    "LayerNormGRU": Variant("LayerNormGRU", layer_norm_gru),
    "BlockGRU": Variant("BlockGRU", block_gru),
    "BlockGRU-blocks": Variant("BlockGRU", block_gru, {"blocks": 2}),
    "ResetBeforeGRU": Variant("ResetBeforeGRU", reset_before_gru),
    "MGU": Variant("MGU", mgu),
    "SLSTM": Variant("SLSTM", slstm),
    "SLSTM-heads": Variant("SLSTM", slstm, {"heads": 2}),
}
# Of several stages, which not every loop has yet.
STAGED = {"LayerNormLSTM", "LayerNormGRU", "BlockGRU", "BlockGRU-blocks", "ResetBeforeGRU", "MGU"}
# With a kink, where rounding decides what the gradient is: fewer units over fewer steps in 16 bits.
KINKED = {"IndRNN", "LiGRU", "LiGRU-none", "MinGRU", "MinLSTM", "SLSTM", "SLSTM-heads"}


class Case(NamedTuple):
    """A module, and how it is called; `lengths`, `reset`, `hx`: whether it has them."""

    name: str
    T: int = 5
    B: int = 3
    D: int = 4
    H: int = 6
    layers: int = 1
    bidirectional: bool = False
    bias: bool = True
    lengths: bool = False
    reset: bool = False
    hx: bool = True
    save: str = "gates"
    dtype: torch.dtype = torch.float32

    def __str__(self) -> str:
        said = [f"{self.name}-T{self.T}-B{self.B}-D{self.D}-H{self.H}-{str(self.dtype).removeprefix('torch.')}"]
        said += [name for name in ("bidirectional", "lengths", "reset") if getattr(self, name)]
        said += [f"layers{self.layers}"] * (self.layers > 1) + ["no_bias"] * (not self.bias)
        return "-".join([*said, *["no_hx"] * (not self.hx), *["recompute"] * (self.save == "recompute")])

    def fit(self) -> Case:
        """The case, of sizes that its module takes, and small ones of a kinked cell in 16 bits."""
        case = self._replace(H=self.H + self.H % 2) if {"heads", "blocks"} & {*self.variant.options} else self
        if self.name in KINKED and self.dtype.itemsize == 2:
            case = case._replace(T=min(case.T, 2), B=min(case.B, 3), H=min(case.H, 6), layers=1)
        return case

    @property
    def variant(self) -> Variant:
        return VARIANTS[self.name]

    def module(self, backend: str | None = None) -> fused_rnn.FlexRNN:
        """Every parameter drawn: nothing is zero, or the same for two units."""
        made: fused_rnn.FlexRNN = getattr(fused_rnn, self.variant.module)(
            self.D, self.H, self.layers, self.bias, bidirectional=self.bidirectional, dtype=torch.float64,
            backend=backend, save=self.save, **self.variant.options,
        )  # fmt: skip
        with torch.no_grad():
            for weight in made.parameters():
                weight.copy_(torch.randn_like(weight) * (0.5 if weight.dim() == 1 else weight.shape[-1] ** -0.5))
        return made.to(self.dtype)


def given(case: Case, states: int) -> Given:
    """Inputs in the case's dtype. lengths hold 0 and T where B allows it."""
    shape = (case.layers * (1 + case.bidirectional), case.B, case.H)

    def draw(*size: int) -> Tensor:
        return torch.randn(*size, dtype=torch.float64)

    lengths = torch.randint(0, case.T + 1, (case.B,))
    lengths[0], lengths[-1] = 0, case.T
    hx = [draw(*shape) for _ in range(states)] if case.hx else []
    if case.variant.module == "SLSTM" and hx:
        hx[2] = 0.5 + torch.rand(shape, dtype=torch.float64)  # its n is positive
    reset = torch.rand(case.T, case.B) < 0.2 if case.reset else None
    dout = [draw(case.T, case.B, (1 + case.bidirectional) * case.H), *(draw(*shape) for _ in range(states))]
    return Given(draw(case.T, case.B, case.D), hx, lengths if case.lengths else None, reset, dout).to(case.dtype)


def plain_loop(rnn: Any, variant: Variant, call: Given, x: Tensor, hx: States, weights: Weights) -> list[Tensor]:
    """[y, each state after] of a module's layers, by the paper's formula."""
    finals, sides, count = [], 1 + rnn.bidirectional, len(rnn.cell.states)
    for layer in range(rnn.num_layers):
        ys = []
        for r in range(sides):
            suffix = f"_l{layer}" + "_reverse" * r
            w = {name.removesuffix(suffix): t for name, t in weights.items() if name.endswith(suffix)}
            state = [s[layer * sides + r] for s in hx] or [x.new_zeros(x.shape[1], rnn.hidden_size)] * count
            own = x if variant.prepare is None else variant.prepare(x, w, call.lengths)
            y, state = _over_time(variant.step, own, state, w, call, r == 1)
            ys.append(y)
            finals.append(state)
        x = torch.cat(ys, -1)
    return [x, *(torch.stack(states) for states in zip(*finals, strict=True))]


def _over_time(
    step: Callable[..., States], x: Tensor, state: States, w: Weights, call: Given, backwards: bool
) -> tuple[Tensor, States]:
    steps = len(x)
    outputs: list[Any] = [None] * steps
    for t in reversed(range(steps)) if backwards else range(steps):
        if call.reset is not None:
            entering = [s.masked_fill(call.reset[t].unsqueeze(-1), 0) for s in state]
        else:
            entering = list(state)
        after = step(x[t], entering, w)
        over = torch.zeros(x.shape[1], 1, dtype=torch.bool)
        if call.lengths is not None:
            over = (t >= call.lengths).unsqueeze(-1)
        state = [torch.where(over, old, new) for old, new in zip(state, after, strict=True)]
        outputs[t] = after[0].masked_fill(over, 0)
    return torch.stack(outputs), state


def by_loop(rnn: Any, variant: Variant, call: Given, dtype: torch.dtype) -> Results:
    """The loop's outputs and gradients, in a dtype."""

    def run(x: Tensor, hx: States, weights: Weights) -> list[Tensor]:
        return plain_loop(rnn, variant, call, x, hx, weights)

    return differentiate(run, call.to(dtype), {name: w.to(dtype) for name, w in rnn.named_parameters()})


def check(case: Case, backend: str | None, device: str = "cpu") -> None:
    """As plain_loop.check: the module against the formula in float64, by the formula's error in the case's dtype."""
    found: list[list[Results]] = []
    for _ in range(max(1, round(UNITS / case.H))):
        rnn = case.module(backend)
        call = given(case, len(rnn.cell.states))
        reference = by_loop(rnn, case.variant, call, torch.float64)
        own = reference if case.dtype == torch.float64 else by_loop(rnn, case.variant, call, case.dtype)
        if call.lengths is not None:
            call = call._replace(x=call.x.masked_fill(past_end(call.lengths, case.T).unsqueeze(-1), float("nan")))
        made = by_module(rnn.to(device), call.on(device))
        found.append([{name: t.cpu() for name, t in made.items()}, own, reference])
    assert_as_good_as_torch(
        *(
            {name: torch.stack([results[name] for results in each]) for name in each[0]}
            for each in zip(*found, strict=True)
        )
    )
