"""How many of our own frames of Python stand between a module and its op: each costs a fraction of a microsecond."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from user_cells import leaky

import fused_rnn
from fused_rnn import ops

PACKAGE = Path(fused_rnn.__file__).parent
MOST = 8


@pytest.mark.skipif(ops.MISSING is not None, reason=str(ops.MISSING))
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("name", ["LSTM", "GRU", "RNN", "FlexRNN"])
def test_from_module_to_op_in_training(name: str, batch_first: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[list[str]] = []

    def forward(*args: Any) -> Any:
        frame, frames = sys._getframe(1), []
        while frame is not None:
            if Path(frame.f_code.co_filename).is_relative_to(PACKAGE):
                frames.append(frame.f_code.co_qualname if sys.version_info >= (3, 11) else frame.f_code.co_name)
            frame = frame.f_back  # type: ignore[assignment]
        found.append(frames)
        return real(*args)

    real = ops.forward
    monkeypatch.setattr(ops, "forward", forward)
    monkeypatch.setattr("fused_rnn.nn.quick.FAST_PATH", None)
    cell = (leaky,) if name == "FlexRNN" else ()
    module = getattr(fused_rnn, name)(*cell, 4, 5, batch_first=batch_first)
    output, _ = module(torch.randn(3, 3, 4))
    output.sum().backward()
    assert len(found) == 1
    assert len(found[0]) <= MOST, found[0]
