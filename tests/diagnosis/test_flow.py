"""The factor per step is what was planted, whatever the loss."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from tolerances import assert_same_formula
from torch import nn
from watched import B, D, H, T, given, made, remembering

import fused_rnn


def planted(factor: float, nonlinearity: str = "tanh") -> fused_rnn.RNN:
    """An RNN in which a step back multiplies a gradient by the factor, for its states are near 0."""
    torch.manual_seed(4)
    rnn = fused_rnn.RNN(D, H, nonlinearity=nonlinearity, bias=False, dtype=torch.float64)
    with torch.no_grad():
        nn.init.orthogonal_(rnn.weight_hh_l0).mul_(factor)
    return rnn


@pytest.mark.parametrize("every", [False, True], ids=["last", "every"])
@pytest.mark.parametrize(("factor", "verdict"), [(0.5, "vanishes"), (1.0, "flows"), (1.5, "explodes")])
def test_what_was_planted_is_found(factor: float, verdict: str, every: bool) -> None:
    rnn, x = planted(factor), torch.randn(60, B, D, dtype=torch.float64) * 1e-30
    with fused_rnn.diagnose(rnn) as report:
        y, _ = rnn(x)
        (y if every else y[-1]).sum().backward()
    found = report.flows["l0"]
    assert found.factor == pytest.approx(factor, rel=1e-9)
    assert (found.verdict, found.span) == (verdict, 59)
    assert found.reach == (59 if factor >= 1 else int(math.log(1e3) / math.log(2)))
    assert report.spectral_radius["h_l0"] == pytest.approx(factor)
    summary = report.summary()
    assert f"l0 (rnn_tanh): the gradient {verdict}: a step back in time multiplies it by {factor:.3g}" in summary
    helps = {"vanishes": "orthogonal", "flows": "", "explodes": "clip_grad_norm_"}[verdict]
    assert helps in summary and ("What helps" in summary) == (verdict != "flows")


def test_a_layer_below_is_judged_by_its_own_recurrence() -> None:
    """Gradients of the layer above enter it mostly at the last steps: in the other direction that looks like growth."""
    torch.manual_seed(5)
    rnn = fused_rnn.RNN(D, H, num_layers=2, bidirectional=True)
    with torch.no_grad():
        for name, p in rnn.named_parameters():
            p.zero_() if "bias" in name else nn.init.orthogonal_(p).mul_(0.5) if "hh" in name else None
    with fused_rnn.diagnose(rnn) as report:
        rnn(torch.zeros(40, B, D))[0][-1].sum().backward()
    norms = report.gradients["h_l0_reverse"]
    assert norms[-1] > 1e3 * norms[0]
    for name in ("l0", "l0_reverse", "l1", "l1_reverse"):  # of the last one no gradient arrives at the end
        assert report.flows[name].factor == pytest.approx(0.5, rel=1e-4)


LOSSES = {
    "last": lambda y: y[-1].sum(),
    "dense": lambda y: y.square().mean(),
    "every": lambda y: y.sum(),
    "middle": lambda y: y[50].sum(),
}


@pytest.mark.parametrize(
    ("kind", "options", "verdict"),
    [
        ("LSTM", {}, "flows"),
        ("LSTM", {"num_layers": 2}, "flows"),
        ("LSTM", {"num_layers": 2, "bidirectional": True}, "flows"),
        ("SLSTM", {}, "flows"),
        ("SLSTM", {"heads": 4, "dtype": torch.float64}, "flows"),
        ("GRU", {}, "vanishes"),
        ("GRU", {"num_layers": 2, "bidirectional": True}, "vanishes"),
        ("RNN", {}, "vanishes"),
    ],
)
def test_the_factor_is_the_recurrences_wherever_the_loss_enters(kind: str, options: Any, verdict: str) -> None:
    x, factors = torch.randn(100, 8, 16, dtype=options.get("dtype")), []
    for loss_of in LOSSES.values():
        module = remembering(kind, **options)
        with fused_rnn.diagnose(module) as report:
            loss_of(module(x)[0]).backward()
        assert {found.verdict for found in report.flows.values()} == {verdict}
        assert {found.span for found in report.flows.values()} == {99}
        factors.append(torch.tensor([found.factor for found in report.flows.values()]))
    for other in factors[1:]:
        torch.testing.assert_close(other, factors[0], rtol=0.02, atol=0)


@pytest.mark.parametrize("bidirectional", [False, True])
def test_a_reset_cuts_and_what_lies_before_it_counts(bidirectional: bool) -> None:
    """The steps of every stretch between resets, within lengths, and no others."""
    torch.manual_seed(6)
    rnn = fused_rnn.RNN(D, H, bias=False, bidirectional=bidirectional, dtype=torch.float64)
    with torch.no_grad():
        for name, p in rnn.named_parameters():
            if "hh" in name:
                nn.init.orthogonal_(p).mul_(0.5)
    x, reset = torch.zeros(40, B, D, dtype=torch.float64), torch.zeros(40, B, dtype=torch.bool)
    reset[[10, 11, 25], 1] = True
    with fused_rnn.diagnose(rnn) as report:
        rnn(x, lengths=[40, 30, 2], reset=reset)[0].sum().backward()
    for record in report.records:
        # stretches of 10, 1, 14 and 5 steps
        counts = [int((gains > 0).sum()) for gains in record.calls[0].gains]
        assert counts == [39, 9 + 0 + 13 + 4, 1]
        for gains in record.calls[0].gains:
            assert_same_formula(gains[gains > 0], torch.full_like(gains[gains > 0], 0.5))


@pytest.mark.parametrize("reentrant", [False, True])
def test_under_a_checkpoint(reentrant: bool) -> None:
    gru, (x, _) = made("GRU"), given()
    with fused_rnn.diagnose(gru) as plain:
        gru(x)[0].sum().backward()
    with fused_rnn.diagnose(gru) as report:
        y, _ = torch.utils.checkpoint.checkpoint(gru, x.clone().requires_grad_(), use_reentrant=reentrant)
        y.sum().backward()
    assert report.flows["l0"].factor == pytest.approx(plain.flows["l0"].factor)
    assert_same_formula(report.gradients["h_l0"], plain.gradients["h_l0"])


def test_an_optimizers_step_inside() -> None:
    lstm, (x, _) = made("LSTM"), given()
    optimizer = torch.optim.SGD(lstm.parameters(), 0.1)
    with fused_rnn.diagnose(lstm) as report:
        for _ in range(2):
            lstm(x)[0].sum().backward()
            optimizer.step()
    assert report.flows["l0"].span == T - 1


def test_an_lstm_that_remembers_flows() -> None:
    lstm = made("LSTM")
    with torch.no_grad():
        lstm.bias_ih_l0[H : 2 * H] = 12
    x = torch.randn(100, B, D, dtype=torch.float64)
    with fused_rnn.diagnose(lstm) as report:
        lstm(x)[0][-1].sum().backward()
    assert report.flows["l0"].verdict == "flows"
    assert 0.99 < report.flows["l0"].factor < 1.01
    low, high = report.gates["f_l0"]
    assert not low.any() and bool((high == 1).all())
    assert "Gate f is saturated" in report.summary()


def test_an_overflow_is_an_explosion() -> None:
    rnn = planted(30.0, "relu").float()
    with fused_rnn.diagnose(rnn) as report:
        rnn(torch.randn(60, B, D).abs())[0][-1].square().sum().backward()
    assert report.flows["l0"].verdict == "explodes"
    assert "inf or NaN" in report.summary()
