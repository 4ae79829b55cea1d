"""LiGRU's batch norm, folded into the weights: by the rows' covariance, or by their product, as good as torch's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from tolerances import GRADCHECK, assert_as_good_as_torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.functional import batch_norm
from torch.utils.checkpoint import checkpoint

import fused_rnn
from fused_rnn.nn.field import batch_norm as norms
from fused_rnn.reference.sequence import past_end

# T, B, D, G, and how many W: of more steps than features, of fewer, of one feature, of two directions.
SIZES = [(130, 3, 24, 16, 1), (6, 2, 40, 16, 1), (64, 8, 1, 8, 1), (90, 4, 17, 12, 2)]


def numbers(T: int, B: int, D: int, G: int, count: int, seed: int) -> list[Tensor]:
    """x, then W and gamma of each."""
    random = torch.Generator().manual_seed(seed)
    made = [torch.randn(T, B, D, generator=random) * 2 + 3]
    for _ in range(count):
        made += [torch.randn(G, D, generator=random) / D**0.5, torch.rand(G, generator=random) + 0.5]
    return made


def by_torch(x: Tensor, past: Tensor | None, *flat: Tensor) -> list[Tensor]:
    """gamma (W x - mean) / √(variance + ε), of every W, zero past an end."""
    within = torch.ones(x.shape[:2], dtype=torch.bool) if past is None else ~past[..., 0]
    made = []
    for w, gamma in zip(flat[::2], flat[1::2], strict=True):
        rows = batch_norm(x[within] @ w.t(), None, None, gamma, None, training=True)
        made.append(torch.zeros(*x.shape[:2], len(w), dtype=x.dtype).index_put((within,), rows))
    return made


def by_ours(x: Tensor, past: Tensor | None, *flat: Tensor) -> list[Tensor]:
    count: Any = x.shape[0] * x.shape[1] if past is None else (~past).sum().to(x.dtype)
    given = x if past is None else x.masked_fill(past, 0)
    made = norms.normed(given, past, count, list(zip(flat[::2], flat[1::2], strict=True)))
    return [made.x @ w.t() for w in made.weights]


def results(run: Callable[..., Sequence[Tensor]], given: Sequence[Tensor], past: Tensor | None, dtype: Any) -> Any:
    leaves = [t.to(dtype).requires_grad_() for t in given]
    made = run(leaves[0], past, *leaves[1:])
    random = torch.Generator().manual_seed(9)
    douts = [torch.randn(y.shape, generator=random).to(dtype) for y in made]
    grads = torch.autograd.grad(made, leaves, douts)
    return {f"y {k}": y.detach() for k, y in enumerate(made)} | {f"d {k}": g for k, g in enumerate(grads)}


@pytest.fixture(params=[True, False], ids=["by covariance", "by product"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    monkeypatch.setattr(norms, "_pays", lambda *_: request.param)
    return bool(request.param)


@pytest.mark.parametrize("lengths", [False, True])
@pytest.mark.parametrize("size", SIZES)
def test_as_good_as_torchs(size: tuple[int, ...], lengths: bool, way: bool) -> None:
    """Results and gradients, of several draws."""
    found: list[list[dict[str, Tensor]]] = [[], [], []]
    for seed in range(4):
        given = numbers(*size, seed)
        past = past_end(torch.randint(1, size[0] + 1, (size[1],)), size[0]).unsqueeze(2) if lengths else None
        for own, (run, dtype) in zip(
            found, ((by_ours, torch.float32), (by_torch, torch.float32), (by_torch, torch.float64)), strict=True
        ):
            own.append(results(run, given, past, dtype))
    assert_as_good_as_torch(*[{k: torch.stack([r[k] for r in each]) for k in each[0]} for each in found])


@pytest.mark.parametrize("lengths", [False, True])
def test_derivatives(lengths: bool, way: bool) -> None:
    """First and second ones against differences."""
    given = [t.double().requires_grad_() for t in numbers(7, 3, 4, 5, 2, 0)]
    past = past_end(torch.tensor([7, 2, 4]), 7).unsqueeze(2) if lengths else None
    run = lambda x, *flat: tuple(by_ours(x, past, *flat))  # noqa: E731
    assert torch.autograd.gradcheck(run, given, **GRADCHECK)
    assert torch.autograd.gradgradcheck(run, given, **GRADCHECK)


def test_where_much_cancels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of features that are nearly the same, and a W that takes their differences, the covariance is left alone."""
    monkeypatch.setattr(norms, "_pays", lambda *_: True)
    asked: list[bool] = []
    real = norms._by_covariance
    monkeypatch.setattr(norms, "_by_covariance", lambda *a: asked.append(real(*a) is not None) or real(*a))
    found: list[list[dict[str, Tensor]]] = [[], [], []]
    for seed in range(4):
        x, w, gamma = numbers(400, 4, 48, 32, 1, seed)
        given = [x[..., :1] + 0.5 * torch.randn(x.shape), w - w.mean(1, keepdim=True), gamma]
        for own, (run, dtype) in zip(
            found, ((by_ours, torch.float32), (by_torch, torch.float32), (by_torch, torch.float64)), strict=True
        ):
            own.append(results(run, given, None, dtype))
    assert asked == [False] * 4
    assert_as_good_as_torch(*[{k: torch.stack([r[k] for r in each]) for k in each[0]} for each in found])


