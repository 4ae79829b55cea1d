"""A call of LSTM, GRU, RNN or FlexRNN: from torch.nn's arguments to a call of `layers`, and back to its results."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, is_grad_enabled
from torch._C import _is_tracing as is_tracing  # torch.jit.trace
from torch.nn.utils.rnn import PackedSequence

from fused_rnn import checks, layers
from fused_rnn.cells import CELLS
from fused_rnn.nn import extras
from fused_rnn.nn.base import prefers_counterpart
from fused_rnn.nn.counterpart import check_packed, refuse, run_counterpart, state_rows
from fused_rnn.nn.extras import Variant
from fused_rnn.nn.packed import Layout, is_unshared
from fused_rnn.nn.plain import are_plain, is_plain_hx
from fused_rnn.nn.recurrent import Recurrent, read_weights

Result = Any  # (y, hx)


def run(
    module: Recurrent,
    input: Any,
    hx: Any,
    lengths: Any,
    reset: Any,
    weights: Sequence[Tensor] | None = None,
    more: Variant | None = None,
) -> Result:
    """forward, of any call. weights: where they are not as the module has them.  more: what its extras ask for, of
    which y over time is a tuple."""
    if more is None and module._fused_extras and (more := extras.active(module)) is not None:
        return extras.returned(module, more, *run(module, input, hx, lengths, reset, weights, more))
    extra = lengths is not None or reset is not None
    packed = isinstance(input, PackedSequence)
    if packed and lengths is not None:
        raise ValueError("lengths: got some beside a PackedSequence, expected None: the input has its own")
    if packed and module._fused_states == 2 and input.data.dim() == 3:  # torch's LSTM takes rows of equal lengths so
        input = input._replace(data=input.data.flatten(0, 1))
    if weights is None:
        weights = read_weights(module)
    plain = are_plain((input.data if packed else input, *weights))
    plain_hx = is_plain_hx(hx, module._fused_states)
    if more is not None and not (plain and plain_hx):
        checks.check_tensor("input", input.data if packed else input)
        if plain:
            run_counterpart(module, _as_it_reads(module, weights), input, hx, extra)  # for its error
        raise NotImplementedError(
            f"{', '.join(extras.DEFAULTS)}: tensors of other classes than torch's own are run by torch.nn's modules,"
            " which have none of these"
        )
    if not (plain and plain_hx) or (not extra and more is None and prefers_counterpart(module, weights, input)):
        return run_counterpart(module, _as_it_reads(module, weights), input, hx, extra)
    try:
        if reset is not None:
            reset = checks.as_reset(reset, weights[0].device)
        if packed:
            return _run_packed(module, input, hx, weights, reset, more)
        if reset is not None and 2 <= input.dim() <= 3:
            reset = _time_first(module, reset, input.shape[:-1])
        if module._fused_checks and 2 <= input.dim() <= 3:
            _check(module, input, hx)
        if input.dim() != 3:
            return _run_unbatched(module, input, hx, weights, lengths, reset, more)
        if not module.batch_first:
            return _run_layers(module, input, weights, hx, lengths, reset, more)
        x = input.transpose(0, 1)
        if is_grad_enabled() or not x.is_cpu or is_tracing():
            # The copy that backward has, so that the caller may write to the input. On a GPU the products read steps
            # that lie one after the other, and a trace is to be the same with and without gradients.
            x = x.contiguous()
        y, hx = _run_layers(module, x, weights, hx, lengths, reset, more)
        if isinstance(y, tuple):
            return tuple(s.transpose(0, 1) for s in y), hx
        return (y.transpose_(0, 1) if is_unshared(y, module._fused_backend) else y.transpose(0, 1)), hx
    except ValueError as error:
        return refuse(module, weights, input, hx, error)


def _as_it_reads(module: Recurrent, weights: Sequence[Tensor]) -> Sequence[Tensor]:
    """A call's weights as the cell has them, where each layer is to make them."""
    return module._fused_read() if module._fused_by_layer else weights


