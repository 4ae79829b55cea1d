"""Modules that are instances of torch.nn's classes, too: convert(model, keep_class=True) and patch(keep_class=True)."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

import fused_rnn
from fused_rnn.nn import both

SEQUENCES = ["LSTM", "GRU", "RNN"]
NAMES = [*SEQUENCES, "LSTMCell", "GRUCell", "RNNCell"]
OURS = {name: getattr(fused_rnn, name) for name in NAMES}
BOTH = {name: getattr(both, name) for name in NAMES}
THEIRS = {name: getattr(nn, name) for name in NAMES}

ARGUMENTS: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = [
    ("LSTM", (3, 4), {}),
    ("LSTM", (3, 4, 2, False, True, 0.0, True, 2), {}),
    ("LSTM", (3, 4), {"num_layers": 2, "bidirectional": True, "proj_size": 2, "dtype": torch.float64}),
    ("GRU", (3, 4, 2), {"bias": False, "batch_first": True}),
    ("RNN", (3, 4), {}),
    ("RNN", (3, 4, 2, "relu", False, True), {}),
    ("RNN", (), {"input_size": 3, "hidden_size": 4, "nonlinearity": "relu"}),
    ("LSTMCell", (3, 4, False), {}),
    ("GRUCell", (3, 4), {"dtype": torch.float64}),
    ("RNNCell", (3, 4, True, "relu"), {}),
    ("RNNCell", (3, 4), {"nonlinearity": "relu"}),
]


def call(module: nn.Module) -> list[Tensor]:
    """Results and gradients, of a module that has 3 inputs."""
    dtype = next(module.parameters()).dtype
    shape = (5, 2, 3) if hasattr(module, "flatten_parameters") else (10, 3)
    y = module(torch.linspace(-1, 1, 30, dtype=dtype).view(shape))
    y = y if isinstance(y, Tensor) else y[0]
    return [y, *torch.autograd.grad(y.square().sum(), list(module.parameters()))]


def no_counterpart(monkeypatch: pytest.MonkeyPatch) -> None:
    for cls in THEIRS.values():
        monkeypatch.setattr(cls, "forward", lambda *_: pytest.fail("torch.nn's forward was called"))


@pytest.mark.parametrize(("name", "args", "kwargs"), ARGUMENTS)
def test_arguments_are_those_of_ours(
    name: str, args: tuple[Any, ...], kwargs: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    modules = []
    for classes in (THEIRS, OURS, BOTH):
        torch.manual_seed(3)
        modules.append(classes[name](*args, **kwargs))
    theirs, ours, module = modules
    assert isinstance(module, OURS[name]) and isinstance(module, THEIRS[name])
    assert repr(module) == repr(theirs)
    assert vars(module).keys() == vars(ours).keys()
    assert getattr(module, "nonlinearity", None) == getattr(theirs, "nonlinearity", None)
    expected = call(theirs)
    no_counterpart(monkeypatch)
    torch.testing.assert_close(call(module), expected)


def test_what_only_ours_take() -> None:
    module = both.GRU(3, 4, backend="cpu", save="recompute")
    assert repr(module) == "GRU(3, 4, backend='cpu', save='recompute')"
    assert repr(both.GRUCell(3, 4, backend="cpu")) == "GRUCell(3, 4, backend='cpu')"
    x, lengths = torch.randn(5, 2, 3), torch.tensor([5, 2])
    ours = fused_rnn.GRU(3, 4)
    ours.load_state_dict(module.state_dict())
    torch.testing.assert_close(module(x, lengths=lengths), ours(x, lengths=lengths))
    stream = both.LSTM(3, 4).stream()
    assert stream.step(torch.randn(1, 3)).shape == (1, 4)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: both.LSTM(3, 4, backend="fast"), ValueError, "backend: got 'fast'"),
        (lambda: both.RNN(3, 4, save="all"), ValueError, "save: got 'all'"),
        (lambda: both.RNN(3, 4, nonlinearity="sin"), ValueError, "Unknown nonlinearity 'sin'"),
        (lambda: both.GRU(3, 4, proj_size=2), ValueError, "proj_size argument is only supported for LSTM"),
        (lambda: both.LSTM(3, -4), ValueError, "hidden_size must be greater than zero"),
        (lambda: both.LSTM(3, 4)(torch.randn(5, 2, 7)), RuntimeError, "input.size\\(-1\\) must be equal to input_size"),
    ],
)
def test_bad_input(make: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize("name", NAMES)
def test_copies(name: str) -> None:
    module = BOTH[name](3, 4, backend="reference")
    expected = call(module)
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    for copied in (
        copy.deepcopy(module),
        pickle.loads(pickle.dumps(module)),
        torch.load(file, weights_only=False),
    ):
        assert type(copied) is BOTH[name]
        assert copied.backend == "reference"
        torch.testing.assert_close(call(copied), expected, rtol=0, atol=0)


@pytest.mark.parametrize("name", NAMES)
def test_from_every_class_to_every_other(name: str) -> None:
    ours, kept, theirs = OURS[name], BOTH[name], THEIRS[name]
    module = theirs(3, 4)
    before, expected = dict(vars(module)), call(module)
    assert type(fused_rnn.convert(module, backend="reference", keep_class=True)) is kept
    torch.testing.assert_close(call(module), expected)
    assert type(fused_rnn.convert(module, backend="cpu")) is ours
    assert type(fused_rnn.convert(module, backend="cpu", keep_class=True)) is kept
    assert module.backend == "reference"  # ours keep what they have
    assert type(fused_rnn.convert(module, keep_class=True)) is kept
    assert type(fused_rnn.to_torch(module)) is theirs
    assert vars(module) == before
    assert type(fused_rnn.to_torch(module)) is theirs


@pytest.mark.parametrize("keep_class", [False, True])
def test_parametrized(keep_class: bool) -> None:
    module = parametrizations.weight_norm(nn.LSTM(3, 4), "weight_hh_l0")
    expected = call(module)
    for keep in (keep_class, not keep_class, keep_class):
        fused_rnn.convert(module, keep_class=keep)
        assert isinstance(module, fused_rnn.LSTM)
        assert isinstance(module, nn.LSTM) is keep
        torch.testing.assert_close(call(module), expected)
    parametrize.remove_parametrizations(module, "weight_hh_l0")
    assert type(module) is (both.LSTM if keep_class else fused_rnn.LSTM)
    assert type(fused_rnn.to_torch(module)) is nn.LSTM


class Own(fused_rnn.GRU):
    def forward(self, x: Tensor, hx: Any = None, **kwargs: Any) -> Any:
        return super().forward(x / 2, hx, **kwargs)


def test_a_class_of_the_users_derived_from_ours() -> None:
    module = Own(3, 4, backend="reference")
    expected = call(module)
    fused_rnn.convert(module, keep_class=True)
    assert isinstance(module, Own) and isinstance(module, nn.GRU)
    assert module.backend == "reference"
    torch.testing.assert_close(call(module), expected)
    assert type(pickle.loads(pickle.dumps(module))) is type(module)
    kind = type(module)
    with pytest.warns(UserWarning, match="Own, derived from fused_rnn's"):
        fused_rnn.to_torch(module)
    assert type(module) is kind
    assert type(fused_rnn.convert(module)) is Own
    torch.testing.assert_close(call(module), expected)


def test_patch() -> None:
    torch_lstm, torch_cell = nn.LSTM, nn.LSTMCell
    with fused_rnn.patch(keep_class=True):
        lstm, cell = torch.nn.LSTM(3, 4), torch.nn.modules.rnn.LSTMCell(3, 4)

        class Mine(torch.nn.LSTM):
            pass

        mine = Mine(3, 4)
        assert isinstance(lstm, torch.nn.LSTM) and isinstance(cell, torch.nn.LSTMCell)
        assert isinstance(mine, torch.nn.LSTM) and issubclass(Mine, torch.nn.LSTM)
        with fused_rnn.patch():
            inner = torch.nn.LSTM(3, 4)
            with fused_rnn.patch(keep_class=True):
                innermost = torch.nn.LSTM(3, 4)
        assert type(torch.nn.LSTM(3, 4)) is both.LSTM
    assert nn.LSTM is torch_lstm and nn.LSTMCell is torch_cell
    assert type(lstm) is both.LSTM and type(cell) is both.LSTMCell
    assert type(inner) is fused_rnn.LSTM and type(innermost) is both.LSTM
    for module in (lstm, mine, innermost):
        assert isinstance(module, nn.LSTM) and isinstance(module, fused_rnn.LSTM)
    assert isinstance(cell, nn.LSTMCell) and isinstance(cell, fused_rnn.LSTMCell)
    assert issubclass(Mine, nn.LSTM)
    assert isinstance(Mine(3, 4), fused_rnn.LSTM)
    with pytest.raises(KeyError), fused_rnn.patch(keep_class=True):
        raise KeyError
    assert nn.LSTM is torch_lstm


class Model(nn.Module):
    def __init__(self, rnn: nn.Module) -> None:
        super().__init__()
        self.rnn = rnn
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.rnn(2 * x)
        return self.head(y if isinstance(y, Tensor) else y[0]).relu()


@pytest.mark.compile
@pytest.mark.parametrize("name", NAMES)
def test_compiled(name: str) -> None:
    """Dynamo breaks the graph at a torch.nn.LSTM, if not at a cell, and at none of them where it is told not to."""
    model = Model(BOTH[name](3, 4))
    x = torch.randn(5, 2, 3) if name in SEQUENCES else torch.randn(2, 3)

    def run(model: Any) -> list[Tensor]:
        y = model(x)
        gradients = torch.autograd.grad(y.sum(), list(model.parameters()))
        with torch.no_grad():
            return [y, model(x), *gradients]

    expected = run(model)
    for allow_rnn in (False, True):
        torch._dynamo.reset()  # of frames that it gave up on, too
        with torch._dynamo.config.patch(allow_rnn=allow_rnn):
            torch.testing.assert_close(run(torch.compile(model, backend="aot_eager")), expected)
            torch._dynamo.reset()
            whole = torch.compile(model, backend="aot_eager", fullgraph=True)
            if name in SEQUENCES and not allow_rnn:
                with pytest.raises(torch._dynamo.exc.Unsupported, match="LSTM"):
                    run(whole)
            else:
                torch.testing.assert_close(run(whole), expected)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("name", NAMES)
def test_scripted_and_traced(name: str) -> None:
    """Both compile torch's own operators, as of ours."""
    module = BOTH[name](3, 4)
    x = torch.randn(5, 2, 3) if name in SEQUENCES else torch.randn(2, 3)
    expected = module(x)
    assert type(module.__prepare_scriptable__()) is THEIRS[name]
    scripted = torch.jit.script(nn.Sequential(module))
    torch.testing.assert_close(scripted(x), expected)
    torch.testing.assert_close(torch.jit.trace(module, (x,))(x), expected)


@pytest.mark.parametrize("name", NAMES)
def test_exported(name: str) -> None:
    module = BOTH[name](3, 4)
    x = torch.randn(5, 2, 3) if name in SEQUENCES else torch.randn(2, 3)
    exported = torch.export.export(module, (x,))
    assert any("fused_rnn" in str(node.target) for node in exported.graph.nodes)
    torch.testing.assert_close(exported.module()(x), module(x))
