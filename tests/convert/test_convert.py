"""convert, to_torch and patch: existing models turned in place, with everything that refers to them."""

from __future__ import annotations

import copy
import pickle
from abc import ABC
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

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


class Mixin(ABC, nn.RNNBase):
    """As packages do it: a forward between the user's class and torch.nn's, that calls the latter's by super()."""

    def forward(self, x: Tensor, hx: Any = None) -> Any:
        y, hx = super().forward(2 * x, hx)
        return self.scale * y, hx


class Mine(Mixin, nn.LSTM):
    def __init__(self, *args: Any, scale: float = 3.0, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.scale = scale


def test_a_class_of_the_users_gets_our_forward_under_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(Mine(2, 3, 2, bidirectional=True, proj_size=2), Mine(2, 3))
    x = torch.randn(5, 4, 2)
    theirs = model[0](x)[0]
    fused_rnn.convert(model, backend="cpu", save="recompute")
    mine = model[0]
    assert isinstance(mine, Mine) and isinstance(mine, fused_rnn.LSTM) and isinstance(mine, nn.LSTM)
    assert type(mine) is type(model[1])
    assert (mine.backend, mine.save, repr(mine)) == (
        "cpu",
        "recompute",
        "Mine(2, 3, proj_size=2, num_layers=2, bidirectional=True, backend='cpu', save='recompute')",
    )
    monkeypatch.setattr(nn.LSTM, "forward", lambda *_: pytest.fail("torch.nn's forward was called"))
    torch.testing.assert_close(mine(x)[0], theirs)
    for copied in (pickle.loads(pickle.dumps(mine)), copy.deepcopy(mine)):
        assert type(copied) is type(mine)
        torch.testing.assert_close(copied(x)[0], theirs)
    monkeypatch.undo()
    kind = type(mine)
    fused_rnn.convert(model)
    assert type(mine) is kind
    fused_rnn.to_torch(model)
    assert type(mine) is Mine and not any(key.startswith("_fused") for key in vars(mine))
    torch.testing.assert_close(mine(x)[0], theirs)


@pytest.mark.parametrize(("theirs", "ours"), PAIRS, ids=IDS)
def test_every_class_can_be_derived_from(theirs: Any, ours: Any) -> None:
    kind = type("Kind", (theirs,), {})
    module = kind(3, 4)
    x = torch.randn(2, 3)
    expected = module(x)
    assert isinstance(fused_rnn.convert(module), (ours, kind))
    assert type(module).forward is ours.forward
    torch.testing.assert_close(module(x), expected)
    assert type(fused_rnn.to_torch(module)) is kind


def test_a_class_derived_from_ours_is_left_alone() -> None:
    class Own(fused_rnn.GRU):
        pass

    model = nn.Sequential(Own(2, 3, backend="reference"))
    fused_rnn.convert(model, backend="cpu")
    with pytest.warns(UserWarning, match="0 is a .*Own, derived from fused_rnn's"):
        fused_rnn.to_torch(model)
    assert type(model[0]) is Own
    assert model[0].backend == "reference"


@pytest.mark.parametrize("name", ["forward", "backend", "save"])
def test_what_holds_a_name_of_ours_is_left_alone(name: str) -> None:
    model = nn.Sequential(Mine(2, 3))
    setattr(model[0], name, model[0].forward)
    with pytest.warns(UserWarning, match=f"0, a .*Mine, has an attribute '{name}' of its own"):
        fused_rnn.convert(model)
    assert type(model[0]) is Mine


def test_parametrized_class_of_the_users() -> None:
    mine = parametrizations.weight_norm(Mine(3, 4), "weight_hh_l0")
    x = torch.randn(5, 2, 3)
    theirs = mine(x)[0]
    fused_rnn.convert(mine)
    assert isinstance(mine, fused_rnn.LSTM) and isinstance(mine, Mine)
    torch.testing.assert_close(mine(x)[0], theirs)
    parametrize.remove_parametrizations(mine, "weight_hh_l0")
    assert isinstance(mine, fused_rnn.LSTM)
    assert type(fused_rnn.to_torch(mine)) is Mine
    torch.testing.assert_close(mine(x)[0], theirs)


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
def test_the_older_weight_norm() -> None:
    """Hooks that compute the weight before each call, which is then no parameter."""
    gru = nn.utils.weight_norm(nn.GRU(3, 4), "weight_hh_l0")
    x = torch.randn(5, 2, 3)
    theirs = torch.autograd.grad(gru(x)[0].square().sum(), list(gru.parameters()))
    fused_rnn.convert(gru)
    ours = torch.autograd.grad(gru(x)[0].square().sum(), list(gru.parameters()))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
    assert torch.equal(gru.weight_hh_l0, torch._weight_norm(gru.weight_hh_l0_v, gru.weight_hh_l0_g, 0))


@pytest.mark.filterwarnings("ignore:.*quantize:UserWarning", "ignore:.*torch.ao.quantization:DeprecationWarning")
def test_quantized_modules_are_not_ours() -> None:
    quantized = torch.ao.nn.quantized.dynamic.LSTM(3, 4)
    assert type(fused_rnn.convert(nn.Sequential(quantized))[0]) is torch.ao.nn.quantized.dynamic.LSTM


@pytest.mark.parametrize("kind", [nn.GRU, Mine])
def test_below_a_compiled_module(kind: Any) -> None:
    """convert after torch.compile finds the module inside, and Dynamo that it has another class."""
    model = nn.Sequential(kind(3, 4))
    compiled = torch.compile(model, backend="eager")
    x = torch.randn(5, 2, 3)
    try:
        theirs = compiled(x)[0]
    except torch._dynamo.exc.InternalTorchDynamoError as error:  # 2.15, of super().forward in a class of nn.LSTM's
        pytest.skip(f"torch {torch.__version__} cannot compile its own class: {error}")
    fused_rnn.convert(compiled)
    assert isinstance(model[0], fused_rnn.nn.recurrent.Recurrent)
    torch.testing.assert_close(compiled(x)[0], theirs)


def test_bidirectional_projection_keeps_its_flat_weights() -> None:
    lstm = nn.LSTM(3, 4, 2, bidirectional=True, proj_size=2)
    fused_rnn.convert(lstm).double()
    lstm.flatten_parameters()
    assert [id(w) for w in lstm._flat_weights] == [id(p) for p in lstm.parameters()]
    assert all(ref() is p for ref, p in zip(lstm._flat_weight_refs, lstm.parameters(), strict=True))
    theirs = nn.LSTM(3, 4, 2, bidirectional=True, proj_size=2).double()
    theirs.load_state_dict(lstm.state_dict())
    x = torch.randn(5, 2, 3, dtype=torch.float64)
    torch.testing.assert_close(lstm(x), theirs(x))


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
