"""The modules of nn/field in the CUDA loops, printed as C++, in the emulator."""

from __future__ import annotations

import shutil
from typing import Any

import pytest
from cuda_cases import EXCHANGES, PRECISIONS
from emulated import on_the_emulator
from emulated_printed import Loader, Printed, kernels
from field_loop import VARIANTS, Case, check

from fused_rnn import ops
from fused_rnn.cuda import programs

pytestmark = [
    pytest.mark.skipif(shutil.which("g++") is None, reason="the emulator is compiled by g++"),
    pytest.mark.skipif(ops.MISSING is not None, reason=str(ops.MISSING)),
    pytest.mark.timeout(1200),
]

NAMES = list(VARIANTS)
# Every module a step at a time, in a precision of its own; these by teams too.
POINTWISE = ("ieee", "bf16", "f64", "f16")
TURNS = {name: POINTWISE[i % len(POINTWISE)] for i, name in enumerate(NAMES)}
BY_TEAMS = {"CoupledLSTM": "bf16", "SLSTM-heads": "f16", "LiGRU": "bf16"}
# Of several stages; teams of others make gates again.
STAGED_BY_TEAMS = {
    "BlockGRU": "bf16",
    "BlockGRU-blocks": "bf16",
    "ResetBeforeGRU": "f16",
    "MGU": "bf16",
    "LayerNormLSTM": "ieee",
    "LayerNormGRU": "bf16",
}


def printed(precision: str) -> list[Printed]:
    """What is built together."""
    made: dict[Printed, None] = {}
    for name, own in TURNS.items():
        every = kernels(Case(name).module().cell.descriptor().whole.name, precision)
        if BY_TEAMS.get(name) == precision:
            made |= dict.fromkeys(every)
        elif own == precision:
            made |= dict.fromkeys(every[:2])
    for name, own in STAGED_BY_TEAMS.items():
        if own == precision:
            every = kernels(Case(name).module().cell.descriptor().whole.name, precision)
            made |= dict.fromkeys(one for one in every if one.kernel.tiles)
    return list(made)


LOADER: list[Loader] = []


def loader() -> Loader:
    """Made when a test runs, for cells are traced by it."""
    if not LOADER:
        LOADER.append(Loader(printed(precision) for precision in POINTWISE))
    return LOADER[0]


OPTIONS: list[dict[str, Any]] = [
    {"lengths": True},
    {"bidirectional": True, "reset": True, "hx": False},
    {"save": "recompute", "lengths": True, "reset": True, "bias": False},
    {"T": 2, "B": 9, "H": 7, "layers": 2, "bidirectional": True, "lengths": True},
]


@pytest.mark.parametrize("case", [
    Case(name, **OPTIONS[(i // 4 + k) % len(OPTIONS)], dtype=PRECISIONS[TURNS[name]]).fit()
    for i, name in enumerate(NAMES)
    for k in range(2)
], ids=str)  # fmt: skip
def test_step_by_step(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fused_rnn.call.CHECKPOINT_EVERY", 3)
    with on_the_emulator(exchange="stepwise"), programs.emulating(loader()):
        check(case, "cuda")


@pytest.mark.parametrize(
    ("name", "options"),
    [(name, k) for name in BY_TEAMS for k in (0, 2)] + [(name, k) for name in STAGED_BY_TEAMS for k in (0, 1)],
)
@pytest.mark.parametrize("exchange", ["cta", "cluster2"])
def test_by_teams(name: str, exchange: str, options: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A team's units are more than H: what a cell makes of zeros past it reaches no other."""
    monkeypatch.setattr("fused_rnn.call.CHECKPOINT_EVERY", 3)
    case = Case(name, **OPTIONS[options], dtype=PRECISIONS[(BY_TEAMS | STAGED_BY_TEAMS)[name]]).fit()
    if exchange == "cluster2":
        case = case._replace(H=33 * case.variant.options.get("heads", 1) + ("blocks" in case.variant.options))
    with on_the_emulator(options, rows=8, **EXCHANGES[exchange]), programs.emulating(loader()):
        check(case, "cuda")
