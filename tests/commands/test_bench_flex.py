"""FlexRNN's benchmark: what is measured and beside whom, that a wrong result gets no time, tables, JAX's process."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from rich.console import Console

from fused_rnn import ops
from fused_rnn.commands.bench import flex, readme
from fused_rnn.commands.bench.flex import BUILT_IN, FLEX, LOOP, SCAN, call_of, measure, points, table
from fused_rnn.commands.bench.grid import CELLS, GRIDS, SEQUENCES, Grid, Point
from fused_rnn.commands.bench.measure import difference
from fused_rnn.commands.bench.providers import BASELINE, build
from fused_rnn.commands.bench.results import Results
from fused_rnn.commands.bench.rivals.scan import Scan, missing
from fused_rnn.commands.cli import cli

from .test_bench import RUN, row, some_results, two_pages

needs_kernels = pytest.mark.skipif(ops.MISSING is not None, reason=str(ops.MISSING))

# What stands for JAX's process: the same protocol, torch.nn's results.
STAND_IN = """
import json, sys, time
import numpy as np, torch
for line in sys.stdin:
    request = json.loads(line)
    if "inputs" in request:
        given = {name: torch.from_numpy(value) for name, value in np.load(request["inputs"]).items()}
        x = given["x"].requires_grad_()
        module = getattr(torch.nn, request["cell"])(x.shape[2], given["w_hh"].shape[1])
        with torch.no_grad():
            for weight, name in zip(module.parameters(), ("w_ih", "w_hh", "b_ih", "b_hh")):
                weight.copy_(given[name])
        y = module(x)[0]
        y.backward(given["dy"])
        grads = [x.grad, *(weight.grad for weight in module.parameters())] if request["training"] else []
        np.savez(request["results"], *(t.detach().numpy() for t in (WRONG * y, *grads)))
    print(json.dumps({"compile_s": 2.5, "seconds": [1e-3] * request.get("times", 0)}), flush=True)
