"""The gradient of a program, by reverse mode: for each operation the rule that torch's autograd has."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from fused_rnn.flex.builder import Builder

# (builder, arguments, result, gradient of the result) → the gradient of each argument, None for none.
Rule = Callable[[Builder, Sequence[int], int, int], Sequence[int | None]]


def _maximum(b: Builder, args: Sequence[int], y: int, d: int, less: str = "lt", more: str = "gt") -> Sequence[int]:
    """Half to each where both are equal."""
    zero = b.const(0)
    shared = b.add("where", b.add("eq", *args), b.add("mul", d, b.const(0.5)), d)
    return [b.add("where", b.add(side, *args), zero, shared) for side in (less, more)]


def _minimum(b: Builder, args: Sequence[int], y: int, d: int) -> Sequence[int]:
    return _maximum(b, args, y, d, "gt", "lt")


def _pow(b: Builder, args: Sequence[int], y: int, d: int) -> Sequence[int | None]:
    x, e = args
    exponent, zero = b.value(e), b.const(0)
    lower = b.add("mul", e, b.add("pow", x, b.add("sub", e, b.const(1))))
    if exponent is not None:
        return b.add("mul", d, lower), None
    dx = b.add("mul", d, b.add("where", b.add("eq", e, zero), zero, lower))
    at_zero = b.add("and", b.add("eq", x, zero), b.add("ge", e, zero))
    return dx, b.add("where", at_zero, zero, b.add("mul", d, b.add("mul", y, b.add("log", x))))


def _div(b: Builder, args: Sequence[int], y: int, d: int) -> Sequence[int]:
    by = b.add("div", d, args[1])
    return by, b.add("neg", b.add("mul", by, y))


def _where(b: Builder, args: Sequence[int], y: int, d: int) -> Sequence[int | None]:
    zero = b.const(0)
    return None, b.add("where", args[0], d, zero), b.add("where", args[0], zero, d)


def _clamp(side: str) -> Rule:
    def rule(b: Builder, args: Sequence[int], y: int, d: int) -> Sequence[int | None]:
        zero = b.const(0)
        inside = b.add(side, *args)
        if b.value(args[1]) is not None:
            return b.add("where", inside, d, zero), None
        return b.add("where", inside, d, zero), b.add("where", inside, zero, d)

    return rule


def _erf(b: Builder, args: Sequence[int], y: int, d: int) -> Sequence[int]:
    bell = b.add("exp", b.add("neg", b.add("mul", args[0], args[0])))
    return [b.add("mul", d, b.add("mul", bell, b.const(2 / math.sqrt(math.pi))))]


def _rsqrt(b: Builder, args: Sequence[int], y: int, d: int) -> Sequence[int]:
    cube = b.add("mul", b.add("mul", y, y), y)
    return [b.add("mul", b.add("mul", d, b.const(-0.5)), cube)]


def _variance(b: Builder, args: Sequence[int], y: int, d: int) -> Sequence[int]:
    far = b.add("sub", args[0], b.add("div", b.add("sum", args[0]), b.units()))
    return [b.add("mul", b.add("div", b.add("mul", d, b.const(2)), b.units()), far)]


def normal(b: Builder, x: int, mean: int, scale: int) -> int:
    return b.add("mul", b.add("sub", x, mean), scale)


def _normal(b: Builder, args: Sequence[int], y: int, d: int) -> Sequence[int | None]:
    """(x less its mean, times its scale; entry of x, centre, spread). Mean and scale depend on all that is normed
    together: its gradient is the scale times d - mean(d) - y mean(d y)."""
    return None, d, d, b.add("mul", d, args[0])


def _entry(b: Builder, args: Sequence[int], y: int, d: int) -> Sequence[int | None]:
    return b.add("mul", d, args[1]), None


def _share(b: Builder, xs: Sequence[int], d: int) -> int:
    """What a sum over all that is normed together takes from each of it."""
    return b.add("div", b.add("mul", d, b.const(-1 / len(xs))), b.units())


def _centre(b: Builder, args: Sequence[int], y: int, d: int) -> Sequence[int | None]:
    xs = args[1:]
    return None, *[_share(b, xs, d)] * len(xs)


def _spread(b: Builder, args: Sequence[int], y: int, d: int) -> Sequence[int | None]:
    scale, mean, *xs = args
    share = _share(b, xs, d)
    return None, None, *(b.add("mul", share, normal(b, b.nodes[x].args[0], mean, scale)) for x in xs)


def _product(b: Builder, args: Sequence[int], y: int, d: int) -> Sequence[int]:
    if b.is_row(d) or b.is_number(d):  # of a product that is summed over its units; a product takes a vector of them
        d = b.add("where", b.add("ne", args[0], args[0]), args[0], d)
    return [b.product("transposed", int(b.nodes[y].value), d)]


RULES: dict[str, Rule] = {
    "sum": lambda b, a, y, d: [d],
    "variance": _variance,
    "product": _product,
    "normal": _normal,
    "entry": _entry,
    "centre": _centre,
    "spread": _spread,
    "neg": lambda b, a, y, d: [b.add("neg", d)],
    "abs": lambda b, a, y, d: [b.add("mul", d, b.add("sign", a[0]))],
    "exp": lambda b, a, y, d: [b.add("mul", d, y)],
    "expm1": lambda b, a, y, d: [b.add("mul", d, b.add("add", y, b.const(1)))],
    "log": lambda b, a, y, d: [b.add("div", d, a[0])],
    "log1p": lambda b, a, y, d: [b.add("div", d, b.add("add", a[0], b.const(1)))],
    "sqrt": lambda b, a, y, d: [b.add("div", d, b.add("mul", y, b.const(2)))],
    "rsqrt": _rsqrt,
    "reciprocal": lambda b, a, y, d: [b.add("neg", b.add("mul", d, b.add("mul", y, y)))],
    "sigmoid": lambda b, a, y, d: [b.add("sigmoid_backward", d, y)],
    "tanh": lambda b, a, y, d: [b.add("tanh_backward", d, y)],
    "relu": lambda b, a, y, d: [b.add("relu_backward", d, y)],
    "erf": _erf,
    "sin": lambda b, a, y, d: [b.add("mul", d, b.add("cos", a[0]))],
    "cos": lambda b, a, y, d: [b.add("neg", b.add("mul", d, b.add("sin", a[0])))],
    "softplus": lambda b, a, y, d: [b.add("mul", d, b.add("sigmoid", a[0]))],
    "add": lambda b, a, y, d: [d, d],
    "sub": lambda b, a, y, d: [d, b.add("neg", d)],
    "mul": lambda b, a, y, d: [b.add("mul", d, a[1]), b.add("mul", d, a[0])],
    "div": _div,
    "maximum": _maximum,
    "minimum": _minimum,
    "pow": _pow,
    "where": _where,
    "clamp_min": _clamp("ge"),
    "clamp_max": _clamp("le"),
}
# Steps: their gradient is zero wherever they have one.
FLAT = {"const", "units", "input", "detach", "sign", "lt", "le", "gt", "ge", "eq", "ne", "and", "or"}


def differentiate(b: Builder, outputs: Sequence[int], grads: Sequence[int], of: Sequence[int]) -> list[int]:
    """The gradient of each of these values, given those of the outputs; zero where nothing depends on it.

    What comes of a matrix product depends on the matrix, so it is followed as the inputs among the values are.
    """
    reached = b.reachable(list(outputs))
    varies = set(of)
    for i in sorted(reached):
        node = b.nodes[i]
        if node.op not in FLAT and any(a in varies for a in node.args):
            varies.add(i)
    total: dict[int, int] = {}

    def give(to: int, gradient: int | None, reader: int | None = None) -> None:
        if gradient is not None and to in varies:
            if b.is_row(to) and (reader is None or not b.is_row(reader)):  # all units read it
                gradient = b.add("sum", gradient)
            total[to] = b.add("add", total[to], gradient) if to in total else gradient

    for output, gradient in zip(outputs, grads, strict=True):
        give(output, gradient)
    for i in sorted(reached & varies, reverse=True):
        node = b.nodes[i]
        if i in total and node.op not in FLAT:
            for argument, part in zip(node.args, RULES[node.op](b, node.args, i, total[i]), strict=True):
                give(argument, part, i)
    return [total.get(i, b.const(0)) for i in of]
