"""torch.compile of modules whose first call it is: no eager one has made the programs of their variants."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import nn

import fused_rnn


@pytest.fixture(autouse=True)
def _anew() -> None:
    torch._dynamo.reset()


@pytest.mark.parametrize("training", [True, False])
def test_of_a_users_cell(training: bool) -> None:
    rate = random.random()  # a program that nobody has had

    @fused_rnn.cell(gates=1)
    def leaky(x: Any, r: Any, s: Any, p: Any) -> Any:
        return rate * s.h + (1 - rate) * torch.tanh(x[0] + r[0])

    module = fused_rnn.FlexRNN(leaky, 4, 6, recurrent_dropout=0.3, zoneout=0.2, return_gates=True).train(training)
    x = torch.randn(5, 3, 4)
    torch.manual_seed(0)
    y, h_n, gates = torch.compile(module, backend="aot_eager", fullgraph=True)(x)
    torch.manual_seed(0)
    own = module(x)
    for a, b in zip((y, h_n, gates["0"]), (own[0], own[1], own[2]["0"]), strict=True):
        torch.testing.assert_close(a, b)


def test_of_two_modules_in_one_graph() -> None:
    first, second = random.random(), random.random()
    layers = nn.ModuleList([fused_rnn.LSTM(4, 6, zoneout=first), fused_rnn.LSTM(6, 6, zoneout=second)]).eval()

    def run(x: torch.Tensor) -> torch.Tensor:
        for layer in layers:
            x, _ = layer(x)
        return x

    x = torch.randn(5, 3, 4)
    torch.testing.assert_close(torch.compile(run, backend="aot_eager", fullgraph=True)(x), run(x))


def test_zoneout_that_changes() -> None:
    """In eval it is a number of the cell's program."""
    module = fused_rnn.LSTM(4, 6, zoneout=0.3).eval()
    compiled, x = torch.compile(module, backend="aot_eager", fullgraph=True), torch.randn(5, 3, 4)
    for rate in (0.3, random.random(), (0.1, random.random()), random.random(), 0.0, random.random()):
        module.zoneout = rate
        torch.testing.assert_close(compiled(x)[0], module(x)[0])
