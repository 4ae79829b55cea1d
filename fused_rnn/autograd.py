"""One layer, all its directions, as torch.autograd.Function: the gradient of backends whose ops have none of their own.

backward runs the backend's. Where it is itself being differentiated (create_graph, torch.func), it is a Function too,
whose backward is the differentiable composite: the reference loop on the saved inputs, by torch.func.vjp twice. That is
correct, slow, and runs only where a second derivative is really taken.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import FunctionCtx

from fused_rnn.checks import in_transform
from fused_rnn.dispatch import BACKENDS
from fused_rnn.reference.gradient import backward_layer
from fused_rnn.reference.loop import without_autocast
from fused_rnn.transforms import vmap

Gradients = tuple[Any, ...]
Outputs = tuple[Tensor, ...]


def layer(
    cell: str,
    x: Tensor,
    weights: Sequence[Tensor],
    h0: Tensor | None,
    c0: Tensor | None,
    lengths: Tensor | None,
    reset: Tensor | None,
    directions: Sequence[int],
    save: str,
    keep_hidden: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(y, h_n, c_n or None) of one layer by its cell's Function."""
    run: Callable[..., Outputs] = _run
    if torch.compiler.is_compiling() and in_transform():
        _keep_from_dynamo()
        run = _untraced
    outputs = run(cell, x, h0, c0, lengths, reset, directions, save, keep_hidden, backend, *weights)
    return outputs[0], outputs[1], outputs[2] if cell == "lstm" else None


def _run(cell: str, x: Any, h0: Any, c0: Any, lengths: Any, reset: Any, *tail: Any) -> Outputs:
    """All outputs of the cell's Function. tail: directions, save, keep_hidden, backend and the weights."""
    outputs: Outputs
    if cell == "lstm":
        outputs = _apply(LSTMFunction, x, h0, c0, lengths, reset, *tail)
    elif cell == "gru":
        outputs = _apply(GRUFunction, x, h0, lengths, reset, *tail)
    else:
        outputs = _apply(RNNFunction, x, h0, lengths, reset, cell.removeprefix("rnn_"), *tail)
    return outputs


def _apply(function: type[Function], *args: Any) -> Any:
    """function.apply(*args), without what it costs in eager mode: where there is a setup_context, apply binds its
    arguments by `inspect.signature` on each call (26 of 38 µs, torch 2.13), to fill in defaults that there are not."""
    if torch.compiler.is_compiling() or in_transform():
        return function.apply(*args)
    return super(Function, function).apply(*args)  # type: ignore[misc]


def _untraced(*args: Any) -> Outputs:
    return _run(*args)


def _keep_from_dynamo() -> None:
    """Within a transform Dynamo would trace a Function's forward alone, and so lose its gradient. AOTAutograd, which
    runs Dynamo's graph under the transform, does not: hence `_untraced` is to stand in that graph as it is."""
    torch._dynamo.allow_in_graph(_untraced)  # here, for it takes the import of all of Dynamo


_keep_from_dynamo._dynamo_marked_constant = True  # type: ignore[attr-defined]  # called while Dynamo traces


def _vmap(
    cell: str, info: Any, dims: Sequence[Any], weight_dims: Sequence[Any], args: Sequence[Any], call: Sequence[Any]
) -> tuple[tuple[Tensor, ...], tuple[int | None, ...]]:
    """A Function's rule under vmap: itself, on a larger batch or with more recurrences. Made by torch
    (generate_vmap_rule), it would compute the weights' gradients sample by sample where their sum is asked for.

    args: x, h0, c0, lengths, reset; dims: where they are mapped.
    call: directions, save, keep_hidden, backend and the weights.
    """
    x, *rest = args
    directions, save, keep_hidden, backend, *weights = call

    def op(x, weights, h0, c0, lengths, reset, cell, directions, save, keep_hidden):  # type: ignore[no-untyped-def]
        return list(_run(cell, x, h0, c0, lengths, reset, directions, save, keep_hidden, backend, *weights))

    rule, every = vmap.rule(op, vmap.forward), (dims[0], list(weight_dims), *dims[1:], None, None, None, None)
    outputs, out_dims = rule(info, every, x, weights, *rest, cell, directions, save, keep_hidden)
    return tuple(outputs), tuple(out_dims)


