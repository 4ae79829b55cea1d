"""float32 on a GPU: whether products may round their operands to TF32. For recurrent layers cuDNN's switch says so."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


def tf32_allowed() -> bool:
    """What torch says of TF32 in recurrent layers: torch.backends.cudnn.allow_tf32, or the newer fp32_precision."""
    return str(torch.backends.cudnn.rnn.fp32_precision) == "tf32"  # type: ignore[attr-defined]


# What torch.compiler.assume_constant_result does, without the import of all of Dynamo that it costs.
tf32_allowed._dynamo_marked_constant = True  # type: ignore[attr-defined]


@contextmanager
def as_in_cudnn() -> Iterator[None]:
    """torch.mm on a GPU follows cuDNN's switch, not its own: a layer is not to have one precision inside, one outside.

    torch has no argument for it, only a setting of the process, so another thread's torch.mm meanwhile follows it too.
    """
    matmul = torch.backends.cuda.matmul
    before, wanted = matmul.fp32_precision, "tf32" if tf32_allowed() else "ieee"
    if before == wanted:
        yield
        return
    matmul.fp32_precision = wanted
    try:
        yield
    finally:
        matmul.fp32_precision = before
