"""What a step becomes: every operation against torch, forward and backward, and what is refused."""

from __future__ import annotations

import copy
import math
import pickle
import random
import subprocess
import sys
import textwrap
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import fused_rnn
from fused_rnn.cells.program import Program, parse
from tests.flex.steps import agrees_with_autograd

Function = Callable[..., Any]

UNARY: dict[str, Function] = {
    **{name: getattr(torch, name) for name in (
        "neg", "abs", "sign", "sgn", "exp", "exp2", "expm1", "square", "sigmoid", "tanh", "relu", "erf", "sin", "cos",
        "tan", "sinh", "cosh", "isnan", "isinf", "isfinite", "positive", "reciprocal", "clone", "detach", "logical_not",
    )},
    **{name: getattr(F, name) for name in (
        "gelu", "silu", "softplus", "logsigmoid", "mish", "elu", "selu", "celu", "leaky_relu", "relu6", "hardtanh",
        "hardsigmoid", "hardswish", "softsign", "tanhshrink", "softshrink", "hardshrink",
    )},
    "log": lambda x: torch.log(x.abs() + 0.1),
    "log2": lambda x: torch.log2(x.abs() + 0.1),
    "log10": lambda x: torch.log10(x.abs() + 0.1),
    "log1p": lambda x: torch.log1p(x.abs()),
    "sqrt": lambda x: torch.sqrt(x.abs() + 0.1),
    "rsqrt": lambda x: torch.rsqrt(x.abs() + 0.1),
    "gelu of tanh": lambda x: F.gelu(x, approximate="tanh"),
    "softplus steep": lambda x: F.softplus(x, beta=3.0, threshold=2.0),
    "elu 0.5": lambda x: F.elu(x, alpha=0.5),
    "threshold": lambda x: F.threshold(x, 0.3, -2.0),
    "clamp": lambda x: x.clamp(-0.5, 0.7),
    "clamp low": lambda x: x.clamp(min=-0.5),
    "clip high": lambda x: x.clip(max=0.5),
    "number - x": lambda x: 1 - x,
    "number / x": lambda x: 2 / (x * x + 1),
    "x / number": lambda x: x / 3 + x / 4,
    "number ** x": lambda x: 2**x,
    **{f"x ** {e}": lambda x, e=e: (x.abs() + 0.1) ** e for e in (0, 1, 2, 3, 0.5, -0.5, -1, -2, 2.5, -1.7)},
    "x in a copy": lambda x: x.clone().mul_(2).add_(1).tanh_(),
    "to float": lambda x: (x > 0).float() * x,
    "constants": lambda x: torch.ones_like(x) * x + torch.full_like(x, 0.3) + x.new_ones(()) - torch.zeros_like(x),
    "masked": lambda x: x.masked_fill(x > 0.5, 2.0),
    "mask and mask": lambda x: torch.where((x > -0.5) & ~(x > 0.5) | (x < -1), x * 2, x * x),
    "mask xor mask": lambda x: torch.where((x > -0.5) ^ (x > 0.5), x * 2, x * x),
    "logical": lambda x: torch.where(torch.logical_and(x > -0.5, torch.logical_or(x < 0, x > 1)), x, 3 * x),
    "widened": lambda x: (x.float() * 1.0).to(x.dtype) if x.dtype.itemsize < 8 else x,
    "new tensor": lambda x: x * x.new_tensor(0.1) + 0.1 + torch.zeros_like(x).fill_(0.25),
    "int32": lambda x: (x > 0).int() * x + (x > 0).long(),
    "nothing changes": lambda x: x.neg().neg() * 1 + 0 - 0,
    "twice itself": lambda x: x * x + x * x,
}  # fmt: skip
BINARY: dict[str, Function] = {
    **{name: getattr(torch, name) for name in (
        "add", "sub", "rsub", "mul", "div", "maximum", "minimum", "lt", "le", "gt", "ge", "eq", "ne",
    )},
    "add alpha": lambda x, y: torch.add(x, y, alpha=0.7),
    "sub alpha": lambda x, y: torch.sub(x, y, alpha=0.7),
    "pow": lambda x, y: torch.pow(x.abs() + 0.1, y),
    "lerp": lambda x, y: torch.lerp(x, y, 0.3),
    "lerp by a tensor": lambda x, y: torch.lerp(x, y, torch.sigmoid(x)),
    "addcmul": lambda x, y: torch.addcmul(x, x, y, value=0.5),
    "addcdiv": lambda x, y: torch.addcdiv(x, y, x.abs() + 1, value=0.5),
    "where": lambda x, y: torch.where(x > y, x, y * 2),
    "clamp by a tensor": lambda x, y: torch.clamp(x, min=y),
    "logaddexp": torch.logaddexp,
    "maximum of relus": lambda x, y: torch.maximum(torch.relu(x), torch.relu(y)),  # ties at zero
    "in place": lambda x, y: (x * 1.5).sub_(y).sigmoid_(),
}  # fmt: skip


