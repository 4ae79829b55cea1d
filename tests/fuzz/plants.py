"""Faults put into the package on purpose, of each kind that the random caller is to find."""

from __future__ import annotations

import os
import time
from typing import Any

import torch

from fused_rnn import checks
from fused_rnn.backends import reference

PLANTS = ("wrong", "crash", "hang", "accepted")


def plant(name: str) -> None:
    """From now on the reference backend is wrong, crashes or hangs; or lengths of any value are accepted."""
    if name == "accepted":
        checks.check_lengths = lambda lengths, x: torch.as_tensor(lengths).flatten()[:1].expand(x.shape[1]).clamp(0, 1)
        return
    forward = reference.forward

    def faulty(*args: Any) -> Any:
        if name == "crash":
            os.abort()
        if name == "hang":
            time.sleep(3600)
        y, *rest = forward(*args)
        return [y * 1.01, *rest]

    reference.forward = faulty
