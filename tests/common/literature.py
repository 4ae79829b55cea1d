"""Cells of the literature as steps: as their papers write them, each gate's sum W x + b, U h one of x[g], r[g]."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.nn import functional as F

import fused_rnn
from fused_rnn import UserCell

sigmoid, tanh = torch.sigmoid, torch.tanh


@fused_rnn.cell(gates=4, states=("h", "c"))
def lstm(x: Any, r: Any, s: Any, p: Any) -> Any:
    """Gers, Schmidhuber, Cummins 2000, "Learning to forget", as torch.nn.LSTM has it."""
    i, f, o = (sigmoid(x[k] + r[k]) for k in (0, 1, 3))
    c = f * s.c + i * tanh(x[2] + r[2])
    return o * tanh(c), c


@fused_rnn.cell(gates=3)
def gru(x: Any, r: Any, s: Any, p: Any) -> Any:
    """Cho et al. 2014, "Learning phrase representations using RNN encoder-decoder"; the reset gate after the product,
    as torch.nn.GRU has it."""
    reset, z = sigmoid(x[0] + r[0]), sigmoid(x[1] + r[1])
    n = tanh(x[2] + reset * r[2])
    return (1 - z) * n + z * s.h


@fused_rnn.cell(gates=1)
def rnn_tanh(x: Any, r: Any, s: Any, p: Any) -> Any:
    """Elman 1990, "Finding structure in time", as torch.nn.RNN has it."""
    return tanh(x[0] + r[0])


@fused_rnn.cell(gates=1)
def rnn_relu(x: Any, r: Any, s: Any, p: Any) -> Any:
    """Le, Jaitly, Hinton 2015, "A simple way to initialize recurrent networks of rectified linear units"."""
    return torch.relu(x[0] + r[0])


@fused_rnn.cell(gates=1)
def elman_sin(x: Any, r: Any, s: Any, p: Any) -> Any:
    """Elman 1990 with a sine: Sopena, Alquezar 1994, "Improvement of learning in recurrent networks by substituting the
    sigmoid activation function"."""
    return torch.sin(x[0] + r[0])


@fused_rnn.cell(gates=1)
def elman_gelu(x: Any, r: Any, s: Any, p: Any) -> Any:
    """Elman 1990 with the unit of Hendrycks, Gimpel 2016, "Gaussian error linear units"."""
    return F.gelu(x[0] + r[0])


@fused_rnn.cell(gates=1)
def elman_softplus(x: Any, r: Any, s: Any, p: Any) -> Any:
    """Elman 1990 with the unit of Dugas et al. 2000, "Incorporating second-order functional knowledge"."""
    return F.softplus(x[0] + r[0])


@fused_rnn.cell(gates=4, states=("h", "c"), params=("p_i", "p_f", "p_o"))
def peephole_lstm(x: Any, r: Any, s: Any, p: Any) -> Any:
    """Gers, Schmidhuber 2000, "Recurrent nets that time and count"; the output gate sees the new c."""
    i = sigmoid(x[0] + r[0] + p.p_i * s.c)
    f = sigmoid(x[1] + r[1] + p.p_f * s.c)
    c = f * s.c + i * tanh(x[2] + r[2])
    o = sigmoid(x[3] + r[3] + p.p_o * c)
    return o * tanh(c), c


@fused_rnn.cell(gates=3, states=("h", "c"), params=("p_i", "p_o"))
def coupled_lstm(x: Any, r: Any, s: Any, p: Any) -> Any:
    """Greff et al. 2017, "LSTM: a search space odyssey", CIFG: f = 1 - i, with peepholes as their vanilla LSTM."""
    i = sigmoid(x[0] + r[0] + p.p_i * s.c)
    c = tanh(x[1] + r[1]) * i + s.c * (1 - i)
    o = sigmoid(x[2] + r[2] + p.p_o * c)
    return tanh(c) * o, c


ZONEOUT_C, ZONEOUT_H = 0.5, 0.05


@fused_rnn.cell(gates=4, states=("h", "c"))
def zoneout_lstm(x: Any, r: Any, s: Any, p: Any) -> Any:
    """Krueger et al. 2017, "Zoneout: regularizing RNNs by randomly preserving hidden activations": the expectation over
    its masks, which evaluation has."""
    i, f, o = (sigmoid(x[k] + r[k]) for k in (0, 1, 2))
    new = f * s.c + i * tanh(x[3] + r[3])
    c = ZONEOUT_C * s.c + (1 - ZONEOUT_C) * new
    h = ZONEOUT_H * s.h + (1 - ZONEOUT_H) * (o * tanh(new))
    return h, c


