"""Steps at random: 2,000 of them, each program and the CPU's loops over it against autograd."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

import fused_rnn
from fused_rnn import ops
from tests.flex.steps import agrees_with_autograd, loops_agree_with_autograd

Function = Callable[..., Tensor]

# Of numbers that stay near one, and away from where torch's own gradient is infinite.
UNARY: tuple[Function, ...] = (
    torch.sigmoid, torch.tanh, torch.relu, torch.sin, torch.cos, torch.erf, torch.abs, torch.neg, torch.sign,
    F.softplus, F.gelu, F.silu, F.elu, F.leaky_relu, F.hardtanh, F.logsigmoid, torch.square, torch.expm1,
    lambda a: torch.exp(-a * a), lambda a: torch.log(a * a + 0.5), lambda a: torch.sqrt(a * a + 0.5),
    lambda a: torch.rsqrt(a * a + 0.5), lambda a: torch.log1p(a * a), lambda a: 1 / (1 + a * a),
    lambda a: a.clamp(-0.8, 0.9), lambda a: 1 - a, lambda a: 0.3 * a,
    lambda a: (a * a + 0.5) ** 1.5, lambda a: a**3, lambda a: a.detach(), lambda a: a.clone().mul_(0.5),
    lambda a: a.mean(-1, keepdim=True).expand_as(a), lambda a: a - a.mean(-1, keepdim=True),
    lambda a: a * torch.rsqrt(a.var(-1, correction=0, keepdim=True) + 0.5), lambda a: a + 0.3 * a.sum(-1, keepdim=True),
)  # fmt: skip
BINARY: tuple[Function, ...] = (
    torch.add, torch.sub, torch.mul, torch.maximum, torch.minimum, lambda a, b: a / (1 + b * b),
    lambda a, b: torch.pow(a * a + 0.5, torch.tanh(b)), lambda a, b: torch.lerp(a, b, 0.3), lambda a, b: (a > b) * a,
    lambda a, b: torch.where(a * 1.3 > b, torch.sin(a), b * b), lambda a, b: torch.addcmul(a, a, b, value=0.5),
    lambda a, b: torch.where((a < b + 0.1) & (a > -1), a, -b), lambda a, b: torch.clamp(a, max=b + 0.2),
)  # fmt: skip
TERNARY: tuple[Function, ...] = (
    lambda a, b, c: torch.where(a > 0.123, b, c), lambda a, b, c: a * b + c, lambda a, b, c: c - a * b, torch.lerp,
    lambda a, b, c: a * b * c,
)  # fmt: skip
FUNCTIONS = [(f, 1) for f in UNARY] + [(f, 2) for f in BINARY] * 2 + [(f, 3) for f in TERNARY] * 3

instruction = st.tuples(st.sampled_from(range(len(FUNCTIONS))), *[st.integers(0, 40)] * 3)


def value(function: Function, args: Sequence[Tensor]) -> Tensor:
    """Of at most about one, so that no chain of them grows without end."""
    made = function(*args)
    return torch.tanh(made) * 1.5 if function in (torch.square, torch.mul, torch.expm1) else made


@settings(max_examples=2000, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck), database=None)
@given(
    code=st.lists(instruction, min_size=1, max_size=14),
    gates=st.integers(1, 3),
    states=st.integers(1, 3),
    params=st.integers(0, 2),
    recurrent=st.booleans(),
    picks=st.tuples(*[st.integers(0, 40)] * 3),
    seed=st.integers(0, 1000),
)
def test_programs_of_random_steps(
    code: list[tuple[int, int, int, int]],
    gates: int,
    states: int,
    params: int,
    recurrent: bool,
    picks: tuple[int, int, int],
    seed: int,
) -> None:
    @fused_rnn.cell(gates=gates, states=("h", "c", "m")[:states], params=("a", "b")[:params], recurrent=recurrent)
    def step(x: Any, r: Any, s: Any, p: Any) -> tuple[Tensor, ...]:
        values = [own + other for own, other in zip(x, r, strict=True)] if recurrent else list(x)
        values += [*s, *p, *x[:1], *(r[:1] if recurrent else ())]
        for which, *places in code:
            function, count = FUNCTIONS[which]
            values.append(value(function, [values[place % len(values)] for place in places[:count]]))
        return tuple(values[-1 - pick % len(values)] + 0.1 * s[i] for i, pick in enumerate(picks[:states]))

    agrees_with_autograd(step, seed=seed, rows=2, units=3, rtol=1e-6)
    if ops.MISSING is None:
        loops_agree_with_autograd(step, seed=seed, rtol=1e-6)
