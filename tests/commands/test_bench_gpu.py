"""What the benchmark does for a GPU alone, on results made up here: cuDNN's algorithms, goals, pictures, graphs."""

from __future__ import annotations

import io
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from cases import Case
from click.testing import CliRunner
from rich.console import Console

from fused_rnn import dispatch
from fused_rnn.commands.bench import choose, exchange, limits, readme
from fused_rnn.commands.bench.calls import GraphCall
from fused_rnn.commands.bench.cudnn import NATIVE, PERSISTENT, SMALL, STANDARD, Gpu, accepted_dtypes, algorithm
from fused_rnn.commands.bench.goals import GOALS, goal_table, judged
from fused_rnn.commands.bench.grid import CELLS, DTYPES, GRIDS, REGIONS, SEQUENCES, VARIANTS, Grid, Point
from fused_rnn.commands.bench.heat import heat_map, step_plot
from fused_rnn.commands.bench.limits import Limits
from fused_rnn.commands.bench.measure import Timing, measure
from fused_rnn.commands.bench.providers import HALF, baseline, build, supports
from fused_rnn.commands.bench.results import FLOOR, Results, Row, time_row
from fused_rnn.commands.bench.tables import against_plain, report
from fused_rnn.commands.bench.variants import resets
from fused_rnn.commands.cli import cli
from fused_rnn.dispatch import fastest

from .test_bench import two_pages

H200 = Gpu((9, 0), 132, ("fp32", "tf32", "fp16"))
RUN = {
    "device": "cuda", "device_name": "a GPU", "dtype": "bf16", "threads": 1, "torch": "2", "commit": "abc",
    "date": "2026-01-01T00:00Z", "capability": "9.0", "multiprocessors": 132, "cudnn_dtypes": ["fp32", "fp16"],
    "limits": {"flops": 1e14, "read": [[4096, 1e12]], "exchanges": [["cta", 1, 2e-8], ["cluster", 16, 1e-6]]},
}  # fmt: skip


def row(point: Point, provider: str, micros: float) -> Row:
    return time_row(point, provider, Timing(micros * 0.9e-6, micros * 1e-6, micros * 1.1e-6, 5), 0)


def some_results(dtype: str = "bf16", ours: float = 1.0) -> Results:
    """torch.nn at 4 µs a step, ours at 1, or at so much; with lengths 1.05 times that, with resets 1.3."""
    results, rows = Results([{**RUN, "dtype": dtype}]), []
    grid = Grid(T=(1, 32, 128, 1024), B=(8, 16, 64, 256), H=(128, 512, 768, 1024, 2048), steps=(128,))
    for point in grid.points(dtype, variants=("plain", "lengths", "resets", "graph")):
        factor = {"lengths": 1.05, "resets": 1.3}.get(point.variant, 1.0)
        rows += [row(point, baseline(point), 4.0 * point.T), row(point, FLOOR, 0.5 * point.T)]
        rows += [row(point, name, ours * factor * point.T) for name in ("cuda", "auto")]
    results.replace(rows)
    return results


# --- cuDNN's algorithms


@pytest.mark.parametrize(
    ("expected", "point", "variant"),
    [
        (PERSISTENT, ("LSTM", "inference", "fp16", 1024, 16, 768), "plain"),
        (STANDARD, ("LSTM", "inference", "fp16", 1024, 12, 768), "plain"),  # B is no multiple of 8
        (STANDARD, ("LSTM", "inference", "fp16", 1024, 136, 768), "plain"),
        (STANDARD, ("LSTM", "inference", "fp16", 1024, 16, 1536), "plain"),
        (STANDARD, ("LSTM", "inference", "fp16", 1024, 16, 750), "plain"),
        (STANDARD, ("LSTM", "inference", "fp16", 1024, 16, 768), "layers"),
        (STANDARD, ("LSTM", "inference", "fp16", 1024, 16, 768), "bidirectional"),
        (STANDARD, ("LSTM", "inference", "fp16", 1024, 16, 128), "ragged"),
        (STANDARD, ("LSTM", "inference", "fp16", 1024, 16, 128), "lengths"),
        (STANDARD, ("GRU", "inference", "fp16", 1024, 16, 768), "plain"),
        (PERSISTENT, ("RNN", "inference", "fp16", 1024, 88, 896), "plain"),
        (STANDARD, ("RNN", "inference", "fp16", 1024, 96, 896), "plain"),
        (STANDARD, ("LSTM", "inference", "tf32", 1024, 16, 768), "plain"),
        (SMALL, ("LSTM", "inference", "tf32", 1024, 16, 192), "plain"),
        (f"{SMALL}, {STANDARD}", ("LSTM", "training", "fp32", 1024, 16, 192), "plain"),
        (SMALL, ("GRU", "training", "fp32", 1024, 16, 128), "plain"),
        (f"{SMALL}, {PERSISTENT}", ("RNN", "training", "fp16", 32, 16, 384), "plain"),
        (STANDARD, ("RNN", "inference", "fp32", 32, 16, 385), "plain"),
        (NATIVE, ("LSTM", "inference", "bf16", 1024, 16, 768), "plain"),
    ],
)
def test_algorithms_by_pytorchs_rules(expected: str, point: tuple[str, str, str, int, int, int], variant: str) -> None:
    assert algorithm(Point(*point, variant), H200) == expected


