"""Weights of a FlexRNN that are in blocks, by heads or on the diagonal of W_hh, as its recurrences have them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from fused_rnn.cells.diagonal import by_gate
from fused_rnn.checks import shape_text


def by_block(module: Any, weights: Sequence[Tensor]) -> list[Tensor]:
    """Weights with the blocks of each W_hh in the order of a recurrence's rows. Raises ValueError for another shape."""
    count, flat, shape = len(module._all_weights[0]), list(weights), module._shapes(0)["weight_hh"]
    for k in range(1, len(flat), count):
        if flat[k].shape != shape:
            name = module._flat_weights_names[k]
            raise ValueError(f"{name}: got {shape_text(flat[k].shape)}, expected {shape_text(shape)}")
        flat[k] = by_gate(flat[k], module._fused_user.gates)
    return flat


def by_head(module: Any, weights: Sequence[Tensor]) -> list[Tensor]:
    """Weights of G·H rows as those of N recurrences of H/N units. Raises ValueError where shapes do not fit."""
    heads, gates = module._fused_heads, module._fused_user.gates
    units, flat = module.hidden_size // heads, []
    sides = 1 + module.bidirectional
    count = len(weights) // (module.num_layers * sides)
    for first in range(0, len(weights), count):
        shapes = module._shapes(module.input_size if first < sides * count else module.hidden_size * sides)
        columns = []
        for k, (name, shape) in enumerate(shapes.items(), first):
            w = weights[k]
            if w.shape != shape:
                full = module._flat_weights_names[k]
                raise ValueError(f"{full}: got {shape_text(w.shape)}, expected {shape_text(shape)}")
            if name in module._fused_user.params:
                w = w.unflatten(0, (heads, units))
            elif name not in ("weight_hh", *module._fused_user.matrices):
                w = w.unflatten(0, (gates, heads, units)).transpose(0, 1).flatten(1, 2)
            columns.append(w.unbind(0))
        flat += [w for member in zip(*columns, strict=True) for w in member]
    return flat
