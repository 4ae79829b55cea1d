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

from fused_rnn.call import BackwardCall, LayerCall, is_absent
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
    name: str, op: Callable[..., list[Tensor]], fold: Callable[..., Result | None], library: torch.library.Library
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
    absent = [is_absent(column[0]) for column in columns]
    outputs = [column[0] if gone else torch.stack(column) for column, gone in zip(columns, absent, strict=True)]
    return outputs, [None if gone else 0 for gone in absent]


def _fold(t: Tensor | None, dim: int | None, n: int, at: int) -> Any:
    """Bring the mapped dimension (new where dim is None) to `at` and merge it with the one behind it."""
    if t is None or is_absent(t, dim is not None):
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


def _where_rows(save: str) -> tuple[int, int]:
    """The positions of B and R in a history: [T, B, R, H] for gates, [K, R, B, H] for checkpoints."""
    return (1, 2) if save == "gates" else (2, 1)


def _fold_each(tensors: Sequence[Tensor], dims: Sequence[int | None], n: int, at: int) -> list[Tensor]:
    return [_fold(t, d, n, at) for t, d in zip(tensors, dims, strict=True)]


def forward(op: Callable[..., list[Tensor]], n: int, dims: Dims, *args: Any) -> Result | None:
    """fused_rnn::forward over a mapped dimension; None where it has to be looped."""
    call = LayerCall(*args)
    where: Any = LayerCall(*dims)
    if call.spec.masks:  # which have a batch of their own
        return None
    states, history = len(call.spec.states), _where_rows(call.save)
    if all(d is None for d in where.weights):
        folded = call._replace(
            x=_fold(call.x, where.x, n, 1),
            states=_fold_each(call.states, where.states, n, 1),
            lengths=_fold(call.lengths, where.lengths, n, 0),
            reset=_fold(call.reset, where.reset, n, 1),
        )
        sequences, places = [1] * (states - 1) * call.sequences, [1] * (1 + states)
    elif where.lengths is None and where.reset is None:
        shared = where.x is None and call.x.dim() == 3
        folded = call._replace(
            x=call.x if shared else _per_recurrence(call.x, where.x, n, call.recurrences),
            weights=_ensemble(call.weights, where.weights, n),
            states=_fold_each(call.states, where.states, n, 0),
            directions=list(call.directions) * n,
        )
        sequences, places = [2] * (states - 1) * call.sequences, [2] + [0] * states
    else:
        return None
    kept, at = (call.sequences and call.save == "gates"), places[0]
    places += [*sequences, at, *[history[at - 1]] * (0 if kept else states - 1), at]
    outputs = op(*folded)
    out_dims = [None if is_absent(t) else at for t, at in zip(outputs, places, strict=False)]
    return [t if at is None else _unfold(t, n, at) for t, at in zip(outputs, out_dims, strict=True)], out_dims


def backward(op: Callable[..., list[Tensor]], n: int, dims: Dims, *args: Any) -> Result | None:
    """fused_rnn::backward over a mapped dimension; None where it has to be looped."""
    call = BackwardCall(*args)
    where: Any = BackwardCall(*dims)
    if call.layer.spec.masks:
        return None
    history, given = _where_rows(call.save), len(call.states)
    outputs: list[Tensor]
    out_dims: list[int | None]
    shared = all(d is None for d in where.weights)
    if shared and (not call.need_dw or per_sample.supports(call.layer)):
        batch = call._replace(
            dy=_fold(call.dy, where.dy, n, 1),
            dstates=_fold_each(call.dstates, where.dstates, n, 1),
            x=_fold(call.x, where.x, n, 1),
            states=_fold_each(call.states, where.states, n, 1),
            lengths=_fold(call.lengths, where.lengths, n, 0),
            reset=_fold(call.reset, where.reset, n, 1),
            hidden=_fold(call.hidden, where.hidden, n, 1),
            saved=_fold(call.saved, where.saved, n, 1),
            histories=_fold_each(call.histories, where.histories, n, history[0]),
            dsequences=_fold_each(call.dsequences, where.dsequences, n, 1),
        )
        outputs = per_sample.backward(op, n, batch) if call.need_dw else op(*batch)
        rows, dweights = outputs[: 1 + given], outputs[1 + given :]
        out_dims = [None if is_absent(t) else 1 for t in rows]
        rows = [t if at is None else _unfold(t, n, at) for t, at in zip(rows, out_dims, strict=True)]
        return [*rows, *dweights], out_dims + [0] * len(dweights)
    if where.lengths is not None or where.reset is not None:
        return None
    # dx must come out per member, even of an x that all members share.
    common = where.x is None and call.x.dim() == 3 and not call.need_dx
    ensemble = call._replace(
        dy=_fold(call.dy, where.dy, n, 2),
        dstates=_fold_each(call.dstates, where.dstates, n, 0),
        x=call.x if common else _per_recurrence(call.x, where.x, n, len(call.directions)),
        weights=_ensemble(call.weights, where.weights, n),
        states=_fold_each(call.states, where.states, n, 0),
        hidden=_fold(call.hidden, where.hidden, n, 2),
        saved=_fold(call.saved, where.saved, n, 2),
        histories=_fold_each(call.histories, where.histories, n, history[1]),
        dsequences=_fold_each(call.dsequences, where.dsequences, n, 2),
        directions=list(call.directions) * n,
    )
    dx, *rest = op(*ensemble)
    states, dweights = rest[:given], rest[given:]
    outputs = [_unfold(dx, n, 2) if call.need_dx else dx, *(_unfold(t, n, 0) for t in states)]
    out_dims = [2 if call.need_dx else None, *[0] * given]
    if call.need_dx and call.x.dim() - (where.x is not None) == 3:
        outputs[0] = outputs[0].sum(3)
    if call.need_dw:
        count = len(call.weights)
        outputs += [torch.stack(dweights[j::count]) for j in range(count)]
        out_dims += [0] * count
    return outputs, out_dims


def step(
    op: Callable[..., list[Tensor]],
    n: int,
    dims: Dims,
    x: Tensor,
    weights: Sequence[Tensor],
    states: Sequence[Tensor],
    cell: str,
) -> Result | None:
    """fused_rnn::step over a mapped dimension; None where it has to be looped."""
    x_dim, weight_dims, state_dims, _ = dims
    if CELLS[cell].masks:
        return None
    if any(d is not None for d in weight_dims):
        rows = x.unsqueeze(1).expand(-1, n, -1) if x_dim is None else x.movedim(x_dim, 1)
        entering = [
            t.expand(n, *t.shape) if d is None else t.movedim(d, 0) for t, d in zip(states, state_dims, strict=True)
        ]
        # A step has one recurrence; a layer of one step has as many as it is given.
        layer = torch.ops.fused_rnn.forward.default
        members = _ensemble(weights, weight_dims, n)
        outputs = layer(*LayerCall(rows.unsqueeze(0), members, entering, None, None, cell, [1] * n))
        return outputs[1:], [0] * (len(outputs) - 1)
    outputs = op(_fold(x, x_dim, n, 0), weights, _fold_each(states, state_dims, n, 0), cell)
    return [_unfold(t, n, 0) for t in outputs], [0] * len(outputs)