@pytest.mark.parametrize("name", UNARY)
def test_unary(name: str) -> None:
    function = UNARY[name]

    @fused_rnn.cell(gates=1)
    def step(x: Any, r: Any, s: Any, p: Any) -> Tensor:
        return function(x[0] + r[0]) + s.h  # type: ignore[no-any-return]

    # torch's gradient of hardsigmoid has a sixth in float32, in float64 too.
    agrees_with_autograd(step, rtol=1e-7 if name in ("hardsigmoid", "hardswish") else 1e-8)


@pytest.mark.parametrize("name", BINARY)
def test_binary(name: str) -> None:
    function = BINARY[name]

    @fused_rnn.cell(gates=2, params=("a",))
    def step(x: Any, r: Any, s: Any, p: Any) -> Tensor:
        return function(x[0] + r[0], x[1]) * r[1] + function(s.h, p.a)  # type: ignore[no-any-return]

    agrees_with_autograd(step)


@pytest.mark.parametrize("name", sorted({*UNARY, *BINARY}))
def test_special_values(name: str) -> None:
    """NaN, infinities, zeros and ends of ranges: forward as torch's, bit for bit where torch's formula is the same."""
    ends = [0.5, 0.7, 1.0, 3.0, 6.0, 20.0, 25.0, 100.0, math.inf]
    special = torch.tensor([0.0, -0.0, math.nan, *ends, *(-end for end in ends)])
    function = UNARY.get(name) or BINARY[name]
    values = [v.reshape(-1).double() for v in torch.meshgrid(special, special, indexing="ij")][: 1 + (name in BINARY)]

    @fused_rnn.cell(gates=len(values), recurrent=False)
    def step(x: Any, r: Any, s: Any, p: Any) -> Tensor:
        return function(*x) + 0.0 * torch.zeros_like(s.h)  # type: ignore[no-any-return]

    rows = [v.unsqueeze(0) for v in values]
    (made,) = step.program.step(rows, (), [torch.zeros_like(rows[0])], ())
    torch.testing.assert_close(made, function(*rows).double(), rtol=1e-12, atol=1e-12, equal_nan=True)


def program(step: Function, **options: Any) -> Program:
    return fused_rnn.cell(**{"gates": 1, **options})(step).program


def test_sides_are_joined_where_only_their_sum_is_read() -> None:
    assert program(lambda x, r, s, p: x[0] + r[0], gates=1).apart == 0
    assert program(lambda x, r, s, p: r[0] + x[0] * 1, gates=1).apart == 0
    assert program(lambda x, r, s, p: x[0] + p.a * s.h + r[0], params=("a",)).apart == 0
    assert program(lambda x, r, s, p: r[0] + (p.a * s.h + x[0] + 1), params=("a",)).apart == 0
    assert program(lambda x, r, s, p: x[0] * r[0]).apart == 1
    assert program(lambda x, r, s, p: x[0] + r[0] + x[0]).apart == 1
    assert program(lambda x, r, s, p: x[1] + r[1], gates=3).apart == 0  # gates that nobody reads
    assert program(lambda x, r, s, p: x[0] + r[0] + x[1] * r[1] + x[2] + r[2], gates=3).apart == 2
    assert program(lambda x, r, s, p: x[0] + x[1], gates=2, recurrent=False).apart == 0


