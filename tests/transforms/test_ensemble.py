"""torch.func over modules: ensembles and per-sample gradients, each one launch a layer, beside torch.nn's modules."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from cases import Case, inputs
from counterparts import CELLS, MODULES, flatten, make
from oracle import forward, require
from tolerances import assert_same_formula
from torch import Tensor, nn
from torch.func import functional_call, grad, stack_module_state, vmap
from torch.utils._python_dispatch import TorchDispatchMode

from fused_rnn import cells, ops
from fused_rnn.call import BackwardCall, LayerCall

pytestmark = pytest.mark.skipif(ops.MISSING is not None, reason=f"vmap rules are those of the ops: {ops.MISSING}")

MEMBERS = 3
OPTIONS: list[tuple[str, dict[str, Any]]] = [
    ("LSTM", {"num_layers": 2, "bidirectional": True}),
    ("LSTM", {"batch_first": True, "proj_size": 2}),
    ("GRU", {"num_layers": 2, "bidirectional": True, "batch_first": True}),
    ("GRU", {"bias": False}),
    ("RNN", {"nonlinearity": "relu", "num_layers": 2}),
    ("LSTMCell", {}),
    ("GRUCell", {}),
    ("RNNCell", {"bias": False}),
]


@contextmanager
def launches() -> Iterator[list[tuple[str, int, int]]]:
    """What really ran, below every transform: (op, B, R)."""
    seen: list[tuple[str, int, int]] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
            if func is torch.ops.fused_rnn.forward.default:
                call = LayerCall(*args)
                seen.append(("forward", call.x.shape[1], call.recurrences))
            elif func is torch.ops.fused_rnn.backward.default:
                back = BackwardCall(*args)
                seen.append(("backward", back.x.shape[1], back.layer.recurrences))
            else:
                assert func is not torch.ops.fused_rnn.step.default
            return func(*args, **(kwargs or {}))

    with Watch():
        yield seen


def pairs(name: str, options: dict[str, Any]) -> tuple[list[nn.Module], list[nn.Module]]:
    """Members of an ensemble, ours and torch's, alike in twos."""
    both = [make(name, 4, 5, seed=k, dtype=torch.float64, **options) for k in range(MEMBERS)]
    return [ours for ours, _ in both], [counterpart for _, counterpart in both]


def example(name: str, *lead: int) -> Tensor:
    return torch.randn(*lead, *((3, 4) if name in CELLS else (6, 3, 4)), dtype=torch.float64)


def value(outputs: Any) -> Tensor:
    return sum(t.square().sum() for t in flatten(outputs))


@pytest.mark.parametrize("shared", [True, False], ids=["one input", "an input each"])
@pytest.mark.parametrize(("name", "options"), OPTIONS, ids=[f"{n}-{'-'.join(o) or 'plain'}" for n, o in OPTIONS])
def test_an_ensemble_is_one_launch_a_layer(name: str, options: dict[str, Any], shared: bool) -> None:
    """Values and gradients are those of torch.nn's modules, one after the other."""
    members, counterparts = pairs(name, options)
    x = example(name) if shared else example(name, MEMBERS)
    parameters, buffers = stack_module_state(members)
    run = vmap(lambda p, b, x: functional_call(members[0], (p, b), (x,)), (0, 0, None if shared else 0))
    layers, directions = options.get("num_layers", 1), 1 + options.get("bidirectional", False)
    batch = x.shape[-3] if options.get("batch_first") else 3

    with torch.no_grad(), launches() as seen:
        inferred = flatten(run(parameters, buffers, x))
    assert seen == [("forward", batch, directions * MEMBERS)] * layers

    with launches() as seen:
        outputs = flatten(run(parameters, buffers, x))
        value(outputs).backward()
    assert seen == [(op, batch, directions * MEMBERS) for op in ("forward", "backward") for _ in range(layers)]
    for one, other in zip(outputs, inferred, strict=True):
        assert_same_formula(one.detach(), other)
    for k, counterpart in enumerate(counterparts):
        expected = flatten(counterpart(x if shared else x[k]))
        value(expected).backward()
        for one, other in zip(outputs, expected, strict=True):
            assert_same_formula(one[k].detach(), other.detach())
        for key, p in counterpart.named_parameters():
            assert_same_formula(parameters[key].grad[k], p.grad)


