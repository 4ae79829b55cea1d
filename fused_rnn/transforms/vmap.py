"""vmap rules of the ops.

The mapped dimension N is folded into the batch, or, where weights differ, into R: an ensemble of N layers with R
directions each is one launch of N·R recurrences. Only a mapped `lengths` or `reset` together with that
is left over (all recurrences share them): those calls are looped, one launch for each of N.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from fused_rnn.cells import CELLS
from fused_rnn.transforms import per_sample

Dims = Sequence[Any]
Result = tuple[list[Tensor], list[int | None]]


def rule(op: Callable[..., list[Tensor]], fold: Callable[..., Result | None]) -> Callable[..., Result]:
    """The function torch.library.register_vmap wants: `fold` where it can, else a loop over the mapped dimension."""

    def vmap_rule(info: Any, in_dims: Dims, *args: Any) -> Result:
        result = fold(op, info.batch_size, in_dims, *args)
        return _loop(op, info.batch_size, in_dims, args) if result is None else result

    return vmap_rule


def register(
    name: str,
    op: Callable[..., list[Tensor]],
    fold: Callable[..., Result | None],
    library: torch.library.Library,
) -> None:
    """Give `op`, registered as `name`, its rule, for torch.func.vmap and for torch's older vmap."""
    torch.library.register_vmap(name, rule(op, fold), lib=library)

    def older(*args: Any) -> list[Tensor]:
        innermost = torch._C._vmapmode_increment_nesting() - 1
        torch._C._vmapmode_decrement_nesting()
        mapped, levels = op, []
        for level in range(innermost, 0, -1):
            args, dims = _without(args, level)
            if any(d is not None for d in tree_leaves(dims)):
                mapped = torch.func.vmap(mapped, dims)
                levels.append(level)
        outputs = mapped(*args)
        for level in reversed(levels):
            outputs = [torch._add_batch_dim(t, 0, level) for t in outputs]
        return outputs

    # What grad(is_grads_batched=True), jacobian(vectorize=True) and gradcheck(check_batched_grad=True) use. It wraps
    # tensors in another way, and its fallback takes no op that returns a list.
    library.impl(name.partition("::")[2], older, "Batched")


def _without(args: Any, level: int) -> tuple[Any, Any]:
    """An op's arguments without the older vmap's wrapper of this level, and where they are mapped: at 0, or None."""
    if isinstance(args, (list, tuple)):
        pairs = [_without(arg, level) for arg in args]
        return type(args)(value for value, _ in pairs), type(args)(dim for _, dim in pairs)
    if not isinstance(args, Tensor) or not torch._C._functorch.is_legacy_batchedtensor(args):
        return args, None
    # Where it is not mapped at this level, it is expanded to the size given.
    none, one = (torch._remove_batch_dim(args, level, size, 0) for size in (0, 1))
    return (none, 0) if none.shape[0] == one.shape[0] else (args, None)


def _loop(op: Callable[..., list[Tensor]], n: int, dims: Dims, args: Sequence[Any]) -> Result:
    def pick(arg: Any, dim: Any, i: int) -> Any:
        if isinstance(arg, (list, tuple)) and isinstance(dim, (list, tuple)):
            return [pick(a, d, i) for a, d in zip(arg, dim, strict=True)]
        return arg if dim is None else arg.select(dim, i)

    each = [op(*(pick(a, d, i) for a, d in zip(args, dims, strict=True))) for i in range(n)]
    columns = list(zip(*each, strict=True))
    absent = [_absent(column[0]) for column in columns]
    outputs = [column[0] if gone else torch.stack(column) for column, gone in zip(columns, absent, strict=True)]
    return outputs, [None if gone else 0 for gone in absent]


def _absent(t: Tensor, dim: int | None = None) -> bool:
    """The ops mark a tensor that is not there by the shape [0]."""
    return t.dim() == (1 if dim is None else 2) and t.numel() == 0


def _fold(t: Tensor | None, dim: int | None, n: int, at: int) -> Any:
    """Bring the mapped dimension (new where dim is None) to `at` and merge it with the one behind it."""
    if t is None or _absent(t, dim):
        return t
    t = t.unsqueeze(at).expand(*t.shape[:at], n, *t.shape[at:]) if dim is None else t.movedim(dim, at)
    return t.flatten(at, at + 1)


