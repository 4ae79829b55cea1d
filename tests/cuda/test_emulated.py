"""The CUDA loops' very source on the CPU: under AddressSanitizer and UBSan, for races, and with planted mutations.

Loops alone, against float64 loops: what is around them (products over all steps, autograd, modules) has its own tests.
"""

from __future__ import annotations

import functools
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import emulated_build as build
import pytest
from torch import Tensor

from fused_rnn.cells import CELLS, Cell

from .emulated import cases, mutations
from .emulated.linear import LINEAR_CELLS, NAMES, instances
from .emulated.linear import header as linear_header
from .emulated.mutation import plant
from .emulated.staged import STAGED_CELLS
from .emulated.staged import header as staged_header

DRIVER, HEADER = (Path(cases.__file__).parent / name for name in ("drive.py", "more_cells.h"))
pytestmark = pytest.mark.skipif(shutil.which(build.CXX) is None, reason=f"no {build.CXX}")

# Every cell in every precision, and of these six with all of their tiles, not the smallest alone.
SANITIZED = [(cell, precision) for cell in build.CELLS for precision in build.PRECISIONS]
ALL_TILES = {
    *(("lstm", "bf16"), ("gru", "bf16"), ("rnn_tanh", "bf16")),
    *(("gru", "tf32"), ("lstm", "ieee"), ("rnn_relu", "ieee")),
}
SMALLEST = {kernel for kernel in SANITIZED if kernel not in ALL_TILES and kernel[1] != "f64"}
SEEDS = 2  # the cases share no schedule: each new one meets others


@functools.cache
def sanitized() -> list[cases.Case]:
    return cases.pairwise(SANITIZED, SMALLEST, seed=6)


def _three_states(x: Sequence[Tensor], r: Sequence[Tensor], s: Sequence[Tensor], params: Sequence[Tensor]) -> Any:
    (h, c, n), (p, q) = s, params
    i = (x[0] + r[0] + p * c).sigmoid()
    c = i * c + (x[1] + i * r[1]).tanh()
    n = i * n + q * c
    return n + i * (h - c), c, n


def _alone(x: Sequence[Tensor], _: Sequence[Tensor], s: Sequence[Tensor], params: Sequence[Tensor]) -> Any:
    f = (x[0] + params[0] * s[0]).sigmoid()
    c = f * s[1] + (1 - f) * x[1]
    return c.tanh(), c


MORE_CELLS = {
    "three_states": Cell("three_states", 2, ("h", "c", "n"), 3, _three_states, ("p", "q"), apart=1, reads_h=True),
    "alone": Cell("alone", 2, ("h", "c"), 2, _alone, ("p",), reads_h=True, recurrent=False),
}


