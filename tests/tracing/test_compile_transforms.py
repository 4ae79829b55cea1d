"""torch.compile of functions that use torch.func: the gradients are eager's. They cross three tracers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._dynamo
from counterparts import CELLS, flatten, make
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, stack_module_state, vmap

pytestmark = [
    pytest.mark.compile,
    # torch's own, from what it calls inside
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"),
]

Loss = Callable[[dict[str, Tensor], Tensor], Tensor]


@pytest.fixture(autouse=True)
def _fresh_compiler() -> None:
    torch._dynamo.reset()


def loss_of(module: nn.Module) -> Loss:
    return lambda parameters, x: sum(t.square().sum() for t in flatten(functional_call(module, parameters, (x,))))


def gradient(loss: Loss, parameters: dict[str, Tensor], x: Tensor) -> Any:
    return grad(loss, argnums=(0, 1))(parameters, x)


def per_sample(loss: Loss, parameters: dict[str, Tensor], x: Tensor) -> Any:
    return vmap(grad(loss), (None, 0))(parameters, torch.stack([x, 2 * x]))


def second(loss: Loss, parameters: dict[str, Tensor], x: Tensor) -> Any:
    return grad(lambda x: grad(loss, argnums=1)(parameters, x).square().sum())(x)


def forward_mode(loss: Loss, parameters: dict[str, Tensor], x: Tensor) -> Any:
    return jvp(lambda x: loss(parameters, x), (x,), (torch.ones_like(x),))


CASES = [("LSTM", f) for f in (gradient, per_sample, second, forward_mode)] + [
    ("GRUCell", gradient),
    ("RNN", per_sample),
]


@pytest.mark.parametrize(("name", "transform"), CASES)
def test_compiled_transforms(name: str, transform: Callable[..., Any]) -> None:
    module, _ = make(name, 2, 3, dtype=torch.float64)
    parameters = {key: p.detach() for key, p in module.named_parameters()}
    x = torch.randn(3, 2, dtype=torch.float64) if name in CELLS else torch.randn(3, 3, 2, dtype=torch.float64)
    loss = loss_of(module)
    compiled = torch.compile(lambda p, x: transform(loss, p, x), backend="aot_eager", fullgraph=True)
    got, expected = (
        torch.utils._pytree.tree_leaves(t) for t in (compiled(parameters, x), transform(loss, parameters, x))
    )
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other)


def test_a_compiled_ensemble_trains() -> None:
    members = [make("LSTM", 2, 3, 2, bidirectional=True, seed=k)[0] for k in range(3)]
    parameters, _ = stack_module_state(members)
    x, names = torch.randn(4, 3, 2), list(parameters)

    def run(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return vmap(lambda p: functional_call(members[0], p, (x,))[0])(parameters)

    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    grads = [
        torch.autograd.grad(f(parameters, x).square().sum(), [parameters[key] for key in names])
        for f in (compiled, run)
    ]
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other)