def _unfold(t: Tensor, n: int, at: int) -> Tensor:
    return t.view(*t.shape[:at], n, t.shape[at] // n, *t.shape[at + 1 :])


def _per_recurrence(x: Tensor, dim: int | None, n: int, recurrences: int) -> Tensor:
    """x [T, B, D] or [T, B, R, D] with a mapped dimension → [T, B, N·R, D]."""
    if x.dim() - (dim is not None) == 3:
        x = x.unsqueeze(2).expand(*x.shape[:2], n, x.shape[2]) if dim is None else x.movedim(dim, 2)
        return x.unsqueeze(3).expand(*x.shape[:3], recurrences, x.shape[3]).flatten(2, 3)
    folded: Tensor = _fold(x, dim, n, 2)
    return folded


def _ensemble(weights: Sequence[Tensor], dims: Sequence[int | None], n: int) -> list[Tensor]:
    columns = [[w] * n if d is None else w.unbind(d) for w, d in zip(weights, dims, strict=True)]
    return [w for member in zip(*columns, strict=True) for w in member]


def _where_saved(save: str) -> tuple[int, int]:
    """The positions of B and R in `saved`: [T, B, R, S, H] for gates, [K, R, B, ·] for checkpoints."""
    return (1, 2) if save == "gates" else (2, 1)


def forward(
    op: Callable[..., list[Tensor]],
    n: int,
    dims: Dims,
    x: Tensor,
    weights: Sequence[Tensor],
    h0: Tensor | None,
    c0: Tensor | None,
    lengths: Tensor | None,
    reset: Tensor | None,
    cell: str,
    directions: Sequence[int],
    save: str,
    keep_hidden: bool,
) -> Result | None:
    """fused_rnn::forward over a mapped dimension; None where it has to be looped."""
    x_dim, weight_dims, h0_dim, c0_dim, lengths_dim, reset_dim = dims[:6]
    states = 3 if cell == "lstm" else 2
    saved_batch, saved_recurrence = _where_saved(save)
    if all(d is None for d in weight_dims):
        folded = (_fold(lengths, lengths_dim, n, 0), _fold(reset, reset_dim, n, 1))
        outputs = op(
            _fold(x, x_dim, n, 1), weights, _fold(h0, h0_dim, n, 1), _fold(c0, c0_dim, n, 1), *folded,
            cell, directions, save, keep_hidden,
        )  # fmt: skip
        places = [1] * states + [saved_batch, 1, 1]
    elif lengths_dim is None and reset_dim is None:
        outputs = op(
            x if x_dim is None and x.dim() == 3 else _per_recurrence(x, x_dim, n, len(directions)),
            _ensemble(weights, weight_dims, n), _fold(h0, h0_dim, n, 0), _fold(c0, c0_dim, n, 0), lengths, reset,
            cell, list(directions) * n, save, keep_hidden,
        )  # fmt: skip
        places = [2] + [0] * (states - 1) + [saved_recurrence, 2, 2]
    else:
        return None
    places = places[: len(outputs)]
    out_dims = [None if _absent(t) else at for t, at in zip(outputs, places, strict=True)]
    return [t if at is None else _unfold(t, n, at) for t, at in zip(outputs, out_dims, strict=True)], out_dims


def backward(
    op: Callable[..., list[Tensor]],
    n: int,
    dims: Dims,
    dy: Tensor | None,
    dh_n: Tensor | None,
    dc_n: Tensor | None,
    x: Tensor,
    weights: Sequence[Tensor],
    h0: Tensor | None,
    c0: Tensor | None,
    lengths: Tensor | None,
    reset: Tensor | None,
    hidden: Tensor,
    saved: Tensor,
    cells: Tensor,
    cell: str,
    directions: Sequence[int],
    save: str,
    need_dx: bool,
    need_dw: bool,
) -> Result | None:
    """fused_rnn::backward over a mapped dimension; None where it has to be looped."""
    (
        dy_dim,
        dh_dim,
        dc_dim,
        x_dim,
        weight_dims,
        h0_dim,
        c0_dim,
        lengths_dim,
        reset_dim,
        hidden_dim,
        saved_dim,
        cells_dim,
    ) = dims[:12]
    saved_batch, saved_recurrence = _where_saved(save)
    outputs: list[Tensor]
    out_dims: list[int | None]
    shared = all(d is None for d in weight_dims)
    if shared and (not need_dw or per_sample.supports(cell, weights, directions, save)):
        batch = (
            _fold(dy, dy_dim, n, 1), _fold(dh_n, dh_dim, n, 1), _fold(dc_n, dc_dim, n, 1),
            _fold(x, x_dim, n, 1), weights, _fold(h0, h0_dim, n, 1), _fold(c0, c0_dim, n, 1),
            _fold(lengths, lengths_dim, n, 0), _fold(reset, reset_dim, n, 1),
            _fold(hidden, hidden_dim, n, 1), _fold(saved, saved_dim, n, saved_batch), _fold(cells, cells_dim, n, 1),
            cell, directions, save, need_dx,
        )  # fmt: skip
        outputs = per_sample.backward(op, n, *batch) if need_dw else op(*batch, False)
        rows, dweights = outputs[:3], outputs[3:]
        out_dims = [None if _absent(t) else 1 for t in rows]
        rows = [t if at is None else _unfold(t, n, at) for t, at in zip(rows, out_dims, strict=True)]
        return [*rows, *dweights], out_dims + [0] * len(dweights)
    if lengths_dim is not None or reset_dim is not None:
        return None
    # dx must come out per member, even of an x that all members share.
    common = x_dim is None and x.dim() == 3 and not need_dx
    dx, dh0, dc0, *dweights = op(
        _fold(dy, dy_dim, n, 2), _fold(dh_n, dh_dim, n, 0), _fold(dc_n, dc_dim, n, 0),
        x if common else _per_recurrence(x, x_dim, n, len(directions)), _ensemble(weights, weight_dims, n),
        _fold(h0, h0_dim, n, 0), _fold(c0, c0_dim, n, 0), lengths, reset,
        _fold(hidden, hidden_dim, n, 2), _fold(saved, saved_dim, n, saved_recurrence), _fold(cells, cells_dim, n, 2),
        cell, list(directions) * n, save, need_dx, need_dw,
    )  # fmt: skip
    states = [t if _absent(t) else _unfold(t, n, 0) for t in (dh0, dc0)]
    outputs = [_unfold(dx, n, 2) if need_dx else dx, *states]
    out_dims = [2 if need_dx else None, *(None if _absent(t) else 0 for t in states)]
    if need_dx and x.dim() - (x_dim is not None) == 3:
        outputs[0] = outputs[0].sum(3)
    if need_dw:
        count = len(weights)
        outputs += [torch.stack(dweights[j::count]) for j in range(count)]
        out_dims += [0] * count
    return outputs, out_dims


def step(
    op: Callable[..., list[Tensor]],
    n: int,
    dims: Dims,
    x: Tensor,
    h: Tensor | None,
    c: Tensor | None,
    *weights_and_cell: Any,
) -> Result | None:
    """fused_rnn::step over a mapped dimension; None where it has to be looped."""
    x_dim, h_dim, c_dim, *weight_dims, _ = dims
    ranks = [t.dim() - (d is not None) for t, d in ((x, x_dim), (h, h_dim), (c, c_dim)) if t is not None]
    if any(rank != 2 for rank in ranks):
        return None
    if any(d is not None for d in weight_dims):
        *weights, code = weights_and_cell
        present = [(w, d) for w, d in zip(weights, weight_dims, strict=True) if w is not None]
        members = _ensemble([w for w, _ in present], [d for _, d in present], n)
        rows = x.unsqueeze(1).expand(-1, n, -1) if x_dim is None else x.movedim(x_dim, 1)
        states = [
            None if t is None else t.expand(n, *t.shape) if d is None else t.movedim(d, 0)
            for t, d in ((h, h_dim), (c, c_dim))
        ]
        # A step has one recurrence; a layer of one step has as many as it is given.
        layer = torch.ops.fused_rnn.forward.default
        outputs = layer(rows.unsqueeze(0), members, *states, None, None, list(CELLS)[code], [1] * n, "none", False)
        return outputs[1:], [0] * (len(outputs) - 1)
    outputs = op(_fold(x, x_dim, n, 0), _fold(h, h_dim, n, 0), _fold(c, c_dim, n, 0), *weights_and_cell)
    return [_unfold(t, n, 0) for t in outputs], [0] * len(outputs)
