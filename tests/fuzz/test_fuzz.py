"""A minute of the random caller; and that it finds what is planted."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from fused_rnn import ops

from .broken_streams import BREAKS
from .generate import SLOW, generate
from .plants import PLANTS

ROOT = Path(__file__).parents[2]
SEED, CALLS = 1, 2000
needs_kernels = pytest.mark.skipif(ops.MISSING is not None, reason=f"cpu: {ops.MISSING}")


def fuzz(*arguments: object) -> tuple[int, str]:
    """The exit status and what is printed."""
    command = [sys.executable, "-m", "tests.fuzz", *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=580, check=False)
    return done.returncode, done.stdout + done.stderr


@needs_kernels
def test_random_calls() -> None:
    status, printed = fuzz("--seed", SEED, "--calls", CALLS)
    assert status == 0, printed
    assert f"{CALLS} calls, 0 findings" in printed


@needs_kernels
@pytest.mark.parametrize("plant", PLANTS)
def test_what_is_planted_is_found(plant: str) -> None:
    """And printed as a line that repeats it."""
    index = next(k for k in range(10**6) if _meets(plant, k))
    planted = ("--plant", plant, "--timeout", 5 if plant == "hang" else 120)
    status, printed = fuzz("--seed", SEED, "--first", index, "--calls", 1, *planted)
    line = printed.splitlines()[0]
    assert status == 1, printed
    assert line.startswith(f"python -m tests.fuzz --repeat {SEED}:{index} --plant {plant}  # {plant}"), printed
    assert "1 calls, 1 findings" in printed
    again = line.split("  #")[0].split()[3:]
    status, printed = fuzz(*again, "--timeout", planted[-1])
    assert status == 1 and line in printed.splitlines()
    status, printed = fuzz("--repeat", f"{SEED}:{index}")
    assert status == 0, printed


def _meets(plant: str, index: int) -> bool:
    """Whether a call meets the fault."""
    call = generate(SEED, index)
    if plant == "accepted":
        return call.broken == "lengths_too_long" and call.dtype == "float32" and call.special == "none"
    plain = call.mode == "no_grad" and call.broken is None and call.special == "none"
    plain = plain and call.kind in ("functional", "module")
    numbers = call.dtype == "float32" and call.cell == "gru" and call.B > 0 and not call.autocast
    judged = call.lengths == "none" and not call.reset  # by torch alone, and not by the faulty backend itself
    return plain and numbers and judged and call.backend == "reference"


def test_a_worker_goes_on_after_a_crash_and_a_hang() -> None:
    for plant, timeout in (("crash", 120), ("hang", 5)):
        index = next(k for k in range(10**6) if _meets(plant, k))
        _, printed = fuzz("--seed", SEED, "--first", index, "--calls", 3, "--plant", plant, "--timeout", timeout)
        assert "3 calls, " in printed


def test_a_call_is_made_of_its_numbers_alone() -> None:
    assert [generate(3, k) for k in range(50)] == [generate(3, k) for k in range(50)]
    assert generate(3, 7) != generate(4, 7)


def test_calls_are_of_every_kind() -> None:
    """Within an hour's calls every choice meets every other of the larger choices, and a quarter is broken."""
    calls = [generate(SEED, k) for k in range(20_000)]
    broken = [call for call in calls if call.broken]
    assert 0.2 < len(broken) / len(calls) < 0.3
    assert {call.broken for call in broken} == set(BREAKS)
    valid = [call for call in calls if not call.broken]
    names = ("kind", "cell", "dtype", "backend", "mode", "form")
    chosen = {name: {getattr(call, name) for call in valid} for name in names}
    assert chosen["backend"] == {None, "cpu", "torch", "reference", *SLOW}
    for one in ("cell", "dtype"):
        for other in chosen:
            if one != other:
                met = {(getattr(call, one), getattr(call, other)) for call in valid}
                assert len(met) == len(chosen[one]) * len(chosen[other]), (one, other)
