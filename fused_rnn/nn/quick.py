"""Calls past torch's dispatcher, of LSTM, GRU and RNN on ordinary tensors; None of any other call.

Python and the dispatcher are most of the time of a step or a short sequence: what the op checks is checked by the plain
function, which reads the weights from where nn.Module keeps them, for its __getattr__ takes 0.4 µs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, is_grad_enabled
from torch.compiler import is_compiling
from torch.nn.utils.rnn import PackedSequence

from fused_rnn import autograd, ops
from fused_rnn.autograd import step as autograd_step
from fused_rnn.call import LayerCall
from fused_rnn.cells import CELLS
from fused_rnn.layers import wants_gradient
from fused_rnn.nn.packed import Layout
from fused_rnn.nn.plain import FAST_PATH, STEPPING, is_plain_hx
from fused_rnn.nn.recurrent import Recurrent

# torch.nn's forward goes by the mode too, and not by RNN's `nonlinearity`.
_CELLS = {cell.upper(): cell for cell in CELLS}
_DIRECTIONS = ((1,), (1, -1))
_HAS_AMX = ops.ISA == "amx"  # where dispatch may leave bfloat16 to torch


def call(module: Recurrent, input: Any, hx: Any, lengths: Any, reset: Any) -> Sequence[Any] | None:
    """y, h_n (and c_n), as the module returns them."""
    if (
        is_compiling()  # before any size, on which nothing traced may specialise
        or FAST_PATH is None
        or module._fused_checks
        or module._fused_extras
        or module._fused_backend not in STEPPING
    ):
        return None
    layers = module.num_layers
    if layers > 1 and module.training and module.dropout:
        return None
    if is_grad_enabled():
        return _keeping(module, input, hx, lengths, reset)
    cell, time, both = _CELLS[module.mode], 1 if module.batch_first else 0, module.bidirectional
    return FAST_PATH(
        module._parameters, module.bias, input, hx, cell, time, lengths, reset, layers, both, module._fused_frozen
    )


def _keeping(module: Recurrent, input: Any, hx: Any, lengths: Any, reset: Any) -> Sequence[Any] | None:
    """The same where a gradient is asked for: what the plain function makes of each layer goes to that layer's
    Function."""
    layers, several, packed = module.num_layers, module._fused_states > 1, type(input) is PackedSequence
    if packed:
        x, batch_sizes, order, order_back = input
        if layers > 1:
            return None
        if order is not None and (hx is not None or reset is not None):
            return None
        if reset is not None and module.batch_first:  # which is laid out as [B, T]
            return None
    elif module.batch_first:  # of which backward has a copy
        return None
    else:
        x = input
    if type(x) is not Tensor or not x.is_cpu:
        return None
    parameters = module._parameters
    try:
        weights: Any = [parameters[name] for name in module._flat_weights_names]
    except KeyError:  # some are computed from some
        return None
    states = _states(module, x, hx, weights) if module._fused_save == "gates" else None
    if states is None or (layers > 1 and any(s.dim() != 3 for s in states)):
        return None
    cell, both, count = _CELLS[module.mode], module.bidirectional, len(weights) // layers
    directions, finals = _DIRECTIONS[both], []
    for k in range(layers):
        own, entering, given = weights, states, hx
        if layers > 1:
            own = weights[k * count : (k + 1) * count]
            entering = tuple([s[k * len(directions) : (k + 1) * len(directions)] for s in states])
            given = None if hx is None else entering if several else entering[0]
        outputs = FAST_PATH(  # type: ignore[misc]
            module._parameters, module.bias, input if packed else x, given, cell, 0, lengths, reset, layers, both, None,
            k,
        )  # fmt: skip
        if outputs is None:
            return None
        layout = Layout(x, batch_sizes, outputs[1].size(1)) if packed else None
        options = (cell, directions, "gates", packed or k + 1 == layers)
        x, *after = autograd.made(outputs, layout, LayerCall(x, own, entering, lengths, reset, *options))
        finals.append(after)
    after = finals[0] if layers == 1 else [torch.cat(each) for each in zip(*finals, strict=True)]
    if packed:
        x = PackedSequence._make((x, batch_sizes, order, order_back))
        if order_back is not None:
            after = [s.index_select(1, order_back) for s in after]
    return [x, *after]


def step(module: Any, input: Any, hx: Any, cell: str, weights: Sequence[Tensor]) -> Sequence[Tensor] | None:
    """The states after a step of a cell where a gradient is asked for."""
    if is_compiling() or FAST_PATH is None or module._fused_backend not in STEPPING:
        return None
    if type(input) is not Tensor or not input.is_cpu or input.dim() != 2:
        return None
    states = _states(module, input, hx, weights)
    if states is None:
        return None
    outputs = FAST_PATH(module._parameters, module.bias, input, hx, cell, -1, None, None, 1, False, None, 0)
    return None if outputs is None else autograd_step.made(outputs, cell, input, states, weights)


def _states(module: Any, x: Tensor, hx: Any, weights: Sequence[Tensor]) -> Sequence[Tensor] | None:
    """The states given to a call whose forward the plain function may make; None of one that it may not, or that wants
    no gradient."""
    if weights[0].is_inference() or (_HAS_AMX and x.dtype is torch.bfloat16):
        return None
    if not is_plain_hx(hx, module._fused_states):
        return None
    states = () if hx is None else tuple(hx) if module._fused_states > 1 else (hx,)
    return states if wants_gradient(x, weights, states) else None
