"""Models of other packages, as examples/packages.py trains them: ours are what runs, and the losses are torch.nn's.

And packages that ask which class a module is of: those that ask by isinstance take keep_class=True, those that derive
from our classes take them as they are, and those that look up the exact class take what to_torch gives.
"""

from __future__ import annotations

import copy
import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fused_rnn
from fused_rnn.nn import both
from fused_rnn.nn.recurrent import Recurrent

MODULES = {
    "sb3-contrib": "sb3_contrib",
    "gluonts": "gluonts.torch",
    "pytorch-forecasting": "pytorch_forecasting",
}


def needed(name: str, package: str) -> Any:
    return pytest.importorskip(name, reason=f"{package} is not installed: pip install 'fused_rnn[integrations]'")


@pytest.fixture(scope="module")
def example() -> ModuleType:
    path = Path(__file__).parents[2] / "examples" / "packages.py"
    spec = importlib.util.spec_from_file_location("packages_example", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.filterwarnings("ignore")  # the packages' own
@pytest.mark.parametrize("name", MODULES)
def test_trains_as_it_is(name: str, example: ModuleType) -> None:
    needed(MODULES[name], name)
    torch.use_deterministic_algorithms(False)  # they call what has no deterministic form
    train, _ = example.PACKAGES[name]
    calls = {fused: example.Calls() for fused in (False, True)}
    curves = {}
    for fused, seen in calls.items():
        with seen.recorded():
            curves[fused], _ = train(2, fused)
    assert curves[True] == pytest.approx(curves[False], rel=1e-4)
    assert len(curves[True]) == 2
    assert calls[True].counts.total() == calls[False].counts.total() > 0
    kinds = {fused: {isinstance(module, Recurrent) for module, *_ in calls[fused].first.values()} for fused in calls}
    assert kinds == {False: {False}, True: {True}}
    theirs, ours = calls[False].seconds(repeats=3)
    assert theirs > 0 and ours > 0


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["lstm", "gru"])
@pytest.mark.parametrize("by", ["convert", "patch", "argument"])
def test_torchrl(by: str, kind: str) -> None:
    """LSTMModule and GRUModule pack what a rollout holds of several episodes if theirs is a torch.nn.LSTM."""
    modules = needed("torchrl.modules", "torchrl")
    tensordict = needed("tensordict", "torchrl")
    states = ["h", "c"] if kind == "lstm" else ["h"]
    keys = {"in_keys": ["obs", *states], "out_keys": ["y", *(("next", state) for state in states)]}
    module_of = modules.LSTMModule if kind == "lstm" else modules.GRUModule
    given = {name: torch.randn(3, 7, 2, 4) for name in states}
    is_init = torch.zeros(3, 7, 1, dtype=torch.bool)
    is_init[:, 0] = is_init[1, 3] = is_init[2, 5] = True
    given |= {"obs": torch.randn(3, 7, 3), "is_init": is_init}

    def run(module: nn.Module) -> list[Tensor]:
        data = tensordict.TensorDict(given, [3, 7])
        with modules.set_recurrent_mode(True):
            out = module(data.clone())
        with modules.set_recurrent_mode(False):
            step = module(data[:, 0].clone())
        gradients = torch.autograd.grad(out["y"].square().sum(), list(module.parameters()))
        return [out["y"], step["y"], *(out["next", state] for state in states), *gradients]

    theirs = module_of(input_size=3, hidden_size=4, num_layers=2, **keys)
    if by == "convert":
        ours = fused_rnn.convert(copy.deepcopy(theirs), keep_class=True)
    elif by == "patch":
        with fused_rnn.patch(keep_class=True):
            ours = module_of(input_size=3, hidden_size=4, num_layers=2, **keys)
    else:
        rnn = getattr(both, kind.upper())(3, 4, num_layers=2, batch_first=True)
        ours = module_of(**{kind: rnn}, **keys)
    ours.load_state_dict(theirs.state_dict())
    assert type(getattr(ours, kind)) is getattr(both, kind.upper())
    torch.testing.assert_close(run(ours), run(theirs), rtol=1e-4, atol=1e-6)
    assert type(getattr(ours.make_cudnn_based(), kind)) is getattr(both, kind.upper())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["lstm", "gru"])
