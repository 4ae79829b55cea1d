"""Stacks as wavefronts, over loops in plain PyTorch: the bits of layer by layer, gradients of any order, who takes it.

Memory that is not written is full of NaN here. B is 8 and H and T·B are multiples of 8: there a row of a product by
torch on a CPU does not depend on how many rows go through it together, and chunks of time give the bits of all of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import combinations
from typing import Any

import pytest
import torch
from cases import Case, Inputs, inputs
from oracle import Results, differentiate
from plain_gpu import make, plain_backend
from tolerances import GRADCHECK, assert_same_formula
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from user_cells import chain, leaky

import fused_rnn
from fused_rnn import dispatch, layers
from fused_rnn.autograd.stack import stack
from fused_rnn.call import StackCall
from fused_rnn.gpu.wavefront import Lanes, OneThread, Wavefront, windows_of


@contextmanager
def waves(chunks: int = 3, backward: int | None = None) -> Iterator[list[int]]:
    """The backend "plain" runs stacks as wavefronts in so many chunks. Yields how many lanes each has had."""
    ran: list[int] = []

    def lanes(x: Tensor, count: int) -> Lanes:
        ran.append(count)
        return OneThread()

    def count(x: Tensor, cell: str, hidden: int, layers: int, pulls: bool) -> int:
        return backward if pulls and backward else chunks

    with plain_backend(Wavefront(make, lanes, count)):
        yield ran


@contextmanager
def one_by_one() -> Iterator[None]:
    with plain_backend():
        yield


def run(case: Case, given: Inputs, **options: Any) -> list[Tensor]:
    outputs = layers.run(
        case.cell, given.x, given.weights, given.hx, case.layers, lengths=given.lengths, reset=given.reset,
        save=case.save, backend="plain", **options,
    )  # fmt: skip
    return list(outputs)


def results(case: Case, **options: Any) -> Results:
    torch.manual_seed(0)  # of dropout
    return differentiate(inputs(case), lambda given: run(case, given, **options))


def assert_same_bits(ours: Results, theirs: Results) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert torch.equal(value, theirs[name]), name


def case(cell: str = "lstm", **options: Any) -> Case:
    return Case(cell, **({"T": 13, "B": 8, "D": 8, "H": 16, "layers": 3, "dtype": torch.float64} | options))


# --- results and gradients

OPTIONS: list[dict[str, Any]] = [
    {},
    {"lengths": True},
    {"reset": True, "hx": False},
    {"lengths": True, "reset": True, "layers": 2},
    {"bias": False, "dtype": torch.float32},
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(options) or "plain")
@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn_tanh", "rnn_relu"])
def test_the_bits_of_layer_by_layer(cell: str, options: dict[str, Any]) -> None:
    with one_by_one():
        expected = results(case(cell, **options))
    with waves(4) as ran:
        assert_same_bits(results(case(cell, **options)), expected)
    assert ran == [case(cell, **options).layers] * 2


@pytest.mark.parametrize(("steps", "forward", "backward"), [(12, 3, 3), (13, 5, 2), (3, 8, 8), (1, 2, 2), (9, 1, 9)])
def test_any_number_of_chunks(steps: int, forward: int, backward: int) -> None:
    """That divides T, that does not, more than there are steps; other ones forward than backward."""
    for cell in ("lstm", "gru"):
        with one_by_one():
            expected = results(case(cell, T=steps, lengths=True))
        with waves(forward, backward) as ran:
            assert_same_bits(results(case(cell, T=steps, lengths=True)), expected)
        assert len(ran) == 2


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("training", [True, False])
def test_dropout_has_torchs_masks(training: bool, dtype: torch.dtype) -> None:
    options = {"dropout": 0.3, "training": training}
    with one_by_one():
        expected = results(case("gru", dtype=dtype, lengths=True), **options)
        drawn = torch.rand(3)
    with waves() as ran:
        assert_same_bits(results(case("gru", dtype=dtype, lengths=True), **options), expected)
    assert torch.equal(torch.rand(3), drawn)
    assert len(ran) == 2


@pytest.mark.parametrize("cell", [leaky, chain], ids=lambda cell: cell.name)
def test_users_cells(cell: Any) -> None:
    model = fused_rnn.FlexRNN(cell, 8, 16, num_layers=3, dtype=torch.float64)
    x = torch.randn(13, 8, 8, dtype=torch.float64, requires_grad=True)
    lengths = torch.randint(0, 14, (8,))

    def train() -> list[Tensor]:
        model.backend = "plain"
        y, states = model(x, lengths=lengths)
        outputs = [y, *([states] if isinstance(states, Tensor) else states)]
        return [*outputs, *torch.autograd.grad([o.square().sum() for o in outputs], [x, *model.parameters()])]

    with one_by_one():
        expected = train()
    with waves() as ran:
        for ours, theirs in zip(train(), expected, strict=True):
            assert torch.equal(ours, theirs)
    assert ran == [3, 3]


def test_without_gradient() -> None:
    given = inputs(case(lengths=True, reset=True))
    with one_by_one():
        expected = run(case(), given)
    with waves() as ran, torch.no_grad():
        for ours, theirs in zip(run(case(), given), expected, strict=True):
            assert torch.equal(ours, theirs)
    assert ran == [3]


def _subsets() -> list[tuple[int, ...]]:
    """Of x, h0 and the w_hh of each layer."""
    return [chosen for size in (1, 2, 5) for chosen in combinations(range(5), size)]


@pytest.mark.parametrize("given_out", [(0,), (1,), (0, 1)])
@pytest.mark.parametrize("chosen", _subsets(), ids=str)
def test_gradients_that_are_asked_for(chosen: tuple[int, ...], given_out: tuple[int, ...]) -> None:
    """Of a part of the inputs, by gradients of a part of the outputs: where layer by layer has none there is none."""
    own, found = case("gru"), []
    for backend in (one_by_one, waves):
        given = inputs(own)
        leaves = [given.x, given.hx[0], *given.weights[1::4]]
        for i in chosen:
            leaves[i].requires_grad_()
        with backend():
            outputs = run(own, given)
            outputs, douts = ([tensors[i] for i in given_out] for tensors in (outputs, given.dout))
            found.append(torch.autograd.grad(outputs, [leaves[i] for i in chosen], douts, allow_unused=True))
    for theirs, ours in zip(*found, strict=True):
        assert ours is not None and theirs is not None
        assert torch.equal(ours, theirs)


def stack_call(own: Case, given: Inputs, **options: Any) -> StackCall:
    by_layer = [given.weights[4 * n : 4 * n + 4] for n in range(own.layers)]
    states = [[h[n : n + 1] for h in given.hx] for n in range(own.layers)]
    return StackCall(given.x, by_layer, states, given.lengths, given.reset, own.cell, save="gates", **options)


def test_layers_that_no_gradient_reaches() -> None:
    """Above the last one whose state has a gradient, below the first that wants one."""
    own = case("lstm", layers=4)
    given = inputs(own)
    for weight in (*given.weights[4:8], *given.weights[12:]):
        weight.requires_grad_()
    with waves():
        y, after = stack(dispatch.BACKENDS["plain"], stack_call(own, given))
        asked = (*given.weights[4:8], *given.weights[12:])
        ours = torch.autograd.grad(after[2][1].sum(), asked, allow_unused=True, retain_graph=True)
        assert torch.autograd.grad(after[0][0].sum(), asked, allow_unused=True) == (None,) * 8
    with one_by_one():
        x = given.x
        for n in range(3):
            part = given._replace(x=x, weights=given.weights[4 * n : 4 * n + 4], hx=[h[n : n + 1] for h in given.hx])
            x, _, c_n = run(own._replace(layers=1), part)
        theirs = torch.autograd.grad(c_n.sum(), given.weights[4:8])
    for one, other in zip(ours[:4], theirs, strict=True):
        assert torch.equal(one, other)
    assert ours[4:] == (None,) * 4
    assert y.grad_fn is not None


@pytest.mark.parametrize("options", [{"lengths": True, "reset": True}, {"dropout": 0.4}], ids=["masked", "dropout"])
@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_gradgradcheck(cell: str, options: dict[str, Any]) -> None:
    options = dict(options)
    dropout = options.pop("dropout", 0.0)
    own = case(cell, T=3, B=2, D=2, H=2, layers=2, **options)
    given = inputs(own)
    leaves = [t.requires_grad_() for t in (given.x, *given.hx, *given.weights)]

    def outputs(x: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        torch.manual_seed(1)
        hx, weights = rest[: len(given.hx)], rest[len(given.hx) :]
        return tuple(run(own, given._replace(x=x, hx=hx, weights=weights), dropout=dropout, training=True))

    with waves(2) as ran:
        assert torch.autograd.gradcheck(outputs, leaves, **GRADCHECK)
        assert torch.autograd.gradgradcheck(outputs, leaves, **GRADCHECK)
    assert ran


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_second_and_third_derivatives_of_layer_by_layer(dropout: float) -> None:
    own, found = case("gru", T=5, lengths=True), []
    for backend in (one_by_one, waves):
        torch.manual_seed(0)
        given = inputs(own)
        leaves = [t.requires_grad_() for t in (given.x, *given.hx, *given.weights)]
        with backend():
            total, orders = sum(o.square().sum() for o in run(own, given, dropout=dropout, training=True)), []
            for order in range(3):
                grads = torch.autograd.grad(total, leaves, create_graph=order < 2)
                orders += grads
                total = sum(g.square().sum() for g in grads)
        found.append(orders)
    for theirs, ours in zip(*found, strict=True):
        assert_same_formula(ours, theirs)


# --- memory


@pytest.mark.parametrize("what", ["x", "w_hh of the first layer", "w_ih of the last layer", "h0"])
def test_what_was_saved_and_changed_raises(what: str) -> None:
    own = case()
    given = inputs(own)
    for t in (given.x, *given.weights):
        t.requires_grad_()
    places = {"x": given.x, "w_hh of the first layer": given.weights[1], "w_ih of the last layer": given.weights[8]}
    with waves():
        y = run(own, given)[0]
        with torch.no_grad():
            places.get(what, given.hx[0]).mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()


def test_the_result_may_be_changed() -> None:
    own, found = case(), []
    for backend in (one_by_one, waves):
        given = inputs(own)
        given.x.requires_grad_()
        with backend():
            y = run(own, given)[0]
            found.append(torch.autograd.grad(y.mul_(2).sum(), given.x)[0])
    assert torch.equal(*found)


def test_windows_begin_where_16_divides_an_address() -> None:
    assert windows_of(100, 4, 16) == [(0, 25), (25, 50), (50, 75), (75, 100)]
    assert windows_of(10, 4, 1024) == [(0, 3), (3, 6), (6, 9), (9, 10)]
    assert windows_of(100, 4, 6) == [(0, 32), (32, 64), (64, 96), (96, 100)]
    assert windows_of(3, 8, 16) == [(0, 1), (1, 2), (2, 3)]
    assert windows_of(7, 1, 2) == [(0, 7)]


# --- who takes it


def test_what_else_watches_goes_layer_by_layer() -> None:
    own = case("gru")
    given = inputs(own)

    def total(x: Tensor) -> Tensor:
        return run(own, given._replace(x=x))[0].square().sum()

    with one_by_one(), FlopCounterMode(display=False) as expected:
        leaf = given.x.clone().requires_grad_()
        torch.autograd.grad(total(leaf), leaf)
    with waves() as ran:
        by_vjp = torch.func.grad(total)(given.x)
        torch.func.vmap(total)(torch.stack([given.x, given.x]))
        with FlopCounterMode(display=False) as counted:
            leaf = given.x.clone().requires_grad_()
            torch.autograd.grad(total(leaf), leaf)
        for options in ({"sequences": True}, {"save": "recompute"}, {"bidirectional": True}):
            more = inputs(own._replace(bidirectional="bidirectional" in options))
            layers.run("gru", leaf, more.weights, more.hx, own.layers, backend="plain", **options)
        layers.run("gru", given.x[:, :0], given.weights, (), own.layers, backend="plain")
        projected = case("lstm")
        more = inputs(projected._replace(proj=16))  # as wide as without a projection
        layers.run("lstm", leaf, more.weights, more.hx, own.layers, backend="plain")
        assert ran == []
        leaf = given.x.clone().requires_grad_()
        assert_same_formula(torch.autograd.grad(total(leaf), leaf)[0], by_vjp)
        assert len(ran) == 2
    assert counted.get_total_flops() == expected.get_total_flops()


@pytest.mark.compile
def test_a_compiled_stack_goes_layer_by_layer() -> None:
    own = case("gru", layers=2)
    given = inputs(own)
    given.x.requires_grad_()
    with waves() as ran:
        compiled = torch.compile(lambda x: run(own, given._replace(x=x))[0], backend="eager", fullgraph=True)
        grad = torch.autograd.grad(compiled(given.x).sum(), given.x)[0]
        assert ran == []
        assert torch.equal(torch.autograd.grad(run(own, given)[0].sum(), given.x)[0], grad)


def test_a_batch_of_gradients() -> None:
    """torch's older vmap over backward."""
    own = case("lstm", lengths=True)
    given = inputs(own)
    leaves = [t.requires_grad_() for t in (given.x, given.weights[1])]
    with waves():
        y = run(own, given)[0]
        many = torch.randn(3, *y.shape, dtype=y.dtype)
        together = torch.autograd.grad(y, leaves, many, is_grads_batched=True, retain_graph=True)
        for i, one in enumerate(many):
            for batched, grad in zip(together, torch.autograd.grad(y, leaves, one, retain_graph=True), strict=True):
                assert_same_formula(batched[i], grad)


def test_what_does_not_pay_goes_layer_by_layer() -> None:
    with waves(1) as ran:
        results(case())
    assert ran == []
    with waves(1, backward=2) as ran, torch.no_grad():
        run(case(), inputs(case()))
    assert ran == []
