"""The modules of nn/field in the Triton loops: on a GPU, or in Triton's interpreter."""

from __future__ import annotations

from typing import Any

import pytest
from field_loop import STAGED, VARIANTS, Case, check
from triton_cases import DEVICE, DTYPES, LOOPS, MARKS, quicker_interpreter

from fused_rnn.triton import planner
from fused_rnn.triton.schedule import Tile

# numpy's, in the interpreter, of the units past H that a tile has: nobody reads what is made of them.
pytestmark = [*MARKS, pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")]

NAMES = [name for name in VARIANTS if name not in STAGED]
# Of several stages, which have one tile of units a member.
STAGED_LOOPS = {"chosen": {}, "cooperative": {"loop": "cooperative", "tile": Tile(16, 16, 16, 4), "hold": True}}
OPTIONS: list[dict[str, Any]] = [
    {"T": 3, "H": 17, "lengths": True},
    {"T": 4, "B": 2, "H": 6, "bidirectional": True, "reset": True, "hx": False},
    {"T": 4, "B": 3, "H": 5, "save": "recompute", "lengths": True, "reset": True, "bias": False},
    {"T": 2, "B": 17, "H": 3, "layers": 2, "bidirectional": True, "lengths": True},
]


def cases() -> list[tuple[Case, str]]:
    """Every module by two loops, in two dtypes, with two options."""
    loops, made = list(LOOPS), []
    for c, name in enumerate(NAMES):
        for k in range(2):
            dtype = DTYPES[(c // 2 + k) % len(DTYPES)]
            made.append(
                (Case(name, **OPTIONS[(c + k) % len(OPTIONS)], dtype=dtype).fit(), loops[(c + 3 * k) % len(loops)])
            )
    return made


@pytest.mark.timeout(110)
@pytest.mark.parametrize(("case", "loop"), cases(), ids=str)
def test_by_the_loops(case: Case, loop: str, monkeypatch: pytest.MonkeyPatch) -> None:
    quicker_interpreter()
    monkeypatch.setattr("fused_rnn.call.CHECKPOINT_EVERY", 2)
    with planner.override(**LOOPS[loop]):
        check(case, "triton", DEVICE)


@pytest.mark.timeout(200)
@pytest.mark.parametrize("loop", STAGED_LOOPS)
@pytest.mark.parametrize("name", sorted(STAGED))
def test_in_stages(name: str, loop: str, monkeypatch: pytest.MonkeyPatch) -> None:
    quicker_interpreter()
    monkeypatch.setattr("fused_rnn.call.CHECKPOINT_EVERY", 2)
    k = sorted(STAGED).index(name) + list(STAGED_LOOPS).index(loop)
    case = Case(name, **OPTIONS[k % len(OPTIONS)], dtype=DTYPES[k % len(DTYPES)]).fit()
    with planner.override(**STAGED_LOOPS[loop]):
        check(case, "triton", DEVICE)