"""


@pytest.fixture
def python(tmp_path: Path) -> str:
    """An interpreter that has "jax"."""
    return interpreter(tmp_path, "1")


def interpreter(folder: Path, wrong: str) -> str:
    (folder / "stand_in.py").write_text(STAND_IN.replace("WRONG", wrong))
    path = folder / "python"
    path.write_text(f'#!/bin/sh\n[ "$1" = -c ] && echo 0 || exec {sys.executable} {folder / "stand_in.py"}\n')
    path.chmod(0o755)
    return str(path)


def some_flex_results() -> Results:
    """The built-in modules at 10 µs, FlexRNN at 11, at one point at 20; the loop at 220; lax.scan at 33."""
    results, rows = Results([{**RUN, "jax": "0.1"}]), []
    for point, providers in points(CELLS, True):
        ours = 20 if point == Point("GRU", "training", "fp32", 32, 8, 128) else 11
        times = {BUILT_IN: 10, FLEX: ours, LOOP: 220, SCAN: 33}
        rows += [row(point, name, times[name]) for name in providers]
    results.replace(rows)
    return results


def test_points_are_those_promised() -> None:
    found = dict(points(CELLS, True))
    quick = [*GRIDS["quick"].points("fp32", CELLS, SEQUENCES)]
    assert set(found) == {*quick, *flex.SCANNED} and len(flex.SCANNED) == 24
    assert all({BUILT_IN, FLEX} <= set(providers) for providers in found.values())
    assert {p for p, providers in found.items() if LOOP in providers} == {p for p in quick if p.B <= 8 and p.T > 1}
    assert {p for p, providers in found.items() if SCAN in providers} == set(flex.SCANNED)
    assert not any(SCAN in providers for _, providers in points(CELLS, False))


@pytest.mark.parametrize("mode", SEQUENCES)
@pytest.mark.parametrize("cell", CELLS)
@needs_kernels
def test_every_provider_computes_the_same(cell: str, mode: str) -> None:
    point = Point(cell, mode, "fp32", 5, 3, 8)
    theirs = build(BASELINE, point)
    theirs.run()
    for provider in (FLEX, LOOP):
        call = call_of(provider, point)
        call.prepare()
        call.run()
        assert difference(call, theirs.results()) < 1e-5
        assert len(call.results()) == len(theirs.results()) == (6 if mode == "training" else 1)


@needs_kernels
def test_lax_scan_gets_its_numbers_and_its_turns(python: str) -> None:
    with Scan(python) as scan:
        for mode in SEQUENCES:
            found = measure(Point("LSTM", mode, "fp32", 4, 2, 8), (FLEX, SCAN), scan, 0.0)
            assert set(found[SCAN]) == {1e-3} and len(found[FLEX]) > 3
    assert scan.process.poll() is not None


@needs_kernels
def test_a_wrong_result_gets_no_time(tmp_path: Path) -> None:
    with (
        Scan(interpreter(tmp_path, "1.5")) as scan,
        pytest.raises(RuntimeError, match=r"lax\.scan differs from torch\.nn"),
    ):
        measure(Point("GRU", "inference", "fp32", 4, 2, 8), (FLEX, SCAN), scan, 0.0)


def test_an_interpreter_without_jax_is_told(tmp_path: Path) -> None:
    path = tmp_path / "python"
    path.write_text("#!/bin/sh\nexit 1\n")
    path.chmod(0o755)
    for python in (str(path), str(tmp_path / "nowhere")):
        assert missing(python) == f"pip install jax for {python}, or --jax-python with one that has it"


def test_the_worker_agrees_with_torch(tmp_path: Path) -> None:
    """The real one, where there is JAX."""
    pytest.importorskip("jax", reason="no jax here")
    with Scan(sys.executable) as scan:
        for cell in CELLS:
            assert measure(Point(cell, "training", "fp32", 4, 2, 8), (FLEX, SCAN), scan, 0.0)[SCAN]


def test_tables() -> None:
    results = some_flex_results()
    text = table(results)
    assert (
        "| time, × the built-in module's, inference | **1.10×** (1.10) | **1.10×** (1.10) | **1.10×** (1.10) |" in text
    )
    assert "(2.00) |" in text and "the worst point, 2.00×, is GRU training T=32 B=8 H=128" in text
    assert "times as fast as a Python loop over the step, inference | **20.0×** (20.0) |" in text
    assert "| LSTM, training | 0.0859 / 0.258 | 0.0859 / 0.258 | 0.0859 / 0.258 | 0.0859 / 0.258 |" in text
    assert "JAX 0.1" in text
    assert set(results.ratios(LOOP, FLEX).values()) == {20.0, 11.0}
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(flex.terminal(results))
    assert "3.00×" in console.export_text()


def test_the_pages_have_the_tables_between_lines_of_their_own(tmp_path: Path) -> None:
    pages = two_pages(tmp_path)
    some_results().save(tmp_path / "fp32-1t.json")
    some_flex_results().save(tmp_path / "flex-fp32-1t.json")
    with pytest.raises(ValueError, match="must contain the lines <!-- flex:begin -->"):
        readme.update(pages[0], tmp_path, "cpu")
    for page in pages:
        page.write_text(page.read_text() + "\n".join(readme.markers("flex")))
    assert readme.update(pages[0], tmp_path, "cpu")
    assert all("python -m fused_rnn bench --flex" in page.read_text() for page in pages)


@needs_kernels
def test_a_whole_run(python: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(GRIDS, "quick", Grid(T=(1, 2), B=(2,), H=(4,)))
    monkeypatch.setattr(flex, "SCANNED", (Point("GRU", "training", "fp32", 3, 1, 8),))
    asked = ["bench", "--flex", "--cell", "GRU", "--minutes", "0", "--out", str(tmp_path)]
    before = torch.get_num_threads()
    for more, said in ((["--jax-python", python], "lax.scan"), (["--jax-python", "/nowhere"], "Without lax.scan")):
        result = CliRunner().invoke(cli, asked + more)
        assert result.exit_code == 0 and said in result.output, result.output
    assert torch.get_num_threads() == before
    results = Results.load(tmp_path / "flex-fp32-1t.json")
    assert [len(results.ratios(over, FLEX)) for over in (BUILT_IN, LOOP, SCAN)] == [5, 2, 1]
