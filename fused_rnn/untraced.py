"""What Dynamo is not to look into."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


@torch.compiler.disable  # type: ignore[untyped-decorator]
def call(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """function(x), outside of the graph."""
    return function(x)
