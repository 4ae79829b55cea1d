"""A block-diagonal W_hh as a whole one, which is what the loops on a GPU multiply by."""

from __future__ import annotations

from typing import TypeVar

from torch import Tensor

from fused_rnn.call import BackwardCall, LayerCall
from fused_rnn.cells import CELLS, diagonal

C = TypeVar("C", LayerCall, BackwardCall)


def of(call: C) -> C:
    """The same call, of whole matrices."""
    cell = CELLS[call.cell]
    if cell.diagonal == 1:
        return call
    count, weights = len(call.weights) // max(1, len(call.directions)), list(call.weights)
    for k in range(1, len(weights), max(1, count)):
        w = weights[k]
        if w.dim() != 2 or w.shape[0] != cell.gates * cell.diagonal * w.shape[1]:
            raise RuntimeError(f"weights[{k}]: got {list(w.shape)}, expected [{cell.gates}·H, H/{cell.diagonal}]")
        weights[k] = diagonal.dense(w, cell.gates, cell.diagonal)
    return call._replace(weights=weights, cell=cell.whole.name)


def gradients(call: BackwardCall, outputs: list[Tensor]) -> list[Tensor]:
    """The outputs of a backward of whole matrices, as those of `call`."""
    cell, first = CELLS[call.cell], 1 + len(call.states)
    if cell.diagonal > 1 and call.need_dw:
        for k in range(first + 1, len(outputs), len(call.weights) // len(call.directions)):
            outputs[k] = diagonal.cut(outputs[k], cell.gates, cell.diagonal)
    return outputs
