"""Another default device than the tensors': it is the user's for what he makes, and of nothing that we make."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from counterparts import CELLS, SEQUENCES, flatten, make
from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence

OTHER = "meta"  # it has no numbers: whatever lands there is found out


@contextmanager
def as_default() -> Iterator[None]:
    torch.set_default_device(OTHER)
    try:
        yield
    finally:
        torch.set_default_device(None)


DEFAULTS = {"set_default_device": as_default, "context": lambda: torch.device(OTHER)}


def everything(name: str, backend: str | None) -> dict[str, Any]:
    """Every form of a call: name → a function without arguments."""
    module = make(name, 3, 4, 2, bidirectional=True, extras={"backend": backend}, dtype=torch.float64)[0]
    stream = make(name, 3, 4, extras={"backend": backend}, dtype=torch.float64)[0].stream(3)
    x = torch.randn(5, 3, 3, dtype=torch.float64)
    packed = pack_padded_sequence(x, [2, 5, 3], enforce_sorted=False)
    lengths, reset = torch.tensor([2, 5, 3]), torch.rand(5, 3) < 0.3

    def gradients(**kwargs: Any) -> list[Tensor]:
        return list(torch.autograd.grad(module(x, **kwargs)[0].square().sum(), list(module.parameters())))

    def streamed() -> Any:
        stream.reset()
        stream.refresh()
        return stream.step(x[0]), stream.steps(x)

    def twice() -> Any:
        z = x.clone().requires_grad_()
        (dx,) = torch.autograd.grad(module(z)[0].square().sum(), z, create_graph=True)
        return torch.autograd.grad(dx.square().sum(), z)

    def per_sample() -> Any:
        parameters = {key: p.detach() for key, p in module.named_parameters()}

        def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
            return torch.func.functional_call(module, parameters, (x.unsqueeze(1),))[0].square().sum()

        return list(torch.func.vmap(torch.func.grad(loss), (None, 1))(parameters, x).values())

    calls: dict[str, Any] = {
        "padded": lambda: module(x),
        "packed": lambda: module(packed),
        "unbatched": lambda: module(x[:, 0], lengths=3),
        "list": lambda: module(x, lengths=[2, 5, 3]),
        "tensor": lambda: module(x, lengths=lengths),
        "gradients": lambda: gradients(lengths=[2, 5, 0]),
        "twice": twice,
        "stream": streamed,
    }
    if backend != "torch":  # its kernels know no reset and no vmap
        calls |= {"reset": lambda: gradients(reset=reset), "per sample": per_sample}
    return calls


@pytest.mark.parametrize("default", DEFAULTS.values(), ids=DEFAULTS)
@pytest.mark.parametrize("backend", [None, "reference", "torch"])
@pytest.mark.parametrize("name", SEQUENCES)
def test_sequences(name: str, backend: str | None, default: Any) -> None:
    for form, call in everything(name, backend).items():
        expected = call()
        with default():
            got = call()
        for one, other in zip(flatten(got), flatten(expected), strict=True):
            assert torch.equal(one, other), form


@pytest.mark.parametrize("default", DEFAULTS.values(), ids=DEFAULTS)
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("name", CELLS)
def test_cells(name: str, grad: bool, default: Any) -> None:
    module, x = make(name, 3, 4)[0], torch.randn(2, 3)
    with torch.set_grad_enabled(grad):
        expected = module(x)
        with default():
            got = module(x)
    for one, other in zip(flatten(got), flatten(expected), strict=True):
        assert torch.equal(one, other)
