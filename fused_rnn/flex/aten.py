"""What ATen's pointwise operations are in a program: each by the formula of torch's own kernel, ties included.

At NaN values are torch's, too; a gradient there may be another one.

A rule takes the trace, the overload's name and the operation's arguments, and returns the value.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class Refused(Exception):
    """Why a rule does not take the arguments."""


def _unary(op: str) -> Callable[..., int]:
    return lambda t, _, x: t.builder.add(op, t.value(x))


def _binary(op: str) -> Callable[..., int]:
    return lambda t, _, x, y: t.builder.add(op, t.value(x), t.value(y))


def _add(t: Any, _: str, x: Any, y: Any, alpha: Any = 1) -> int:
    return _sum(t, t.value(x), t.builder.add("mul", t.value(y), t.value(alpha)))


def _sum(t: Any, x: int, y: int) -> int:
    """x + y, with the two sides of a gate side by side where a step adds something between them."""
    for side, rest in ((y, x), (x, y)):
        if side in t.partners and (made := _beside(t, rest, t.partners[side], side, set())) is not None:
            return made
    return int(t.builder.add("add", x, y))


def _beside(t: Any, x: int, partner: int, side: int, seen: set[int]) -> int | None:
    """A sum x with a gate's side added to its other one, if that is a term of it. seen: terms without it."""
    if x == partner:
        return int(t.builder.add("add", partner, side))
    node = t.builder.nodes[x]
    if node.op == "add" and x not in seen:
        for term, other in (node.args, node.args[::-1]):
            if (made := _beside(t, term, partner, side, seen)) is not None:
                return int(t.builder.add("add", made, other))
    seen.add(x)
    return None


def _sub(t: Any, _: str, x: Any, y: Any, alpha: Any = 1) -> int:
    return int(t.builder.add("sub", t.value(x), t.builder.add("mul", t.value(y), t.value(alpha))))


def _rsub(t: Any, _: str, x: Any, y: Any, alpha: Any = 1) -> int:
    return _sub(t, _, y, x, alpha)


def _div(t: Any, _: str, x: Any, y: Any, *, rounding_mode: Any = None) -> int:
    if rounding_mode is not None:
        raise Refused(f"rounding_mode: got {rounding_mode!r}, expected None")
    return int(t.builder.add("div", t.value(x), t.value(y)))


def power(t: Any, x: int, y: int) -> int:
    """x ** y, by torch's shorter ways where the exponent is a number."""
    b = t.builder
    exponent = b.value(y)
    if exponent == 0:
        return int(b.const(1))
    if exponent == 1:
        return x
    if exponent in (2, 3):
        square = b.add("mul", x, x)
        return int(square if exponent == 2 else b.add("mul", square, x))
    named = {0.5: "sqrt", -0.5: "rsqrt", -1: "reciprocal"}.get(exponent)
    return int(b.add(named, x) if named else b.add("pow", x, y))


def _clamp(t: Any, _: str, x: Any, min: Any = None, max: Any = None) -> int:
    y = t.value(x)
    if min is not None:
        y = t.builder.add("clamp_min", y, t.value(min))
    if max is not None:
        y = t.builder.add("clamp_max", y, t.value(max))
    return int(y)


def _hardtanh(t: Any, _: str, x: Any, low: Any = -1, high: Any = 1) -> int:
    """Its gradient at the ends themselves is zero, unlike clamp's."""
    b, x = t.builder, t.value(x)
    low, high = t.value(low), t.value(high)
    upper = b.add("where", b.add("ge", x, high), high, x)
    return int(b.add("where", b.add("le", x, low), low, upper))


def _times(t: Any, x: int, number: float) -> int:
    return int(t.builder.add("mul", x, t.builder.const(number)))