@pytest.mark.parametrize("by", ["convert", "patch"])
def test_rsl_rl(by: str, kind: str) -> None:
    """The exporters of a policy ask which of torch.nn's classes its recurrent part is of."""
    models = needed("rsl_rl.models", "rsl-rl-lib")
    tensordict = needed("tensordict", "rsl-rl-lib")
    obs = tensordict.TensorDict({"policy": torch.randn(5, 3)}, [5])
    given = (obs, {"actor": ["policy"]}, "actor", 2)
    sizes = {"hidden_dims": [8], "rnn_type": kind, "rnn_hidden_dim": 4, "rnn_num_layers": 2}
    theirs = models.RNNModel(*given, **sizes)
    if by == "convert":
        ours = fused_rnn.convert(copy.deepcopy(theirs), keep_class=True)
    else:
        with fused_rnn.patch(keep_class=True):
            ours = models.RNNModel(*given, **sizes)
    ours.load_state_dict(theirs.state_dict())
    assert type(ours.rnn.rnn) is getattr(both, kind.upper())
    jit = [torch.jit.script(model.as_jit()) for model in (ours, theirs)]
    onnx = [model.as_onnx().eval() for model in (ours, theirs)]
    for _ in range(3):
        torch.testing.assert_close(ours(obs), theirs(obs))
        x = torch.randn(1, 3)
        torch.testing.assert_close(jit[0](x), jit[1](x))
        inputs = (x, *onnx[1].get_dummy_inputs()[1:])
        torch.testing.assert_close(onnx[0](*inputs), onnx[1](*inputs))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["LSTM", "GRU", "RNN", "LSTMCell", "GRUCell", "RNNCell"])
def test_pyro(name: str) -> None:
    """PyroModule[cls] derives from cls and from each class above it, and a weight may be drawn anew at each call."""
    pyro = needed("pyro", "pyro-ppl")
    dist = needed("pyro.distributions", "pyro-ppl")
    pyro_nn = needed("pyro.nn", "pyro-ppl")
    x = torch.randn(5, 2, 3) if hasattr(getattr(nn, name), "flatten_parameters") else torch.randn(2, 3)
    weight = "weight_hh_l0" if x.dim() == 3 else "weight_hh"

    def run(module: nn.Module) -> list[Any]:
        results = [module(x), copy.deepcopy(module)(x)]
        shape = getattr(module, weight).shape
        setattr(module, weight, pyro_nn.PyroSample(dist.Normal(0.0, 1.0).expand(shape).to_event(2)))
        for grad in (True, False, True):
            pyro.set_rng_seed(int(grad))
            with torch.set_grad_enabled(grad):
                results.append(module(x))
        assert torch.is_grad_enabled()
        return results

    def made(cls: Any) -> Any:
        torch.manual_seed(3)
        return pyro_nn.PyroModule[cls](3, 4)

    ours, theirs = getattr(fused_rnn, name), getattr(nn, name)
    expected = run(made(theirs))
    with fused_rnn.patch(keep_class=True):
        patched = made(getattr(torch.nn, name))
    modules = (made(ours), made(getattr(both, name)), patched, fused_rnn.convert(made(theirs)))
    for module in modules:
        assert isinstance(module, ours) and isinstance(module, pyro_nn.PyroModule)
        torch.testing.assert_close(run(module), expected)


class Last(nn.Module):
    def __init__(self, rnn: nn.Module) -> None:
        super().__init__()
        self.rnn = rnn
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0][:, -1])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("keep_class", [False, True])
def test_opacus(keep_class: bool) -> None:
    """Its validator and its fixer look up the exact class."""
    validator = needed("opacus.validators", "opacus").ModuleValidator
    theirs = Last(nn.LSTM(3, 4, batch_first=True))
    ours = fused_rnn.convert(copy.deepcopy(theirs), keep_class=keep_class)
    assert not validator.is_valid(fused_rnn.to_torch(ours))
    fixed = needed("opacus", "opacus").GradSampleModule(validator.fix(ours), loss_reduction="sum")
    x = torch.randn(6, 5, 3)
    fixed(x).square().sum().backward()
    for row in range(6):
        one = torch.autograd.grad(theirs(x[row : row + 1]).square().sum(), list(theirs.parameters()))
        for (name, _), expected in zip(theirs.named_parameters(), one, strict=True):
            parameter = dict(fixed.named_parameters())[f"_module.{name}"]
            torch.testing.assert_close(parameter.grad_sample[row].view_as(expected), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.filterwarnings("ignore")
def test_thop() -> None:
    """It counts by the exact class, and may be told of another."""
    thop = needed("thop", "thop")
    x, model = torch.randn(6, 5, 3), Last(nn.LSTM(3, 4, batch_first=True))
    expected = thop.profile(model, (x,), verbose=False)
    rules = {fused_rnn.LSTM: needed("thop.rnn_hooks", "thop").count_lstm}
    assert thop.profile(fused_rnn.convert(model), (x,), verbose=False, custom_ops=rules) == expected
    assert thop.profile(fused_rnn.to_torch(model), (x,), verbose=False) == expected
