"""Autocast: one rule for every cell and device, in eager mode and compiled; GradScaler; training to the same loss."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch._dynamo
from counterparts import CELLS, MODULES, SEQUENCES, cast, flatten, make, states
from text import Characters, Windows, corpus
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence

import fused_rnn
from fused_rnn import ops

DTYPES = [torch.bfloat16, torch.float16]
BACKENDS = [None, "cpu", "torch", "reference"]


def problem(name: str, backend: str | None, **options: Any) -> tuple[nn.Module, tuple[Any, ...]]:
    """A module and a call of it with states, that is no single step's."""
    if backend == "cpu" and ops.MISSING is not None:
        pytest.skip(ops.MISSING)
    module, _ = make(name, 4, 6, extras={"backend": backend}, **options)
    if name in CELLS:
        h = torch.randn(3, 6)
        return module, (torch.randn(3, 4), (h, torch.randn(3, 6)) if name == "LSTMCell" else h)
    return module, (torch.randn(5, 3, 4), states(module, 3))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", MODULES)
def test_the_rule(name: str, backend: str | None, dtype: torch.dtype) -> None:
    """The result is that of the module and its arguments cast by hand; gradients come in each tensor's own dtype."""
    if backend == "torch" and name == "LSTM" and dtype == torch.float16:
        pytest.skip("oneDNN has no LSTM in float16 on every processor")
    module, args = problem(name, backend)
    args = (args[0].requires_grad_(), *args[1:])
    by_hand = copy.deepcopy(module).to(dtype)
    expected = flatten(by_hand(*cast(args, dtype)))
    with torch.autocast("cpu", dtype):
        outputs = flatten(module(*args))
        with torch.no_grad():
            inferred = flatten(module(*args))
        with torch.autocast("cpu", enabled=False):
            assert all(t.dtype == torch.float32 for t in flatten(module(*args)))
    for one, two, other in zip(outputs, inferred, expected, strict=True):
        assert one.dtype == two.dtype == dtype
        assert torch.equal(one, other)
        torch.testing.assert_close(two, other)  # torch's own kernels may differ without a gradient
    sum(t.float().square().sum() for t in outputs).backward()
    sum(t.float().square().sum() for t in expected).backward()
    assert args[0].grad.dtype == torch.float32
    for p, q in zip(module.parameters(), by_hand.parameters(), strict=True):
        assert p.grad.dtype == torch.float32
        assert torch.equal(p.grad, q.grad.float())