def test_the_device_has_a_say() -> None:
    point = Point("LSTM", "inference", "fp16", 1024, 16, 768)
    assert algorithm(point, H200._replace(capability=(8, 6))) == STANDARD
    assert algorithm(point, H200._replace(multiprocessors=56)) == STANDARD
    assert algorithm(Point("LSTM", "inference", "fp64", 8, 8, 64), H200._replace(dtypes=("fp64",))) == STANDARD
    assert algorithm(Point("LSTM", "inference", "bf16", 8, 8, 64), H200._replace(dtypes=("bf16",))) == SMALL


def test_the_dtypes_are_those_torch_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "empty", lambda *_, dtype, device: SimpleNamespace(dtype=dtype, device=device))
    monkeypatch.setattr(torch, "cudnn_is_acceptable", lambda tensor: tensor.dtype is not torch.bfloat16)
    assert accepted_dtypes() == [name for name in DTYPES if name != "bf16"]


# --- limits


def test_a_loop_on_a_gpu_waits_for_an_exchange_each_step() -> None:
    known = Limits(1e18, ((1 << 30, 1e15),), (("cta", 4, 2e-8), ("cluster", 16, 1e-6), ("grid", 128, 3e-6)))
    small, middle, large = (Point("LSTM", "inference", "bf16", 100, 1, H) for H in (128, 512, 1536))
    assert known.exchange(small) == 2e-8  # one multiprocessor has room, whatever the team of warps
    assert known.exchange(middle) == 1e-6
    assert known.exchange(large) == 3e-6  # 18 MiB
    assert known.exchange(Point("LSTM", "inference", "fp32", 100, 1, 8192)) == 0.0
    assert known.floor(middle, "cuda") == pytest.approx(100 * 1e-6)
    assert known.floor(Point("LSTM", "training", "bf16", 100, 1, 512, "layers"), "cuda") == pytest.approx(600 * 1e-6)
    assert known.floor(Point("LSTM", "inference", "bf16", 100, 1, 512, "bidirectional"), "cuda") == pytest.approx(1e-4)
    assert Limits(1e18, ((1 << 30, 1e15),)).floor(middle, "cuda") < 1e-8


def test_exchanges_are_read_and_their_failure_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    said = '{"kind": "cta", "members": 4, "seconds": 2.1e-08}\n{"kind": "grid", "members": 128, "seconds": 1.5e-06}\n'
    assert exchange.read(said) == (("cta", 4, 2.1e-08), ("grid", 128, 1.5e-06))
    with pytest.raises(RuntimeError, match="it broke"):
        exchange._call([sys.executable, "-c", "raise SystemExit('it broke')"], 60)
    with pytest.raises(RuntimeError, match="did not end within 0 s"):
        exchange._call([sys.executable, "-c", "import time; time.sleep(60)"], 0.1)

    def broken() -> None:
        raise RuntimeError("it broke")

    monkeypatch.setattr(limits, "measure_exchanges", broken)
    with pytest.warns(UserWarning, match="leave exchanges out: it broke"):
        assert limits._exchanges() == ()
    assert exchange.SOURCE.exists()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")
