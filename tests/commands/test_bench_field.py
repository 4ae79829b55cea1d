"""The benchmark of the cells of the literature: what is measured, that all compute the same, the table."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from rich.console import Console

from fused_rnn import list_cells, ops
from fused_rnn.commands.bench import field, readme
from fused_rnn.commands.bench.field import BUILT_IN, CLOSEST, LOOP, OURS, SIZES, call_of, measure, points, table
from fused_rnn.commands.bench.grid import SEQUENCES, Point
from fused_rnn.commands.bench.measure import difference
from fused_rnn.commands.bench.results import Results
from fused_rnn.commands.cli import cli
from fused_rnn.nn.field import FIELD

from .test_bench import RUN, row, some_results, two_pages

needs_kernels = pytest.mark.skipif(ops.MISSING is not None, reason=str(ops.MISSING))
NAMES = [*(cls.__name__ for cls in FIELD), *field.MORE]


def some_field_results() -> Results:
    """The built-in modules at 10 µs, ours at 12, at one point at 15; the loop at 240."""
    results, rows = Results([RUN]), []
    for point in points(NAMES):
        ours = 15 if point == Point("SRU", "training", "fp32", field.STEPS, 8, 64) else 12
        rows += [row(point, name, time) for name, time in ((BUILT_IN, 10), (OURS, ours), (LOOP, 240))]
    results.replace(rows)
    return results


def test_points_are_those_promised() -> None:
    found = points(NAMES)
    cells = {point.cell for point in found} - set(field.MORE)
    assert cells == {cls.__name__ for cls in FIELD} == set(list_cells()) - {"LSTM", "GRU", "RNN"} == set(CLOSEST)
    assert len(found) == len(NAMES) * 2 * len(SIZES)
    assert all(point.B <= 8 and point.H <= 256 for point in found)
    regularised = points(field.REGULARISED)
    assert {point.mode for point in regularised} == {"training"} and len(regularised) == 12 * len(SIZES)


@pytest.mark.parametrize("mode", SEQUENCES)
@pytest.mark.parametrize("cell", NAMES)
@needs_kernels
def test_the_loop_computes_the_same(cell: str, mode: str) -> None:
    calls = [call_of(provider, Point(cell, mode, "fp32", 5, 3, 8)) for provider in (OURS, LOOP)]
    for call in calls:
        call.prepare()
        call.run()
    assert difference(calls[0], calls[1].results()) < 1e-5
    assert len(calls[0].results()) == len(calls[1].results()) > (mode == "training")


@needs_kernels
def test_a_wrong_result_gets_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(field.SHORTER, "MinGRU", lambda x, r, s, p: (s[0] + x[0],))
    with pytest.raises(RuntimeError, match=r"MinGRU.* differs from the loop"):
        measure(Point("MinGRU", "inference", "fp32", 4, 2, 8), 0.0)


def test_tables() -> None:
    text = table(some_field_results())
    assert "| MGU | GRU | **20.0×** (20.0) | **20.0×** (20.0) | **1.20×** (1.20) | **1.20×** (1.20) |" in text
    assert "(16.0) |" in text and "(1.50) |" in text and "`python -m fused_rnn bench --field`" in text
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(field.terminal(some_field_results()))
    assert "20.0×" in console.export_text()


def test_a_regulariser_is_measured_beside_the_module_without() -> None:
    """In a row behind the cells, without a loop."""
    point = Point("GRU, zoneout", "training", "fp32", field.STEPS, 8, 64)
    results = some_field_results()
    results.replace([row(point, name, time) for name, time in ((BUILT_IN, 10), (OURS, 11))])
    *_, last = (line for line in table(results).splitlines() if line.startswith("| "))
    assert last == "| GRU, zoneout | GRU | – | – | – | **1.10×** (1.10) |"
    small = Point("GRU, zoneout", "training", "fp32", 3, 2, 4)
    plain, ours = (call_of(provider, small).module for provider in (BUILT_IN, OURS))
    assert type(plain) is type(ours) and ours.zoneout == 0.1 and not hasattr(plain, "zoneout")


def test_the_pages_have_the_table_between_lines_of_its_own(tmp_path: Path) -> None:
    pages = two_pages(tmp_path)
    some_results().save(tmp_path / "fp32-1t.json")
    some_field_results().save(tmp_path / "field-fp32-1t.json")
    with pytest.raises(ValueError, match="must contain the lines <!-- field:begin -->"):
        readme.update(pages[0], tmp_path, "cpu")
    for page in pages:
        page.write_text(page.read_text() + "\n".join(readme.markers("field")))
    assert readme.update(pages[0], tmp_path, "cpu")
    assert all("python -m fused_rnn bench --field" in page.read_text() for page in pages)


@needs_kernels
def test_a_whole_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(field, "SIZES", ((2, 8),))
    monkeypatch.setattr(field, "STEPS", 2)
    before = torch.get_num_threads()
    for _ in range(2):  # the second time in the place of the first
        result = CliRunner().invoke(cli, ["bench", "--field", "--minutes", "0", "--out", str(tmp_path)])
        assert result.exit_code == 0 and "Written to" in result.output, result.output
    assert torch.get_num_threads() == before
    assert len(Results.load(tmp_path / "field-fp32-1t.json").rows) == 3 * 2 * len(NAMES) + 2 * len(field.REGULARISED)
    assert CliRunner().invoke(cli, ["bench", "--field", "--cell", "GRU"]).exit_code == 2
