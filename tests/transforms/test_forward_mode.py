"""Forward-mode differentiation of the modules, beside torch.nn's, whose float64 kernels have it, too."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from counterparts import CELLS, MODULES, flatten, make
from tolerances import assert_same_formula
from torch import Tensor
from torch.func import functional_call, hessian, jacfwd, jacrev, jvp, vmap


def problem(name: str, **options: Any) -> tuple[Any, Any, Tensor, dict[str, Tensor]]:
    ours, counterpart = make(name, 2, 3, dtype=torch.float64, **options)
    x = torch.randn(3, 2, dtype=torch.float64) if name in CELLS else torch.randn(4, 3, 2, dtype=torch.float64)
    return ours, counterpart, x, {key: p.detach() for key, p in ours.named_parameters()}


@pytest.mark.parametrize("name", MODULES)
def test_jvp(name: str) -> None:
    """Along a direction of input and parameters; mapped over several directions, too."""
    options = {} if name in CELLS else {"num_layers": 2, "bidirectional": True}
    ours, counterpart, x, parameters = problem(name, **options)
    tangents = (torch.randn_like(x), {key: torch.randn_like(p) for key, p in parameters.items()})

    def push(module: Any, dx: Tensor) -> tuple[Any, Any]:
        return jvp(lambda x, p: tuple(flatten(functional_call(module, p, (x,)))), (x, parameters), (dx, tangents[1]))

    for one, other in zip(flatten(push(ours, tangents[0])), flatten(push(counterpart, tangents[0])), strict=True):
        assert_same_formula(one, other)
    several = torch.stack([tangents[0], -2 * tangents[0]])
    mapped = vmap(lambda dx: push(ours, dx)[1])(several)
    for k, dx in enumerate(several):
        for one, other in zip(flatten(mapped), flatten(push(ours, dx)[1]), strict=True):
            assert_same_formula(one[k], other)


@pytest.mark.parametrize("name", MODULES)
def test_jacobian_and_hessian(name: str) -> None:
    ours, _, x, _ = problem(name)

    def run(x: Tensor) -> Tensor:
        return flatten(ours(x))[0].square().sum()

    assert_same_formula(jacfwd(run)(x), jacrev(run)(x))
    assert_same_formula(hessian(run)(x), jacrev(jacrev(run))(x))


@pytest.mark.parametrize("name", MODULES)
def test_a_backend_that_cannot_says_so(name: str) -> None:
    ours, _, x, _ = problem(name, extras={"backend": "cpu"})
    with pytest.raises(NotImplementedError, match=r"cpu: (it has no forward-mode derivative|the compiled extension)"):
        jvp(lambda x: flatten(ours(x))[0], (x,), (x,))


@pytest.mark.parametrize("name", [name for name in MODULES if name not in CELLS])
def test_what_would_keep_little_for_backward(name: str) -> None:
    ours, counterpart, x, _ = problem(name, extras={"save": "recompute"})
    tangents = [jvp(lambda x, module=each: flatten(module(x))[0], (x,), (x,))[1] for each in (ours, counterpart)]
    assert_same_formula(*tangents)
