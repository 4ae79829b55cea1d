"""Gates by name: their activations, their matrices, and what is advised for them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import user_cells
from torch import nn
from torch.nn.functional import linear
from watched import LENGTHS, B, D, H, T, given, made

import fused_rnn


def test_saturation_counts_what_is_near_the_ends() -> None:
    """Against counting by hand, over the steps that sequences have."""
    gru, (x, _) = made("GRU"), given()
    with torch.no_grad():
        for p in gru.parameters():
            p.mul_(6)
    with fused_rnn.diagnose(gru) as report:
        y, _ = gru(x, lengths=LENGTHS)
        y.sum().backward()
    h = torch.cat([torch.zeros(1, B, H, dtype=torch.float64), y[:-1].detach()])
    gates_x = linear(x, gru.weight_ih_l0, gru.bias_ih_l0).chunk(3, -1)
    gates_h = linear(h, gru.weight_hh_l0, gru.bias_hh_l0).chunk(3, -1)
    r, z = (torch.sigmoid(gates_x[k] + gates_h[k]) for k in range(2))
    n = torch.tanh(gates_x[2] + r * gates_h[2])
    valid = (torch.arange(T)[:, None] < torch.tensor(LENGTHS)).double()
    for name, a, (low, high) in (("r", r, (0.05, 0.95)), ("z", z, (0.05, 0.95)), ("n", n, (-0.9, 0.9))):
        near = torch.stack([(a < low).double().mean(-1), (a > high).double().mean(-1)])
        expected = (near * valid).sum(-1) / valid.sum(-1)
        assert 0 < expected.sum() < 2 * T
        torch.testing.assert_close(report.gates[f"{name}_l0"], expected)


def test_relu_is_saturated_where_it_is_0() -> None:
    rnn, (x, _) = made("rnn_relu"), given()
    with fused_rnn.diagnose(rnn) as report:
        y, _ = rnn(x)
        y.sum().backward()
    torch.testing.assert_close(report.gates["h_l0"][0], (y == 0).double().mean((1, 2)))
    assert not report.gates["h_l0"][1].any()


@pytest.mark.parametrize(("kind", "gates"), [("lstm", 4), ("gru", 3), ("leaky", 1), ("indrnn", 1), ("chain", 0)])
def test_gates_of_a_users_cell(kind: str, gates: int) -> None:
    """Where the built-in cells have names, these have numbers. chain's gate also goes on as it is, by a state."""
    module, (x, _) = made(kind), given()
    with fused_rnn.diagnose(module) as report:
        module(x)[0].sum().backward()
    assert list(report.gates) == [f"gate{k}_l0" for k in range(gates)]
    if kind in ("lstm", "gru"):
        theirs = made(kind.upper())
        theirs.load_state_dict(module.state_dict())
        with fused_rnn.diagnose(theirs) as other:
            theirs(x)[0].sum().backward()
        for ours, named in zip(report.gates.values(), other.gates.values(), strict=True):
            torch.testing.assert_close(ours, named)


def test_a_gate_that_nothing_squashes_is_left_out() -> None:
    @fused_rnn.cell(gates=2, recurrent=False)
    def linear_cell(x: Any, r: Any, s: Any, p: Any) -> Any:
        return torch.sigmoid(x[1]) * s.h + x[0]

    module = fused_rnn.FlexRNN(linear_cell, D, H)
    with fused_rnn.diagnose(module) as report:
        module(torch.randn(T, B, D))[0].sum().backward()
    assert list(report.gates) == ["gate1_l0"] and not report.spectral_radius
    assert report.gradients["h_l0"].all() and report.flows["l0"].factor is not None


def test_gates_have_the_cells_names() -> None:
    @fused_rnn.cell(gates=("forget", "new"))
    def named(x: Any, r: Any, s: Any, p: Any) -> Any:
        new = torch.tanh(x[1] + r[1])
        return new + torch.sigmoid(x[0] + r[0]) * (s.h - new)

    model = nn.ModuleDict({"a": fused_rnn.FlexRNN(named, D, H), "b": fused_rnn.PeepholeLSTM(D, H)})
    with fused_rnn.diagnose(model) as report:
        sum(m(given()[0].float())[0].sum() for m in model.values()).backward()
    expected = ["a.forget_l0", "a.new_l0", *(f"b.{gate}_l0" for gate in "ifgo")]
    assert list(report.gates) == list(report.spectral_radius) == expected


SATURATED: dict[str, tuple[str, slice, str | None]] = {  # the parameter, the rows of a gate, the gate if it has a say
    "LayerNormLSTM": ("bias_ih_l0", slice(32, 64), "f"),
    "LayerNormGRU": ("bias_ih_l0", slice(32, 64), "z"),
    "BlockGRU": ("beta_l0", slice(64, 96), "z"),
    "MGU": ("bias_ih_l0", slice(0, 32), "f"),
    "SRU": ("bias_ih_l0", slice(0, 32), "f"),
    "MinGRU": ("bias_ih_l0", slice(0, 32), "z"),
    "PeepholeLSTM": ("bias_ih_l0", slice(96, 128), "o"),
    "MinLSTM": ("bias_ih_l0", slice(0, 32), None),  # one sigmoid of two gates
    "SLSTM": ("bias_ih_l0", slice(32, 64), None),  # an exponential
}