def _gelu(t: Any, _: str, x: Any, *, approximate: str = "none") -> int:
    b, x = t.builder, t.value(x)
    if approximate == "tanh":
        cube = b.add("mul", b.add("mul", x, x), x)
        inner = b.add("add", x, _times(t, cube, 0.044715))
        inner = b.add("tanh", _times(t, inner, math.sqrt(2 / math.pi)))
    else:
        inner = b.add("erf", _times(t, x, math.sqrt(0.5)))
    return int(b.add("mul", _times(t, x, 0.5), b.add("add", inner, b.const(1))))


def _silu(t: Any, _: str, x: Any) -> int:
    x = t.value(x)
    return int(t.builder.add("mul", x, t.builder.add("sigmoid", x)))


def _softplus(t: Any, _: str, x: Any, beta: Any = 1, threshold: Any = 20) -> int:
    b, x = t.builder, t.value(x)
    scaled = b.add("mul", x, t.value(beta))
    curve = b.add("div", b.add("softplus", scaled), t.value(beta))
    return int(b.add("where", b.add("gt", scaled, t.value(threshold)), x, curve))


def _logaddexp(t: Any, _: str, x: Any, y: Any) -> int:
    """From the larger one on; of two equal infinities it is that."""
    b, x, y = t.builder, t.value(x), t.value(y)
    far = b.add("abs", b.add("sub", x, y))
    both = b.add("add", b.add("maximum", x, y), b.add("softplus", b.add("neg", far)))
    infinite = b.add("and", b.add("eq", x, y), b.add("eq", b.add("abs", x), b.const(math.inf)))
    return int(b.add("where", infinite, x, both))


def _log_sigmoid(t: Any, _: str, x: Any) -> int:
    b = t.builder
    return int(b.add("neg", b.add("softplus", b.add("neg", t.value(x)))))


def _elu(t: Any, _: str, x: Any, alpha: Any = 1, scale: Any = 1, input_scale: Any = 1) -> int:
    """Of what is not negative no exponential is taken: its gradient there would be zero times infinity."""
    b, x = t.builder, t.value(x)
    zero = b.const(0)
    low = b.add("expm1", b.add("mul", b.add("clamp_max", x, zero), t.value(input_scale)))
    low = b.add("mul", low, b.add("mul", t.value(alpha), t.value(scale)))
    return int(b.add("where", b.add("le", x, zero), low, b.add("mul", x, t.value(scale))))


def _celu(t: Any, _: str, x: Any, alpha: Any = 1) -> int:
    return _elu(t, _, x, alpha, 1, 1 / alpha)


def _softshrink(t: Any, _: str, x: Any, width: Any = 0.5) -> int:
    b, x = t.builder, t.value(x)
    inside = b.add("mul", x, b.const(0))  # NaN stays NaN
    low = b.add("where", b.add("lt", x, b.const(-width)), b.add("add", x, b.const(width)), inside)
    return int(b.add("where", b.add("gt", x, b.const(width)), b.add("sub", x, b.const(width)), low))


def _hardshrink(t: Any, _: str, x: Any, width: Any = 0.5) -> int:
    b, x = t.builder, t.value(x)
    inside = b.add("and", b.add("ge", x, b.const(-width)), b.add("le", x, b.const(width)))
    return int(b.add("where", inside, b.const(0), x))


def _leaky_relu(t: Any, _: str, x: Any, slope: Any = 0.01) -> int:
    b, x = t.builder, t.value(x)
    return int(b.add("where", b.add("gt", x, b.const(0)), x, b.add("mul", x, t.value(slope))))


def _threshold(t: Any, _: str, x: Any, threshold: Any, value: Any) -> int:
    b, x = t.builder, t.value(x)
    return int(b.add("where", b.add("le", x, t.value(threshold)), t.value(value), x))


def _hardsigmoid_of(t: Any, x: int) -> int:
    b = t.builder
    upper = b.add(
        "where", b.add("ge", x, b.const(3)), b.const(1), b.add("div", b.add("add", x, b.const(3)), b.const(6))
    )
    return int(b.add("where", b.add("le", x, b.const(-3)), b.const(0), upper))