def test_what_is_kept() -> None:
    """As few values as will do: none that the states and params tell."""
    assert program(lambda x, r, s, p: torch.tanh(x[0] + r[0])).saved == 0  # h itself
    assert program(lambda x, r, s, p: x[0] + r[0] + torch.tanh(s.h)).saved == 0  # h before
    assert program(lambda x, r, s, p: torch.exp(torch.tanh(x[0] + r[0]))).saved == 1  # exp's is h; tanh's is not
    assert program(lambda x, r, s, p: torch.sin(x[0] + r[0]) * s.h).saved == 1
    three = program(lambda x, r, s, p: (torch.sin(x[0] + r[0]) + torch.cos(x[0] + r[0]) ** 2) * 0.5)
    assert three.saved == 1  # the sum, of which both are made again
    assert len(three.forward.outputs[1]) == 1 and three.forward.outputs[1][0] == 0


def test_constants_are_those_of_the_closure() -> None:
    number, tensor = 0.25, torch.tensor(0.5)
    made = program(lambda x, r, s, p: (x[0] + r[0]) * number * (tensor * 2) + torch.tensor([2.0]) * s.h)
    assert {i.value for i in made.forward.code if i.op == "const"} <= {0.25, 1.0, 0.5, 2.0}
    (after,) = made.step([torch.ones(1, 2)], [torch.ones(1, 2)], [torch.ones(1, 2)], ())
    torch.testing.assert_close(after, torch.full((1, 2), 2.5))


WEIGHT, VECTOR, LAYER = torch.randn(7, requires_grad=True), torch.randn(7), torch.nn.Linear(7, 7)
OTHER = torch.randn(6)  # broadcast with no size that a step is traced on


def branch(x: Any, r: Any, s: Any, p: Any) -> Any:
    if s.h.sum() > 0:
        return x[0]
    return r[0]


def compare(x: Any, r: Any, s: Any, p: Any) -> Any:
    return x[0] if s.h > 0 else r[0]


COUNTER, HALF = torch.zeros(()), torch.tensor(0.5)


def without_gradient(x: Any, r: Any, s: Any, p: Any) -> Any:
    with torch.no_grad():
        z = torch.sigmoid(x[0] + r[0])
    return z * s.h + x[0]


