"""Streams of narrow weights beside modules of what these stand for."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from typing import Any

import torch
from cuda_cases import _Tf32Products
from tolerances import allowed, error
from torch import Tensor

from fused_rnn.gpu.narrow import narrowed, widened


def rounded(module: Any, weights: str, dtype: torch.dtype) -> Any:
    """The module with what its narrow weights stand for, by the plain loop."""
    other = copy.deepcopy(module).to(dtype)
    other.backend = "reference"
    with torch.no_grad():
        for theirs, ours in zip(other.parameters(), module.parameters(), strict=True):
            if ours.dim() == 2:
                values, scale = narrowed(ours, weights)
                theirs.copy_(widened(values, None if scale is None else scale.double(), torch.float64))
    return other


def by_steps(stream: Any, x: Tensor) -> Tensor:
    """A chunk, and then step by step."""
    half = len(x) // 2
    return torch.cat([stream.steps(x[:half]), *(stream.step(x_t)[None] for x_t in x[half:])])


def flat(outputs: Any) -> list[Tensor]:
    y, hx = outputs
    return [y, *(hx if isinstance(hx, tuple) else [hx])]


def assert_as_good_as_rounded(stream: Any, y: Tensor, module: Any, weights: str, precision: str, x: Tensor) -> None:
    """y and the stream's state behind x, as good as the plain loop in the module's dtype on the rounded weights."""
    ours = [y, *stream.state_dict().values()]
    with torch.no_grad(), _Tf32Products() if precision == "tf32" else nullcontext():
        plain = rounded(module, weights, x.dtype)(x)
    with torch.no_grad():
        exact = rounded(module, weights, torch.float64)(x.double())
    for one, own, right in zip(ours, flat(plain), flat(exact), strict=True):
        assert error(one, right) <= allowed(own, right)