@pytest.mark.parametrize("name", MODULES)
def test_float64_stays(name: str) -> None:
    module, args = problem(name, None, dtype=torch.float64)
    args = cast(args, torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        for one, other in zip(flatten(module(*args)), flatten(module(*args)), strict=True):
            assert one.dtype == torch.float64
            assert torch.equal(one, other)


@pytest.mark.compile
@pytest.mark.parametrize("inside", [True, False], ids=["inside", "around"])
@pytest.mark.parametrize("name", ["LSTM", "GRU", "RNNCell"])
def test_compiled(name: str, inside: bool) -> None:
    """Autocast within what is compiled, or around the call of it."""
    torch._dynamo.reset()
    module, args = problem(name, None)

    def run(*args: Any) -> list[Tensor]:
        with torch.autocast("cpu", torch.bfloat16):
            return flatten(module(*args))

    compiled = torch.compile(run if inside else module, backend="aot_eager", fullgraph=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=not inside):
        got = flatten(compiled(*args))
    expected = run(*args)
    parameters = list(module.parameters())
    grads = [torch.autograd.grad(sum(t.float().sum() for t in o), parameters) for o in (got, expected)]
    for one, other in zip((*got, *grads[0]), (*expected, *grads[1]), strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", MODULES)
def test_the_rule_on_a_gpu(name: str, dtype: torch.dtype) -> None:
    module, args = problem(name, None)
    module, args = module.cuda(), torch.utils._pytree.tree_map(lambda t: t.cuda(), args)
    with torch.autocast("cuda", dtype):
        outputs = flatten(module(*args))
    assert all(t.dtype == dtype for t in outputs)
    sum(t.float().sum() for t in outputs).backward()
    assert all(p.grad.dtype == torch.float32 for p in module.parameters())


class Small(nn.Module):
    """The demo's model, smaller."""

    def __init__(self, kind: str, symbols: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(symbols, 32)
        self.rnn = getattr(fused_rnn, kind)(32, 64)
        self.head = nn.Linear(64, symbols)

    def forward(self, text: Tensor) -> Tensor:
        return self.head(self.rnn(self.embed(text))[0])


def trained(kind: str, dtype: torch.dtype, steps: int = 200) -> list[float]:
    """Losses of the demo's task in float32, or under autocast, with a GradScaler where float16 needs one."""
    characters = Characters()
    windows = Windows(characters.encode(corpus()[0][:60_000]), 32, 16)
    torch.manual_seed(0)
    model = Small(kind, len(characters))
    optimiser = torch.optim.Adam(model.parameters(), lr=5e-3)
    scaler = torch.amp.GradScaler("cpu", enabled=dtype == torch.float16)
    losses = []
    for step in range(steps):
        given, target = windows[step]
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            loss = F.cross_entropy(model(given).flatten(0, 1).float(), target.flatten())
        optimiser.zero_grad()
        scaler.scale(loss).backward()
        scaler.unscale_(optimiser)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimiser)
        scaler.update()
        losses.append(loss.item())
    return losses


@pytest.mark.slow
@pytest.mark.parametrize("kind", SEQUENCES)
def test_training_comes_to_the_same_loss(kind: str) -> None:
    runs = {dtype: trained(kind, dtype) for dtype in (torch.float32, *DTYPES)}
    first, last = runs[torch.float32][0], {dtype: sum(losses[-20:]) / 20 for dtype, losses in runs.items()}
    assert last[torch.float32] < 0.75 * first
    for dtype in DTYPES:
        assert abs(last[dtype] / last[torch.float32] - 1) < 0.01, (dtype, last)


def test_a_step_that_overflows_is_skipped() -> None:
    """GradScaler finds an inf among the gradients, leaves the weights as they are and lowers its scale."""
    torch.manual_seed(0)
    module = fused_rnn.GRU(4, 6)
    optimiser = torch.optim.SGD(module.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**24)
    before, x = [p.detach().clone() for p in module.parameters()], torch.randn(5, 3, 4)
    changed = []
    for _ in range(16):
        with torch.autocast("cpu", torch.float16):
            loss = module(x)[0].float().sum()
        optimiser.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimiser)
        scaler.update()
        changed.append(any(not torch.equal(p, q) for p, q in zip(module.parameters(), before, strict=True)))
    assert not changed[0] and changed[-1]
    assert all(bool(p.isfinite().all()) for p in module.parameters())


@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no_grad"])
@pytest.mark.parametrize("backend", [None, "reference", "torch"])
@pytest.mark.parametrize("name", MODULES)
def test_a_float16_module_under_autocast_to_bfloat16(name: str, backend: str | None, grad: bool) -> None:
    """Some of torch's operators refuse float16 there; no call of ours meets one, packed input included."""
    module, args = problem(name, backend)
    module, args = module.half(), cast(args, torch.float16)
    by_hand = copy.deepcopy(module).bfloat16()
    calls = [args]
    if name in SEQUENCES:
        calls.append((pack_padded_sequence(args[0], [5, 2, 1]), args[1]))
        calls.append((pack_padded_sequence(args[0], [2, 5, 1], enforce_sorted=False), args[1]))
    for call in calls:
        with torch.set_grad_enabled(grad):
            with torch.autocast("cpu", torch.bfloat16):
                outputs = flatten(module(*call))
            for one, other in zip(outputs, flatten(by_hand(*cast(call, torch.bfloat16))), strict=True):
                assert torch.equal(one, other)
        if grad:
            sum(t.float().sum() for t in outputs if t.is_floating_point()).backward()
            assert all(p.grad.dtype == torch.float16 and p.grad.isfinite().all() for p in module.parameters())
