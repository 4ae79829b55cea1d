"""The Functions: gradients of every order and kind, and what users do to tensors between forward and backward."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from cases import Case, Inputs, inputs
from oracle import by_backend, forward, require
from tolerances import GRADCHECK, assert_same_formula
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from fused_rnn import GRUFunction, LSTMFunction, RNNFunction, autograd
from fused_rnn.call import LayerCall
from fused_rnn.cells import CELLS

BACKENDS = ["cpu", "reference"]
SMALL = {"T": 3, "B": 2, "D": 2, "H": 2, "dtype": torch.float64}
FULL = {"layers": 2, "bidirectional": True, "lengths": True, "reset": True}


def leaves(given: Inputs) -> tuple[Tensor, ...]:
    return tuple(t.detach().clone().requires_grad_() for t in (given.x, *given.hx, *given.weights))


def function_of(case: Case, given: Inputs, backend: str | None) -> Callable[..., tuple[Tensor, ...]]:
    """(x, *hx, *weights) → outputs."""
    states = len(given.hx)

    def run(x: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        changed = given._replace(x=x, hx=list(tensors[:states]), weights=list(tensors[states:]))
        return tuple(forward(case, changed, backend))

    return run


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("save", ["gates", "recompute"])
@pytest.mark.parametrize("options", [{}, FULL], ids=["plain", "full"])
@pytest.mark.parametrize("cell", CELLS)
def test_gradcheck(cell: str, options: dict[str, object], save: str, backend: str) -> None:
    case = Case(cell, **SMALL, **options, save=save)
    require(backend, case)
    given = inputs(case)
    run, tensors = function_of(case, given, backend), leaves(given)
    # The whole Jacobians for one layer; along random directions for the stack, which has too many inputs for that.
    assert gradcheck(run, tensors, fast_mode=bool(options), **GRADCHECK)
    assert gradgradcheck(run, tensors, fast_mode=bool(options), **GRADCHECK)


@pytest.mark.parametrize("save", ["gates", "recompute"])
def test_gradcheck_with_projection(save: str) -> None:
    case = Case("lstm", **{**SMALL, "H": 3}, proj=2, bidirectional=True, save=save)
    require("cpu", case)
    given = inputs(case)
    assert gradcheck(function_of(case, given, "cpu"), leaves(given), **GRADCHECK)
    assert gradgradcheck(function_of(case, given, "cpu"), leaves(given), fast_mode=True, **GRADCHECK)


@pytest.mark.parametrize("cell", CELLS)
def test_functions_by_themselves(cell: str) -> None:
    """An input per recurrence, any directions, three of them; the thin public usage of the Functions."""
    case = Case(cell, **SMALL, layers=3)
    require("cpu", case)
    given = inputs(case)
    x = torch.randn(3, 2, 3, 2, dtype=torch.float64, requires_grad=True)
    directions, tail = (1, -1, -1), ("gates", True, "cpu")

    def run(x: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        h0, *rest = tensors
        if cell == "lstm":
            return LSTMFunction.apply(x, h0, rest[0], None, None, directions, *tail, *rest[1:])[:3]
        if cell == "gru":
            return GRUFunction.apply(x, h0, None, None, directions, *tail, *rest)[:2]
        return RNNFunction.apply(x, h0, None, None, cell[4:], directions, *tail, *rest)[:2]

    tensors = (x, *leaves(given)[1:])
    assert gradcheck(run, tensors, fast_mode=True, **GRADCHECK)
    assert gradgradcheck(run, tensors, fast_mode=True, **GRADCHECK)


@pytest.mark.parametrize("with_state", [True, False])
@pytest.mark.parametrize("cell", CELLS)
def test_a_function_over_each_backend(cell: str, with_state: bool) -> None:
    """All backends have the ops' interface: a Function runs over any of them, with the same gradients."""
    case = Case(cell, **SMALL, bidirectional=True, hx=with_state)
    given = inputs(case)
    results = []
    for backend in ("cpu", "torch", "reference"):
        require(backend, case)
        tensors = leaves(given)
        states, weights = tensors[1 : 1 + len(given.hx)], tensors[1 + len(given.hx) :]
        call = LayerCall(tensors[0], weights, states, None, None, cell, (1, -1), "gates", True)
        outputs = list(autograd.function(backend, call)[: 1 + len(CELLS[cell].states)])
        results.append([*outputs, *torch.autograd.grad(outputs, tensors, given.dout)])
    for one, other, third in zip(*results, strict=True):
        assert_same_formula(one, third)
        assert_same_formula(other, third)


@pytest.mark.parametrize("cell", CELLS)
def test_third_derivative(cell: str) -> None:
    case = Case(cell, T=2, B=1, D=1, H=2, dtype=torch.float64)
    require("cpu", case)
    given = inputs(case)
    tensors = leaves(given)

    def third(backend: str) -> list[Tensor]:
        value = function_of(case, given, backend)(*tensors)[0].square().sum()
        for _ in range(3):
            value = sum(g.square().sum() for g in torch.autograd.grad(value, tensors, create_graph=True))
        return list(torch.autograd.grad(value, tensors))

    for one, other in zip(third("cpu"), third("reference"), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9 * float(other.abs().max()))


def test_create_graph_runs_the_kernels_and_gives_the_same_bits() -> None:
    case = Case("gru", layers=2, lengths=True)
    require("cpu", case)
    given = inputs(case)
    tensors = leaves(given)
    outputs = function_of(case, given, "cpu")(*tensors)
    plain = torch.autograd.grad(outputs, tensors, given.dout, retain_graph=True)
    graph = torch.autograd.grad(outputs, tensors, given.dout, create_graph=True)
    for one, other in zip(plain, graph, strict=True):
        assert torch.equal(one, other)
        assert other.grad_fn is not None


