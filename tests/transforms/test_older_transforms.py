"""torch's older vmap, which batches gradients outside torch.func; functionalize; make_fx with symbolic sizes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import Case, Inputs, inputs
from counterparts import MODULES, flatten, make
from oracle import forward, require
from tolerances import assert_same_formula
from torch import Tensor
from torch._vmap_internals import _vmap
from torch.autograd.functional import hessian, jacobian
from torch.func import functionalize, grad, vjp, vmap
from torch.fx.experimental.proxy_tensor import make_fx

from fused_rnn.cells import CELLS

# torch's own, about its own older vmap
pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop", "ignore:Please use torch.vmap")

N = 3
OPTIONS: list[dict[str, Any]] = [
    {},
    {"bidirectional": True, "layers": 2, "lengths": True, "reset": True},
    {"save": "recompute", "hx": False, "bias": False},
]
CASES = [(cell, options) for cell in CELLS for options in OPTIONS]
CASES += [("lstm", {"proj": 2, "bidirectional": True}), ("lstm", {"proj": 2, "save": "recompute", "lengths": True})]


def problem(cell: str, **options: Any) -> tuple[Case, Inputs, list[Tensor]]:
    """A case, its inputs, and those of them that a gradient is taken in, as leaves."""
    case = Case(cell, T=4, B=2, D=3, H=3, dtype=torch.float64, **options)
    require("cpu", case)
    given = inputs(case)
    leaves = [t.requires_grad_() for t in (given.x, *given.hx, *given.weights)]
    return case, given, leaves


@pytest.mark.parametrize(("cell", "options"), CASES, ids=str)
def test_batched_gradients(cell: str, options: dict[str, Any]) -> None:
    """grad(..., is_grads_batched=True) is a loop over the gradients, of all outputs or of one alone."""
    case, given, leaves = problem(cell, **options)
    outputs = forward(case, given, "cpu")
    for chosen in (outputs, outputs[:1], outputs[-1:]):
        douts = [torch.randn(N, *o.shape, dtype=o.dtype) for o in chosen]
        settings: dict[str, Any] = {"retain_graph": True, "allow_unused": True, "materialize_grads": True}
        got = torch.autograd.grad(chosen, leaves, douts, is_grads_batched=True, **settings)
        for i in range(N):
            expected = torch.autograd.grad(chosen, leaves, [d[i] for d in douts], **settings)
            for one, other in zip(got, expected, strict=True):
                assert_same_formula(one[i], other)


@pytest.mark.parametrize("name", MODULES)
def test_jacobian_and_hessian_vectorized(name: str) -> None:
    ours, counterpart = make(name, 3, 4, dtype=torch.float64)
    x = torch.randn(2, 3, dtype=torch.float64)

    def y(module: Any) -> Any:
        return lambda x: flatten(module(x))[0]

    assert_same_formula(jacobian(y(ours), x, vectorize=True), jacobian(y(counterpart), x))
    squared = [
        hessian(lambda x, m=m: y(m)(x).square().sum(), x, vectorize=v) for m, v in ((ours, True), (counterpart, False))
    ]
    assert_same_formula(*squared)
    forwards = jacobian(y(ours), x, vectorize=True, strategy="forward-mode")
    assert_same_formula(forwards, jacobian(y(counterpart), x))
    assert torch.autograd.gradcheck(y(ours), x.requires_grad_(), check_batched_grad=True)


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("name", MODULES)
def test_the_older_vmap_of_a_call(name: str, grad: bool) -> None:
    module, _ = make(name, 3, 4, dtype=torch.float64)
    xs = torch.randn(N, N, 2, 3, dtype=torch.float64)
    with torch.set_grad_enabled(grad):
        got = _vmap(_vmap(lambda x: flatten(module(x))[0]))(xs)
        for i in range(N):
            for j in range(N):
                assert_same_formula(got[i, j], flatten(module(xs[i, j]))[0])


def test_the_older_vmap_over_lengths() -> None:
    module, _ = make("GRU", 3, 4, dtype=torch.float64)
    xs, lengths = torch.randn(N, 5, 2, 3, dtype=torch.float64), torch.tensor([[1, 5], [0, 3], [2, 2]])
    got = _vmap(lambda x, lengths: module(x, lengths=lengths)[0])(xs, lengths)
    for i in range(N):
        assert_same_formula(got[i], module(xs[i], lengths=lengths[i])[0])


@pytest.mark.parametrize("backend", [None, "cpu", "reference"])
@pytest.mark.parametrize("name", MODULES)
def test_functionalize(name: str, backend: str | None) -> None:
    """Values, the gradient from outside, and under vmap; under no_grad, too."""
    module, counterpart = make(name, 3, 4, extras={"backend": backend}, dtype=torch.float64)
    x = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)

    def y(x: Tensor) -> Tensor:
        return flatten(module(x))[0]

    with torch.no_grad():
        assert_same_formula(functionalize(y)(x), y(x))
    got = functionalize(y)(x)
    assert_same_formula(got, flatten(counterpart(x))[0])
    tensors, theirs = [x, *module.parameters()], [x, *counterpart.parameters()]
    for one, other in zip(
        torch.autograd.grad(got.square().sum(), tensors),
        torch.autograd.grad(flatten(counterpart(x))[0].square().sum(), theirs),
        strict=True,
    ):
        assert_same_formula(one, other)
    xs = torch.randn(N, 2, 3, dtype=torch.float64)
    expected = torch.stack([y(x) for x in xs])
    assert_same_formula(vmap(functionalize(y))(xs), expected)
    assert_same_formula(functionalize(vmap(y))(xs), expected)


@pytest.mark.parametrize("name", MODULES)
def test_functionalize_with_a_gradient_of_torch_func(name: str) -> None:
    """An op has no gradient there, so it is torch's kernels that run, and ours, asked for by name, say why not."""
    module, counterpart = make(name, 3, 4, dtype=torch.float64)
    x = torch.randn(2, 3, dtype=torch.float64)

    def loss(module: Any) -> Any:
        return lambda x: flatten(module(x))[0].square().sum()

    expected = grad(loss(counterpart))(x)
    assert_same_formula(functionalize(grad(loss(module)))(x), expected)
    assert_same_formula(grad(functionalize(loss(module)))(x), expected)
    assert_same_formula(make_fx(functionalize(grad(loss(module))))(x)(x), expected)
    _, pull = vjp(functionalize(loss(module)), x)
    assert_same_formula(pull(torch.ones((), dtype=x.dtype))[0], expected)
    module.backend = "cpu"
    with pytest.raises(NotImplementedError, match=r"cpu: torch.func.functionalize has no rule for its gradient"):
        functionalize(grad(loss(module)))(x)


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
@pytest.mark.parametrize("cell", CELLS)
def test_make_fx(cell: str, mode: str) -> None:
    """Of values and of gradients: the ops, and with symbolic sizes any length and batch."""
    case, given, _ = problem(cell, lengths=True, reset=True, bidirectional=True)

    def values(x: Tensor, lengths: Tensor, reset: Tensor, *tensors: Tensor) -> list[Tensor]:
        hx, weights = list(tensors[: len(given.hx)]), list(tensors[len(given.hx) :])
        return forward(case, Inputs(x, weights, hx, lengths, reset, []), None)

    def gradient(x: Tensor, *tensors: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        return torch.autograd.grad(sum(t.square().sum() for t in values(x, *tensors)), x)[0]

    def arguments(steps: int, batch: int) -> list[Tensor]:
        hx = [torch.randn(h.shape[0], batch, h.shape[2], dtype=h.dtype) for h in given.hx]
        lengths, reset = torch.randint(0, steps + 1, (batch,)), torch.rand(steps, batch) < 0.3
        weights = [w.detach() for w in given.weights]
        return [torch.randn(steps, batch, 3, dtype=torch.float64), lengths, reset, *hx, *weights]

    for function in (values, gradient):
        graph = make_fx(function, tracing_mode=mode)(*arguments(6, 5))  # sizes that are equal are one to it: B is no R
        assert {str(n.target) for n in graph.graph.nodes if "fused_rnn" in str(n.target)}
        for sizes in ((6, 5), (9, 11)) if mode == "symbolic" else ((6, 5),):
            args = arguments(*sizes)
            for one, other in zip(flatten(graph(*args)), flatten(function(*args)), strict=True):
                assert_same_formula(one.detach(), other.detach())


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("name", MODULES)
def test_make_fx_of_a_module(name: str, grad: bool) -> None:
    module, _ = make(name, 3, 4, dtype=torch.float64)
    sizes = ((2, 3), (5, 3)) if name.endswith("Cell") else ((4, 2, 3), (7, 5, 3))
    first, other = (torch.randn(size, dtype=torch.float64) for size in sizes)

    def run(parameters: dict[str, Tensor], x: Tensor) -> list[Tensor]:
        return flatten(torch.func.functional_call(module, parameters, (x,)))

    parameters = {key: p.detach() for key, p in module.named_parameters()}
    with torch.set_grad_enabled(grad):
        graph = make_fx(run, tracing_mode="symbolic")(parameters, first)
        for a, b in zip(graph(parameters, other), run(parameters, other), strict=True):
            assert_same_formula(a, b)