def _hardsigmoid(t: Any, _: str, x: Any) -> int:
    return _hardsigmoid_of(t, t.value(x))


def _hardswish(t: Any, _: str, x: Any) -> int:
    x = t.value(x)
    return int(t.builder.add("mul", x, _hardsigmoid_of(t, x)))


def _mish(t: Any, _: str, x: Any) -> int:
    b, x = t.builder, t.value(x)
    return int(b.add("mul", x, b.add("tanh", b.add("softplus", x))))


def _lerp(t: Any, _: str, x: Any, y: Any, weight: Any) -> int:
    """From the nearer end, as torch does it."""
    b = t.builder
    x, y, weight = t.value(x), t.value(y), t.value(weight)
    way = b.add("sub", y, x)
    near = b.add("lt", b.add("abs", weight), b.const(0.5))
    if b.value(near) == 0:
        return int(b.add("sub", y, b.add("mul", way, b.add("sub", b.const(1), weight))))
    first = b.add("add", x, b.add("mul", weight, way))
    if b.value(near) == 1:
        return int(first)
    last = b.add("sub", y, b.add("mul", way, b.add("sub", b.const(1), weight)))
    return int(b.add("where", near, first, last))


def _addcmul(t: Any, _: str, x: Any, y: Any, z: Any, *, value: Any = 1) -> int:
    b = t.builder
    return int(b.add("add", t.value(x), b.add("mul", b.add("mul", t.value(y), t.value(value)), t.value(z))))


def _addcdiv(t: Any, _: str, x: Any, y: Any, z: Any, *, value: Any = 1) -> int:
    b = t.builder
    return int(b.add("add", t.value(x), b.add("div", b.add("mul", t.value(y), t.value(value)), t.value(z))))


def _where(t: Any, _: str, condition: Any, x: Any, y: Any) -> int:
    return int(t.builder.add("where", t.value(condition), t.value(x), t.value(y)))


def _masked_fill(t: Any, _: str, x: Any, mask: Any, value: Any) -> int:
    return int(t.builder.add("where", t.value(mask), t.value(value), t.value(x)))


def _logical(op: str) -> Callable[..., int]:
    return lambda t, _, x, y: t.builder.add(op, t.value(x), t.value(y))


def _not(t: Any, _: str, x: Any) -> int:
    return int(t.builder.add("eq", t.value(x), t.builder.const(0)))


def _xor(t: Any, _: str, x: Any, y: Any) -> int:
    zero = t.builder.const(0)
    return int(t.builder.add("ne", *(t.builder.add("ne", t.value(each), zero) for each in (x, y))))


def _of_conditions(rule: Callable[..., int]) -> Callable[..., int]:
    """Bit by bit, where every argument has one bit."""

    def refusing(t: Any, _: str, *arguments: Any) -> int:
        for argument in arguments:
            if (argument.dtype != torch.bool) if isinstance(argument, Tensor) else not isinstance(argument, bool):
                raise Refused("expected booleans")
        return rule(t, _, *arguments)

    return refusing


def _isnan(t: Any, _: str, x: Any) -> int:
    return int(t.builder.add("ne", t.value(x), t.value(x)))


def _isinf(t: Any, _: str, x: Any) -> int:
    return int(t.builder.add("eq", t.builder.add("abs", t.value(x)), t.builder.const(math.inf)))


def _scaled_exp(base: float) -> Callable[..., int]:
    return lambda t, _, x: t.builder.add("exp", _times(t, t.value(x), math.log(base)))


def _scaled_log(base: float) -> Callable[..., int]:
    return lambda t, _, x: _times(t, t.builder.add("log", t.value(x)), 1 / math.log(base))


def _tan(t: Any, _: str, x: Any) -> int:
    x = t.value(x)
    return int(t.builder.add("div", t.builder.add("sin", x), t.builder.add("cos", x)))