def _save(
    ctx: Any,
    cell: str,
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    lengths: Tensor | None,
    reset: Tensor | None,
    directions: Sequence[int],
    save: str,
    keep_hidden: bool,
    backend: str,
    weights: Sequence[Tensor],
    outputs: Sequence[Tensor],
) -> None:
    saved, cells, hidden = outputs[-3:]
    ctx.mark_non_differentiable(saved, cells, hidden)
    ctx.set_materialize_grads(False)
    # All go through save_for_backward: a weight (or y, where there is no copy of it) changed in place must raise.
    ctx.save_for_backward(x, h0, c0, lengths, reset, hidden if keep_hidden else outputs[0], saved, cells, *weights)
    ctx.call = (cell, tuple(directions), save, backend)


def _backward(ctx: Any, dy: Tensor | None, dh_n: Tensor | None, dc_n: Tensor | None, need_dw: bool) -> Sequence[Any]:
    """→ [dx, dh0, dc0, one per weight], None for what is not needed."""
    x, h0, c0, lengths, reset, hidden, saved, cells, *weights = ctx.saved_tensors
    cell, directions, save, backend = ctx.call
    need_dx = ctx.needs_input_grad[0]
    if dy is None and dh_n is None and dc_n is None:
        return [None] * (3 + len(weights))
    # torch.compile has no double backward, but within what it compiles torch.func has.
    if torch.is_grad_enabled() and (in_transform() or not torch.compiler.is_compiling()):
        args = (dy, dh_n, dc_n, x, h0, c0, lengths, reset, hidden, saved, cells)
        grads = _apply(LayerBackward, *args, cell, directions, save, backend, need_dx, need_dw, *weights)
    else:
        grads = BACKENDS[backend].backward(
            dy,
            dh_n,
            dc_n,
            x,
            weights,
            h0,
            c0,
            lengths,
            reset,
            hidden,
            saved,
            cells,
            cell,
            directions,
            save,
            need_dx,
            need_dw,
        )
    dx, dh0, dc0, *dweights = grads
    return [
        dx if need_dx else None,
        None if h0 is None else dh0,
        None if c0 is None else dc0,
        *(dweights if need_dw else [None] * len(weights)),
    ]


class LSTMFunction(Function):
    """One LSTM layer. ::

        apply(x, h0, c0, lengths, reset, directions, save, keep_hidden, backend, *weights)
            → (y, h_n, c_n, saved, cells, hidden)

    Inputs:
        x: [T, B, D] or [T, B, R, D] with an input per recurrence.
        h0: [R, B, P], None for zeros.
        c0: [R, B, H], None for zeros.
        lengths: [B] int64 or None.
        reset: [T, B] bool or None.
        directions: R of +1 or -1.
        save: "gates" or "recompute".
        keep_hidden: keep a copy of y for backward, so that y may be changed in place.
        backend: one whose ops have no autograd of their own: "cpu", "cuda" or "triton".
        weights: per recurrence w_ih [4H, D], w_hh [4H, P], (b_ih, b_hh [4H]), (w_hr [P, H]), gate order i, f, g, o.

    Returns:
        y [T, B, R·P], h_n [R, B, P], c_n [R, B, H] in x's dtype; saved, cells and hidden are what backward reads, and
        not differentiable.

    Raises:
        RuntimeError: from the op on inputs that do not fit together: fused_rnn.functional checks them first.

    Twice differentiable in x, h0, c0 and the weights; works under torch.func.vmap; has no forward-mode derivative.
    Source: Hochreiter & Schmidhuber 1997; gates as in torch.nn.LSTM.

    Examples:
        >>> x, weights = torch.randn(5, 3, 10), [torch.randn(80, 10), torch.randn(80, 20)]
        >>> call = (x, None, None, None, None, (1,), "gates", False, "cpu", *weights)
        >>> y, h_n, c_n, *_ = fused_rnn.LSTMFunction.apply(*call)
    """

    @staticmethod
    def vmap(info: Any, in_dims: Any, x: Any, h0: Any, c0: Any, lengths: Any, reset: Any, *call: Any) -> Any:
        return _vmap("lstm", info, in_dims[:5], in_dims[9:], (x, h0, c0, lengths, reset), call)

    @staticmethod
    def forward(
        x: Tensor,
        h0: Tensor | None,
        c0: Tensor | None,
        lengths: Tensor | None,
        reset: Tensor | None,
        directions: Sequence[int],
        save: str,
        keep_hidden: bool,
        backend: str,
        *weights: Tensor,
    ) -> Outputs:
        return tuple(
            BACKENDS[backend].forward(x, weights, h0, c0, lengths, reset, "lstm", directions, save, keep_hidden)
        )

    @staticmethod
    def setup_context(ctx: FunctionCtx, inputs: tuple[Any, ...], output: Any) -> None:
        x, h0, c0, lengths, reset, directions, save, keep_hidden, backend, *weights = inputs
        _save(ctx, "lstm", x, h0, c0, lengths, reset, directions, save, keep_hidden, backend, weights, output)

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, dh_n: Tensor | None, dc_n: Tensor | None, *_: Any) -> Gradients:
        dx, dh0, dc0, *dweights = _backward(ctx, dy, dh_n, dc_n, any(ctx.needs_input_grad[9:]))
        return (dx, dh0, dc0, None, None, None, None, None, None, *dweights)


