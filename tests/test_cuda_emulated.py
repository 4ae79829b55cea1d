"""The CUDA loops' very source on the CPU: under AddressSanitizer and UBSan, for races, and with mistakes planted in it.

Loops alone, against float64 loops: what is around them (products over all steps, autograd, modules) has its own tests.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from cuda_emulated import build, cases, mistakes

DRIVER = Path(build.__file__).parent / "drive.py"
pytestmark = pytest.mark.skipif(shutil.which(build.CXX) is None, reason=f"no {build.CXX}")

# Every cell in the 16-bit product and in plain float32; the other products where two cells differ most.
SANITIZED = [
    *((cell, number) for cell in build.CELLS for number in ("bf16", "ieee")),
    ("lstm", "f16"),
    ("gru", "tf32"),
    ("gru", "f64"),
]
SEEDS = 2  # the cases share no schedule: each new one meets others


def drive(flavour: str, library: Path, told: list[cases.Case], seeds: int, folder: Path, cut: str = "") -> str:
    """What went wrong, or nothing."""
    path = folder / "cases.pickle"
    cases.write(told, seeds, path)
    command = [sys.executable, str(DRIVER), str(library), str(path), *([cut] if cut else [])]
    done = subprocess.run(
        command, env=build.environment(flavour), capture_output=True, text=True, check=False, timeout=500
    )
    if done.returncode == 0:
        assert f"{len(told) * seeds} runs, 0 failed" in done.stdout, done.stdout
        return ""
    return done.stdout + done.stderr


@pytest.mark.parametrize("kernel", SANITIZED, ids="-".join)
def test_address_and_undefined_behaviour(kernel: tuple[str, str], tmp_path: Path) -> None:
    library = build.module("asan", build.Instance(*kernel))
    told = [case for case in cases.pairwise(SANITIZED, seed=1) if (case.cell, case.number) == kernel]
    assert told
    assert not (found := drive("asan", library, told, SEEDS, tmp_path)), found


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_races(cell: str, tmp_path: Path) -> None:
    library = build.module("races", build.Instance(cell, "bf16"))
    told = cases.pairwise([(cell, "bf16")], seed=2, small=True)
    assert not (found := drive("races", library, told, 1, tmp_path)), found


def test_cases_are_many() -> None:
    """Of every exchange and of every way to save, for the forward loop and the one backward."""
    told = cases.pairwise(SANITIZED, seed=1)
    for name, choices in {**cases.CHOICES, "H": (1, 3, 17, 130, 245)}.items():
        assert {getattr(case, name) for case in told} >= set(choices), name


@pytest.mark.parametrize("cut", ["y", "h_n", "saved", "dgates"])
def test_a_write_past_a_global_array_is_caught(cut: str, tmp_path: Path) -> None:
    """AddressSanitizer watches the arrays that the loops are given."""
    library = build.module("asan", build.Instance("gru", "ieee"))
    found = drive("asan", library, [cases.Case("gru", "ieee", "cta", 2, 3, 5)], 1, tmp_path, cut)
    assert "AddressSanitizer: heap-buffer-overflow" in found, found


@pytest.mark.parametrize("name", mistakes.MISTAKES)
def test_mistake_is_caught(name: str, tmp_path: Path) -> None:
    mistake = mistakes.MISTAKES[name]
    library = build.module(mistake.by, mistake.instance, mistakes.plant(mistake, tmp_path))
    found = drive(mistake.by, library, list(mistake.cases), mistakes.SEEDS[mistake.by], tmp_path)
    assert mistake.says in found, found or "not caught"


@pytest.mark.parametrize("by", list(build.FLAVOURS))
def test_without_a_mistake_all_is_well(by: str, tmp_path: Path) -> None:
    """What is caught above is caught because of the mistake."""
    told = {mistake.instance: set[cases.Case]() for mistake in mistakes.MISTAKES.values() if mistake.by == by}
    for mistake in mistakes.MISTAKES.values():
        if mistake.by == by:
            told[mistake.instance] |= set(mistake.cases)
    for instance, some in told.items():
        library = build.module(by, instance)
        assert not (found := drive(by, library, sorted(some), mistakes.SEEDS[by], tmp_path)), found
