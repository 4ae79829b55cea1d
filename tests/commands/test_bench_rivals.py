"""Rivals: that they compute the same, that each may be missing, DeepBench's sizes, and tables of files in part."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from rich.console import Console

from fused_rnn import ops
from fused_rnn.commands.bench import readme
from fused_rnn.commands.bench.beside_rivals import OURS, STREAM, tables, terminal
from fused_rnn.commands.bench.grid import CELLS, GRIDS, SEQUENCES, Grid, Point
from fused_rnn.commands.bench.measure import Timing, measure
from fused_rnn.commands.bench.providers import BASELINE, build, kernels_of_torch, supports
from fused_rnn.commands.bench.results import TIME, Results, Row, time_row, torch_of
from fused_rnn.commands.bench.rivals import RIVALS, compiled, missing, opened, ort, versions
from fused_rnn.commands.bench.workload import Workload
from fused_rnn.commands.cli import cli

from .test_bench import RUN, row, some_results, two_pages

needs_kernels = pytest.mark.skipif(ops.MISSING is not None, reason=str(ops.MISSING))
needs_ort = pytest.mark.skipif(missing("onnxruntime") is not None, reason=str(missing("onnxruntime")))
NEEDS = {"onnxruntime": "onnxruntime", "scan": "jax"}


def timings(rival: str, point: Point) -> dict[str, Timing]:
    with opened([rival]) as builders:
        return measure(point, [BASELINE, rival], "cpu", 0.0, builders)


@pytest.mark.parametrize("mode", SEQUENCES)
@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("rival", NEEDS)
def test_a_rival_computes_the_same(rival: str, cell: str, mode: str) -> None:
    pytest.importorskip(NEEDS[rival], reason=f"no {NEEDS[rival]} here")
    point = Point(cell, mode, "fp32", 7, 3, 5, D=9)
    found = timings(rival, point)
    assert set(found) == ({BASELINE} if supports(rival, point) else {BASELINE, rival})
    assert not any(timing.refused for timing in found.values())
    if rival == "scan":
        assert (found[rival].compile_s or 0) > 0
    assert found[BASELINE].compile_s is None


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("rival", "cell", "mode"),
    [("compile-loop", "GRU", "training"), ("compile-scan", "LSTM", "training"), ("compile-scan", "RNN", "inference")],
)
def test_what_is_compiled_computes_the_same(rival: str, cell: str, mode: str) -> None:
    """Its first run compiles, and is not among those that are timed."""
    if lacking := missing(rival):
        pytest.skip(lacking)
    found = timings(rival, Point(cell, mode, "fp32", 3, 2, 5))[rival]
    assert found.refused is None
    assert found.compile_s is not None and found.compile_s > 20 * found.p50


def test_rivals_run_plain_sequences() -> None:
    for name in RIVALS:
        assert supports(name, Point("GRU", "inference", "fp32", 4, 2, 8)) is None
        for point in (
            Point("GRU", "inference", "fp32", 4, 2, 8, "layers"),
            Point("GRU", "step", "fp32", 1, 1, 8),
            Point("GRU", "inference", "fp64", 4, 2, 8),
        ):
            assert supports(name, point) is not None
    assert "inference, fp32" in str(supports("onnxruntime", Point("GRU", "training", "fp32", 4, 2, 8)))


@needs_ort
def test_a_wrong_result_gets_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    node, order, attributes = ort.ours.NODES["lstm"]
    monkeypatch.setitem(ort.ours.NODES, "lstm", (node, order[::-1], attributes))
    refused = timings("onnxruntime", Point("LSTM", "inference", "fp32", 7, 3, 5))["onnxruntime"].refused
    assert refused is not None and "wrong result: differs from torch" in refused


@needs_ort
@pytest.mark.parametrize("cell", CELLS)
def test_a_session_keeps_its_state_from_step_to_step(cell: str) -> None:
    point = Point(cell, "inference", "fp32", 4, 1, 6)
    call = build(BASELINE, point)
    call.run()
    x = torch.empty(1, 6)
    stream = ort.OrtStream(cell, call.parameters, x)
    for x_t, y_t in zip(call.x, call.results()[0], strict=True):
        x.copy_(x_t)
        torch.testing.assert_close(stream.step(), y_t)


@needs_ort
def test_a_session_has_as_many_threads_as_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    call = build(BASELINE, Point("RNN", "inference", "fp32", 2, 1, 4))
    options = ort.session("RNN", call.parameters, 2, 1, stateful=False).get_session_options()
    assert options.intra_op_num_threads == 3


def test_what_torch_runs_has_a_name() -> None:
    expected = "oneDNN" if torch.backends.mkldnn.is_available() else "ATen"
    assert kernels_of_torch("fp32") == {"LSTM": expected, "GRU": "ATen", "RNN": "ATen"}
    assert set(kernels_of_torch("fp64").values()) == {"ATen"}
    assert torch_of(RUN) == "torch 2"
    runs = {"LSTM": "oneDNN", "GRU": "ATen", "RNN": "ATen"}
    assert torch_of({**RUN, "torch_runs": runs}) == "torch 2 (oneDNN: LSTM; ATen: GRU, RNN)"


# --- what is missing


@pytest.fixture
def nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """No rival is installed."""
    monkeypatch.setattr(ort, "installed", lambda *_: {})
    monkeypatch.setattr("fused_rnn.commands.bench.rivals.scan.installed", lambda *_: {})
    monkeypatch.setattr(compiled.shutil, "which", lambda _: None)


@pytest.mark.usefixtures("nothing")
@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("onnxruntime", "pip install onnx onnxruntime"),
        ("scan", "pip install jax"),
        ("compile-loop", "a C++ compiler"),
        ("compile-scan", "a C++ compiler"),
    ],
)
def test_a_rival_that_is_missing_is_refused_by_name(name: str, said: str) -> None:
    result = CliRunner().invoke(cli, ["bench", "--provider", name])
    assert result.exit_code == 2
    assert f"{name} is not measured, it needs: {said}" in " ".join(result.output.split())


@needs_kernels
@pytest.mark.usefixtures("nothing")
def test_a_grid_does_without_those_that_are_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(GRIDS, "rivals", Grid(T=(2,), B=(2,), H=(4,), rivals=("onnxruntime", "scan"), minutes=0))
    result = CliRunner().invoke(cli, ["bench", "--grid", "rivals", "--cell", "RNN", "--out", str(tmp_path)])
    assert result.exit_code == 0, result.output
    assert "onnxruntime is not measured, it needs: pip install onnx onnxruntime\n" in result.output
    assert "scan is not measured, it needs: pip install jax" in result.output
    assert tables(tmp_path) == ("", "")


@needs_kernels
@needs_ort
def test_a_grid_beside_a_rival(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(GRIDS, "rivals", Grid(T=(2,), B=(1, 2), H=(4,), rivals=("onnxruntime",), minutes=0))
    asked = ["bench", "--grid", "rivals", "--cell", "GRU", "--out", str(tmp_path)]
    result = CliRunner().invoke(cli, asked)
    assert result.exit_code == 0, result.output
    assert "Every point beside onnxruntime" in result.output and "refused" not in result.output
    results = Results.load(tmp_path / "rivals-fp32-1t.json")
    assert results.runs[0]["onnxruntime"] == versions(["onnxruntime"])["onnxruntime"]
    assert results.runs[0]["torch_runs"]["GRU"] == "ATen"
    assert len(results.ratios("onnxruntime", OURS)) == 2
    short, full = tables(tmp_path)
    assert "| onnxruntime, inference | – | **" in short
    assert "| inference, all | – | **" in full and "| training" not in full


def test_files_have_names_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def name(**options: object) -> str:
        return Workload(**options, out=tmp_path).path("fp32", 1).name  # type: ignore[arg-type]

    assert name() == "fp32-1t.json" and name(grid="quick") == "quick-fp32-1t.json"
    assert name(grid="deepbench") == "deepbench-fp32-1t.json"
    assert name(grid="deepbench", providers=("torch", "auto", "scan")) == "rivals-fp32-1t.json"
    assert name(shapes=((1, 2, 3, 4),), providers=("torch", "scan")) == "shapes-fp32-1t.json"
    monkeypatch.setenv("FUSED_RNN_ISA", "avx2")
    monkeypatch.setattr("fused_rnn.commands.bench.workload.kernels_isa", lambda: "avx2")
    assert name(grid="quick") == "isa-avx2-quick-fp32-1t.json"


# --- DeepBench's sizes


def test_deepbench_has_its_sizes_up_to_1024() -> None:
    points = [*GRIDS["deepbench"].points("fp32")]
    assert len(points) == len({*points})
    assert {point.mode for point in points} == {*SEQUENCES} and max(point.H for point in points) == 1024
    sizes = {(p.cell, p.mode, p.H, p.B, p.T) for p in points}
    for known in (
        ("LSTM", "inference", 512, 1, 25),
        ("LSTM", "inference", 1024, 128, 25),
        ("LSTM", "training", 256, 64, 150),
        ("GRU", "inference", 1024, 4, 1500),
        ("RNN", "inference", 32, 1, 672),
    ):
        assert known in sizes
    assert {p.cell for p in GRIDS["deepbench"].points("fp32", ("RNN",), ("inference",))} == {"RNN"}
    assert not [*GRIDS["deepbench"].points("fp32", ("RNN",), ("training",))]


# --- tables


def some_rivals(*names: str, grid: str = "rivals", compile_s: float | None = None) -> Results:
    """torch.nn at 30 µs, ours at 10, onnxruntime at 9 at one point and 13 elsewhere, the others at 40."""
    results = Results([{**RUN, "onnxruntime": "1.2", "jax": "0.1"}])
    lost = Point("LSTM", "inference", "fp32", 64, 1, 512)
    for point in GRIDS[grid].points("fp32"):
        times = {BASELINE: 30, OURS: 10, "onnxruntime": 9 if point == lost else 13}
        for name in (BASELINE, OURS, *names):
            if supports(name, point) is None:
                micros = times.get(name, 40) * 1e-6
                timing = Timing(micros, micros, micros, 5, compile_s=compile_s if name in names else None)
                results.replace([time_row(point, name, timing, 0)])
    return results


def test_what_it_took_to_compile_survives_the_file(tmp_path: Path) -> None:
    results = some_rivals("compile-loop", grid="compiled", compile_s=12.3456)
    results.save(tmp_path / "a.json")
    again = Results.load(tmp_path / "a.json")
    assert again.rows == results.rows
    assert {row.compile_s for (_, name, _), row in again.rows.items() if name == "compile-loop"} == {12.3}
    assert not any("compile_s" in row.to_json() for (_, name, _), row in again.rows.items() if name == OURS)


def test_tables_have_every_rival_and_losses_like_wins(tmp_path: Path) -> None:
    some_rivals("onnxruntime", "scan").save(tmp_path / "rivals-fp32-1t.json")
    short, full = tables(tmp_path)
    (line,) = (line for line in short.splitlines() if line.startswith("| onnxruntime, inference"))
    assert line.count("(0.90)") == 1 and line.count("**1.30×** (1.30)") == 2
    assert "| lax.scan of JAX, training | **4.00×** (4.00) | **4.00×** (4.00) | **4.00×** (4.00) |" in short
    assert "onnxruntime, training" not in short
    assert "packed once and for all" in short and "a CPU, torch 2, onnxruntime 1.2, jax 0.1, commit abc" in short
    assert "T 1 to 64, B 1 to 32, H 64 to 512" in short
    assert "slower at 1 of 72 points, the worst 0.90× at LSTM inference fp32 T=64 B=1 H=512." in full
    assert "slower at 0 of 144 points." in full
    assert "| inference, B=1, T≥32 |" in full and "compile" not in full.split("<sub>")[0]
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(*terminal(some_rivals("onnxruntime")))
    assert "0.90" in console.export_text()


def test_tables_of_files_in_part(tmp_path: Path) -> None:
    """A rival, a grid or the streams alone."""
    results = some_rivals("compile-scan", grid="compiled", compile_s=12)
    results.save(tmp_path / "rivals-fp32-1t.json")
    short, full = tables(tmp_path)
    assert "| torch.compile of scan, training | **4.00×** (4.00) |" in short and "onnxruntime's" not in short
    assert "it takes 12 to 12 s to compile each of 12 points" in full
    some_rivals("scan", grid="deepbench").save(tmp_path / "rivals-fp32-1t.json")
    short, full = tables(tmp_path)
    assert "| lax.scan of JAX, training | **4.00×** (4.00) | **4.00×** (4.00) | – |" in short
    assert "| GRU, inference, T=1500 B=1 H=1024 | 0.01 | 0.03 (3.00×) | 0.04 (4.00×) |" in full
    (tmp_path / "rivals-fp32-1t.json").unlink()
    streams = Results([{**RUN, "onnxruntime": "1.2"}])
    for point in (Point("GRU", "stream", "fp32", 1, 1, H) for H in (64, 128)):
        streams.replace([row(point, "onnxruntime", 8), row(point, STREAM, 2)])
    streams.save(tmp_path / "stream-fp32-1t.json")
    short, full = tables(tmp_path)
    assert "| onnxruntime, a step of a stream, B=1 | – | **4.00×** (4.00) | – |" in short
    assert "| GRU | 8 → 2 (4.00×) | 8 → 2 (4.00×) |" in full


def test_refused_points_are_left_out(tmp_path: Path) -> None:
    results = some_rivals("scan")
    point = next(GRIDS["rivals"].points("fp32"))
    results.replace([Row(point, "scan", TIME, 0, refused="no")])
    results.save(tmp_path / "rivals-fp32-1t.json")
    assert point not in results.ratios("scan", OURS)
    assert all(tables(tmp_path)) and terminal(results)


def test_the_pages_have_tables_of_their_own(tmp_path: Path) -> None:
    pages = two_pages(tmp_path)
    some_results().save(tmp_path / "fp32-1t.json")
    some_rivals("onnxruntime").save(tmp_path / "rivals-fp32-1t.json")
    with pytest.raises(ValueError, match="must contain the lines <!-- rivals:begin -->"):
        readme.update(pages[0], tmp_path, "cpu")
    for page in pages:
        page.write_text(page.read_text() + "\n".join(readme.markers("rivals")))
    assert readme.update(pages[0], tmp_path, "cpu")
    short, full = (page.read_text() for page in pages)
    assert "inference, B=1, T≥32" in full and "inference, B=1, T≥32" not in short.split("<!-- rivals:begin -->")[1]
