"""Every operation that a program may hold, against torch's, over wide ranges and at special values."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fused_rnn import ops
from fused_rnn.cells.program import BINARY, PREFIX, TERNARY, UNARY

pytestmark = pytest.mark.skipif(ops.MISSING is not None, reason=str(ops.MISSING))
DTYPES = [torch.float32, torch.float64]
SPECIAL = [
    *(
        0.0,
        -0.0,
        1.0,
        -1.0,
        math.inf,
        -math.inf,
        math.nan,
        2.0,
        0.5,
        -0.5,
        1e-30,
        -1e-30,
        1e30,
        -1e30,
        3e38,
        -3e38,
        1e-37,
    ),
    *(88.0, 88.7, 89.0, 709.0, 710.0, -87.0, -88.0, -104.0, -709.0, 39.9, 40.0, 40.1, 20.0, -20.0, 4194304.0, 1e6, 3.0),
]
# In eps of the result: our float polynomials, and what a compiler fuses into one rounding.
MOST_ULP = {torch.float32: 2.5, torch.float64: 2.5}


def run(op: str, args: list[Tensor]) -> Tensor:
    """One operation as the formula of a cell whose states are its arguments, by the loop itself."""
    dtype, n = args[0].dtype, args[0].numel()
    states = [torch.zeros(1, 1, n, dtype=dtype), *(a.view(1, 1, n) for a in args)]
    names, values = " ".join("habc"[: len(states)]), " ".join(str(2 + i) for i in range(len(args)))
    gradients = " ".join(["0"] * len(states))
    text = f"{PREFIX}{op}|1 0 0|{names}||{op} {values}>{1 + len(states)} {values};|>0;{gradients};"
    weight = torch.zeros(n, 1, dtype=dtype)
    y, *_ = ops.forward(
        torch.zeros(1, 1, 1, dtype=dtype), [weight], states, None, None, text, [1], "none", False, False
    )
    return y.view(n)


def draw(number: int, scale: float, seed: int) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    return torch.randn(number, generator=random, dtype=torch.float64) * scale


def numbers() -> Tensor:
    """At special places, near 0, 1 and -1, at multiples of pi / 2, and of every size."""
    sizes = 10.0 ** draw(3000, 12, 1).clamp(-36, 37)
    turns = (draw(1000, 1000, 2)).round() * (math.pi / 2)
    near = [draw(2000, scale, seed) for seed, scale in enumerate((1, 10, 100, 0.01), 3)]
    around = [place + draw(1000, 1e-3, 7) for place in (1.0, -1.0, 0.55, 0.93)]
    return torch.cat([torch.tensor(SPECIAL, dtype=torch.float64), *near, *around, turns, sizes, -sizes])


def assert_close(made: Tensor, torchs: Tensor, exact: Tensor, scale: Tensor, dtype: torch.dtype) -> None:
    """Where torch has NaN or an infinity there is one, elsewhere the error is a few ulp; a denormal number may be 0."""
    odd = ~torchs.isfinite()
    torch.testing.assert_close(made[odd], torchs[odd], rtol=0, atol=0, equal_nan=True)
    limit = torch.finfo(dtype)
    assert made[~odd].isfinite().all()
    error = (made.double() - exact.double()).abs() - limit.tiny * 2
    allowed = MOST_ULP[dtype] * limit.eps * scale.double()
    bad = ~odd & (error > allowed)
    assert not bad.any(), list(zip(made[bad].tolist(), torchs[bad].tolist(), strict=True))[:5]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", UNARY)
def test_of_one(op: str, dtype: torch.dtype) -> None:
    x = numbers().to(dtype)
    torchs, made = UNARY[op](x), run(op, [x])
    exact = UNARY[op](x.double())
    assert_close(made, torchs, exact, exact.abs(), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", [*BINARY, *TERNARY])
def test_of_more(op: str, dtype: torch.dtype) -> None:
    special = torch.tensor(SPECIAL, dtype=torch.float64)
    a = torch.cat([special.repeat_interleave(len(special)), draw(5000, 3, 1)]).to(dtype)
    b = torch.cat([special.repeat(len(special)), draw(5000, 3, 2)]).to(dtype)
    c = torch.cat([special.repeat(len(special)).roll(3), draw(5000, 1, 3)]).to(dtype)
    function: Callable[..., Tensor] = (BINARY | TERNARY)[op]
    if op == "fma":  # a product that is too large alone need not be with the sum
        there = (a * b).isfinite() | ~(a.isfinite() & b.isfinite())
        a, b, c = a[there], b[there], c[there]
    args = [a, b, c][: 3 if op in TERNARY else 2]
    torchs, made = function(*args), run(op, args)
    scale = torchs.abs()
    if op == "tanh_backward":
        scale = a.abs() * (1 + b * b)
    elif op == "fma":
        scale = (a * b).abs() + c.abs()
    assert_close(made, torchs, torchs, scale, dtype)


def test_constants() -> None:
    """As Python writes them, whatever the locale."""
    for value in (0.1, -2.5e-07, 1e22, 3.0, float("inf"), float("nan"), -0.0, 1 / 3):
        text = f"{PREFIX}c|1 0 0|h||const {value!r}>2;|const 0.0>3;3;"
        x, w = torch.zeros(1, 1, 1, dtype=torch.float64), torch.zeros(3, 1, dtype=torch.float64)
        made = ops.forward(x, [w], [], None, None, text, [1], "none", False, False)[0].view(3)
        torch.testing.assert_close(made, torch.full((3,), value, dtype=torch.float64), rtol=0, atol=0, equal_nan=True)


# Two operations that the loop runs as one: the same numbers to the last bit, for each is rounded.
JOINED: dict[str, tuple[str, Callable[[Tensor, Tensor, Tensor], Tensor]]] = {
    "a sum of three": ("add 2 3,add 5 4", lambda a, b, c: (a + b) + c),
    "a sum of three from the right": ("add 2 3,add 4 5", lambda a, b, c: c + (a + b)),
    "a sum scaled": ("add 2 3,mul 5 4", lambda a, b, c: (a + b) * c),
    "a difference scaled": ("sub 2 3,mul 4 5", lambda a, b, c: c * (a - b)),
    "a product of three": ("mul 2 3,mul 5 4", lambda a, b, c: (a * b) * c),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", JOINED)
def test_two_operations_as_one(name: str, dtype: torch.dtype) -> None:
    code, function = JOINED[name]
    a, b, c = (draw(77, 3.0, seed).to(dtype) for seed in (1, 2, 3))
    states = [torch.zeros(1, 1, 77, dtype=dtype), *(v.view(1, 1, 77) for v in (a, b, c))]
    text = f"{PREFIX}joined|1 0 0|h a b c||{code}>6 2 3 4;|>0;0 0 0 0;"
    x, weight = torch.zeros(1, 1, 1, dtype=dtype), torch.zeros(77, 1, dtype=dtype)
    y, *_ = ops.forward(x, [weight], states, None, None, text, [1], "none", False, False)
    assert torch.equal(y.view(77), function(a, b, c))