@pytest.mark.parametrize(("name", "options"), OPTIONS, ids=[f"{n}-{'-'.join(o) or 'plain'}" for n, o in OPTIONS])
def test_per_sample_gradients(name: str, options: dict[str, Any]) -> None:
    """vmap(grad): one batch forward, one backward a layer; the gradients torch.nn's has for each sample."""
    ours, counterpart = make(name, 4, 5, dtype=torch.float64, **options)
    samples = example(name, MEMBERS)
    parameters = {key: p.detach() for key, p in ours.named_parameters()}
    with launches() as seen:
        got, dx = vmap(grad(lambda p, x: value(functional_call(ours, p, (x,))), argnums=(0, 1)), (None, 0))(
            parameters, samples
        )
    layers = options.get("num_layers", 1)
    assert [op for op, *_ in seen] == ["forward"] * layers + ["backward"] * layers
    for k, sample in enumerate(samples):
        sample = sample.clone().requires_grad_()
        counterpart.zero_grad()
        value(counterpart(sample)).backward()
        assert_same_formula(dx[k], sample.grad)
        for key, p in counterpart.named_parameters():
            assert_same_formula(got[key][k], p.grad)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("cell", list(cells.CELLS))
def test_per_sample_gradients_of_ragged_samples(cell: str, dtype: torch.dtype) -> None:
    """With states, lengths (x is anything past them) and resets, both directions; inside autocast, too."""
    case = Case(cell, T=5, B=2, D=3, H=4, bidirectional=True, lengths=True, reset=True, dtype=dtype)
    require("cpu", case)
    given = inputs(case)
    xs = torch.stack([given.x, given.x.flip(1)])
    lengths = torch.tensor([[2, 5], [4, 1]])
    xs.masked_fill_((torch.arange(5)[:, None] >= lengths[:, None]).unsqueeze(-1), 1e3)

    def loss(weights: list[Tensor], hx: list[Tensor], x: Tensor, lengths: Tensor) -> Tensor:
        changed = given._replace(x=x, hx=hx, weights=weights, lengths=lengths)
        return sum((o * g).sum() for o, g in zip(forward(case, changed, "cpu"), given.dout, strict=True))

    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        mapped = vmap(grad(loss, argnums=(0, 1)), (None, None, 0, 0))(given.weights, given.hx, xs, lengths)
    for k in range(2):
        alone = grad(loss, argnums=(0, 1))(given.weights, given.hx, xs[k], lengths[k])
        for one, other in zip(flatten(mapped), flatten(alone), strict=True):
            if dtype == torch.float64:
                assert_same_formula(one[k], other)
            else:  # the gates' gradients are rounded to bfloat16 once more before the products: 2^-8 of each term
                assert one.dtype == other.dtype == dtype
                torch.testing.assert_close(one[k], other, rtol=2**-5, atol=2**-6 * float(other.abs().max()))


@pytest.mark.parametrize("name", MODULES)
def test_training_a_mapped_module_is_training_on_a_larger_batch(name: str) -> None:
    """Where the sum of the samples' gradients is asked for, none of them is computed by itself."""
    ours, counterpart = make(name, 4, 5, dtype=torch.float64)
    samples = example(name, MEMBERS)
    with launches() as seen:
        value(vmap(ours)(samples)).backward()
    assert seen == [("forward", 3 * MEMBERS, 1), ("backward", 3 * MEMBERS, 1)]
    sum(value(counterpart(sample)) for sample in samples).backward()
    for p, q in zip(ours.parameters(), counterpart.parameters(), strict=True):
        assert_same_formula(p.grad, q.grad)


def test_every_module_is_covered() -> None:
    assert {name for name, _ in OPTIONS} == set(MODULES)


@pytest.mark.skipif(ops.fast_path is None, reason="this torch lends no tensors")
@pytest.mark.parametrize("name", ["LSTM", "GRU", "RNNCell"])
def test_a_wrapped_tensor_is_not_asked_for(name: str) -> None:
    """torch refuses to lend what vmap has wrapped, by a C++ exception: a millisecond, more than an ensemble takes."""
    ours, _ = make(name, 4, 5)
    cell = name in CELLS
    kind, x = (
        {"LSTM": "lstm", "GRU": "gru", "RNNCell": "rnn_tanh"}[name],
        torch.randn(3, 4) if cell else torch.randn(6, 3, 4),
    )
    times: list[float] = []

    def asked(parameters: dict[str, Tensor]) -> Tensor:
        start = time.process_time()
        extras = () if cell else (None, None)
        assert ops.fast_path(parameters, True, x, None, kind, -1 if cell else 0, *extras) is None
        times.append(time.process_time() - start)
        return parameters["weight_hh" if cell else "weight_hh_l0"]

    with torch.no_grad():
        assert ops.fast_path(dict(ours.named_parameters()), True, x, None, kind, -1 if cell else 0) is not None
        parameters, _ = stack_module_state([ours, ours])
        for _ in range(20):
            vmap(asked)(parameters)
    assert min(times) < 2e-4  # seconds; 2e-6, and 1e-3 where tensors are read