class Straight(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.sign()

    @staticmethod
    def backward(ctx: Any, d: Tensor) -> Tensor:  # type: ignore[override]
        return d


def epsilon(x: Any, r: Any, s: Any, p: Any) -> Any:
    return (x[0] + r[0]) / (s.h.abs() + torch.finfo(s.h.dtype).eps)


def after_a_factory(x: Any, r: Any, s: Any, p: Any) -> Any:
    a = torch.zeros_like(s.h)
    a.detach().add_(x[0])
    return a


def view(x: Any, r: Any, s: Any, p: Any) -> Any:
    a = x[0] + r[0]
    a.view_as(s.h).mul_(2)
    return a


def original(x: Any, r: Any, s: Any, p: Any) -> Any:
    a = x[0] + r[0]
    b = a.expand_as(s.h)
    a.mul_(2)
    return b


AGAIN = "the step did something else when it ran again"
REFUSED: dict[str, tuple[Function, str]] = {
    "a size": (lambda x, r, s, p: x[0] / math.sqrt(x[0].shape[-1]), AGAIN),
    "the batch": (lambda x, r, s, p: x[0] * x[0].size(0), AGAIN),
    "a value": (lambda x, r, s, p: x[0] * s.h.tolist()[0][0], AGAIN),
    "numpy": (lambda x, r, s, p: x[0] if (x[0] + r[0]).numpy().max() > 1 else r[0], AGAIN),
    "Python's random numbers": (lambda x, r, s, p: x[0] * random.random(), AGAIN),
    "torch's random numbers": (lambda x, r, s, p: x[0] * torch.rand(()), "it draws random numbers"),
    "noise": (lambda x, r, s, p: x[0] + torch.randn_like(s.h), "it draws random numbers"),
    "a dtype": (lambda x, r, s, p: x[0] * (1 if x[0].dtype == torch.float64 else 5), AGAIN),
    "a dtype's smallest step": (epsilon, AGAIN),
    "NumPy's": (lambda x, r, s, p: torch.from_numpy(np.tanh((x[0] * 1).numpy())) * s.h, "by other means than torch's"),
    "bits of a number": (lambda x, r, s, p: ~(x[0] > 0).int() * r[0], "bitwise_not.default: expected booleans"),
    "bits of two": (lambda x, r, s, p: ((x[0] > 0).int() ^ 2) * r[0], "bitwise_xor.Scalar: expected booleans"),
    "narrow integers": (lambda x, r, s, p: (x[0] > 0).to(torch.int8) * r[0], "_to_copy makes torch.int8"),
    "out": (lambda x, r, s, p: torch.sigmoid(x[0], out=s.h), "does not take by name out"),
    "two dtypes": (lambda x, r, s, p: F.prelu(x[0], torch.ones(1).half()), "torch says "),
    "a view of a factory's": (after_a_factory, "under another view"),
    "a counter": (lambda x, r, s, p: x[0] * COUNTER.add_(1), "changes a tensor outside of the step"),
    "a Function": (lambda x, r, s, p: Straight.apply(x[0]), "it calls a torch.autograd.Function"),
    "a view": (view, "mul_ changes in place a tensor that the step also has under another view"),
    "what has a view": (original, "mul_ changes in place a tensor that the step also has under another view"),
    "detached in place": (lambda x, r, s, p: (x[0] * 1.5).detach().mul_(2), "under another view"),
    "an argument's view": (lambda x, r, s, p: s.h.view_as(x[0]).mul_(2), "under another view"),
    "a list": (lambda x, r, s, p: torch.stack([x[0], r[0]]), "that a cell can run; it changes the shape"),
    "growing in place": (lambda x, r, s, p: torch.zeros(()).add_(x[0]), "add_ would give a tensor [] the shape [B, H]"),
    "minus a condition": (lambda x, r, s, p: x[0] * ((x[0] > 0) - (r[0] > 0)), "expected numbers, got conditions"),
    "branch on a sum": (branch, "sum: dim: got None, expected -1: a cell sees all units of a row, and no other rows"),
    "branch on a tensor": (compare, "it branches on the value of a tensor; use torch.where"),
    "item": (lambda x, r, s, p: x[0] * (s.h * 0 + 1)[0, 0].item(), "select is no operation"),
    "unknown op": (lambda x, r, s, p: torch.erfinv(s.h), "erfinv is no operation that a cell can run"),
    "too many states": (lambda x, r, s, p: (s.h, s.h), "the step returned 2 values, expected 1: h"),
    "a string": (lambda x, r, s, p: "h", "the step returned str for state 'h', expected a tensor"),
    "a slice": (lambda x, r, s, p: x[0][:, :2], "slice is no operation"),
    "a new dimension": (lambda x, r, s, p: x[0].unsqueeze(1), "unsqueeze makes a tensor [B, 1, H], expected [B, H]"),
    "a product": (lambda x, r, s, p: LAYER(s.h), "'LAYER.weight' requires a gradient"),
    "a gradient": (lambda x, r, s, p: s.h * WEIGHT, "'WEIGHT' requires a gradient, which a step does not give"),
    "a gradient apart": (lambda x, r, s, p: s.h * (WEIGHT * 2), "'WEIGHT' requires a gradient"),
    "a vector": (lambda x, r, s, p: s.h * VECTOR, "'VECTOR' has shape [7]; a step closes over single numbers"),
    "another vector": (lambda x, r, s, p: s.h * OTHER, "'OTHER' has shape [6]; a step closes over single numbers"),
    "a vector apart": (lambda x, r, s, p: s.h * (VECTOR + 1), "'VECTOR' has shape [7]"),
    "another dtype": (lambda x, r, s, p: s.h.double(), "_to_copy makes torch.float64; a cell computes in one dtype"),
    "integers": (lambda x, r, s, p: s.h.int() * x[0], "_to_copy makes torch.int32"),
    "half": (lambda x, r, s, p: s.h.half() * x[0], "_to_copy makes torch.float16"),
    "in place": (lambda x, r, s, p: s.h.add_(1), "add_ changes an argument of the step, or a tensor outside, in place"),
    "random": (lambda x, r, s, p: F.dropout(x[0], 0.5, True), "it draws random numbers, or leaves"),
    "rounding": (lambda x, r, s, p: torch.div(x[0], 2, rounding_mode="floor"), "rounding_mode: got 'floor'"),
    "an index": (lambda x, r, s, p: x[1], "tuple index out of range"),
    "a missing param": (lambda x, r, s, p: p.a * x[0], "has no attribute 'a'"),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_refused(what: str) -> None:
    """By the operation, and the line of the user's."""
    step, said = REFUSED[what]
    with pytest.raises(Exception) as caught:
        program(step)
    assert said in str(caught.value)
    if not isinstance(caught.value, (IndexError, AttributeError)):
        assert isinstance(caught.value, ValueError)
        assert str(caught.value).startswith(f"cell {step.__name__!r}: ")
        assert __file__ in str(caught.value)


def test_the_line_is_the_users() -> None:
    """Also where Python refuses before torch is asked, and where the step is over."""
    for step, line in ((branch, r"if s.h.sum\(\) > 0:"), (compare, "return x.0. if s.h > 0 else r.0.")):
        with pytest.raises(ValueError, match=rf"in {step.__name__}\n    {line}"):
            fused_rnn.FlexRNN(fused_rnn.cell(gates=1)(step), 2, 3)
    with pytest.raises(ValueError, match=r"in without_gradient\n    def without_gradient"):
        fused_rnn.FlexRNN(fused_rnn.cell(gates=1, states=("h", "c"))(without_gradient), 2, 3)


def test_no_gradient_is_none() -> None:
    """Neither is it lost where the cell is first needed without gradients, or in another mode."""
    cell = fused_rnn.cell(gates=1)(without_gradient)
    agrees_with_autograd(cell)
    texts = {cell.descriptor().name}
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            texts.add(fused_rnn.cell(gates=1)(without_gradient).descriptor().name)
    inside: list[Any] = []

    def traced(x: Tensor) -> Tensor:
        inside.append(fused_rnn.cell(gates=1)(without_gradient).descriptor())
        return x

    torch.func.grad(traced)(torch.ones(()))
    with torch._subclasses.FakeTensorMode():
        inside.append(fused_rnn.cell(gates=1)(without_gradient).descriptor())
    assert texts | {made.name for made in inside} == texts and len(texts) == 1


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_default_dtype_is_none_of_the_steps(dtype: torch.dtype) -> None:
    step = fused_rnn.cell(gates=1)(lambda x, r, s, p: (x[0] > 0).to(x[0].dtype) * r[0] + torch.zeros_like(s.h))
    plain = step.descriptor().name
    torch.set_default_dtype(dtype)
    try:
        again = fused_rnn.cell(gates=1)(step.step).descriptor().name
    finally:
        torch.set_default_dtype(torch.float32)
    assert again == plain


def test_numbers_of_the_closure_may_be_read() -> None:
    made = program(lambda x, r, s, p: x[0] * float(HALF) + (r[0] if HALF > 0 else s.h) * HALF.item())
    (after,) = made.step([torch.ones(1, 2)], [torch.ones(1, 2)], [torch.ones(1, 2)], ())
    torch.testing.assert_close(after, torch.ones(1, 2))


def test_constants_are_those_of_the_widest_dtype() -> None:
    """0.1 of a tensor that is made in x's dtype is that dtype's, and of one in float32 float32's."""
    own = program(lambda x, r, s, p: (x[0] + r[0]) * x[0].new_tensor(0.1))
    single = program(lambda x, r, s, p: (x[0] + r[0]) * torch.tensor(0.1))
    found = [[i.value for i in made.forward.code if i.op == "const"] for made in (own, single)]
    assert found == [[0.1], [float(torch.tensor(0.1))]]


def test_a_step_in_float32_alone() -> None:
    slope = torch.full((1,), 0.25)
    made = program(lambda x, r, s, p: F.prelu(x[0] + r[0], slope))
    assert 0.25 in {i.value for i in made.forward.code}


def test_the_default_device_is_none_of_the_steps() -> None:
    with torch.device("meta"):
        made = program(lambda x, r, s, p: torch.tensor(0.5) * x[0] + torch.zeros(()) * r[0])
    assert 0.5 in {i.value for i in made.forward.code}


def test_a_sum_in_place() -> None:
    def summed(x: Any, r: Any, s: Any, p: Any) -> Any:
        a = torch.zeros_like(s.h)
        for gate in (*x, *r):
            a += torch.tanh(gate)
        return a

    agrees_with_autograd(fused_rnn.cell(gates=3)(summed))


def test_conditions_add_up_as_torchs() -> None:
    def either(x: Any, r: Any, s: Any, p: Any) -> Any:
        return ((x[0] > 0) + (r[0] > 0)) * s.h + (x[0] > 0) * 2 * r[0]

    def counted(x: Any, r: Any, s: Any, p: Any) -> Any:
        return ((x[0] > 0) * 2 + 1) / 4 * s.h - (s.h > 0).float()

    agrees_with_autograd(fused_rnn.cell(gates=1)(either))
    agrees_with_autograd(fused_rnn.cell(gates=1)(counted))


def test_a_step_of_many_operations() -> None:
    def long(x: Any, r: Any, s: Any, p: Any) -> Any:
        a = x[0]
        for _ in range(3000):
            a = torch.sin(a)
        return a + r[0]

    def doubled(x: Any, r: Any, s: Any, p: Any) -> Any:
        a = x[0]
        for _ in range(40):
            a = a + a
        return a + r[0]

    assert len(program(long).forward.code) == 3001
    assert program(doubled).apart == 1


def test_a_step_that_asks_for_itself() -> None:
    cell: Any = fused_rnn.cell(gates=1)(lambda x, r, s, p: fused_rnn.FlexRNN(cell, 2, 3) and x[0])
    for _ in range(2):
        with pytest.raises(ValueError, match="the step asks for its own program"):
            cell.descriptor()


def test_any_name() -> None:
    def step(x: Any, r: Any, s: Any, p: Any) -> Any:
        return x[0] + r[0]

    step.__name__ = "a|b\nü"
    cell = fused_rnn.cell(gates=1)(step)
    assert cell.name == "a_b_ü" and parse(cell.descriptor().name).title == cell.name


def test_lerp_is_torchs() -> None:
    """From the nearer end: at a weight of one the other end itself."""
    made = program(lambda x, r, s, p: torch.lerp(x[0], r[0], s.h))
    x, r, s = (torch.full((1, 2), v) for v in (1e8, 1.0, 1.0))
    assert made.step([x], [r], [s], ())[0].tolist() == torch.lerp(x, r, s).tolist()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"gates": 0}, "gates: got 0, expected a number of at least 1"),
        ({"gates": 1.5}, "gates: got 1.5"),
        ({"gates": True}, "gates: got True"),
        ({"states": ()}, "states: got none"),
        ({"states": "h"}, r"states: got the string 'h', expected a sequence of names, as \('h',\)"),
        ({"states": ("h", "h")}, "states: got .* expected different names"),
        ({"states": ("_h",)}, "states: got '_h'"),
        ({"states": ("h 1",)}, "states: got 'h 1'"),
        ({"params": ("h",)}, "params: got 'h', which is a state"),
        ({"params": (1,)}, "params: got 1"),
        ({"recurrent": 1}, "recurrent: got 1, expected True or False"),
        ({"states": ("h", "for")}, "states: got 'for'"),
        ({"states": None}, "states: got None, expected a sequence of names"),
    ],
)
def test_arguments(options: dict[str, Any], said: str) -> None:
    with pytest.raises((TypeError, ValueError), match=said):
        fused_rnn.cell(**{"gates": 1, **options})
    with pytest.raises(TypeError, match="step: got int, expected a function"):
        fused_rnn.cell(gates=1)(3)  # type: ignore[arg-type]