@pytest.mark.parametrize("kind", SATURATED)
def test_one_saturated_gate_is_named_and_no_other(kind: str) -> None:
    torch.manual_seed(0)
    name, rows, gate = SATURATED[kind]
    module = getattr(fused_rnn, kind)(16, 32)
    with torch.no_grad():
        getattr(module, name)[rows] += 10
    with fused_rnn.diagnose(module) as report:
        module(torch.randn(30, 4, 16) / 2)[0].sum().backward()
    shares = {name: float(ends.sum(0).mean()) for name, ends in report.gates.items()}
    assert {name for name, share in shares.items() if share > 0.5} == ({f"{gate}_l0"} if gate else set())
    assert gate is None or shares[f"{gate}_l0"] > 0.99
    absent = {"MinLSTM": {"f_l0", "i_l0", "h_l0"}, "SLSTM": {"i_l0", "f_l0"}, "MinGRU": {"h_l0"}}
    assert not absent.get(kind, set()) & report.gates.keys()


KEPT = {
    "PeepholeLSTM": "gate f that is larger by 1 to 3 keeps c",
    "CoupledLSTM": "gate f that is larger by 1 to 3 keeps c",
    "LayerNormLSTM": "gate f that is larger by 1 to 3 keeps c",
    "LayerNormGRU": "gate z that is larger by 1 to 3 keeps h",
    "BlockGRU": "gate z that is smaller by 1 to 3 keeps h",
    "MGU": "gate f that is smaller by 1 to 3 keeps h",
    "ResetBeforeGRU": "gate z that is larger by 1 to 3 keeps h",
    "SLSTM": "gate f that is larger by 1 to 3 keeps c",
    "MinGRU": "gate z that is smaller by 1 to 3 keeps h",
    "MinLSTM": "gate f that is larger by 1 to 3 keeps h",
    "SRU": "gate f that is larger by 1 to 3 keeps c",
    "LiGRU": "gate z that is larger by 1 to 3 keeps h",
    "lstm": "gate1 that is larger by 1 to 3 keeps c",
    "gru": "gate1 that is larger by 1 to 3 keeps h",
    "LSTM": "rows H to 2H are f's",
    "GRU": "rows H to 2H are z's",
    **dict.fromkeys(("IndRNN", "RNN", "leaky", "indrnn", "chain"), "A gated cell, such as LSTM or GRU"),
}


@pytest.mark.parametrize("kind", KEPT)
def test_what_helps_against_vanishing(kind: str) -> None:
    module = made(kind, dtype=torch.float32)
    with fused_rnn.diagnose(module) as report:
        module(torch.randn(T, B, D))[0].sum().backward()
    report.flows["l0"] = report.flows["l0"]._replace(factor=0.1, overflows=False)
    summary = report.summary()
    assert KEPT[kind] in summary
    assert summary.count("A gated cell") == int(KEPT[kind].startswith("A gated cell"))
    report.flows["l0"] = report.flows["l0"]._replace(factor=10.0)
    assert ("A gated cell" in report.summary()) == KEPT[kind].startswith("A gated cell")


def test_a_gate_of_the_recurrent_side_alone_keeps_a_state() -> None:
    @fused_rnn.cell(gates=("new", "hold"))
    def one_sided(x: Any, r: Any, s: Any, p: Any) -> Any:
        return torch.tanh(x[0]) - torch.sigmoid(-r[1]) * s.h

    module = fused_rnn.FlexRNN(one_sided, D, H)
    with fused_rnn.diagnose(module) as report:
        module(torch.randn(T, B, D))[0].sum().backward()
    report.flows["l0"] = report.flows["l0"]._replace(factor=0.1)
    assert "gate hold that is smaller by 1 to 3 keeps h" in report.summary()


@pytest.mark.parametrize(("kind", "advised"), [("LiGRU", False), ("BlockGRU", False), ("GRU", True)])
def test_layer_norm_is_not_advised_to_what_has_a_norm(kind: str, advised: bool) -> None:
    module = made(kind, dtype=torch.float32)
    with torch.no_grad():
        module.weight_ih_l0.mul_(100)
        (module.gamma_l0 if not advised else module.weight_hh_l0).mul_(100)
    with fused_rnn.diagnose(module) as report:
        module(torch.randn(T, B, D))[0].sum().backward()
    report.flows["l0"] = report.flows["l0"]._replace(factor=0.1, overflows=False)
    assert "saturated" in report.summary() and ("Layer norm" in report.summary()) == advised


def test_spectral_radius() -> None:
    lstm = made("LSTM", proj_size=2, bidirectional=True)
    heads = made("lstm", heads=2)
    model = nn.ModuleDict({"a": lstm, "b": heads, "c": made("indrnn")})
    with fused_rnn.diagnose(model) as report:
        sum(m(given()[0])[0].sum() for m in model.values()).backward()
    for suffix in ("", "_reverse"):
        w_hh, w_hr = (getattr(lstm, f"weight_{k}_l0{suffix}").detach() for k in ("hh", "hr"))
        for gate, block in zip("ifgo", w_hh.chunk(4), strict=True):
            expected = torch.linalg.eigvals(w_hr @ block).abs().max()  # the same but for zeros, and another matrix
            assert report.spectral_radius[f"a.{gate}_l0{suffix}"] == pytest.approx(float(expected))
    for k, block in enumerate(user_cells.dense(heads.weight_hh_l0.detach(), 4).chunk(4)):
        expected = torch.linalg.eigvals(block).abs().max()
        assert report.spectral_radius[f"b.gate{k}_l0"] == pytest.approx(float(expected))
    assert not any(name.startswith("c.") for name in report.spectral_radius)
    assert report.flows.keys() == {"a.l0", "a.l0_reverse", "b.l0", "c.l0"}
