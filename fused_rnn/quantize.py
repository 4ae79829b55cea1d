"""Models for serving: recurrent modules turned into ones with weights of int8."""

from __future__ import annotations

import copy
import warnings
from typing import Any, TypeVar

from torch import nn

from fused_rnn import nn as room
from fused_rnn.convert import convert
from fused_rnn.nn import GRU, LSTM, RNN, FlexRNN, both, extras
from fused_rnn.nn.base import Fused
from fused_rnn.nn.frozen import ACTIVATIONS
from fused_rnn.nn.quantized import Quantized, quantized
from fused_rnn.nn.recurrent import Recurrent

M = TypeVar("M", bound=nn.Module)

_KINDS = (LSTM, GRU, RNN, FlexRNN, both.LSTM, both.GRU, both.RNN)


def quantize(model: M, *, activations: str = "int8", inplace: bool = False) -> M:
    """The model with int8 weights in its recurrent layers, in the place of torch.ao.quantization.quantize_dynamic.

    Every LSTM, GRU and RNN of torch.nn or of this package, every FlexRNN and cell of the literature becomes a module
    whose matrices are int8, a scale for each row, with its arguments, calls and results otherwise; a quarter of the
    bytes, for inference on the CPU. Nothing else in the model changes.

    Args:
        model: any module, or such a layer itself, of float32 on the CPU.
        activations: what the matrices are multiplied with. "int8" brings x and h to it, too, each row at each step by a
            scale of its own, as torch does by one for all: fastest, on processors with AVX512-VNNI and bfloat16 and
            for LSTM without a projection, GRU and RNN; elsewhere it is "float32", which leaves x and h as they are and
            has about half the error.
        inplace: whether `model` itself shall be changed, whose float32 weights are then given up, and not a copy.

    Returns:
        The copy, or `model`; of a layer by itself always another module.

    Raises:
        TypeError: if model is no torch.nn.Module.
        ValueError: for another word for activations, for weights of another dtype or device, or that are not finite.

    What it cannot do so (regularisers' attributes, heads, a LiGRU's batch norm in training, single cells, classes that
    somebody derived) it leaves as it is, with a UserWarning that names it. state_dict has the int8 weights, their
    scales and the biases, and loads into another quantized copy; deepcopy and pickle take the module.

    Examples:
        >>> model = torch.nn.Sequential(torch.nn.Embedding(100, 16), torch.nn.LSTM(16, 32)).eval()
        >>> fused_rnn.quantize(model)[1]
        QuantizedLSTM(16, 32, weights='int8', activations='int8')
    """
    if activations not in ACTIVATIONS:
        raise ValueError(f"activations: got {activations!r}, expected 'int8' or 'float32'")
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got {type(model).__name__}, expected a torch.nn.Module")
    whole = convert(model if inplace else copy.deepcopy(model))
    made: dict[nn.Module, nn.Module] = {}
    for name, module in list(whole.named_modules()):
        if not isinstance(module, Fused) or isinstance(module, Quantized):
            continue
        why = _why_not(module)
        if why is None:
            made[module] = quantized(module, name or type(module).__name__, activations)  # type: ignore[arg-type]
        else:
            what = f"{name or 'the model'}, a {type(module).__name__}"
            warnings.warn(f"quantize: {what}, {why}, and is left as it is", stacklevel=2)
    for parent in list(whole.modules()):
        for name, child in parent._modules.items():
            if child in made:
                parent._modules[name] = made[child]
    result: Any = made.get(whole, whole)
    return result  # type: ignore[no-any-return]


def _why_not(module: Fused) -> str | None:
    """Why there is no int8 module for it; None where there is one."""
    kind = type(module)
    if not isinstance(module, Recurrent):
        return "is a single step, whose weights of int8 a stream has: module.stream(weights='int8')"
    if kind not in _KINDS and kind not in room.field.FIELD:
        return "is of a class that somebody derived"
    if any(own in vars(module) for own in module._flat_weights_names):
        return "has weights that a hook computes (weight_norm, prune): take it off first"
    if extras.asks(module):
        return "has regularisers, or returns states or gates"
    if module._fused_heads > 1:
        return "has heads"
    if module._fused_by_layer:
        return "normalises by the batch in training mode: eval()"
    return None