@fused_rnn.cell(gates=1, states=("h", "m"), params=("a",))
def smoothed(x: Any, r: Any, s: Any, p: Any) -> tuple[Tensor, Tensor]:
    """Its doc."""
    m = p.a * s.m + torch.tanh(x[0] + r[0])
    return m + s.h, m


def test_it_is_the_step() -> None:
    values = [torch.randn(2, 3) for _ in range(4)]
    a = torch.randn(3)
    expected = smoothed.step([values[0]], [values[1]], smoothed._states(*values[2:]), smoothed._params(a))
    for s, p in (
        ((values[2], values[3]), (a,)),
        ({"h": values[2], "m": values[3]}, {"a": a}),
        (smoothed._states(*values[2:]), a),
    ):
        for made, right in zip(smoothed([values[0]], [values[1]], s, p), expected, strict=True):
            assert torch.equal(made, right)
    assert smoothed.__doc__ == "Its doc." and smoothed.__name__ == "smoothed"
    assert repr(smoothed) == "<cell smoothed: gates=1, states=('h', 'm'), params=('a',)>"
    assert parse(smoothed.descriptor().name) == smoothed.program


def test_copies_and_pickles_by_name() -> None:
    assert copy.deepcopy(smoothed) is smoothed and copy.copy(smoothed) is smoothed
    assert pickle.loads(pickle.dumps(smoothed)) is smoothed
    local = fused_rnn.cell(gates=1)(lambda x, r, s, p: x[0])
    with pytest.raises(pickle.PicklingError, match="define the cell at the top of a module"):
        pickle.dumps(local)


def test_equal_steps_are_one_cell() -> None:
    first, second = (fused_rnn.cell(gates=1)(lambda x, r, s, p: torch.tanh(x[0] + r[0])) for _ in range(2))
    assert first.descriptor() is second.descriptor()


def test_the_first_cell_of_a_process_takes_no_time() -> None:
    """Nothing of Dynamo, fx or sympy is imported for it."""
    script = textwrap.dedent("""
        import sys, time, torch, fused_rnn
        @fused_rnn.cell(gates=4, states=("h", "c"))
        def lstm(x, r, s, p):
            i, f, o = (torch.sigmoid(x[g] + r[g]) for g in (0, 1, 3))
            c = f * s.c + i * torch.tanh(x[2] + r[2])
            return o * torch.tanh(c), c
        before, start = set(sys.modules), time.perf_counter()
        lstm.descriptor()
        taken = time.perf_counter() - start
        heavy = {name.split(".")[0] for name in set(sys.modules) - before} & {"sympy", "mpmath", "triton"}
        assert not heavy and "torch._dynamo" not in sys.modules, heavy
        assert taken < 1.5, taken
    """)
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)
