"""The cells' descriptors as the loops need them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from fused_rnn import cells


def _of(spec: Any) -> Any:
    reads_h = spec.name == "gru"

    def step(x: Any, r: Any, states: Any, _: Any) -> Any:
        h, c = spec.step(torch.cat(list(x), -1), torch.cat(list(r), -1), states[0], states[1] if spec.has_c else None)
        return (h, c)[: 1 + spec.has_c]

    return SimpleNamespace(
        gates=spec.gates, states=("h", "c")[: 1 + spec.has_c], saved=spec.stored, apart=int(reads_h), reads_h=reads_h,
        step=step,
    )  # fmt: skip


CELLS = {name: _of(spec) for name, spec in cells.CELLS.items()}
