"""FlexRNN under torch.func: mapped over samples and over an ensemble, gradients of each sample, jvp, functionalize."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from user_cells import USER_CELLS, chain, lstm

from fused_rnn import FlexRNN

F64 = torch.float64
CELLS = pytest.mark.parametrize("cell", USER_CELLS.values(), ids=lambda cell: cell.name)


def make(cell: Any, **options: Any) -> FlexRNN:
    init = dict.fromkeys(cell.params, torch.nn.init.uniform_)
    return FlexRNN(cell, 4, 6, dtype=F64, init=init, return_sequences="states", **options)


def leaves(value: Any) -> list[Tensor]:
    return list(torch.utils._pytree.tree_leaves(value))


def assert_close(got: Any, expected: Any) -> None:
    for a, b in zip(leaves(got), leaves(expected), strict=True):
        torch.testing.assert_close(a, b)


def loss_of(module: FlexRNN, parameters: dict[str, Tensor], *args: Any, **kwargs: Any) -> Tensor:
    outputs = torch.func.functional_call(module, parameters, args, kwargs)
    return sum(t.square().sum() for t in leaves(outputs))  # type: ignore[return-value]


@CELLS
@pytest.mark.parametrize("options", [{}, {"save": "recompute"}, {"heads": 2, "bidirectional": True, "num_layers": 2}])
def test_a_gradient_for_each_sample(cell: Any, options: dict[str, Any]) -> None:
    """Of ragged samples with resets, as a loop over the samples has them."""
    module = make(cell, **options)
    parameters = {name: p.detach() for name, p in module.named_parameters()}
    x, reset = torch.randn(3, 5, 2, 4, dtype=F64), torch.rand(3, 5, 2) < 0.3
    lengths = torch.tensor([[5, 3], [0, 5], [2, 4]])

    def loss(parameters: dict[str, Tensor], x: Tensor, lengths: Tensor, reset: Tensor) -> Tensor:
        return loss_of(module, parameters, x, lengths=lengths, reset=reset)

    grad = torch.func.grad(loss, (0, 1))
    got = torch.func.vmap(grad, (None, 0, 0, 0))(parameters, x, lengths, reset)
    for i in range(3):
        expected = grad(parameters, x[i], lengths[i], reset[i])
        assert_close(torch.utils._pytree.tree_map(lambda t, i=i: t[i], got), expected)


@CELLS
def test_an_ensemble(cell: Any) -> None:
    """Outputs and gradients of three modules in one call."""
    modules = [make(cell, heads=2, bidirectional=True) for _ in range(3)]
    stacked, _ = torch.func.stack_module_state(modules)
    x = torch.randn(5, 2, 4, dtype=F64)

    def run(parameters: dict[str, Tensor]) -> Tensor:
        return loss_of(modules[0], parameters, x)

    outputs = torch.func.vmap(lambda p: torch.func.functional_call(modules[0], p, (x,)))(stacked)
    grads = torch.func.vmap(torch.func.grad(run))(stacked)
    for i, module in enumerate(modules):
        assert_close(torch.utils._pytree.tree_map(lambda t, i=i: t[i], outputs), module(x))
        expected = torch.autograd.grad(sum(t.square().sum() for t in leaves(module(x))), list(module.parameters()))
        assert_close([grads[name][i] for name, _ in module.named_parameters()], expected)


@CELLS
def test_forward_mode_and_second_order(cell: Any) -> None:
    """By the reference, which dispatch finds by itself for a tangent."""
    module, x = make(cell), torch.randn(3, 2, 4, dtype=F64)
    parameters = {name: p.detach() for name, p in module.named_parameters()}
    tangent = torch.randn_like(x)
    gradient = torch.func.grad(lambda x: loss_of(module, parameters, x))
    _, forward = torch.func.jvp(lambda x: loss_of(module, parameters, x), (x,), (tangent,))
    torch.testing.assert_close(forward, (gradient(x) * tangent).sum())
    twice = torch.func.grad(lambda x: (gradient(x) * tangent).sum())(x)
    torch.testing.assert_close(torch.func.jvp(gradient, (x,), (tangent,))[1], twice)


@pytest.mark.parametrize("cell", [lstm, chain], ids=lambda cell: cell.name)
def test_functionalize_and_make_fx(cell: Any) -> None:
    module, x = make(cell, heads=2), torch.randn(5, 7, 4, dtype=F64)  # no size of the weights
    assert_close(torch.func.functionalize(module)(x), module(x))

    def run(parameters: dict[str, Tensor], x: Tensor) -> list[Tensor]:
        return leaves(torch.func.functional_call(module, parameters, (x,)))

    parameters = {key: p.detach() for key, p in module.named_parameters()}
    graph = make_fx(run, tracing_mode="symbolic")(parameters, x)
    assert any("fused_rnn" in str(node.target) for node in graph.graph.nodes)
    other = torch.randn(9, 3, 4, dtype=F64)
    assert_close(graph(parameters, other), module(other))


@CELLS
def test_batched_gradients_of_the_older_vmap(cell: Any) -> None:
    module, x = make(cell), torch.randn(3, 2, 4, dtype=F64, requires_grad=True)
    outputs = leaves(module(x))
    inputs = [x, *module.parameters()]
    cotangents = [torch.randn(2, *t.shape, dtype=F64) for t in outputs]
    got = torch.autograd.grad(outputs, inputs, cotangents, is_grads_batched=True, retain_graph=True)
    for i in range(2):
        expected = torch.autograd.grad(outputs, inputs, [c[i] for c in cotangents], retain_graph=True)
        assert_close([g[i] for g in got], expected)
