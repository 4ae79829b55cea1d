"""A loop of a cell in stages without a team, a step at a time: a launch for the stages up to each product, which is
torch's (csrc/cuda/by_stages.h)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from fused_rnn.cells.program import MATRIX_PRODUCTS, parse
from fused_rnn.cuda.staged import Published, stages

_Run = tuple[int, int, tuple[Published, ...]]  # stages first .. last - 1, and the products that end them


@lru_cache(maxsize=4096)
def runs(name: str, backward: bool) -> tuple[int, tuple[_Run, ...]]:
    """How many values cross from stage to stage, and the launches of a step."""
    found, first = stages(parse(name), late=True)[backward], 0
    count, made = len(found.lines), list[_Run]()
    for last in range(1, count + 1):
        products = tuple(p for p in found.published if p.stage == last - 1 and p.what in MATRIX_PRODUCTS)
        if products or last == count:
            made.append((first, last, products))
            first = last
    return len(found.crossing), tuple(made)


class Steps:
    """The steps of one loop. crossing: its workspace, [crossing, R, B, H] wide.  matrices: [R, N, H, H]."""

    def __init__(self, name: str, backward: bool, like: Tensor, matrices: Tensor | None, stream: int) -> None:
        """like: a state [R, B, H] in the accumulation dtype."""
        crossing, self.runs = runs(name, backward)
        self.crossing = like.new_zeros(max(crossing, 1), *like.shape)
        self.weights: Sequence[Tensor] = ()
        if matrices is not None:
            each = matrices.unbind(1)
            self.weights = each if backward else [w.transpose(1, 2) for w in each]
        self.stream = stream

    def run(self, loop: Any, step: int) -> None:
        """One step of the module's loop; -1, backward, to close."""
        if step < 0:
            loop.run_stages(step, 0, 1, self.stream)
            return
        for first, last, products in self.runs:
            loop.run_stages(step, first, last, self.stream)
            for one in products:
                w = self.weights[one.block]
                self.crossing[one.result].copy_(torch.bmm(self.crossing[one.operand].to(w.dtype), w))