@fused_rnn.cell(gates=4, states=("h", "c"))
def hard_lstm(x: Any, r: Any, s: Any, p: Any) -> Any:
    """Courbariaux, Bengio, David 2015, "BinaryConnect": σ(x) = clip((x + 1)/2, 0, 1) in an LSTM; its c clipped as in
    Sak, Senior, Beaufays 2014, "Long short-term memory based recurrent neural network architectures"."""
    i, f, o = (torch.clamp((x[k] + r[k] + 1) / 2, 0, 1) for k in (0, 1, 3))
    c = torch.clamp(f * s.c + i * tanh(x[2] + r[2]), -3, 3)
    return o * tanh(c), c


@fused_rnn.cell(gates=4, states=("h", "c", "phase"), params=("rate", "opens"))
def phased_lstm(x: Any, r: Any, s: Any, p: Any) -> Any:
    """Neil, Pfeiffer, Liu 2016, "Phased LSTM: accelerating recurrent network training for long or event-based
    sequences". rate: 1/τ, of a step of time 1; opens: r_on; the phase φ is a state, and outside of training α is 0."""
    moved = s.phase + p.rate
    phase = torch.where(moved >= 1, moved - 1, moved)
    rising, falling = 2 * phase / p.opens, 2 - 2 * phase / p.opens
    k = torch.where(phase < p.opens / 2, rising, torch.where(phase < p.opens, falling, 1e-3 * phase))
    i, f, o = (sigmoid(x[g] + r[g]) for g in (0, 1, 3))
    made = f * s.c + i * tanh(x[2] + r[2])
    c = k * made + (1 - k) * s.c
    return k * (o * tanh(made)) + (1 - k) * s.h, c, phase


@fused_rnn.cell(gates=2)
def mgu(x: Any, r: Any, s: Any, p: Any) -> Any:
    """Zhou et al. 2016, "Minimal gated unit for recurrent neural networks"; the gate after the product."""
    f = sigmoid(x[0] + r[0])
    return (1 - f) * s.h + f * tanh(x[1] + f * r[1])


@fused_rnn.cell(gates=2)
def ligru(x: Any, r: Any, s: Any, p: Any) -> Any:
    """Ravanelli et al. 2018, "Light gated recurrent units for speech recognition", without its batch norm."""
    z = sigmoid(x[0] + r[0])
    return z * s.h + (1 - z) * torch.relu(x[1] + r[1])


@fused_rnn.cell(gates=2)
def ugrnn(x: Any, r: Any, s: Any, p: Any) -> Any:
    """Collins, Sohl-Dickstein, Sussillo 2017, "Capacity and trainability in recurrent neural networks"; b_fg = 1."""
    c, g = tanh(x[0] + r[0]), sigmoid(x[1] + r[1] + 1)
    return g * s.h + (1 - g) * c


@fused_rnn.cell(gates=2, states=("h",))
def janet(x: Any, r: Any, s: Any, p: Any) -> Any:
    """van der Westhuizen, Lasenby 2018, "The unreasonable effectiveness of the forget gate"; β = 1."""
    a = x[0] + r[0]
    return sigmoid(a) * s.h + (1 - sigmoid(a - 1)) * tanh(x[1] + r[1])


@fused_rnn.cell(gates=1, params=("b_z", "b_h", "zeta", "nu"))
def fastgrnn(x: Any, r: Any, s: Any, p: Any) -> Any:
    """Kusupati et al. 2018, "FastGRNN": one product for both gates."""
    a = x[0] + r[0]
    z = sigmoid(a + p.b_z)
    return (sigmoid(p.zeta) * (1 - z) + sigmoid(p.nu)) * tanh(a + p.b_h) + z * s.h


@fused_rnn.cell(gates=1, params=("a",))
def leaky_integrator(x: Any, r: Any, s: Any, p: Any) -> Any:
    """Jaeger et al. 2007, "Optimization and applications of echo state networks with leaky-integrator neurons"; a rate
    of its own for each unit, γ = 1."""
    return (1 - p.a) * s.h + tanh(x[0] + r[0])


EPSILON, GAMMA = 0.1, 0.01


@fused_rnn.cell(gates=2)
def antisymmetric_rnn(x: Any, r: Any, s: Any, p: Any) -> Any:
    """Chang et al. 2019, "AntisymmetricRNN", with its gate. W_hh is W - Wᵀ for both gates, which a parametrisation of
    the weight makes; the diffusion γ is here."""
    z = sigmoid(x[0] + r[0] - GAMMA * s.h)
    return s.h + EPSILON * z * tanh(x[1] + r[1] - GAMMA * s.h)


@fused_rnn.cell(gates=3)
def cfc(x: Any, r: Any, s: Any, p: Any) -> Any:
    """Hasani et al. 2022, "Closed-form continuous-time neural networks", over a time of 1, heads without a backbone."""
    gate = sigmoid(-(x[0] + r[0]) * 1.0)
    return gate * tanh(x[1] + r[1]) + (1 - gate) * tanh(x[2] + r[2])


