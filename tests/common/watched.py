"""Modules and inputs for the tests of `diagnose`."""

from __future__ import annotations

from typing import Any

import torch
import user_cells
from torch import Tensor

import fused_rnn

T, B, D, H = 7, 3, 4, 6
LENGTHS = [7, 4, 6]


def made(kind: str, **options: Any) -> Any:
    torch.manual_seed(1)
    options = {"dtype": torch.float64, **options}
    if kind == "rnn_relu":
        return fused_rnn.RNN(D, H, nonlinearity="relu", **options)
    if kind in user_cells.USER_CELLS:
        init = dict.fromkeys(user_cells.USER_CELLS[kind].params, 0.4)
        return fused_rnn.FlexRNN(user_cells.USER_CELLS[kind], D, H, init=init, **options)
    return getattr(fused_rnn, kind)(D, H, **options)


def given() -> tuple[Tensor, Tensor]:
    """x and reset."""
    torch.manual_seed(2)
    return torch.randn(T, B, D, dtype=torch.float64), torch.rand(T, B) < 0.2


def remembering(kind: str, **options: Any) -> Any:
    torch.manual_seed(0)
    module = getattr(fused_rnn, kind)(16, 32, **options)
    if kind == "LSTM":
        with torch.no_grad():
            for name, p in module.named_parameters():
                if name.startswith("bias_ih"):
                    p[32:64] += 3
    return module
