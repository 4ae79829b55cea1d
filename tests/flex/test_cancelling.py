"""Differences of products that are equal: 0, as in PyTorch, and not what a fused multiply-add leaves of a rounding."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import fused_rnn
from fused_rnn import ops
from fused_rnn.cells.program import parse
from fused_rnn.cuda import printer as cuda
from fused_rnn.triton import printer as triton
from tests.common.program_calls import make_call
from tests.common.programs import LEAKY

SPELLINGS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "difference": lambda a, b: a * a - b * b,
    "squares": lambda a, b: a**2 - b.square(),
    "the other first": lambda a, b: -(b * b) + a * a,
    "a negative factor": lambda a, b: a * a + b * (-b),
    "addcmul": lambda a, b: torch.addcmul(a * a, b, b, value=-1),
    "twice": lambda a, b: torch.addcmul(2 * a * a, b, b, value=-2),
    "gradients": lambda a, b: a * (1 - a * a) - b * (1 - b * b),
}


def text_of(spelling: str, both_read: bool = False) -> str:
    def step(x: Any, r: Any, s: Any, p: Any) -> Tensor:
        one, two = x[0] * x[0], x[1] * x[1]
        made: Tensor = SPELLINGS[spelling](*x).sqrt()
        return made + (one.sin() + two.cos()) * 0 if both_read else made

    return fused_rnn.cell(gates=2, recurrent=False)(step).descriptor().name


@pytest.mark.skipif(ops.MISSING is not None, reason=str(ops.MISSING))
@pytest.mark.parametrize("both_read", [False, True])
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_on_the_cpu(spelling: str, both_read: bool) -> None:
    for dtype in (torch.float32, torch.float64):
        call = make_call(text_of(spelling, both_read), T=4, B=6, H=64, hx=False, dtype=dtype)
        for w in call.weights:
            w[64:] = w[:64]
        for save in ("none", "gates"):
            y = ops.forward(*call._replace(save=save))[0]
            assert torch.equal(y, torch.zeros_like(y)), dtype


def test_what_is_printed() -> None:
    program = parse(text_of("difference"))
    assert cuda.struct(program).count("M::product(a[") == 2
    assert triton.source(program).count(", 0.0)\n") == 2
    assert "M::product" not in cuda.struct(parse(LEAKY))
