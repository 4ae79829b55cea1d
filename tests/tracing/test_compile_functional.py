"""torch.compile(fullgraph=True) of the functional interface: values, gradients, no recompilation for another length."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from cases import Case, Inputs, inputs
from oracle import forward, require
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from fused_rnn.cells import CELLS

pytestmark = pytest.mark.compile


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def call_of(case: Case) -> Callable[..., tuple[Tensor, ...]]:
    """(x, hx, weights, lengths, reset) → outputs: a function of tensors alone, to be compiled."""

    def run(
        x: Tensor, hx: list[Tensor], weights: list[Tensor], lengths: Tensor | None, reset: Tensor | None
    ) -> tuple[Tensor, ...]:
        return tuple(forward(case, Inputs(x, weights, hx, lengths, reset, []), None))

    return run


def gradients(given: Inputs, run: Callable[..., tuple[Tensor, ...]]) -> list[Tensor]:
    tensors = [t.detach().clone().requires_grad_() for t in (given.x, *given.hx, *given.weights)]
    states = len(given.hx)
    outputs = run(tensors[0], tensors[1 : 1 + states], tensors[1 + states :], given.lengths, given.reset)
    return [*outputs, *torch.autograd.grad(outputs, tensors, given.dout)]


@pytest.mark.parametrize("save", ["gates", "recompute"])
@pytest.mark.parametrize("cell", CELLS)
def test_training_with_dynamic_length(cell: str, save: str) -> None:
    case = Case(cell, layers=2, bidirectional=True, lengths=True, reset=True, save=save)
    require("cpu", case)
    run, counter = call_of(case), CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(run, backend=counter, fullgraph=True)
    for steps, batch in ((5, 3), (9, 3), (70, 3), (33, 4), (32, 33)):
        given = inputs(case._replace(T=steps, B=batch))
        for one, other in zip(gradients(given, compiled), gradients(given, run), strict=True):
            assert torch.equal(one, other)
    # Once for the first shape, then with T, then with B dynamic; no length after that compiles again.
    assert counter.frame_count == 3


@pytest.mark.parametrize("cell", CELLS)
def test_inference_with_dynamic_length(cell: str) -> None:
    case = Case(cell)
    require("cpu", case, needs_grad=False)
    run, counter = call_of(case), CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(run, backend=counter, fullgraph=True)
    with torch.no_grad():
        for steps in (5, 9, 70):
            given = inputs(case._replace(T=steps))
            call = (given.x, given.hx, given.weights, None, None)
            for one, other in zip(compiled(*call), run(*call), strict=True):
                assert torch.equal(one, other)
    assert counter.frame_count == 2


def test_inductor() -> None:
    """The default compiler, which lays out memory as it likes around the op, and reuses what it thinks is free."""
    case = Case("lstm", layers=2, bidirectional=True)
    require("cpu", case)
    run = call_of(case)

    def around(x: Tensor, *rest: object) -> tuple[Tensor, ...]:
        y, *states = run((x * 2).transpose(0, 1).contiguous().transpose(0, 1), *rest)
        return (y.relu_(), *states)

    compiled = torch.compile(around, fullgraph=True)
    given = inputs(case)
    for one, other in zip(gradients(given, compiled), gradients(given, around), strict=True):
        torch.testing.assert_close(one, other)


def test_autocast() -> None:
    case = Case("gru")
    require("cpu", case)
    run, given = call_of(case), inputs(case)
    call = (given.x, given.hx, given.weights, None, None)
    with torch.autocast("cpu", torch.bfloat16):
        compiled = torch.compile(run, backend="aot_eager", fullgraph=True)(*call)
        for one, other in zip(compiled, run(*call), strict=True):
            assert one.dtype == torch.bfloat16
            assert torch.equal(one, other)
