"""Users' cells by the CUDA loops, in the emulator: the printed source, compiled by g++, against the reference loop."""

from __future__ import annotations

import shutil
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from cuda_cases import EXCHANGES, PRECISIONS, _Tf32Products
from emulated import on_the_emulator
from emulated_printed import Loader, Printed, kernels
from program_cases import CELLS_BY_NAME, ProgramCase, by_backend, by_loop, by_reference, call_of
from tolerances import assert_as_good_as_torch, tf32

from fused_rnn import ops
from fused_rnn.cuda import programs

pytestmark = [
    pytest.mark.skipif(shutil.which("g++") is None, reason="the emulator is compiled by g++"),
    pytest.mark.skipif(ops.MISSING is not None, reason=str(ops.MISSING)),
    pytest.mark.timeout(1200),
]

# Which cells meet which precision by a team; pointwise all meet all.
BY_TEAMS = {"bf16": ("lstm",), "f16": ("leaky",), "tf32": ("gru",), "ieee": ("lstm", "leaky"), "f64": ()}
ALONE = ("indrnn", "sru")


def group(precision: str) -> list[Printed]:
    names = [*BY_TEAMS[precision], *(ALONE if precision != "tf32" else ())]
    names = list(CELLS_BY_NAME) if precision == "f64" else names
    return [one for name in names for one in kernels(CELLS_BY_NAME[name], precision)]


LOADER = Loader(group(precision) for precision in PRECISIONS)


def check(case: ProgramCase, precision: str, seed: int = 0, **forced: Any) -> None:
    call = call_of(case, seed)
    with tf32(precision == "tf32"), on_the_emulator(seed, **forced), programs.emulating(LOADER):
        ours = by_backend(call, "cuda")
    with _Tf32Products() if precision == "tf32" else nullcontext():
        theirs = by_loop(call)
    assert_as_good_as_torch(ours, theirs, by_reference(call))


OPTIONS = [
    {},
    {"lengths": True, "reset": True, "bidirectional": True, "sequences": True},
    {"lengths": True, "bidirectional": True, "save": "recompute"},
    {"reset": True, "save": "recompute", "sequences": True, "hx": False, "bias": False, "T": 7},
]


@pytest.mark.parametrize("options", range(len(OPTIONS)))
@pytest.mark.parametrize("exchange", ["cta", "cluster2", "grid", "stepwise"])
@pytest.mark.parametrize(("precision", "cell"), [(p, cell) for p, cells in BY_TEAMS.items() for cell in cells])
def test_teams(precision: str, cell: str, exchange: str, options: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fused_rnn.call.CHECKPOINT_EVERY", 3)
    forced = EXCHANGES[exchange] | ({"rows": 8} if exchange != "stepwise" else {})
    case = ProgramCase(cell, H=33 if exchange == "cluster2" else 17, dtype=PRECISIONS[precision], **OPTIONS[options])
    check(case, precision, options, **forced)


@pytest.mark.parametrize("options", range(len(OPTIONS)))
@pytest.mark.parametrize("precision", [p for p in PRECISIONS if p != "tf32"])
@pytest.mark.parametrize("cell", ALONE)
def test_without_w_hh(cell: str, precision: str, options: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fused_rnn.call.CHECKPOINT_EVERY", 3)
    check(ProgramCase(cell, dtype=PRECISIONS[precision], **OPTIONS[options]), precision, options)


@pytest.mark.parametrize("options", range(len(OPTIONS)))
@pytest.mark.parametrize("cell", CELLS_BY_NAME)
def test_float64(cell: str, options: int) -> None:
    check(ProgramCase(cell, dtype=torch.float64, **OPTIONS[options]), "f64", options)