def _run_unbatched(
    module: Recurrent,
    input: Tensor,
    hx: Any,
    weights: Sequence[Tensor],
    lengths: Any,
    reset: Tensor | None,
    more: Variant | None,
) -> Result:
    """forward of [T, D]."""
    if input.dim() != 2:
        raise ValueError(f"input: got {input.dim()} dimensions, expected two or three")
    hx = _each(lambda s: s.unsqueeze(1), hx)
    if lengths is not None:
        lengths = checks.as_lengths(lengths)
        if lengths.numel() != 1:
            raise ValueError(f"lengths: got {checks.shape_text(lengths.shape)}, expected [], of unbatched input")
        lengths = lengths.reshape(1)
    y, hx = _run_layers(module, input.unsqueeze(1), weights, hx, lengths, reset, more)
    return _each(lambda s: s.squeeze(1), y), _each(lambda s: s.squeeze(1), hx)


def _run_packed(
    module: Recurrent,
    input: PackedSequence,
    hx: Any,
    weights: Sequence[Tensor],
    reset: Tensor | None,
    more: Variant | None,
) -> Result:
    """forward of a packed batch, longest first. hx, given and returned, and reset are in the order before."""
    data, batch_sizes, sorted_indices, unsorted_indices = input
    check_packed(input)
    if hx is not None:
        _check_rows(module, hx, int(batch_sizes[0]))
        hx = module.permute_hidden(hx, sorted_indices)
    if module._fused_checks:
        _check(module, data, hx, batch_sizes)
    layout = Layout(data, batch_sizes)
    if reset is not None:
        reset = _time_first(module, reset, (layout.batch, layout.steps)[:: 1 if module.batch_first else -1])
        reset = reset if sorted_indices is None else reset.index_select(1, sorted_indices)
    if module.dropout and module.training and module.num_layers > 1:
        data, hx = _run_packed_dropout(module, data, layout, weights, hx, reset, more)
    else:
        y, hx = _run_layers(module, layout.pad(data), weights, hx, layout.lengths, reset, more)
        data = _each(lambda s: layout.pack(s, is_unshared(s, module._fused_backend)), y)
    packed = _each(lambda s: PackedSequence(s, batch_sizes, sorted_indices, unsorted_indices), data)
    return packed, module.permute_hidden(hx, unsorted_indices)


def _run_packed_dropout(
    module: Recurrent,
    data: Tensor,
    layout: Layout,
    weights: Sequence[Tensor],
    hx: Any,
    reset: Tensor | None,
    more: Variant | None,
) -> tuple[Any, Any]:
    """torch draws the masks between layers for the packed rows, and so do we."""

    def layer(data: Tensor, own: Sequence[Tensor], entering: Any) -> Result:
        y, final = _run_layers(module, layout.pad(data), own, entering, layout.lengths, reset, more, num_layers=1)
        return _each(lambda s: layout.pack(s, is_unshared(s, module._fused_backend)), y), final

    return _one_by_one(module, data, weights, hx, layer)


def _one_by_one(
    module: Recurrent, data: Tensor, weights: Sequence[Tensor], hx: Any, layer: Callable[..., Result]
) -> tuple[Any, Any]:
    """The layers, each by a call of its own, dropout between them."""
    recurrences = 2 if module.bidirectional else 1
    count = len(weights) // module.num_layers
    finals: list[Any] = []
    y: Any = data
    for k in range(module.num_layers):
        data = y if isinstance(y, Tensor) else y[0]
        if k and module.dropout and module.training:
            data = torch.dropout(data, module.dropout, True)
        rows = slice(k * recurrences, (k + 1) * recurrences)
        entering = _each(lambda s, rows=rows: s[rows], hx)
        y, final = layer(data, weights[k * count : (k + 1) * count], entering)
        finals.append(final)
    if module._fused_states > 1:
        return y, tuple(torch.cat(states) for states in zip(*finals, strict=True))
    return y, torch.cat(finals)