class GRUFunction(Function):
    """One GRU layer (the reset gate after the recurrent product). ::

        apply(x, h0, lengths, reset, directions, save, keep_hidden, backend, *weights) → (y, h_n, saved, cells, hidden)

    Weights of 3H rows, gate order r, z, n; all else as in :class:`LSTMFunction`.
    Source: Cho et al. 2014; gates as in torch.nn.GRU.

    Examples:
        >>> x, weights = torch.randn(5, 3, 10), [torch.randn(60, 10), torch.randn(60, 20)]
        >>> y, h_n, *_ = fused_rnn.GRUFunction.apply(x, None, None, None, (1,), "gates", False, "cpu", *weights)
    """

    @staticmethod
    def vmap(info: Any, in_dims: Any, x: Any, h0: Any, lengths: Any, reset: Any, *call: Any) -> Any:
        dims = (*in_dims[:2], None, *in_dims[2:4])
        return _vmap("gru", info, dims, in_dims[8:], (x, h0, None, lengths, reset), call)

    @staticmethod
    def forward(
        x: Tensor,
        h0: Tensor | None,
        lengths: Tensor | None,
        reset: Tensor | None,
        directions: Sequence[int],
        save: str,
        keep_hidden: bool,
        backend: str,
        *weights: Tensor,
    ) -> Outputs:
        return tuple(
            BACKENDS[backend].forward(x, weights, h0, None, lengths, reset, "gru", directions, save, keep_hidden)
        )

    @staticmethod
    def setup_context(ctx: FunctionCtx, inputs: tuple[Any, ...], output: Any) -> None:
        x, h0, lengths, reset, directions, save, keep_hidden, backend, *weights = inputs
        _save(ctx, "gru", x, h0, None, lengths, reset, directions, save, keep_hidden, backend, weights, output)

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, dh_n: Tensor | None, *_: Any) -> Gradients:
        dx, dh0, _dc0, *dweights = _backward(ctx, dy, dh_n, None, any(ctx.needs_input_grad[8:]))
        return (dx, dh0, None, None, None, None, None, None, *dweights)