def test_tied_weights_get_both_gradients() -> None:
    """One tensor as w_ih and w_hh, in both directions: first and second derivatives count each use once."""
    case = Case("gru", T=3, B=2, D=2, H=2, bidirectional=True, bias=False, hx=False, dtype=torch.float64)
    require("cpu", case)
    given = inputs(case)
    w = given.weights[0].clone().requires_grad_()
    x = given.x.clone().requires_grad_()

    def run(x: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        return tuple(forward(case, given._replace(x=x, weights=[w] * 4), "cpu"))

    assert gradcheck(run, (x, w), **GRADCHECK)
    assert gradgradcheck(run, (x, w), **GRADCHECK)


@pytest.mark.parametrize("save", ["gates", "recompute"])
@pytest.mark.parametrize("frozen", ["x", "hx", "weights", "one weight", "all but c0"])
def test_only_what_needs_a_gradient_gets_one(frozen: str, save: str) -> None:
    case = Case("lstm", dtype=torch.float64, save=save)
    require("cpu", case)
    given = inputs(case)
    frees = {
        "x": lambda i: i != 0,
        "hx": lambda i: i not in (1, 2),
        "weights": lambda i: i < 3,
        "one weight": lambda i: i != 4,
        "all but c0": lambda i: i == 2,
    }[frozen]
    judge, everything = function_of(case._replace(save="gates"), given, "reference"), leaves(given)
    expected = torch.autograd.grad(judge(*everything), everything, given.dout)
    tensors = leaves(given)
    for i, t in enumerate(tensors):
        t.requires_grad_(frees(i))
    outputs = function_of(case, given, "cpu")(*tensors)
    torch.autograd.backward(outputs, given.dout)
    for i, (t, g) in enumerate(zip(tensors, expected, strict=True)):
        assert (t.grad is not None) == frees(i)
        if t.grad is not None:
            assert_same_formula(t.grad, g)


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("save", ["gates", "recompute"])
def test_each_output_alone(cell: str, save: str) -> None:
    """A gradient that comes by y, h_n or c_n only: the others are None inside."""
    case = Case(cell, layers=2, bidirectional=True, lengths=True, dtype=torch.float64, save=save)
    require("cpu", case)
    given = inputs(case)
    for k in range(len(given.dout)):
        grads = []
        for backend in ("cpu", "reference"):
            tensors = leaves(given)
            run = function_of(case._replace(save="gates") if backend == "reference" else case, given, backend)
            grads.append(
                torch.autograd.grad(run(*tensors)[k], tensors, given.dout[k], materialize_grads=True, allow_unused=True)
            )
        for one, other in zip(*grads, strict=True):
            assert_same_formula(one, other)


def test_weight_changed_in_place_raises() -> None:
    case = Case("lstm", layers=2)
    require("cpu", case)
    given = inputs(case)
    for k in range(len(leaves(given))):
        tensors = leaves(given)
        y = function_of(case, given, "cpu")(*tensors)[0]
        with torch.no_grad():
            tensors[k].add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()


@pytest.mark.parametrize("save", ["gates", "recompute"])
@pytest.mark.parametrize("cell", CELLS)
def test_output_may_be_changed_in_place(cell: str, save: str) -> None:
    case = Case(cell, layers=2, dtype=torch.float64, save=save)
    require("cpu", case)
    given = inputs(case)
    results = []
    for change in (Tensor.relu, Tensor.relu_):
        tensors = leaves(given)
        outputs = [change(o) for o in function_of(case, given, "cpu")(*tensors)]
        results.append([*outputs, *torch.autograd.grad(outputs, tensors, given.dout)])
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


def test_backward_twice_and_freed_buffers() -> None:
    case = Case("gru")
    require("cpu", case)
    given = inputs(case)
    tensors = leaves(given)
    y = function_of(case, given, "cpu")(*tensors)[0].sum()
    first = torch.autograd.grad(y, tensors, retain_graph=True)
    for one, other in zip(first, torch.autograd.grad(y, tensors), strict=True):
        assert torch.equal(one, other)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        torch.autograd.grad(y, tensors)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_without_gradient_nothing_is_kept(context: Callable[[], object]) -> None:
    case = Case("lstm", layers=2)
    require("cpu", case)
    given = inputs(case)
    with context():
        outputs = function_of(case, given, "cpu")(*leaves(given))
    assert all(o.grad_fn is None and not o.requires_grad for o in outputs)
    outputs = forward(case, given, "cpu")  # gradients enabled, but nothing asks for one
    assert all(o.grad_fn is None for o in outputs)


def test_saved_tensor_hooks_see_everything() -> None:
    """As activation offloading and checkpointing need it."""
    case = Case("lstm", dtype=torch.float64)
    require("cpu", case)
    given = inputs(case)
    expected = by_backend(case, given, "cpu")
    packed: list[Tensor] = []

    def pack(t: Tensor) -> Tensor:
        packed.append(t)
        return t.clone()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        results = by_backend(case, given, "cpu")
    assert len(packed) >= 6
    for name, value in expected.items():
        assert torch.equal(results[name], value)


@pytest.mark.parametrize("save", ["gates", "recompute"])
def test_checkpoint(save: str) -> None:
    case = Case("gru", layers=2, dtype=torch.float64, save=save)
    require("cpu", case)
    given = inputs(case)
    run, tensors = function_of(case, given, "cpu"), leaves(given)
    plain = torch.autograd.grad(run(*tensors)[0].sum(), tensors)
    y = torch.utils.checkpoint.checkpoint(run, *tensors, use_reentrant=False)[0]
    for one, other in zip(torch.autograd.grad(y.sum(), tensors), plain, strict=True):
        assert torch.equal(one, other)