def _run_layers(
    module: Recurrent,
    x: Tensor,
    weights: Sequence[Tensor],
    hx: Any,
    lengths: Any,
    reset: Tensor | None,
    more: Variant | None,
    num_layers: int | None = None,
) -> Result:
    """x [T, B, D], hx of [L·R, B, ·] or None → y [T, B, R·P], the final hx."""
    several, options = module._fused_states > 1, module._fused_options
    num_layers = num_layers or module.num_layers
    if num_layers > 1 and (module._fused_by_layer or more is not None):
        return _one_by_one(
            module, x, weights, hx, lambda x, own, hx: _run_layers(module, x, own, hx, lengths, reset, more, 1)
        )
    if module._fused_by_layer:
        x, weights = module._fused_of_layer(x, weights, lengths)
    y: Any
    if more is not None:
        states = () if hx is None else hx if several else (hx,)
        y, after = extras.run(module, more, x, weights, states, lengths, reset)
        return y, tuple(after) if several else after[0]
    y, *after = layers.run(
        module._fused_cell,
        x,
        weights,
        () if hx is None else hx if several else (hx,),
        num_layers,
        module.bidirectional,
        module.dropout,
        module.training,
        lengths,
        reset,
        module._fused_save,
        module._fused_backend,
        *options,
    )
    if options and options[1]:
        y, after = (y, *after[module._fused_states :]), after[: module._fused_states]
    return y, tuple(after) if several else after[0]


def _time_first(module: Recurrent, reset: Tensor, shape: Sequence[int]) -> Tensor:
    """reset, which has this shape in the input's layout, as [T, B]. Raises ValueError."""
    if len(shape) == 1:
        checks.check_reset_shape(reset, shape, "[T]", ", of unbatched input")
        return reset.unsqueeze(1)
    if module.batch_first:
        checks.check_reset_shape(reset, shape, "[B, T]", ", for batch_first is True")
        return reset.transpose(0, 1)
    checks.check_reset_shape(reset, shape, "[T, B]")
    return reset


def _check_rows(module: Recurrent, hx: Any, batch: int) -> None:
    """Whether states may be put into a packed batch's order, and taken apart by layers. Raises ValueError."""
    rows = state_rows(module)
    names = CELLS[module._fused_cell].states
    for name, state in zip(names, hx if len(names) > 1 else (hx,), strict=True):
        if state.dim() != 3 or state.size(0) != rows or state.size(1) < batch:
            width = "P" if name == names[0] else "H"
            expected = f"[L·R, B, {width}] with [{rows}, {batch}]{checks.misplaced(state)}"
            raise ValueError(f"{name}_0: got {checks.shape_text(state.shape)}, expected {expected}")


def _each(function: Callable[..., Any], value: Any) -> Any:
    """function of each state of hx, or sequence of y."""
    if value is None:
        return None
    return tuple(map(function, value)) if isinstance(value, (tuple, list)) else function(value)


def _check(module: Recurrent, input: Tensor, hx: Any, batch_sizes: Tensor | None = None) -> None:
    """Call the checks that a subclass overrides, with what torch.nn gives them."""
    module._update_flat_weights()
    if batch_sizes is None and input.dim() == 2:
        input = input.unsqueeze(0 if module.batch_first else 1)
        hx = _each(lambda s: s.unsqueeze(1), hx)
    if hx is None:
        hx = input.new_zeros(module.get_expected_hidden_size(input, batch_sizes))
        if module._fused_states > 1:
            other = module.get_expected_cell_size(input, batch_sizes)  # type: ignore[operator]
            hx = (hx, *(input.new_zeros(other) for _ in range(module._fused_states - 1)))
    module.check_forward_args(input, hx, batch_sizes)