@fused_rnn.cell(gates=1, params=("a", "tau"))
def ltc(x: Any, r: Any, s: Any, p: Any) -> Any:
    """Hasani et al. 2021, "Liquid time-constant networks": one step of the fused Euler solver, Δt = 0.5."""
    f, dt = sigmoid(x[0] + r[0]), 0.5
    return (s.h + dt * f * p.a) / (1 + dt * (1 / p.tau + f))


@fused_rnn.cell(gates=4, states=("h", "c", "n", "m"))
def slstm(x: Any, r: Any, s: Any, p: Any) -> Any:
    """Beck et al. 2024, "xLSTM": exponential gates, their normaliser n and stabiliser m. Its memory mixing within heads
    is FlexRNN's `heads`."""
    i, f, z, o = (x[k] + r[k] for k in range(4))
    log_f = F.logsigmoid(f)
    m = torch.maximum(log_f + s.m, i)
    i, f = torch.exp(i - m), torch.exp(log_f + s.m - m)
    c, n = f * s.c + i * tanh(z), f * s.n + i
    return sigmoid(o) * (c / n), c, n, m


@fused_rnn.cell(gates=1, params=("u",), recurrent=False)
def indrnn(x: Any, r: Any, s: Any, p: Any) -> Any:
    """Li et al. 2018, "Independently recurrent neural network"."""
    return torch.relu(x[0] + p.u * s.h)


@fused_rnn.cell(gates=4, states=("h", "c"), params=("v_f", "v_r"), recurrent=False)
def sru(x: Any, r: Any, s: Any, p: Any) -> Any:
    """Lei et al. 2018, "Simple recurrent units for highly parallelizable recurrence": f, r, W x, and the highway's x,
    which has a matrix of its own where widths differ."""
    f = sigmoid(x[0] + p.v_f * s.c)
    gate = sigmoid(x[1] + p.v_r * s.c)
    c = f * s.c + (1 - f) * x[2]
    return gate * c + (1 - gate) * x[3] * math.sqrt(3), c


@fused_rnn.cell(gates=2, recurrent=False)
def min_gru(x: Any, r: Any, s: Any, p: Any) -> Any:
    """Feng et al. 2024, "Were RNNs all we needed?": minGRU."""
    z = sigmoid(x[0])
    return (1 - z) * s.h + z * x[1]


@fused_rnn.cell(gates=3, recurrent=False)
def min_lstm(x: Any, r: Any, s: Any, p: Any) -> Any:
    """Feng et al. 2024, "Were RNNs all we needed?": minLSTM."""
    f, i = sigmoid(x[0]), sigmoid(x[1])
    return f / (f + i) * s.h + i / (f + i) * x[2]


@fused_rnn.cell(gates=8, states=("h", "c"))
def nas_cell(x: Any, r: Any, s: Any, p: Any) -> Any:
    """Zoph, Le 2017, "Neural architecture search with reinforcement learning", the cell found on the Penn Treebank, as
    TensorFlow's NASCell has it: eight gates, in pairs."""
    a = tanh(sigmoid(x[0] + r[0]) * torch.relu(x[1] + r[1]))
    b = tanh(sigmoid(x[2] + r[2]) + torch.relu(x[3] * r[3]))
    c = tanh(tanh(x[4] + r[4]) * sigmoid(x[5] + r[5]))
    d = sigmoid(tanh(x[6] + r[6]) + sigmoid(x[7] + r[7]))
    inner = tanh(a + s.c) * b
    return tanh(inner * tanh(c + d)), inner


CELLS: dict[str, UserCell] = {name: value for name, value in globals().items() if isinstance(value, UserCell)}
# What is no bare number: (low, high) of states and params that the papers keep within bounds.
RANGES: dict[str, dict[str, tuple[float, float]]] = {
    "slstm": {"n": (0.5, 2.0)},
    "indrnn": {"u": (-1.0, 1.0)},  # beyond it h explodes: Li et al. keep it within about 1
    "ltc": {"tau": (0.5, 2.0)},
    "phased_lstm": {"phase": (0.0, 1.0), "rate": (0.1, 0.4), "opens": (0.3, 0.7)},
    "leaky_integrator": {"a": (0.1, 0.9)},
}
# Cells with a kink. There rounding alone decides what the gradient is, and in 16 bits often: of many such units the
# plain loop's own error says little. sLSTM's is in its m, whose gradient the tests ask for too.
KINKED = {"rnn_relu", "indrnn", "ligru", "hard_lstm", "slstm", "nas_cell"}
