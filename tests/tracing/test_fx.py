"""torch.fx takes our modules for leaves, as it does torch.nn's: symbolic_trace, and quantization's prepare_fx on it."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from counterparts import CELLS, MODULES, SEQUENCES, flatten, make
from torch import Tensor, nn
from torch.ao.quantization import get_default_qconfig_mapping
from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx
from torch.nn.utils import parametrizations

import fused_rnn

# torch's own, about its quantization
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")


class Model(nn.Module):
    def __init__(self, recurrent: nn.Module) -> None:
        super().__init__()
        self.enter = nn.Linear(4, 4)
        self.rnn = recurrent
        self.leave = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Any:
        out = self.rnn(self.enter(x))
        y = out[0] if isinstance(self.rnn, (nn.RNNBase, nn.LSTMCell, fused_rnn.LSTMCell)) else out
        return self.leave(y)


def called(graph: torch.fx.GraphModule) -> list[str]:
    return [str(node.target) for node in graph.graph.nodes if node.op == "call_module"]


def sample(name: str) -> Tensor:
    return torch.randn(3, 4) if name in CELLS else torch.randn(5, 3, 4)


def subclass(kind: type[nn.Module]) -> nn.Module:
    return type("Mine", (kind,), {})(4, 6)


MADE = {
    "built": lambda name: make(name, 4, 6)[0],
    "converted": lambda name: fused_rnn.convert(make(name, 4, 6)[1]),
    "copied": lambda name: copy.deepcopy(make(name, 4, 6)[0]),
    "unpickled": lambda name: pickle.loads(pickle.dumps(make(name, 4, 6)[0])),
    "parametrized": lambda name: parametrizations.weight_norm(
        make(name, 4, 6)[0], "weight_hh" if name in CELLS else "weight_hh_l0"
    ),
    "a subclass": lambda name: subclass(MODULES[name][0]),
    "a converted subclass": lambda name: fused_rnn.convert(subclass(MODULES[name][1])),
}


@pytest.mark.parametrize("made", MADE.values(), ids=MADE)
@pytest.mark.parametrize("name", MODULES)
def test_a_leaf(name: str, made: Any) -> None:
    model, x = Model(made(name)), sample(name)
    graph = torch.fx.symbolic_trace(model)
    assert called(graph) == ["enter", "rnn", "leave"]
    assert torch.equal(graph(x), model(x))


def test_all_arguments_and_hooks() -> None:
    """Hooks run once, when the graph runs."""

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = make("LSTM", 4, 6, 2)[0]

        def forward(self, x: Tensor, h: Tensor, c: Tensor, lengths: Tensor, reset: Tensor) -> Any:
            return self.rnn(x, (h, c), lengths=lengths, reset=reset)

    model = Outer()
    model.rnn.register_forward_hook(lambda module, args, out: (out[0] + 1, out[1]))
    graph = torch.fx.symbolic_trace(model)
    args = (torch.randn(5, 3, 4), *torch.randn(2, 2, 3, 6).unbind(0), torch.tensor([5, 1, 2]), torch.rand(5, 3) < 0.3)
    for one, other in zip(flatten(graph(*args)), flatten(model(*args)), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("name", SEQUENCES)
def test_a_forward_of_the_users_is_traced(name: str) -> None:
    class Mine(SEQUENCES[name][0]):  # type: ignore[misc]
        def forward(self, x: Tensor) -> Tensor:
            return 2 * x

    graph = torch.fx.symbolic_trace(nn.Sequential(Mine(4, 6)))
    assert [node.op for node in graph.graph.nodes] == ["placeholder", "call_function", "output"]
    mine = fused_rnn.convert(nn.Sequential(type("Mine", (SEQUENCES[name][1],), {"forward": Mine.forward})(4, 6)))
    assert [node.op for node in torch.fx.symbolic_trace(mine).graph.nodes] == ["placeholder", "call_function", "output"]


@pytest.mark.parametrize("name", MODULES)
def test_prepare_fx(name: str) -> None:
    """Around our module all is quantized, and it is called as it is."""
    torch.use_deterministic_algorithms(False)  # as torch's quantized kernels are none; conftest puts it back
    x = sample(name)
    prepared = prepare_fx(Model(make(name, 4, 6)[0]).eval(), get_default_qconfig_mapping(), (x,))
    prepared(x)
    quantized = convert_fx(prepared)
    assert "rnn" in called(quantized) and type(quantized.rnn) is MODULES[name][0]
    assert type(quantized.enter).__module__.startswith("torch.ao.nn")
    assert quantized(x).isfinite().all()


@pytest.mark.parametrize("name", MODULES)
def test_nobody_else_sees_it(name: str) -> None:
    """pickle, repr and the class go by the class's own module; Dynamo's torch.nn.modules is another; and it goes with
    our class."""
    ours, counterpart = make(name, 4, 6)
    kind = type(ours)
    assert kind.__module__.startswith("fused_rnn.") and ours.__module__ == "torch.nn"
    assert f"{kind.__module__}".encode() in pickle.dumps(ours)
    assert repr(ours) == repr(counterpart)
    assert fused_rnn.to_torch(ours).__module__ == "torch.nn.modules.rnn"
    assert "__module__" not in vars(ours)