def test_the_cheaper_way() -> None:
    """Of many steps the covariance, of few the product."""
    assert all(norms._pays(*size) for size in ((1024, 64, 128), (1024, 256, 512)))
    assert not any(norms._pays(*size) for size in ((128, 64, 128), (128, 256, 512), (1024, 256, 64), (10, 4, 8)))


def test_input_without_a_gradient() -> None:
    """The weights' gradients are the same, and the loop makes none of its input."""
    gru, x = fused_rnn.LiGRU(64, 64), torch.randn(128, 2, 64)
    found = []
    for given in (x, x.clone().requires_grad_()):
        y, _ = gru(given)
        found.append(torch.autograd.grad(y.square().sum(), list(gru.parameters())))
    for own, other in zip(*found, strict=True):
        assert torch.equal(own, other)


def test_backward_within_autocast() -> None:
    """Its products keep their dtype, as those of forward do."""
    gru, x = fused_rnn.LiGRU(8, 12), torch.randn(20, 3, 8)
    found = []
    for within in (False, True):
        leaves = [x.clone().requires_grad_(), *gru.parameters()]
        with torch.autocast("cpu", torch.bfloat16):
            y, _ = gru(leaves[0])
        with torch.autocast("cpu", torch.bfloat16, enabled=within):
            found.append(torch.autograd.grad(y, leaves, torch.ones_like(y)))
    for own, other in zip(*found, strict=True):
        assert torch.equal(own, other)


def test_checkpoint() -> None:
    """What is saved is read once."""
    gru, x = fused_rnn.LiGRU(5, 6), torch.randn(7, 3, 5, requires_grad=True)
    expected, found = (
        torch.autograd.grad(y.square().sum(), x)[0]
        for y in (gru(x)[0], checkpoint(lambda x: gru(x)[0], x, use_reentrant=False))
    )
    torch.testing.assert_close(found, expected)


def test_forward_mode() -> None:
    """Outside of torch.func, too."""
    gru, x, dx = fused_rnn.LiGRU(3, 4, dtype=torch.float64), *torch.randn(2, 6, 2, 3, dtype=torch.float64)
    with forward_ad.dual_level():
        found = forward_ad.unpack_dual(gru(forward_ad.make_dual(x, dx))[0]).tangent
    torch.testing.assert_close(found, torch.autograd.functional.jvp(lambda x: gru(x)[0], x, dx)[1])


def test_transforms() -> None:
    """torch.func has the gradients of an ordinary call, and maps over it."""
    given = [t.double() for t in numbers(9, 3, 5, 6, 1, 0)]
    past = past_end(torch.tensor([9, 4, 6]), 9).unsqueeze(2)
    loss = lambda *given: by_ours(given[0], past, *given[1:])[0].square().sum()  # noqa: E731
    leaves = [t.clone().requires_grad_() for t in given]
    expected = torch.autograd.grad(loss(*leaves), leaves)
    made = torch.func.grad(loss, argnums=(0, 1, 2))(*given)
    mapped = torch.func.vmap(loss, in_dims=(None, 0, None))(given[0], torch.stack([given[1]] * 2), given[2])
    for own, other in zip((*made, mapped), (*expected, loss(*given).expand(2)), strict=True):
        torch.testing.assert_close(own, other)


def test_compile_with_lengths() -> None:
    """In one graph, for any lengths, with the running statistics."""
    gru, x = fused_rnn.LiGRU(5, 6, bidirectional=True), torch.randn(9, 3, 5, requires_grad=True)
    other = fused_rnn.LiGRU(5, 6, bidirectional=True)
    other.load_state_dict(gru.state_dict())
    torch._dynamo.reset()
    compiled = torch.compile(gru, backend="aot_eager", fullgraph=True)
    for lengths in (torch.tensor([9, 4, 6]), torch.tensor([1, 9, 2])):
        expected, _ = other(x, lengths=lengths)
        made, _ = compiled(x, lengths=lengths)
        torch.testing.assert_close(made, expected)
        for own, judge in zip(*(torch.autograd.grad(y.square().sum(), x) for y in (made, expected)), strict=True):
            torch.testing.assert_close(own, judge)
    for name, buffer in gru.named_buffers():
        torch.testing.assert_close(buffer, dict(other.named_buffers())[name])


@pytest.mark.parametrize("lengths", [(1, 0), (0, 0)])
def test_too_few_steps_where_nobody_reads_the_lengths(lengths: tuple[int, int]) -> None:
    """A compiled call cannot refuse them; what eval mode reads later stays finite."""
    gru = fused_rnn.LiGRU(5, 6)
    torch._dynamo.reset()
    y, _ = torch.compile(gru, backend="aot_eager", fullgraph=True)(torch.randn(4, 2, 5), lengths=torch.tensor(lengths))
    y.sum().backward()
    for tensor in (y, *gru.buffers(), *(p.grad for p in gru.parameters() if p.grad is not None)):
        assert tensor.isfinite().all()


@pytest.mark.parametrize("batch_first", [False, True])
def test_eval_past_the_dispatcher(batch_first: bool) -> None:
    """By the running statistics as they are at the call."""
    gru, x = fused_rnn.LiGRU(5, 6, batch_first=batch_first), torch.randn(4, 3, 5)
    for _ in range(2):
        gru.train()(x)
        gru.eval()
        with torch.no_grad():
            y, h_n = gru(x)
            gru.gamma_l0 *= 1.5
            other, _ = gru(x)
            gru.gamma_l0 /= 1.5
        expected, last = gru(x)
        torch.testing.assert_close(y, expected)
        torch.testing.assert_close(h_n, last)
        assert not torch.allclose(y, other)