@pytest.fixture
def more_cells(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, cell in (MORE_CELLS | STAGED_CELLS | LINEAR_CELLS).items():
        monkeypatch.setitem(CELLS, name, cell)


def more_for(instance: build.Instance) -> Path | None:
    """The header of a cell that is not among the built-in ones."""
    if instance.cell in STAGED_CELLS:
        return staged_header()
    if instance.cell in LINEAR_CELLS:
        return linear_header()
    return None if instance.cell in build.CELLS else HEADER


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
    told = [case for case in sanitized() if (case.cell, case.precision) == kernel]
    assert told
    library = build.module("asan", [build.Instance(*kernel, kernel in SMALLEST, shapes=cases.shapes(told))])
    assert not (found := drive("asan", library, told, SEEDS, tmp_path)), found


@pytest.mark.parametrize("kernel", [("lstm", "bf16"), ("gru", "bf16"), ("rnn_tanh", "tf32")], ids="-".join)
def test_races(kernel: tuple[str, str], tmp_path: Path) -> None:
    is_smallest = kernel in SMALLEST
    told = cases.pairwise([kernel], {kernel} if is_smallest else set(), seed=2, small=True)
    library = build.module("races", [build.Instance(*kernel, is_smallest, shapes=cases.shapes(told))])
    assert not (found := drive("races", library, told, 1, tmp_path)), found


GRID, DIRECT = 2, 4  # csrc/cuda/params.h's ExchangeKind


@pytest.mark.parametrize(
    ("kind", "members", "units", "rows"),
    [
        *((GRID, members, 16, 8) for members in (48, 64, 128)),
        *((GRID, members, 32, 16) for members in (24, 32)),
        *((DIRECT, members, 16, 8) for members in (48, 64, 128)),
        *((DIRECT, members, 32, 16) for members in (24, 32)),
    ],
)
@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_known_teams_of_wide_layers(
    cell: str, kind: int, members: int, units: int, rows: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Forward of those that meet on the grid, and backward of those that read directly."""
    width = members * units
    monkeypatch.setitem(cases.EXCHANGES, "wide", cases.Exchange(kind, members, (width,), known=True))
    library = build.module("plain", [build.Instance(cell, "bf16", smallest=True)])
    case = cases.Case(cell, "bf16", "wide", 3, rows - 1, width, rows=rows, save="none" if kind == GRID else "saved")
    assert not (found := drive("plain", library, [case], 1, tmp_path)), found


def test_cases_are_many() -> None:
    """Every cell in every precision meets every exchange, every length of a loop, and so on."""
    told = sanitized()
    for kernel in SANITIZED:
        met = [case for case in told if (case.cell, case.precision) == kernel]
        for name in ("exchange", "T", "B", "directions", "lengths", "reset", "save", "every"):
            choices = set(cases.CHOICES[name])
            if name == "exchange":
                choices = cases.exchanges(*kernel)
            if kernel[0].startswith("rnn") and name == "save":
                choices -= {"recompute"}
            assert {getattr(case, name) for case in met} >= choices, (kernel, name)
    assert {case.H for case in told} >= set(cases.CHOICES["H"])
    assert {case.rows for case in told} == {8, 16, 32}


@pytest.mark.parametrize("cut", ["y", "h_n", "saved", "dgates"])
def test_a_write_past_a_global_array_is_caught(cut: str, tmp_path: Path) -> None:
    """AddressSanitizer watches the arrays that the loops are given."""
    library = build.module("asan", [build.Instance("gru", "ieee", shapes=0)])
    found = drive("asan", library, [cases.Case("gru", "ieee", "cta", 2, 3, 5)], 1, tmp_path, cut)
    assert "AddressSanitizer: heap-buffer-overflow" in found, found


@pytest.fixture(scope="module")
def mutants(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Future[Path]]]:
    """The libraries of all mutations that are tested, by name: two are compiled while one runs."""
    folder = tmp_path_factory.mktemp("mutants")

    def made(name: str, number: int) -> Path:
        mutation = mutations.MUTATIONS[name]
        csrc = plant(mutation, folder / str(number))
        instance = mutation.instance._replace(shapes=cases.shapes(mutation.cases))
        return build.module(mutation.by, instances(instance), csrc, more_for(instance))

    tests = [item for item in request.session.items if isinstance(item, pytest.Function)]
    names = [test.callspec.params["name"] for test in tests if test.function is test_mistake_is_caught]
    pool = ThreadPoolExecutor(2)
    try:
        yield {name: pool.submit(made, name, i) for i, name in enumerate(names)}
    finally:
        pool.shutdown(cancel_futures=True)


@pytest.mark.usefixtures("more_cells")
@pytest.mark.parametrize("name", mutations.MUTATIONS)
def test_mistake_is_caught(name: str, mutants: dict[str, Future[Path]], tmp_path: Path) -> None:
    mutation, library = mutations.MUTATIONS[name], mutants[name].result()
    found = drive(mutation.by, library, list(mutation.cases), mutations.SEEDS[mutation.by], tmp_path)
    assert mutation.says in found, found or "not caught"


@pytest.mark.usefixtures("more_cells")
@pytest.mark.parametrize("by", list(build.FLAVOURS))
def test_without_a_mistake_all_is_well(by: str, tmp_path: Path) -> None:
    """What is caught above is caught because of the mutation."""
    told = {mutation.instance: set[cases.Case]() for mutation in mutations.MUTATIONS.values() if mutation.by == by}
    for mutation in mutations.MUTATIONS.values():
        if mutation.by == by:
            told[mutation.instance] |= set(mutation.cases)
    for instance, some in told.items():
        wanted = instances(instance._replace(shapes=cases.shapes(some)))
        library = build.module(by, wanted, more=more_for(instance))
        assert not (found := drive(by, library, sorted(some), mutations.SEEDS[by], tmp_path)), found


@pytest.mark.usefixtures("more_cells")
@pytest.mark.parametrize(
    ("name", "exchange"),
    [*(("three_states", exchange) for exchange in ("cta", "cluster 2", "grid", "stepwise")), ("alone", "cta")],
)
def test_a_cell_is_one_header(name: str, exchange: str, tmp_path: Path) -> None:
    """Three states, h read by the formula, a gate apart, params; no W_hh: nothing but the header knows of it."""
    instances = [build.Instance(each, "ieee", smallest=True, shapes=0) for each in MORE_CELLS]
    library = build.module("asan", instances, more=HEADER)
    widths = {"cta": 17, "cluster 2": 33, "grid": 33, "stepwise": 17}
    told = [
        cases.Case(name, "ieee", exchange, 5, 3, widths[exchange], "fr", True, True, save, every, sequences=sequences)
        for save, every, sequences in (
            ("saved", 2, False),
            ("saved", 3, True),
            ("recompute", 2, False),
            ("recompute", 2, True),
            ("none", 2, True),
        )
    ]
    assert not (found := drive("asan", library, told, 1, tmp_path)), found


@pytest.mark.usefixtures("more_cells")
@pytest.mark.parametrize("name", MORE_CELLS)
def test_races_of_a_cell_with_params(name: str, tmp_path: Path) -> None:
    library = build.module("races", [build.Instance(name, "bf16", smallest=True, shapes=0)], more=HEADER)
    exchanges = ("cta", "cluster 2", "grid", "stepwise")[:: 1 if MORE_CELLS[name].recurrent else 4]
    told = [
        cases.Case(name, "bf16", exchange, 4, 3, 17 + 16 * (exchange == "grid"), save=save, sequences=True)
        for exchange in exchanges
        for save in ("saved", "recompute")
    ]
    assert not (found := drive("races", library, told, 1, tmp_path)), found


# Stages by every exchange, options in turn; H of no whole members.
IN_STAGES = {"cta": 29, "cluster 2": 33, "cluster 4": 50, "grid": 50, "stepwise": 17}


def in_stages(cell: str, precision: str, exchanges: Sequence[str], T: int, B: int) -> list[cases.Case]:
    told = []
    for exchange in exchanges:
        one = cases.Case(cell, precision, exchange, T, B, IN_STAGES[exchange], "r")
        several = len(STAGED_CELLS[cell].states) > 1
        told += [one, one._replace(directions="fr", lengths=True, reset=True, sequences=several)]
    return told


@pytest.mark.usefixtures("more_cells")
@pytest.mark.parametrize("precision", ["bf16", "ieee"])
@pytest.mark.parametrize("name", STAGED_CELLS)
def test_address_and_undefined_behaviour_of_stages(name: str, precision: str, tmp_path: Path) -> None:
    instance = build.Instance(name, precision, smallest=True, shapes=0)
    library = build.module("asan", [instance], more=more_for(instance))
    told = in_stages(name, precision, list(IN_STAGES), 3, 9)
    assert not (found := drive("asan", library, told, SEEDS, tmp_path)), found


@pytest.mark.usefixtures("more_cells")
@pytest.mark.parametrize("name", STAGED_CELLS)
def test_races_of_stages(name: str, tmp_path: Path) -> None:
    instance = build.Instance(name, "bf16", smallest=True, shapes=0)
    library = build.module("races", [instance], more=more_for(instance))
    told = in_stages(name, "bf16", ("cta", "cluster 2", "grid", "stepwise"), 3, 3)
    assert not (found := drive("races", library, told, 1, tmp_path)), found


# Chunks of time side by side, of a cell that is linear in its states. T of whole chunks, of no whole ones, and of more
# than are joined at once; a chunk for each step.
IN_CHUNKS = [(8, 4), (7, 3), (19, 2), (5, 1)]


def in_chunks(cell: str, precision: str, lengths: Sequence[tuple[int, int]] = IN_CHUNKS) -> list[cases.Case]:
    told = []
    for k, (steps, chunk) in enumerate(lengths):
        masked = {"lengths": k != 0, "reset": k % 2 == 1, "sequences": k == 1 and cell != "linear_indrnn"}
        one = cases.Case(cell, precision, "stepwise", steps, 3, (17, 5)[k % 2], ("f", "fr")[k > 0], chunk=chunk)
        told += [one._replace(**masked), one._replace(**masked, save="recompute", every=3)]
    return told


@pytest.mark.usefixtures("more_cells")
@pytest.mark.parametrize("precision", ["bf16", "ieee", "f64"])
@pytest.mark.parametrize("name", NAMES)
def test_address_and_undefined_behaviour_of_chunks(name: str, precision: str, tmp_path: Path) -> None:
    instance = build.Instance(name, precision, smallest=True, shapes=0)
    library = build.module("asan", instances(instance), more=more_for(instance))
    assert not (found := drive("asan", library, in_chunks(name, precision), SEEDS, tmp_path)), found


@pytest.mark.usefixtures("more_cells")
@pytest.mark.parametrize("name", NAMES)
def test_races_of_chunks(name: str, tmp_path: Path) -> None:
    instance = build.Instance(name, "ieee", smallest=True, shapes=0)
    library = build.module("races", instances(instance), more=more_for(instance))
    assert not (found := drive("races", library, in_chunks(name, "ieee"), 1, tmp_path)), found
