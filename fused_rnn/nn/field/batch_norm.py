"""Batch norm of W x, folded into W: its statistics, those of x at hand, without a pass over W x where that pays."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function, forward_ad
from torch.compiler import is_compiling

from fused_rnn.checks import in_transform
from fused_rnn.reference.loop import without_autocast

EPSILON = 1e-5
# The variance of W x by that of x has the error of a sum this many times as large, where it is taken.
MOST_CANCELLED = 4

Count = int | Tensor


class Normed(NamedTuple):
    """x: about its mean, zero past an end.  mean: of x.  variances: of W x, for each W.  weights: each W times
    gamma / √(variance + ε)."""

    x: Tensor
    mean: Tensor
    variances: Sequence[Tensor]
    weights: Sequence[Tensor]


def normed(x: Tensor, past: Tensor | None, count: Count, pairs: Sequence[tuple[Tensor, Tensor]]) -> Normed:
    """x: [T, B, D], zero where `past` [T, B, 1] says so.  count: at how many steps it does not.  pairs: W [G, D] and
    gamma [G] each.

    Twice differentiable in all of them by `x` and `weights` of what is returned.
    """
    if is_compiling() or in_transform() or forward_ad._current_level >= 0 or not x.is_cpu:
        return Normed(*_plain(x, past, count, pairs))
    flat = [t for pair in pairs for t in pair]
    outputs = _Normed.apply(x, past, count, *flat)  # type: ignore[no-untyped-call]
    last = 2 + len(pairs)
    return Normed(outputs[0], outputs[1], outputs[2:last], outputs[last:])


def _about_mean(x: Tensor, past: Tensor | None, count: Count) -> tuple[Tensor, Tensor]:
    """x about its mean, and that; x is zero past an end. The gradient of this is the same of its own."""
    mean = x.mean((0, 1)) if past is None else x.sum((0, 1)) / count
    about = x - mean
    return about if past is None else about.masked_fill(past, 0), mean


def _plain(
    x: Tensor, past: Tensor | None, count: Count, pairs: Sequence[tuple[Tensor, Tensor]]
) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor]]:
    about, mean = _about_mean(x, past, count)
    variances = [(about.flatten(0, 1) @ w.t()).square().sum(0) / count for w, _ in pairs]
    scales = [gamma * torch.rsqrt(v + EPSILON) for (_, gamma), v in zip(pairs, variances, strict=True)]
    weights = [w * scale.unsqueeze(1) for (w, _), scale in zip(pairs, scales, strict=True)]
    return about, mean, variances, weights


def _pays(steps: int, width: int, gates: int) -> bool:
    """Whether the covariance of rows [steps, width] takes less than their product with W [gates, width], forward and
    backward together: less by more than its further operations cost."""
    return width * (3 * steps * gates - 2 * steps * width - 2 * gates * width) > 1 << 21


class _Normed(Function):
    """`_plain` with a backward of its own. Of W's product with the rows, P, it keeps P, or W times their covariance."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, past: Tensor | None, count: Count, *flat: Tensor) -> tuple[Tensor, ...]:
        about, mean = _about_mean(x, past, count)
        weights, rows = flat[::2], about.flatten(0, 1)
        made = None
        if _pays(rows.shape[0], rows.shape[1], sum(w.shape[0] for w in weights)):
            made = _by_covariance(rows, count, weights)
        ctx.by_covariance = made is not None
        products, variances = made or _by_product(rows, count, weights)
        roots = [torch.rsqrt(v + EPSILON) for v in variances]
        scales = [gamma * root for gamma, root in zip(flat[1::2], roots, strict=True)]
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(mean, *variances, *([] if ctx.needs_input_grad[0] else [about]))
        ctx.count = count
        ctx.save_for_backward(x, past, about, *flat, *products, *roots, *scales)
        return about, mean, *variances, *(w * scale.unsqueeze(1) for w, scale in zip(weights, scales, strict=True))

    @staticmethod
    def backward(ctx: Any, dabout: Tensor | None, _: Any, *more: Tensor | None) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # read once, as a checkpoint requires
        with without_autocast(saved[0]):  # whoever calls backward within it
            return _Normed._gradients(ctx, saved, dabout, more)

    @staticmethod
    def _gradients(
        ctx: Any, saved: Sequence[Tensor], dabout: Tensor | None, more: Sequence[Tensor | None]
    ) -> tuple[Tensor | None, ...]:
        x, past, about, *rest = saved
        count, each, needs = ctx.count, len(rest) // 5, ctx.needs_input_grad
        weights, gammas = rest[: 2 * each : 2], rest[1 : 2 * each : 2]
        dweights = more[each:]
        if torch.is_grad_enabled():
            pairs = list(zip(weights, gammas, strict=True))
            return _differentiable(needs, x, past, count, pairs, (dabout, *dweights))
        rows, dx = about.flatten(0, 1), None
        if dabout is not None:
            dabout = dabout if past is None else dabout.masked_fill(past, 0)
            dx = _about_mean(dabout, past, count)[0].flatten(0, 1)
        square = None  # [D, D], which the rows are multiplied by
        grads: list[Tensor | None] = []
        parts = [rest[first : first + each] for first in range(2 * each, 5 * each, each)]
        for w, dweight, product, root, scale in zip(weights, dweights, *parts, strict=True):
            if dweight is None:
                grads += [None, None]
                continue
            dscale, own = (dweight * w).sum(1), dweight * scale.unsqueeze(1)
            dgamma = dscale * root
            dvariance = dgamma * root * scale / -count  # times 2 / count
            if ctx.by_covariance:
                own.addcmul_(product, (dvariance * count).unsqueeze(1))
                if needs[0]:
                    part = (w * dvariance.unsqueeze(1)).t()
                    square = part @ w if square is None else torch.addmm(square, part, w)
            else:
                product = product * dvariance
                own.addmm_(product.t(), rows)
                if needs[0]:
                    dx = product @ w if dx is None else torch.addmm(dx, product, w)
            grads += [own, dgamma]
        if square is not None:
            dx = rows @ square if dx is None else torch.addmm(dx, rows, square)
        return dx.view(x.shape) if needs[0] and dx is not None else None, None, None, *grads