def _sinh(t: Any, _: str, x: Any) -> int:
    """Near zero by expm1, for there the difference of exponentials cancels."""
    b, x = t.builder, t.value(x)
    e = b.add("expm1", b.add("clamp_max", b.add("clamp_min", x, b.const(-1)), b.const(1)))
    near = b.add("add", e, b.add("div", e, b.add("add", e, b.const(1))))
    far = b.add("sub", b.add("exp", x), b.add("exp", b.add("neg", x)))
    return _times(t, b.add("where", b.add("lt", b.add("abs", x), b.const(1)), near, far), 0.5)


def _cosh(t: Any, _: str, x: Any) -> int:
    b, x = t.builder, t.value(x)
    return _times(t, b.add("add", b.add("exp", x), b.add("exp", b.add("neg", x))), 0.5)


OPERATIONS: dict[str, Callable[..., int]] = {
    **{name: _unary(name) for name in (
        "neg", "abs", "sign", "exp", "expm1", "log", "log1p", "sqrt", "rsqrt", "reciprocal", "sigmoid", "tanh", "relu",
        "erf", "sin", "cos",
    )},
    **{name: _binary(name) for name in ("mul", "maximum", "minimum", "lt", "le", "gt", "ge", "eq", "ne")},
    "add": _add, "sub": _sub, "rsub": _rsub, "div": _div, "true_divide": _div,
    "pow": lambda t, _, x, y: power(t, t.value(x), t.value(y)),
    "square": lambda t, _, x: power(t, t.value(x), t.builder.const(2)),
    "clamp": _clamp, "clip": _clamp, "hardtanh": _hardtanh, "threshold": _threshold,
    "clamp_min": lambda t, _, x, low: _clamp(t, _, x, low),
    "clamp_max": lambda t, _, x, high: _clamp(t, _, x, None, high),
    "sgn": _unary("sign"), "exp2": _scaled_exp(2), "log2": _scaled_log(2), "log10": _scaled_log(10),
    "detach": _unary("detach"), "tan": _tan, "sinh": _sinh, "cosh": _cosh,
    "gelu": _gelu, "silu": _silu, "softplus": _softplus, "log_sigmoid_forward": _log_sigmoid, "mish": _mish,
    "elu": _elu, "celu": _celu, "softshrink": _softshrink, "hardshrink": _hardshrink,
    "leaky_relu": _leaky_relu, "hardsigmoid": _hardsigmoid, "hardswish": _hardswish,
    "lerp": _lerp, "addcmul": _addcmul, "addcdiv": _addcdiv, "where": _where, "masked_fill": _masked_fill,
    "logical_and": _logical("and"), "logical_or": _logical("or"), "logical_not": _not, "logical_xor": _xor,
    "bitwise_and": _of_conditions(_logical("and")), "bitwise_or": _of_conditions(_logical("or")),
    "bitwise_not": _of_conditions(_not), "bitwise_xor": _of_conditions(_xor), "isnan": _isnan, "isinf": _isinf,
    "logaddexp": _logaddexp, "_prelu_kernel": _leaky_relu, "fill": lambda t, _, x, value: t.value(value),
}  # fmt: skip


def _full(position: int) -> Callable[..., int]:
    return lambda t, args, kwargs: t.value(args[position] if len(args) > position else kwargs["fill_value"])


def _all(value: float) -> Callable[..., int]:
    return lambda t, args, kwargs: t.builder.const(value)


FACTORIES: dict[str, Callable[..., int]] = {
    "zeros": _all(0), "ones": _all(1), "zeros_like": _all(0), "ones_like": _all(1), "new_zeros": _all(0),
    "new_ones": _all(1), "full": _full(1), "full_like": _full(1), "new_full": _full(2), "scalar_tensor": _full(0),
}  # fmt: skip
