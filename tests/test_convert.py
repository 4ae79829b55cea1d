"""convert, to_torch and patch: existing models turned in place, with everything that refers to them."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

import fused_rnn

IDS = ["LSTM", "GRU", "RNN", "LSTMCell", "GRUCell", "RNNCell"]
PAIRS = [(getattr(torch.nn, name), getattr(fused_rnn, name)) for name in IDS]


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.encoder = nn.LSTM(6, 5, num_layers=2, bidirectional=True, dropout=0.3, batch_first=True)
        self.decoder = nn.ModuleDict({"rnn": nn.GRU(10, 7, batch_first=True), "cell": nn.GRUCell(7, 4)})
        self.tied = self.decoder["rnn"]

    def forward(self, tokens: Tensor) -> Tensor:
        y, _ = self.encoder(self.embed(tokens))
        y, _ = self.decoder["rnn"](y)
        return self.decoder["cell"](y[:, -1])


def gradients(model: nn.Module, tokens: Tensor) -> list[Tensor]:
    loss = model(tokens).square().sum()
    return [loss, *torch.autograd.grad(loss, list(model.parameters()))]


def test_a_model_trains_the_same_after_it() -> None:
    torch.manual_seed(3)
    model = Model().eval()
    tokens = torch.randint(11, (3, 8))
    theirs = gradients(model, tokens)
    parameters = list(model.parameters())
    assert fused_rnn.convert(model) is model
    assert type(model.encoder) is fused_rnn.LSTM
    assert type(model.decoder["rnn"]) is fused_rnn.GRU
    assert type(model.decoder["cell"]) is fused_rnn.GRUCell
    assert model.tied is model.decoder["rnn"]
    assert not model.encoder.training
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    for ours, reference in zip(gradients(model, tokens), theirs, strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-4, atol=1e-6)


def test_dropout_draws_the_same_mask() -> None:
    model = Model()
    tokens = torch.randint(11, (3, 8))
    torch.manual_seed(7)
    theirs = model(tokens)
    fused_rnn.convert(model)
    torch.manual_seed(7)
    torch.testing.assert_close(model(tokens), theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("theirs", "ours"), PAIRS, ids=IDS)
def test_there_and_back(theirs: Any, ours: Any) -> None:
    module = theirs(3, 4)
    before = dict(vars(module))
    assert type(fused_rnn.convert(module, backend="reference")) is ours
    assert module.backend == "reference"
    assert type(fused_rnn.to_torch(module)) is theirs
    assert vars(module) == before
    assert type(pickle.loads(pickle.dumps(fused_rnn.convert(module)))) is ours
    assert type(copy.deepcopy(module)) is ours


def test_save_is_for_sequences() -> None:
    model = fused_rnn.convert(Model(), save="recompute")
    assert model.encoder.save == "recompute"
    assert model.decoder["rnn"].save == "recompute"
    already = fused_rnn.LSTM(2, 3, backend="cpu")
    assert fused_rnn.convert(already, backend="torch").backend == "cpu"


def test_hooks_optimizers_and_masks_stay() -> None:
    lstm = nn.LSTM(3, 4)
    calls = []
    lstm.register_forward_hook(lambda *_: calls.append(1))
    prune.random_unstructured(lstm, "weight_hh_l0", 0.5)
    optimizer = torch.optim.SGD(lstm.parameters(), lr=0.1)
    x = torch.randn(5, 2, 3)
    theirs = lstm(x)[0]
    fused_rnn.convert(lstm)
    torch.testing.assert_close(lstm(x)[0], theirs)
    assert len(calls) == 2
    before = lstm.weight_ih_l0.clone()
    lstm(x)[0].sum().backward()
    optimizer.step()
    assert not torch.equal(before, lstm.weight_ih_l0)


def test_parametrized_weights_stay_so() -> None:
    lstm = parametrizations.weight_norm(nn.LSTM(3, 4), "weight_hh_l0")
    x = torch.randn(5, 2, 3)
    theirs = lstm(x)[0]
    keys = list(lstm.state_dict())
    fused_rnn.convert(lstm)
    assert isinstance(lstm, fused_rnn.LSTM)
    torch.testing.assert_close(lstm(x)[0], theirs)
    assert list(lstm.state_dict()) == keys
    fused_rnn.to_torch(lstm)
    assert isinstance(lstm, nn.LSTM)
    torch.testing.assert_close(lstm(x)[0], theirs)


def test_a_class_of_the_users_is_left_alone() -> None:
    class Mine(nn.LSTM):
        pass

    model = nn.Sequential(Mine(2, 3))
    with pytest.warns(UserWarning, match="0 is a .*Mine, derived from"):
        fused_rnn.convert(model)
    assert type(model[0]) is Mine


def test_patch_is_for_code_that_builds_its_own() -> None:
    torch_lstm = nn.LSTM
    with fused_rnn.patch():
        inner = Model()
        with fused_rnn.patch():
            pass
        assert torch.nn.LSTM is fused_rnn.LSTM
        assert isinstance(nn.modules.rnn.GRU(2, 3), fused_rnn.GRU)
    assert type(inner.encoder) is fused_rnn.LSTM
    assert nn.LSTM is torch_lstm
    with pytest.raises(KeyError), fused_rnn.patch():
        raise KeyError
    assert nn.LSTM is torch_lstm
    assert inner(torch.randint(11, (3, 8))).shape == (3, 4)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: fused_rnn.convert(3), TypeError, "model: got int, expected a torch.nn.Module"),
        (lambda: fused_rnn.to_torch(None), TypeError, "model: got NoneType"),
        (lambda: fused_rnn.convert(nn.LSTM(2, 3), backend="fast"), ValueError, "backend: got 'fast'"),
        (lambda: fused_rnn.convert(nn.LSTM(2, 3), save="all"), ValueError, "save: got 'all'"),
    ],
)
def test_bad_input(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
