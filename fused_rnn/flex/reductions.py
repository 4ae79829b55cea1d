"""What ATen's operations over the units of a row are in a program, as aten.py has those that are pointwise."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from fused_rnn.flex.aten import Refused
from fused_rnn.flex.builder import Builder
from fused_rnn.flex.gradient import normal


def _over_units(t: Any, dim: Any, keepdim: bool) -> None:
    """Whether a reduction is over the units, and leaves a number for each row. Raises Refused."""
    dims = [dim] if isinstance(dim, int) else list(dim or ())
    if dims not in ([-1], [1]):
        raise Refused(f"dim: got {dim}, expected -1: a cell sees all units of a row, and no other rows")
    if not keepdim:
        raise Refused("keepdim: got False, expected True: a number for each row, [B, 1]")


def _operand(t: Any, x: Tensor) -> int:
    """A value of the units of a row. Raises Refused for another one."""
    if x.dim() == 0 or x.shape[-1] != t.sizes[1]:
        raise Refused(f"expected a tensor of the units, [B, H], got {t._text(x.shape)}")
    return int(t.value(x))


def _mean_of(b: Builder, x: int) -> int:
    return b.add("div", b.add("sum", x), b.units())


def _sum_over(t: Any, _: str, x: Tensor, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> int:
    _over_units(t, dim, keepdim)
    return int(t.builder.add("sum", _operand(t, x)))


def _mean(t: Any, _: str, x: Tensor, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> int:
    _over_units(t, dim, keepdim)
    return _mean_of(t.builder, _operand(t, x))


def _corrected(t: Any, x: int, correction: Any) -> int:
    """The variance of a value, with this correction: 1 if it is None."""
    b, correction = t.builder, 1 if correction is None else correction
    y = b.add("variance", x)
    if correction == 0:
        return int(y)
    return int(b.add("mul", y, b.add("div", b.units(), b.add("sub", b.units(), b.const(correction)))))


def _var(t: Any, _: str, x: Tensor, dim: Any = None, *, correction: Any = None, keepdim: bool = False) -> int:
    _over_units(t, dim, keepdim)
    return _corrected(t, _operand(t, x), correction)


def _std(t: Any, _: str, x: Tensor, dim: Any = None, *, correction: Any = None, keepdim: bool = False) -> int:
    return int(t.builder.add("sqrt", _var(t, _, x, dim, correction=correction, keepdim=keepdim)))


def _vector_norm(
    t: Any, _: str, x: Tensor, ord: Any = 2, dim: Any = None, keepdim: bool = False, *, dtype: Any = None
) -> int:
    _over_units(t, dim, keepdim)
    b, x = t.builder, _operand(t, x)  # type: ignore[assignment]
    if ord == 1:
        return int(b.add("sum", b.add("abs", x)))
    if ord != 2:
        raise Refused(f"ord: got {ord}, expected 1 or 2")
    norm = b.add("sqrt", b.add("sum", b.add("mul", x, x)))
    # As torch's own gradient, which is 0 where the norm is.
    return int(b.add("where", b.add("eq", norm, b.const(0)), b.const(0), norm))


def _affine(b: Builder, ys: Sequence[int], weights: Sequence[int], biases: Sequence[int]) -> list[int]:
    made = [b.add("mul", y, weight) for y, weight in zip(ys, weights, strict=True)] if weights else [*ys]
    return [b.add("add", y, bias) for y, bias in zip(made, biases, strict=True)] if biases else made


def _check_normalized(t: Any, shape: Any, parts: int = 1) -> None:
    if list(shape) != [parts * t.sizes[1]]:
        raise Refused(
            f"normalized_shape: got {t._text(shape)}, expected [H] written as v.shape[-1:], and no number: a step is"
            " traced on tensors of another size"
        )


def _moments(b: Builder, xs: Sequence[int], eps: float) -> tuple[int, int]:
    """The mean of all these values together, and 1 / (the standard deviation).

    Their variance is that of the units' means over the values, and the mean of the units' variances over the values:
    three numbers of a row, all of one stage, and no difference of squares.
    """
    count, own = b.const(len(xs)), xs[0]
    for x in xs[1:]:
        own = b.add("add", own, x)
    own = b.add("div", own, count)
    variance = b.add("variance", own)
    if len(xs) > 1:
        squares = [b.add("mul", far, far) for far in (b.add("sub", x, own) for x in xs)]
        within = squares[0]
        for square in squares[1:]:
            within = b.add("add", within, square)
        variance = b.add("add", variance, b.add("div", _mean_of(b, within), count))
    return _mean_of(b, own), b.add("rsqrt", b.add("add", variance, b.const(eps)))


def _layer_norm(t: Any, _: str, x: Tensor, shape: Any, weight: Any, bias: Any, eps: float) -> tuple[Any, int, int]:
    """With the mean and 1 / (the standard deviation), which ATen returns beside it. Of several values side by side as
    of one."""
    b, xs = t.builder, t.parts(x) or (_operand(t, x),)
    _check_normalized(t, shape, len(xs))
    weights, biases = (() if v is None else t.parts(v) or (t.value(v),) for v in (weight, bias))
    for name, vectors in (("weight", weights), ("bias", biases)):
        if len(vectors) not in (0, len(xs)):
            raise Refused(f"{name}: got {len(vectors)}·H numbers, expected {len(xs)}·H")
    mean, scale = _moments(b, xs, eps)
    ys = [normal(b, each, mean, scale) for each in xs]
    if not any(b.is_row(each) or b.is_number(each) for each in xs):
        entries = [b.add("entry", each, scale) for each in xs]
        centre, spread = b.add("centre", scale, *entries), b.add("spread", scale, mean, *entries)
        ys = [b.add("normal", y, entry, centre, spread) for y, entry in zip(ys, entries, strict=True)]
    ys = _affine(b, ys, weights, biases)
    return ys[0] if len(ys) == 1 else tuple(ys), mean, scale


def _rms_norm(t: Any, _: str, x: Tensor, shape: Any, weight: Any = None, eps: Any = None) -> tuple[int, int]:
    _check_normalized(t, shape)
    b, value = t.builder, _operand(t, x)
    if eps is None:
        raise Refused("eps: got None, expected a number: torch's own depends on the dtype")
    scale = b.add("rsqrt", b.add("add", _mean_of(b, b.add("mul", value, value)), b.const(eps)))
    (y,) = _affine(b, [b.add("mul", value, scale)], () if weight is None else (t.value(weight),), ())
    return y, scale


# Of the units of a row one number, of some beside others.
REDUCING: dict[str, Callable[..., Any]] = {
    "sum": _sum_over, "mean": _mean, "var": _var, "std": _std, "linalg_vector_norm": _vector_norm,
    "var_mean": lambda t, _, x, dim=None, *, correction=None, keepdim=False: (
        _var(t, _, x, dim, correction=correction, keepdim=keepdim), _mean(t, _, x, dim, keepdim),
    ),
    "std_mean": lambda t, _, x, dim=None, *, correction=None, keepdim=False: (
        _std(t, _, x, dim, correction=correction, keepdim=keepdim), _mean(t, _, x, dim, keepdim),
    ),
    "native_layer_norm": _layer_norm, "_fused_rms_norm": _rms_norm,
}  # fmt: skip