def test_exchanges_of_this_gpu_are_plausible() -> None:
    found = exchange.measure_exchanges()
    assert {kind for kind, _, _ in found} >= {"cta", "grid", "flags"}
    assert all(1e-9 < seconds < 1e-4 for _, _, seconds in found), found


# --- tables, goals, pictures


def test_regions_of_a_gpu_do_not_overlap() -> None:
    points = [p for p in GRIDS["cuda"].points("bf16") if p.mode != "step"]
    assert all(sum(contains(p) for contains in REGIONS["cuda"].values()) == 1 for p in points)


def test_goals_are_met_and_not_met() -> None:
    met = {goal.name: goal.met(value) for goal, value in judged(some_results(), "cuda") if value is not None}
    assert met == {
        "LSTM and GRU, T≥128, B≤128, H≤1024, inference: × torch.nn": True,
        "LSTM and GRU, T≥128, B≤128, H≤1024, training: × torch.nn": True,
        "a padded batch with lengths over one without, worst point": True,
        "1 % resets over none, worst point": False,
        "the automatic choice, of the best of all, worst point": True,
        "inference, H≤512, B≤64: a step over the exchange, worst point": False,  # W_hh of H=128 needs no other CTA
    }
    slow = {goal.name: value for goal, value in judged(some_results(ours=2.0), "cuda")}
    assert slow["LSTM and GRU, T≥128, B≤128, H≤1024, inference: × torch.nn"] == pytest.approx(2.0)
    half = {goal.name: value for goal, value in judged(some_results("fp16"), "cuda")}
    assert half["LSTM where cuDNN is persistent, inference: × torch.nn"] == pytest.approx(4.0)
    assert half["LSTM, T=1024, B=16, H=768, inference: ms"] == pytest.approx(1.024)
    assert {dtype for goal in GOALS for dtype in goal.dtypes} <= set(DTYPES)


def test_an_automatic_choice_that_loses_is_seen() -> None:
    results = some_results()
    point = Point("GRU", "training", "bf16", 128, 64, 512)
    results.replace([row(point, "torch", 10), row(point, "cuda", 4), row(point, "auto", 10)])
    found = {goal.name: (goal, value) for goal, value in judged(results, "cuda")}
    goal, value = found["the automatic choice, of the best of all, worst point"]
    assert value == pytest.approx(0.4)
    assert not goal.met(value)


@pytest.mark.slow
def test_the_report_names_algorithms_variants_and_goals() -> None:
    results = some_results("fp16")
    console = Console(width=220, record=True, file=io.StringIO())
    table = goal_table(results)
    assert table is not None
    console.print(report(results), table)
    text = console.export_text()
    for part in (
        PERSISTENT,
        STANDARD,
        "resets",
        "3.08× (3.08×); 1.30 | 1.00",
        "LSTM H=128 in a graph",
        "1.02 met",
        "1.3 not met",
    ):
        assert part in text, part
    ratios = against_plain(results, "cuda", "lengths")
    assert len(ratios) == len(CELLS) * len(SEQUENCES) * 4 * 4 * 5
    assert {round(r, 2) for r in ratios.values()} == {1.05}
    assert goal_table(Results([{**RUN, "device": "cpu"}])) is None


def test_the_pages_show_goals_that_are_not_met(tmp_path: Path) -> None:
    short, full = two_pages(tmp_path, "cuda")
    some_results().save(tmp_path / "bf16.json")
    assert readme.update(short, tmp_path, "cuda")
    text = full.read_text()
    assert "| bf16: 1 % resets over none, worst point | ≤ 1.1 | 1.3 | **not met** |" in text
    assert "| inference, T≥128, B≤128, H≤1024 | 4.00× (4.00) |" in text
    assert "| inference, T ≥ 32, bf16 | **4.00×** (4.00) | **4.00×** (4.00) | **4.00×** (4.00) |" in short.read_text()


