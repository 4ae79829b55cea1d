"""A mistake planted in a copy of the CUDA loops' source."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import NamedTuple

from emulated_build import ROOT, Instance

from .cases import Case


class Mutation(NamedTuple):
    file: str  # in csrc
    old: str
    new: str
    by: str
    says: str
    cases: tuple[Case, ...]
    times: int = 1  # that `old` is there

    @property
    def instance(self) -> Instance:
        return Instance(self.cases[0].cell, self.cases[0].precision, smallest=True, narrow=self.cases[0].narrow)


FWD, BWD, EXCHANGE, PRECISION = "cuda/persistent_fwd.h", "cuda/persistent_bwd.h", "cuda/exchange.h", "cuda/precision.h"
WEIGHTS, GATHER, SCATTERS, INDEX = "cuda/weights.h", "cuda/gather.h", "cuda/scatter.h", "cuda/index.h"
DIRECTLY, PRODUCT = "cuda/direct.h", "cuda/product.h"
UNIT_FWD, UNIT_BWD = "cuda/unit_fwd.h", "cuda/unit_bwd.h"
WIDEN = "cuda/primitives/widen.h"
WRONG = "error "


def plant(mutation: Mutation, folder: Path) -> Path:
    """A copy of csrc that has the mutation."""
    copied = folder / "csrc"
    shutil.copytree(ROOT / "csrc", copied)
    path = copied / mutation.file
    text = path.read_text()
    times = text.count(mutation.old)
    assert times == mutation.times, f"{mutation.file} has {mutation.old!r} {times} times"
    path.write_text(text.replace(mutation.old, mutation.new))
    return copied
