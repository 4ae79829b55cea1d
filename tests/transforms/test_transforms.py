"""torch.func and forward mode: vmap over inputs, states, weights and gradients, jvp, Jacobians."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from cases import Case, Inputs, inputs
from oracle import forward, require
from tolerances import assert_same_formula
from torch import Tensor
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

import fused_rnn
from fused_rnn import LSTMFunction
from fused_rnn.cells import CELLS
from fused_rnn.functional import gru_cell

N = 3
SAVES = ["gates", "recompute"]


def problem(cell: str, **options: object) -> tuple[Case, Inputs]:
    case = Case(cell, T=4, B=2, D=3, H=3, dtype=torch.float64, **options)
    require("cpu", case)
    return case, inputs(case)


def loss(case: Case, given: Inputs, backend: str | None = "cpu") -> Callable[..., Tensor]:
    """(x, hx, weights, lengths, reset) → a number that depends on all outputs."""

    def run(
        x: Tensor, hx: list[Tensor], weights: list[Tensor], lengths: Tensor | None = None, reset: Tensor | None = None
    ) -> Tensor:
        changed = given._replace(x=x, hx=hx, weights=weights, lengths=lengths, reset=reset)
        return sum((o * g).sum() for o, g in zip(forward(case, changed, backend), given.dout, strict=True))

    return run


def batched(t: Tensor | list[Tensor], dim: int = 0) -> Tensor | list[Tensor]:
    if isinstance(t, list):
        return [batched(each, dim) for each in t]
    return torch.randn(N, *t.shape, dtype=torch.float64).movedim(0, dim)


MAPPED = {
    "x": (True, False, False),
    "states": (False, True, False),
    "x and states": (True, True, False),
    "weights": (False, False, True),
    "everything": (True, True, True),
}


@pytest.mark.parametrize("save", SAVES)
@pytest.mark.parametrize("mapped", MAPPED)
@pytest.mark.parametrize("cell", CELLS)
def test_vmap_is_a_loop(cell: str, mapped: str, save: str) -> None:
    """Values without a gradient, per-sample gradients (vmap of grad), gradients of a mapped function (grad of vmap)."""
    case, given = problem(cell, bidirectional=True, layers=2, save=save)
    arguments = [
        batched(t) if on else t for t, on in zip((given.x, given.hx, given.weights), MAPPED[mapped], strict=True)
    ]
    dims = tuple(0 if on else None for on in MAPPED[mapped])
    run = loss(case, given)

    def pick(argument: Tensor | list[Tensor], on: bool, i: int) -> Tensor | list[Tensor]:
        if not on:
            return argument
        return [t[i] for t in argument] if isinstance(argument, list) else argument[i]

    def each(f: Callable[..., object]) -> list[object]:
        return [f(*(pick(a, on, i) for a, on in zip(arguments, MAPPED[mapped], strict=True))) for i in range(N)]

    with torch.no_grad():
        assert_same_formula(vmap(run, dims)(*arguments), torch.stack(each(run)))
    per_sample = grad(run, argnums=(0, 1, 2))
    mapped_grads = flat(vmap(per_sample, dims)(*arguments))
    for k, one in enumerate(mapped_grads):
        assert_same_formula(one, torch.stack([flat(g)[k] for g in each(per_sample)]))
    of_vmap = flat(grad(lambda *a: vmap(run, dims)(*a).sum(), argnums=(0, 1, 2))(*arguments))
    ons = [on for a, on in zip(arguments, MAPPED[mapped], strict=True) for _ in flat(a)]
    for one, other, on in zip(of_vmap, mapped_grads, ons, strict=True):
        assert_same_formula(one, other if on else other.sum(0))


def flat(t: object) -> list[Tensor]:
    return torch.utils._pytree.tree_leaves(t)


@pytest.mark.parametrize("cell", CELLS)
def test_vmap_without_initial_states(cell: str) -> None:
    case, given = problem(cell, hx=False, bidirectional=True)
    x, run = batched(given.x), loss(case, given)
    for argnums in (0, 2):
        mapped = flat(vmap(grad(run, argnums=argnums), (0, None, None))(x, [], given.weights))
        for k, one in enumerate(mapped):
            each = [flat(grad(run, argnums=argnums)(x[i], [], given.weights))[k] for i in range(N)]
            assert_same_formula(one, torch.stack(each))


@pytest.mark.parametrize("with_weights", [False, True])
def test_vmap_over_lengths_and_resets(with_weights: bool) -> None:
    case, given = problem("gru", bidirectional=True, lengths=True, reset=True)
    lengths, reset = torch.randint(0, 5, (N, 2)), torch.rand(N, 4, 2) < 0.3
    weights = batched(given.weights) if with_weights else given.weights
    dims, run = (None, None, 0 if with_weights else None, 0, 0), loss(case, given)
    per_sample = grad(run, argnums=(0, 2))
    mapped = vmap(per_sample, dims)(given.x, given.hx, weights, lengths, reset)
    for i in range(N):
        alone = per_sample(
            given.x, given.hx, [w[i] for w in weights] if with_weights else weights, lengths[i], reset[i]
        )
        for one, other in zip(flat(mapped), flat(alone), strict=True):
            assert_same_formula(one[i], other)


@pytest.mark.parametrize("name", ["LSTM", "GRU", "RNN"])
def test_a_sample_gradient_knows_nothing_of_what_lies_past_an_end(name: str) -> None:
    module = getattr(fused_rnn, name)(4, 5, dtype=torch.float64, backend="cpu")
    parameters = {key: value.detach() for key, value in module.named_parameters()}
    x, lengths = torch.randn(2, 6, 2, 4, dtype=torch.float64), torch.tensor([[3, 6], [6, 2]])
    past = torch.arange(6).view(1, 6, 1) >= lengths.unsqueeze(1)

    def loss(p: dict[str, Tensor], x: Tensor, lengths: Tensor) -> Tensor:
        return functional_call(module, p, (x,), {"lengths": lengths})[0].sum()

    filled = (x.masked_fill(past.unsqueeze(-1), value) for value in (float("nan"), 0.0))
    dirty, clean = (vmap(grad(loss), (None, 0, 0))(parameters, x, lengths) for x in filled)
    for key in parameters:
        assert torch.equal(dirty[key], clean[key]), key


def test_vmap_in_any_dimension_and_nested() -> None:
    case, given = problem("lstm")
    run = loss(case, given)
    x = batched(batched(given.x, 1), 3)
    nested = vmap(vmap(run, (1, None, None)), (3, None, None))(x, given.hx, given.weights)
    for i in range(N):
        for j in range(N):
            assert_same_formula(nested[i, j], run(x.select(3, i).select(1, j), given.hx, given.weights))


def test_ensemble_of_modules_trains_in_one_call() -> None:
    """The idiom of torch.func.stack_module_state."""
    require("cpu", Case("gru"))

    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = torch.nn.ParameterList([torch.randn(9, 3) * 0.5, torch.randn(9, 3) * 0.5])

        def forward(self, x: Tensor) -> Tensor:
            return forward(Case("gru", D=3, H=3, bias=False), Inputs(x, list(self.w), [], None, None, []), "cpu")[0]

    nets, x = [Net() for _ in range(N)], torch.randn(4, 2, 3)
    parameters, buffers = torch.func.stack_module_state(nets)
    run = vmap(lambda p, b: functional_call(nets[0], (p, b), (x,)))
    run(parameters, buffers).square().sum().backward()
    for i, net in enumerate(nets):
        net(x).square().sum().backward()
        for name, p in net.named_parameters():
            torch.testing.assert_close(parameters[name].grad[i], p.grad)


def test_step_under_vmap() -> None:
    _, given = problem("gru")
    x, h = batched(given.x[0]), batched(given.hx[0][0])
    stacked = batched(given.weights)
    with torch.no_grad():
        folded = vmap(lambda x, h: gru_cell(x, h, given.weights, backend="cpu"))(x, h)
        looped = vmap(lambda x, h, w: gru_cell(x, h, w, backend="cpu"))(x, h, stacked)
    for i in range(N):
        assert_same_formula(folded[i], gru_cell(x[i], h[i], given.weights, backend="reference"))
        assert_same_formula(looped[i], gru_cell(x[i], h[i], [w[i] for w in stacked], backend="reference"))


def test_step_under_vmap_of_a_size_that_is_torchs_otherwise() -> None:
    case = Case("gru", T=1, B=32, D=3, H=256, dtype=torch.float32)
    require("cpu", case)
    given = inputs(case)
    x = torch.randn(N, 32, 3)
    with torch.no_grad():
        mapped = vmap(lambda x: gru_cell(x, given.hx[0][0], given.weights))(x)
        for i in range(N):
            torch.testing.assert_close(mapped[i], gru_cell(x[i], given.hx[0][0], given.weights))


@pytest.mark.parametrize("cell", CELLS)
def test_second_order_transforms(cell: str) -> None:
    case, given = problem(cell)
    run, slow = loss(case, given), loss(case, given, "reference")
    arguments = (given.x, given.hx, given.weights)
    assert_same_formula(jacrev(jacrev(run))(*arguments), jacrev(jacrev(slow))(*arguments))
    _, pull = vjp(grad(run), *arguments)
    _, slow_pull = vjp(grad(slow), *arguments)
    for one, other in zip(flat(pull(given.x)), flat(slow_pull(given.x)), strict=True):
        assert_same_formula(one, other)


def test_forward_mode_says_what_can() -> None:
    case, given = problem("lstm")
    arguments, tangents = (given.x,), (torch.ones_like(given.x),)
    with pytest.raises(NotImplementedError, match="cpu: it has no forward-mode derivative"):
        jvp(lambda x: forward(case, given._replace(x=x), "cpu")[0], arguments, tangents)
    value, tangent = jvp(lambda x: forward(case, given._replace(x=x), None)[0], arguments, tangents)
    assert_same_formula(value, forward(case, given, "cpu")[0])
    step = 1e-6
    ahead, behind = (forward(case, given._replace(x=given.x + s), "cpu")[0] for s in (step, -step))
    torch.testing.assert_close(tangent, (ahead - behind) / (2 * step), rtol=1e-6, atol=1e-8)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(given.x, torch.ones_like(given.x))
        assert_same_formula(
            torch.autograd.forward_ad.unpack_dual(forward(case, given._replace(x=dual), None)[0]).tangent, tangent
        )
    with pytest.raises(RuntimeError, match="jvp"):
        jvp(
            lambda x: LSTMFunction.apply(x, None, None, None, None, (1,), "gates", True, "cpu", *given.weights)[0],
            arguments,
            tangents,
        )


def test_jacobians_and_hessian_by_the_automatic_choice() -> None:
    case, given = problem("gru")
    run = loss(case, given, None)
    slow = loss(case, given, "reference")
    arguments = (given.x, given.hx, given.weights)
    assert_same_formula(jacfwd(run)(*arguments), jacrev(run)(*arguments))
    assert_same_formula(hessian(run)(*arguments), hessian(slow)(*arguments))