class RNNFunction(Function):
    """One plain recurrent layer. ::

        apply(x, h0, lengths, reset, nonlinearity, directions, save, keep_hidden, backend, *weights)
            → (y, h_n, saved, cells, hidden)

    nonlinearity: "tanh" or "relu".  Weights of H rows; all else as in :class:`LSTMFunction`.
    Source: Elman 1990; as in torch.nn.RNN.

    Examples:
        >>> x, weights = torch.randn(5, 3, 10), [torch.randn(20, 10), torch.randn(20, 20)]
        >>> y, h_n, *_ = fused_rnn.RNNFunction.apply(x, None, None, None, "tanh", (1,), "gates", False, "cpu", *weights)
    """

    @staticmethod
    def vmap(info: Any, in_dims: Any, x: Any, h0: Any, lengths: Any, reset: Any, kind: str, *call: Any) -> Any:
        dims = (*in_dims[:2], None, *in_dims[2:4])
        return _vmap(f"rnn_{kind}", info, dims, in_dims[9:], (x, h0, None, lengths, reset), call)

    @staticmethod
    def forward(
        x: Tensor,
        h0: Tensor | None,
        lengths: Tensor | None,
        reset: Tensor | None,
        nonlinearity: str,
        directions: Sequence[int],
        save: str,
        keep_hidden: bool,
        backend: str,
        *weights: Tensor,
    ) -> Outputs:
        cell = f"rnn_{nonlinearity}"
        return tuple(
            BACKENDS[backend].forward(x, weights, h0, None, lengths, reset, cell, directions, save, keep_hidden)
        )

    @staticmethod
    def setup_context(ctx: FunctionCtx, inputs: tuple[Any, ...], output: Any) -> None:
        x, h0, lengths, reset, nonlinearity, directions, save, keep_hidden, backend, *weights = inputs
        cell = f"rnn_{nonlinearity}"
        _save(ctx, cell, x, h0, None, lengths, reset, directions, save, keep_hidden, backend, weights, output)

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, dh_n: Tensor | None, *_: Any) -> Gradients:
        dx, dh0, _dc0, *dweights = _backward(ctx, dy, dh_n, None, any(ctx.needs_input_grad[9:]))
        return (dx, dh0, None, None, None, None, None, None, None, *dweights)


class LayerBackward(Function):
    """The backward of one layer as a Function: the backend's kernels forward, the reference composite backward."""

    generate_vmap_rule = True

    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        dy,
        dh_n,
        dc_n,
        x,
        h0,
        c0,
        lengths,
        reset,
        hidden,
        saved,
        cells,
        cell,
        directions,
        save,
        backend,
        need_dx,
        need_dw,
        *weights,
    ):
        kept = (hidden, saved, cells)
        return tuple(
            BACKENDS[backend].backward(
                dy, dh_n, dc_n, x, weights, h0, c0, lengths, reset, *kept, cell, directions, save, need_dx, need_dw
            )
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        dy, dh_n, dc_n, x, h0, c0, lengths, reset, _, _, _, cell, directions, _, _, need_dx, need_dw, *weights = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(dy, dh_n, dc_n, x, h0, c0, lengths, reset, *weights)
        ctx.call = (cell, directions, need_dx, need_dw)

    @staticmethod
    def backward(ctx: Any, *ddgrads: Tensor | None) -> Gradients:
        dy, dh_n, dc_n, x, h0, c0, lengths, reset, *weights = ctx.saved_tensors
        cell, directions, need_dx, need_dw = ctx.call
        given = (dy, dh_n, dc_n, x, h0, c0, *weights)
        present = [i for i, t in enumerate(given) if t is not None]

        def first(*tensors: Tensor) -> list[Tensor]:
            full: list[Any] = [None] * len(given)
            for i, t in zip(present, tensors, strict=True):
                full[i] = t
            dy, dh_n, dc_n, x, h0, c0, *weights = full
            return backward_layer(dy, dh_n, dc_n, x, weights, h0, c0, lengths, reset, cell, directions)

        with without_autocast(x):
            outputs, pull = torch.func.vjp(first, *(given[i] for i in present))[:2]
            # Those of forward's outputs that are placeholders (dx, dc0, the weights not asked for) got no gradient.
            ddx, ddh0, ddc0, *ddweights = ddgrads
            asked = [ddx if need_dx else None, None if h0 is None else ddh0]
            asked += [None if c0 is None else ddc0] if cell == "lstm" else []
            asked += ddweights if need_dw else [None] * len(weights)
            grads = pull([torch.zeros_like(o) if g is None else g for o, g in zip(outputs, asked, strict=True)])
        full: list[Any] = [None] * len(given)
        for i, g in zip(present, grads, strict=True):
            full[i] = g
        return (*full[:6], *[None] * 11, *full[6:])