def _by_covariance(rows: Tensor, count: Count, weights: Sequence[Tensor]) -> Any:
    """Of each W its product with the rows' covariance and the variances; None where too much cancels in those."""
    covariance = rows.t() @ rows / count
    products = [w @ covariance for w in weights]
    variances = [(product * w).sum(1) for product, w in zip(products, weights, strict=True)]
    for w, variance in zip(weights, variances, strict=True):
        if bool((variance * MOST_CANCELLED < w.square() @ covariance.diagonal()).any()):
            return None
    return products, variances


def _by_product(rows: Tensor, count: Count, weights: Sequence[Tensor]) -> Any:
    """Of each W its product with the rows, and the variances."""
    products = [rows @ w.t() for w in weights]
    return products, [product.square().sum(0) / count for product in products]


def _differentiable(
    needs: Sequence[bool],
    x: Tensor,
    past: Tensor | None,
    count: Count,
    pairs: Sequence[tuple[Tensor, Tensor]],
    given: Sequence[Tensor | None],
) -> tuple[Tensor | None, ...]:
    """The same gradients by torch's own."""
    about, _, _, weights = _plain(x, past, count, pairs)
    outputs = [(y, d) for y, d in zip((about, *weights), given, strict=True) if d is not None and y.requires_grad]
    inputs = [x, *(t for pair in pairs for t in pair)]
    asked = [k for k, need in enumerate((needs[0], *needs[3:])) if need]
    grads: list[Tensor | None] = [None] * len(inputs)
    if outputs:
        made, of = [y for y, _ in outputs], [inputs[k] for k in asked]
        found = torch.autograd.grad(made, of, [d for _, d in outputs], create_graph=True, allow_unused=True)
        for k, gradient in zip(asked, found, strict=True):
            grads[k] = gradient
    return grads[0], None, None, *grads[1:]