def test_pictures(tmp_path: Path) -> None:
    for draw in (heat_map, step_plot):
        path = tmp_path / f"{draw.__name__}.png"
        draw(some_results(), "cuda", path)
        assert path.read_bytes().startswith(b"\x89PNG")
        draw(Results([dict(RUN)]), "cuda", tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()


# --- variants


def test_points_of_the_variants() -> None:
    grid = Grid(T=(4,), B=(2,), H=(8,), steps=(16,))
    points = list(grid.points("bf16", variants=VARIANTS))
    assert not any(p.variant == "graph" and p.mode == "training" for p in points)
    assert sum(p.mode == "step" for p in points) == 2 * len(CELLS)  # plain, and in a graph
    assert supports("cell", Point("GRU", "step", "bf16", 1, 1, 16, "graph")) is None
    assert supports("loop", Point("GRU", "inference", "bf16", 4, 1, 16, "resets")) is not None


def test_resets_are_one_in_a_hundred_and_always_the_same() -> None:
    point = Point("GRU", "inference", "fp32", 500, 40, 8, "resets")
    assert 0.007 < float(resets(point).double().mean()) < 0.013
    assert torch.equal(resets(point), resets(point))
    assert bool(resets(Point("GRU", "inference", "fp32", 96, 5, 8, "resets"))[1:].any())


def test_resets_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """A provider that forgot them would be told from one that did not."""
    monkeypatch.setattr("fused_rnn.commands.bench.variants.RESETS", 0.0)
    without = build("auto", Point("GRU", "inference", "fp32", 96, 5, 8, "resets"))
    without.run()
    monkeypatch.undo()
    timings = measure(Point("GRU", "inference", "fp32", 96, 5, 8, "resets"), ["torch", "auto"], "cpu", 0.0)
    assert timings["auto"].refused is None
    with_ = build("auto", Point("GRU", "inference", "fp32", 96, 5, 8, "resets"))
    with_.run()
    assert float((with_.results()[0] - without.results()[0]).norm()) > 1e-2


def test_inference_is_measured_in_eval_mode() -> None:
    assert not build("torch", Point("LSTM", "inference", "fp32", 2, 2, 4)).module.training
    assert build("torch", Point("LSTM", "training", "fp32", 2, 2, 4)).module.training


def test_a_graph_needs_a_gpu() -> None:
    with pytest.raises(ValueError, match="device: got 'cpu' with the variant 'graph'"):
        build("torch", Point("LSTM", "inference", "fp32", 2, 2, 4, "graph"))


def test_a_graph_is_captured_once_and_replayed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand-ins for streams and graphs: what is captured runs as it is, what is replayed runs it again."""
    log: list[str] = []

    class Graph:
        def replay(self) -> None:
            log.append("replay")

    @contextmanager
    def capture(graph: Graph) -> Iterator[None]:
        log.append("capture")
        yield

    @contextmanager
    def stream(_: object) -> Iterator[None]:
        yield

    waits = SimpleNamespace(wait_stream=lambda _: None)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    monkeypatch.setattr(torch.cuda, "stream", stream)
    monkeypatch.setattr(torch.cuda, "Stream", lambda: waits)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: waits)
    plain = build("auto", Point("GRU", "inference", "fp32", 4, 2, 8))
    graphed = GraphCall(plain)
    for _ in range(2):
        graphed.prepare()
        graphed.run()
    assert log == ["capture", "replay", "replay"]
    plain.run()
    assert torch.equal(graphed.results()[0], plain.results()[0])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")
@pytest.mark.parametrize("variant", ["plain", "graph"])
@pytest.mark.parametrize("cell", CELLS)
def test_a_step_on_a_gpu(cell: str, variant: str) -> None:
    timings = measure(Point(cell, "step", "fp32", 1, 1, 64, variant), ["cell", "torch", "triton", "auto"], "cuda", 0.0)
    assert [timing.refused for timing in timings.values()] == [None] * 4, timings


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")
@pytest.mark.parametrize("architecture", ["80", "90a", "120"])
def test_the_exchange_program_compiles(architecture: str, tmp_path: Path) -> None:
    flags = ["-std=c++17", "--expt-relaxed-constexpr", "-Werror", "all-warnings", f"-arch=sm_{architecture}"]
    command = ["nvcc", *flags, "-cubin", str(exchange.SOURCE), "-o", str(tmp_path / "exchange.cubin")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


# --- the table by which the automatic choice goes


def test_speed_ups_count_against_the_fastest_way_in_torch() -> None:
    """For bf16 that may be float16, for which cuDNN has kernels that it lacks for bf16."""
    point, other = Point("LSTM", "training", "bf16", 32, 8, 64), Point("LSTM", "training", "bf16", 32, 8, 128)
    results = Results([dict(RUN)])
    results.replace([row(point, "torch", 30), row(point, HALF, 12), row(point, "cuda", 10)])
    results.replace([row(other, "torch", 20), row(other, HALF, 25), row(other, "cuda", 10)])
    assert results.speedups("cuda") == pytest.approx({point: 1.2, other: 2.0})
    step, fp32 = Point("LSTM", "step", "bf16", 1, 1, 64), Point("LSTM", "training", "fp32", 32, 8, 64)
    assert supports(HALF, point) is None
    for no_sequence_in_bf16 in (step, fp32):
        assert supports(HALF, no_sequence_in_bf16) is not None
    call = build(HALF, point)
    assert {t.dtype for t in (call.x, call.dy, *call.parameters)} == {torch.float16}
    assert call.x.requires_grad and call.x.is_leaf
    theirs = build("torch", point)
    for ours, own in zip(call.parameters, theirs.parameters, strict=True):
        torch.testing.assert_close(ours.float(), own.float(), rtol=1e-2, atol=1e-4)


def test_the_backend_that_loses_least_at_its_worst_is_chosen() -> None:
    points = [Point("LSTM", "training", "bf16", T, 8, 64) for T in (32, 128)]
    results = Results([dict(RUN)])
    times = {"torch": (10, 20), "cuda": (8, 26), "triton": (11, 21), "auto": (1, 1)}
    results.replace([row(p, name, values[n]) for n, p in enumerate(points) for name, values in times.items()])
    assert choose.best(results, points) == "torch"  # loses 1.25 once, cuda 1.3, triton 1.375
    assert choose.best(results, points[:1]) == "cuda"


def test_sizes_between_go_with_the_nearest() -> None:
    best = {
        (64, 8): "cuda",
        (64, 32): "cuda",
        (256, 8): "cuda",
        (256, 32): "torch",
        (1024, 8): "cuda",
        (1024, 32): "torch",
    }
    small, large, torchs = ((45, "cuda"), (None, "torch")), ((16, "cuda"), (None, "torch")), ((None, "torch"),)
    assert choose._rows(best) == ((128, small), (1448, large), (None, torchs))  # beyond what was measured, torch
    for (hidden, batch), name in best.items():
        assert fastest.pick(choose._rows(best), hidden, batch) == name


@pytest.mark.slow
def test_a_table_is_written_and_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fastest, "FOLDER", tmp_path / "measured")
    monkeypatch.setattr(fastest, "architecture", lambda: "sm_90")
    fastest.table.cache_clear()
    with pytest.raises(FileNotFoundError, match="no result file of a GPU"):
        choose.write(tmp_path)
    results = some_results()
    slow = Point("GRU", "inference", "bf16", 1, 64, 512)
    results.replace([row(slow, "torch", 1), row(slow, "cuda", 2), row(slow, "auto", 1)])
    results.save(tmp_path / "bf16.json")
    done = CliRunner().invoke(cli, ["bench", "--choose", "--device", "cuda", "--out", str(tmp_path)])
    assert done.exit_code == 0, done.output
    table = fastest.table("sm_90")
    keys = {
        fastest.key_of(cell.lower(), "bf16", training, step) for cell in CELLS for training in (0, 1) for step in (0, 1)
    }
    assert set(table) == keys
    assert table["gru bf16 training step"] == ((2896, ((362, "cuda"), (None, "torch"))), (None, ((None, "torch"),)))
    rows = fastest.rows_of("gru bf16 inference step")
    assert [fastest.pick(rows, 512, batch) for batch in (16, 64, 256)] == ["cuda", "torch", "cuda"]
    assert fastest.pick(rows, 128, 64) == "cuda"
    problem = Case("gru", B=64).problem(needs_grad=False)
    problem = problem._replace(device="cuda", dtype=torch.bfloat16, hidden_size=512, width=512, single_step=True)
    assert dispatch.preference(problem)[0] == "torch"
    assert dispatch.preference(problem._replace(single_step=False))[0] == "cuda"
    Results([{**RUN, "capability": "8.0"}], results.rows).save(tmp_path / "tf32.json")
    with pytest.raises(ValueError, match="got results of sm_80, sm_90, expected those of one"):
        choose.write(tmp_path)
    fastest.table.cache_clear()
