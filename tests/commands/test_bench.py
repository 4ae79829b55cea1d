"""The benchmark's own arithmetic, clock, checks and files, on points of microseconds."""

from __future__ import annotations

import io
import math
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from fused_rnn import ops
from fused_rnn.commands import machine
from fused_rnn.commands.bench import limits as limits_module
from fused_rnn.commands.bench import measure as measure_module
from fused_rnn.commands.bench import readme
from fused_rnn.commands.bench.grid import CELLS, GATES, GRIDS, MODES, REGIONS, SEQUENCES, Grid, Point
from fused_rnn.commands.bench.limits import Ceilings, Limits, measure_limits
from fused_rnn.commands.bench.measure import Timing, clock, counts_core_time, float32_as, measure, percentiles
from fused_rnn.commands.bench.memory import peak_memory
from fused_rnn.commands.bench.plot import plot
from fused_rnn.commands.bench.providers import baseline, build, supports
from fused_rnn.commands.bench.results import FLOOR, TIME, Results, Row, continued, geometric_mean, setting, time_row
from fused_rnn.commands.bench.run import execute
from fused_rnn.commands.bench.tables import losses, region_table, regions, report
from fused_rnn.commands.bench.workload import Workload

RUN = {
    "device": "cpu", "device_name": "a CPU", "cores": 2, "isa": "AVX2", "kernels": "avx2",
    "dtype": "fp32", "threads": 1, "torch": "2", "fused_rnn": "0", "commit": "abc", "date": "2026-01-01T00:00Z",
    "limits": {"flops": 1e11, "read": [[4096, 1e11]]},
}  # fmt: skip


def row(point: Point, provider: str, micros: float, run: int = 0) -> Row:
    return time_row(point, provider, Timing(micros * 0.9e-6, micros * 1e-6, micros * 1.1e-6, 5), run)


def small(out: Path, **options: Any) -> Workload:
    """Of the grid "tiny", unless told otherwise, in no more time than it must take."""
    usual = {"grid": "tiny", "dtypes": ("fp32",), "threads": (1,), "memory": False, "budget_s": 0.0}
    return Workload(**{**usual, **options}, out=out)


def some_results() -> Results:
    """torch.nn at 10 µs everywhere, ours at 5 µs but for one point, where it takes 20; the cell at 4 and ours at 1."""
    results = Results([dict(RUN)])
    rows = []
    for point in GRIDS["cpu"].points("fp32"):
        slow = point == Point("GRU", "training", "fp32", 32, 8, 128)
        ours = 1 if point.mode == "step" else 20 if slow else 5
        rows += [row(point, baseline(point), 4 if point.mode == "step" else 10), row(point, FLOOR, 0.5)]
        rows += [row(point, name, ours) for name in ("cpu", "auto")]
    results.replace(rows)
    return results


def test_regions_are_the_ones_promised() -> None:
    points = [p for p in GRIDS["cpu"].points("fp32") if p.mode != "step"]
    assert len(points) == len(CELLS) * len(SEQUENCES) * 4 * 4 * 3
    counts = {name: sum(map(contains, points)) // 6 for name, contains in REGIONS["cpu"].items()}
    assert counts == {"B=1, T≥32": 8, "B≥8, H≤128": 18, "B≥8, H≥256": 18}
    assert not any(sum(contains(p) for contains in REGIONS["cpu"].values()) > 1 for p in points)


@pytest.mark.parametrize("cell", CELLS)
def test_flops_are_those_of_the_matrix_products(cell: str) -> None:
    """A sequence's first step has none with W_hh, for it enters from zeros."""
    T, B, H = 3, 2, 5
    forward = (T * B + (T - 1) * B) * (2 * H * GATES[cell] * H)
    assert Point(cell, "inference", "fp32", T, B, H).flops == forward
    assert Point(cell, "training", "fp32", T, B, H).flops == 3 * forward
    assert Point(cell, "inference", "fp32", T, B, H, "bidirectional").flops == 2 * forward
    layered = forward * 3
    assert Point(cell, "step", "fp32", 1, B, H).flops == 2 * Point(cell, "inference", "fp32", 1, B, H).flops
    assert Point(cell, "inference", "fp32", T, B, H, "ragged").flops == (3 + 2 + 2 + 1) * (2 * H * GATES[cell] * H)
    assert Point(cell, "inference", "fp32", T, B, H, "layers").flops == layered
    assert Point(cell, "inference", "bf16", T, B, H).recurrent_bytes == GATES[cell] * H * H * 2


def test_ragged_lengths_descend_and_stay_in_range() -> None:
    lengths = Point("GRU", "inference", "fp32", 9, 4, 3, "ragged").lengths
    assert lengths == sorted(lengths, reverse=True)
    assert lengths[0] == 9
    assert min(lengths) >= 1


def test_floor_is_arithmetic_for_large_batches_and_reading_for_small_ones() -> None:
    limits = Limits(flops=1e11, read=((1 << 12, 1e11), (1 << 20, 5e10)))
    large = Point("LSTM", "inference", "fp32", 10, 1000, 64)
    assert limits.floor(large) == large.flops / 1e11
    small = Point("LSTM", "inference", "fp32", 10, 1, 256)  # W_hh has 1 MiB
    assert limits.floor(small) == pytest.approx(10 * (1 << 20) / 5e10)
    assert limits.floor(Point("LSTM", "training", "fp32", 10, 1, 256)) == pytest.approx(2 * limits.floor(small))
    assert limits.bandwidth(1 << 30) == 5e10


def test_a_point_that_goes_past_the_limits_raises_them() -> None:
    """They are measured again first, and if that does not help they are what was reached."""
    low = Limits(flops=1e11, read=((1 << 12, 1e11), (1 << 20, 5e10)))
    better = Limits(flops=2e11, read=((1 << 12, 1e11), (1 << 20, 6e10)), by="our own product")
    asked: list[int] = []
    ceilings = Ceilings(low, lambda: asked.append(1) or better, "cpu")  # type: ignore[func-returns-value]
    large, small = Point("LSTM", "inference", "fp32", 10, 1000, 64), Point("LSTM", "training", "fp32", 10, 1, 256)
    ceilings.check(large, 1.01 * large.flops / 1e11)
    assert (ceilings.limits, asked, ceilings.said()) == (low, [], "")
    ceilings.check(large, large.flops / 1.5e11)
    assert (ceilings.limits, len(asked)) == (better, 1)
    ceilings.check(large, large.flops / 3e11)
    assert ceilings.limits.flops == pytest.approx(3e11)
    assert ceilings.limits.by == str(large)
    assert ceilings.limits.floor(large) == pytest.approx(large.flops / 3e11)
    ceilings.check(small, 20 * (1 << 20) / 7e10)
    assert ceilings.limits.floor(small) == pytest.approx(20 * (1 << 20) / 7e10)
    assert ceilings.limits.read[0] == (1 << 12, 1e11)
    ceilings.check(small, 1e-9)
    assert len(asked) == ceilings.measured_again == Ceilings.AGAIN
    assert "100 GFLOP/s are now" in ceilings.said() and "50 GB/s of 1024 KiB are now" in ceilings.said()


def test_no_point_of_a_run_is_past_its_limits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ceilings far too low, as on a disturbed machine."""
    limits = Limits(1e6, ((1 << 12, 1e3), (1 << 20, 1e3)))
    monkeypatch.setattr("fused_rnn.commands.bench.run.measure_limits", lambda *_: limits)
    shapes = ((3, 2, 5, 16), (4, 1, 5, 64))
    workload = small(tmp_path, shapes=shapes, cells=("GRU",), modes=SEQUENCES, providers=("torch", "auto"))
    console = Console(file=io.StringIO(), width=80)
    (path,) = execute(workload, console)
    results = Results.load(path)
    for point, provider, metric in results.rows:
        floor, ours = results.value(point, FLOOR, metric), results.value(point, provider, metric)
        assert floor is not None and ours is not None
        assert floor <= 1.001 * ours, (point, provider)
    assert isinstance(console.file, io.StringIO)
    assert "Points went past the limits" in console.file.getvalue()


@pytest.mark.skipif(ops._C is None, reason="the extension is not built")
def test_the_limit_is_that_of_the_best_product(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where torch.mm is slow."""
    rates = {"mm": 1e9, "run": 3e9}
    monkeypatch.setattr(limits_module, "best_rate", lambda work, call, device, seconds=0.1: rates.get(_name(call), 1e9))
    limits = measure_limits("fp32", "cpu")
    assert (limits.flops, limits.by) == (3e9, "our own product")
    rates["mm"] = 4e9
    assert measure_limits("fp32", "cpu").by == "torch.mm"


def _name(call: object) -> str:
    return str(getattr(getattr(call, "func", call), "__name__", ""))


def test_limits_of_this_machine_are_plausible() -> None:
    limits = measure_limits("fp32", "cpu")
    assert 1e8 < limits.flops < 1e14
    assert all(1e8 < rate < 1e13 for _, rate in limits.read)


def test_percentiles_by_nearest_rank() -> None:
    timing = percentiles([5.0, 1.0, 3.0, 2.0, 4.0, 6.0])
    assert (timing.p20, timing.p50, timing.p80, timing.n) == (2.0, 3.0, 5.0, 6)
    assert percentiles([7.0]).p50 == 7.0


def test_geometric_mean() -> None:
    assert geometric_mean([2.0, 0.5]) == pytest.approx(1.0)
    assert math.isnan(geometric_mean([]))


@pytest.mark.parametrize("variant", ["plain", "layers", "bidirectional", "ragged", "lengths", "resets"])
@pytest.mark.parametrize("mode", SEQUENCES)
@pytest.mark.parametrize("cell", CELLS)
def test_every_provider_agrees_with_the_baseline(cell: str, mode: str, variant: str) -> None:
    point = Point(cell, mode, "fp32", 96, 5, 8, variant)  # so many steps that some are reset
    timings = measure(point, ["torch", "loop", "cpu", "auto"], "cpu", 0.0)
    expected = {"torch", "cpu", "auto"} | ({"loop"} if variant == "plain" else set())
    assert set(timings) == expected
    assert {name: timing.refused for name, timing in timings.items() if timing.refused} == {}
    assert all(0 < timing.p20 <= timing.p50 <= timing.p80 for timing in timings.values())


@pytest.mark.parametrize("cell", CELLS)
def test_a_step_is_compared_with_the_cell(cell: str) -> None:
    point = Point(cell, "step", "fp32", 1, 1, 8)
    timings = measure(point, ["torch", "cell", "loop", "auto"], "cpu", 0.0)
    assert set(timings) == {"cell", "torch", "auto"}
    assert not any(timing.refused for timing in timings.values())
    assert supports("loop", point) is not None


def test_by_one_thread_the_time_without_a_core_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    class Sleeps:
        def prepare(self) -> None:
            pass

        def run(self) -> None:
            time.sleep(0.02)

    assert min(clock("cpu")(Sleeps(), 2)) >= 0.02
    assert max(clock("cpu", core_time=True)(Sleeps(), 2)) < 0.02
    for threads, counts in ((1, True), (2, False)):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        assert counts_core_time("cpu") is counts and not counts_core_time("cuda")


def test_a_wrong_result_gets_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = build

    def wrong(provider: str, point: Point, device: str = "cpu") -> object:
        call = honest(provider, point, device)
        if provider == "auto":
            with torch.no_grad():
                call.parameters[1].add_(0.1)
        return call

    monkeypatch.setattr(measure_module, "build", wrong)
    timings = measure(Point("GRU", "training", "fp32", 4, 2, 8), ["torch", "auto"], "cpu", 0.0)
    assert timings["auto"].refused is not None
    assert "wrong result" in timings["auto"].refused
    assert timings["auto"].n == 0
    assert timings["torch"].refused is None


def test_a_backend_that_raises_is_reported_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = build

    def broken(provider: str, point: Point, device: str = "cpu") -> object:
        if provider == "cpu":
            raise NotImplementedError("it has no such kernel\nand more lines")
        return honest(provider, point, device)

    monkeypatch.setattr(measure_module, "build", broken)
    timings = measure(Point("RNN", "inference", "fp32", 2, 2, 8), ["torch", "cpu"], "cpu", 0.0)
    assert timings["cpu"].refused == "it has no such kernel"


def test_training_writes_the_weights_between_runs() -> None:
    call = build("torch", Point("LSTM", "training", "fp32", 2, 2, 4))
    versions = [parameter._version for parameter in call.parameters]
    call.prepare()
    assert all(p._version > version for p, version in zip(call.parameters, versions, strict=True))
    call.run()
    assert len(call.results()) == 2 + len(call.parameters)
    call.prepare()
    assert all(parameter.grad is None for parameter in call.parameters)


def test_rows_survive_the_file(tmp_path: Path) -> None:
    results = some_results()
    refused = Row(Point("LSTM", "inference", "fp32", 2, 3, 5), "cpu", TIME, 0, refused="no")
    results.replace([refused])
    results.save(tmp_path / "a.json")
    again = Results.load(tmp_path / "a.json")
    assert again.rows == results.rows
    assert again.runs == results.runs


def test_measuring_again_replaces_the_point_and_keeps_the_rest(tmp_path: Path) -> None:
    """Of "auto", which was not measured again, nothing is lost: neither its row nor those that it stands beside."""
    results = some_results()
    point = Point("LSTM", "training", "fp32", 32, 8, 128)
    results.runs.append({**RUN, "commit": "def"})
    before = set(results.rows)
    results.replace([row(point, "torch", 30, run=1), row(point, "cpu", 3, run=1)])
    assert results.speedups("cpu")[point] == pytest.approx(10)
    assert results.speedups("auto")[point] == pytest.approx(2), "no speed-up across two runs"
    assert set(results.rows) == before
    assert results.value(point, "torch") == 30
    assert results.value(point, "torch", run=0) == 10
    results.save(tmp_path / "a.json")
    assert [run["commit"] for run in results.runs] == ["abc", "def"]
    again = Results.load(tmp_path / "a.json")
    assert (again.rows, again.older) == (results.rows, results.older)
    assert again.speedups("auto") == results.speedups("auto")
    alone = again.of_run(1)
    assert set(alone.rows) == {(point, "torch", TIME), (point, "cpu", TIME)}


def test_a_run_goes_when_all_that_it_measured_was_measured_again() -> None:
    point = Point("GRU", "inference", "fp32", 8, 8, 8)
    results = Results([{**RUN, "commit": str(n)} for n in range(4)])
    results.replace([row(point, name, 10) for name in ("torch", "cpu", "auto", FLOOR)])
    results.replace([row(point, name, 8, run=1) for name in ("torch", "cpu", FLOOR)])
    assert {r.run for r in results.every_row()} == {0, 1}
    results.replace([row(point, name, 6, run=2) for name in ("torch", "auto")])
    assert {r.run for r in results.every_row()} == {0, 1, 2}, "no later run has all three"
    results.replace([row(point, "cpu", 1, run=3)])
    assert {r.run for r in results.every_row()} == {0, 1, 2, 3}
    assert results.value(point, "cpu") == 1
    assert results.speedups("cpu") == {point: 1.0}, "the latest run that has both"
    results.runs.append(dict(RUN))
    results.replace([row(point, name, 4, run=4) for name in ("torch", "cpu", "auto")])
    assert {r.run for r in results.every_row()} == {4}


@pytest.mark.parametrize("change", [{"device_name": "another CPU"}, {"torch": "3"}, {"kernels": "avx512"}, None])
def test_a_file_of_another_machine_stays(change: dict[str, str] | None, tmp_path: Path) -> None:
    path, facts = tmp_path / "fp32-1t.json", dict(RUN)
    assert continued(path, facts)[::2] == (path, None)
    if change is None:
        path.write_text('{"somebody": "else"}')
    else:
        some_results().save(path)
        facts |= change
    before = path.read_bytes()
    other, results, said = continued(path, facts)
    assert (other, results.rows) == (tmp_path / "fp32-1t-2.json", {})
    assert said is not None and str(path) in said and str(other) in said
    Results([facts], some_results().rows).save(other)
    again, results, _ = continued(path, facts)
    assert again == other and results.rows
    assert path.read_bytes() == before


def test_a_run_beside_another_machines_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(GRIDS, "tiny", Grid(T=(2,), B=(2,), H=(4,), steps=()))
    some_results().save(tmp_path / "tiny-fp32-1t.json")
    before = (tmp_path / "tiny-fp32-1t.json").read_bytes()
    workload = small(tmp_path, cells=("GRU",), providers=("torch", "auto"))
    console = Console(file=io.StringIO(), width=400)
    assert execute(workload, console) == [tmp_path / "tiny-fp32-1t-2.json"]
    assert isinstance(console.file, io.StringIO)
    assert f"{tmp_path / 'tiny-fp32-1t.json'} holds results of a CPU with torch 2" in console.file.getvalue()
    assert (tmp_path / "tiny-fp32-1t.json").read_bytes() == before


def test_runs_without_rows_are_dropped(tmp_path: Path) -> None:
    results = some_results()
    results.runs.append({**RUN, "commit": "def"})
    results.replace([Row(**{**old.__dict__, "run": 1}) for old in results.rows.values()])
    results.save(tmp_path / "a.json")
    assert [run["commit"] for run in Results.load(tmp_path / "a.json").runs] == ["def"]


def test_tables_print_losses_like_wins() -> None:
    results = some_results()
    means = {(mode, name): cells for mode, name, cells in regions(results, "cpu")}
    assert len(means) == 6
    assert min(means["training", "B≥8, H≤128"]["GRU"]) == 0.5
    assert "1 of" in losses(results, "cpu").plain
    assert "0.50× GRU training fp32 T=32 B=8 H=128" in losses(results, "cpu").plain
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(report(results), region_table(results, "auto"))
    text = console.export_text()
    assert "0.50×" in text
    assert "2.00× (2.00×)" in text
    assert "10%" in text


def two_pages(folder: Path, provider: str = "cpu") -> tuple[Path, Path]:
    """A README and a page of measurements, with the lines between which tables go."""
    short, full = folder / "README.md", folder / readme.FULL
    full.parent.mkdir(exist_ok=True)
    for page in (short, full):
        page.write_text("\n".join(["before", *readme.markers(provider), "after", ""]))
    return short, full


def test_readme_tables_come_from_the_files_and_only_between_the_markers(tmp_path: Path) -> None:
    short, full = two_pages(tmp_path)
    with pytest.raises(FileNotFoundError, match="no result file"):
        readme.update(short, tmp_path, "cpu")
    some_results().save(tmp_path / "fp32-1t.json")
    some_results().save(tmp_path / "quick-fp32-1t.json")
    some_results().save(tmp_path / "shapes-fp32-1t.json")
    assert readme.update(short, tmp_path, "cpu")
    assert not readme.update(short, tmp_path, "cpu")
    for page in (short, full):
        assert page.read_text().startswith("before\n") and page.read_text().endswith("after\n")
    text = full.read_text()
    assert text.count("**fp32, 1 thread**") == 1
    assert "slower than 0.95× at 1 of 288 points, the worst 0.50×" in text
    assert "4 → 1 (4.0×)" in text
    some_results().save(tmp_path / "fp32-1t-2.json")
    with pytest.raises(ValueError, match="are both of fp32, 1 thread: expected one"):
        readme.update(short, tmp_path, "cpu")
    (tmp_path / "fp32-1t-2.json").unlink()
    full.write_text("no markers")
    with pytest.raises(ValueError, match="must contain the lines"):
        readme.update(short, tmp_path, "cpu")
    full.unlink()
    with pytest.raises(ValueError, match="no such page"):
        readme.update(short, tmp_path, "cpu")


def test_the_readme_has_the_sums_and_says_where_the_rest_is(tmp_path: Path) -> None:
    short, _ = two_pages(tmp_path)
    some_results().save(tmp_path / "fp32-1t.json")
    readme.update(short, tmp_path, "cpu")
    text = short.read_text()
    assert "| inference, one sequence, T ≥ 32, fp32 | **2.00×** (2.00) | **2.00×** (2.00) | **2.00×** (2.00) |" in text
    (line,) = (line for line in text.splitlines() if line.startswith("| training, batches of 8 to 128, fp32"))
    speedups = [2.0] * (3 * 3 * 4 - 1) + [0.5]
    assert line.split("|")[3].strip() == f"**{geometric_mean(speedups):.2f}×** (0.50)"
    assert "T 1 to 128, B 1 to 128, H 32 to 512" in text
    assert "[measurements](docs/measurements.md)" in text
    assert len([line for line in text.splitlines() if line.startswith("|")]) <= 12, "to be read in a minute"


@pytest.mark.parametrize(("provider", "folder"), [("cpu", "cpu"), ("cuda", "h200")])
def test_the_pages_are_up_to_date(provider: str, folder: str) -> None:
    """The README and docs/measurements.md have what the committed files say."""
    root = Path(__file__).parents[2]
    for page, text in readme.pages(root / "README.md", root / "benchmarks/results" / folder, provider).items():
        assert page.read_text() == text, f"{page.name}: python -m fused_rnn bench --readme README.md"


def test_plot_is_a_picture(tmp_path: Path) -> None:
    plot(some_results(), "cpu", tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    plot(Results(), "cpu", tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()


@pytest.mark.slow
def test_a_whole_run_writes_what_it_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(GRIDS, "tiny", Grid(T=(1, 2), B=(2,), H=(4,), steps=(4,)))
    workload = small(tmp_path)
    threads = torch.get_num_threads()
    (path,) = execute(workload, Console(file=io.StringIO(), width=200))
    assert torch.get_num_threads() == threads
    results = Results.load(path)
    assert set(results.providers()) == {"torch", "cell", "loop", "cpu", "auto"}
    points = {point for point, _, _ in results.rows}
    assert points == set(Grid(T=(1, 2), B=(2,), H=(4,), steps=(4,)).points("fp32", modes=MODES))
    assert all(row.refused is None for row in results.rows.values())
    run = results.runs[0]
    for fact in ("device", "device_name", "cpu", "torch", "fused_rnn", "commit", "date", "threads", "dtype", "limits"):
        assert fact in run
    assert path.with_suffix(".png").exists()


@pytest.mark.slow
def test_a_run_that_is_killed_has_written_what_it_had(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of an earlier run stay, with the run that they are from."""
    monkeypatch.setitem(GRIDS, "tiny", Grid(T=(1, 2), B=(2,), H=(4,), steps=()))
    monkeypatch.setattr("fused_rnn.commands.bench.run.SAVE_EVERY", 0.0)
    workload = small(tmp_path, cells=("GRU",), modes=("inference",), providers=("torch", "cpu"))
    (path,) = execute(workload, Console(file=io.StringIO()))
    on_disk: list[Results] = []
    original = measure_module.measure

    def measured(*args: object) -> dict[str, Timing]:
        on_disk.append(Results.load(path))
        return original(*args)  # type: ignore[arg-type]

    monkeypatch.setattr("fused_rnn.commands.bench.run.measure", measured)
    execute(workload, Console(file=io.StringIO()))
    before, halfway = on_disk
    assert {row.run for row in before.rows.values()} == {0}
    assert {(point.T, row.run) for (point, _, _), row in halfway.rows.items()} == {(1, 0), (2, 1)}


@pytest.mark.parametrize("stop", [MemoryError, KeyboardInterrupt])
@pytest.mark.parametrize("where", ["times", "memory"])
def test_what_was_measured_before_an_error_is_kept(
    where: str, stop: type[BaseException], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(GRIDS, "tiny", Grid(T=(1, 2, 3), B=(2,), H=(4,), steps=()))
    which: dict[str, Any] = {"cells": ("GRU",), "modes": ("inference",), "providers": ("torch", "cpu")}
    workload = small(tmp_path, memory=where == "memory", **which)
    asked: list[object] = []

    def third(answer: object) -> object:
        asked.append(answer)
        if len(asked) == 3:
            raise stop("no more")
        return answer

    monkeypatch.setattr("fused_rnn.commands.bench.run.measure_limits", lambda *_: Limits(1e11, ((1 << 12, 1e11),)))
    name = "measure" if where == "times" else "peak_memory"
    answer = {"torch": Timing(1e-6, 1e-6, 1e-6, 5)} if where == "times" else 2**20
    monkeypatch.setattr(f"fused_rnn.commands.bench.run.{name}", lambda *_: third(answer))
    if where == "memory":
        monkeypatch.setattr("fused_rnn.commands.bench.workload.SIZES", (1, 2, 4))
        monkeypatch.setattr("fused_rnn.commands.bench.run._ours", lambda plan: ["cpu", "auto"])
    with pytest.raises(stop):
        execute(workload, Console(file=io.StringIO()))
    results = Results.load(tmp_path / "tiny-fp32-1t.json")
    points = {point.T for point, name, metric in results.rows if metric == TIME and name == "torch"}
    assert points == ({2, 3} if where == "times" else {1, 2, 3}), "the dearest first"
    assert {point.T for point, name, _ in results.rows if name == FLOOR} == points
    assert sum(metric != TIME for _, _, metric in results.rows) == (2 if where == "memory" else 0)


def test_a_kill_while_it_writes_leaves_the_file_that_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "fp32-1t.json"
    some_results().save(path)
    before = path.read_text()
    whole = Path.write_text

    def half(self: Path, text: str, **options: str) -> int:
        whole(self, text[: len(text) // 2], **options)
        raise KeyboardInterrupt

    results = some_results()
    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", half)
        with pytest.raises(KeyboardInterrupt):
            results.save(path)
    assert path.read_text() == before
    results.save(path)
    assert path.read_text() == before and [p.name for p in tmp_path.iterdir()] == ["fp32-1t.json"]


@pytest.mark.slow
def test_peak_memory_of_training_grows_with_the_sequence() -> None:
    short, long = (peak_memory(Point("GRU", "training", "fp32", T, 32, 128), "torch", "cpu", 1) for T in (16, 512))
    tensors = 512 * 32 * 128 * 4 * GATES["GRU"]
    assert long > tensors
    assert long > 4 * short


# --- on a GPU


def test_a_gpus_results_have_names_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    assert machine.folder("cpu") == Path("benchmarks/results/cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for name, folder in (("NVIDIA H200", "h200"), ("NVIDIA GeForce RTX 4090", "geforce-rtx-4090"), ("H100", "h100")):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda name=name: name)
        assert machine.folder("cuda") == Path("benchmarks/results") / folder
        assert machine.folder("cpu") == Path("benchmarks/results/cpu")
        assert machine.folder("cuda", machine.OUT) == Path("bench-out") / folder
    assert Workload(device="cuda", grid="cuda", out=Path("a")).path("bf16", 8) == Path("a/bf16.json")
    assert Workload(device="cuda", grid="quick-cuda", out=Path("a")).path("tf32", 8) == Path("a/quick-tf32.json")
    assert Workload(out=Path("a")).path("fp32", 2) == Path("a/fp32-2t.json")
    assert setting({**RUN, "device": "cuda"}) == "fp32"
    assert setting({**RUN, "threads": 2}) == "fp32, 2 threads"
    assert readme.markers("cuda") != readme.markers("triton") != readme.markers("cpu")


def test_w_hh_is_read_once_in_all_on_a_gpu() -> None:
    limits = Limits(flops=1e18, read=((1 << 20, 5e10),))
    point = Point("LSTM", "training", "fp32", 10, 1, 256)
    assert limits.floor(point, "cuda") == pytest.approx(limits.floor(point, "cpu") / 10)


@pytest.mark.parametrize("dtype", ["fp32", "tf32"])
def test_the_dtype_says_whether_a_gpu_rounds_to_tf32(dtype: str) -> None:
    def now() -> tuple[str, str]:
        return torch.backends.cuda.matmul.fp32_precision, torch.backends.cudnn.rnn.fp32_precision

    before = now()
    with float32_as(dtype, "cpu"):
        assert now() == before
    with float32_as("bf16", "cuda"):
        assert now() == before
    with float32_as(dtype, "cuda"):
        assert [flag == "tf32" for flag in now()] == [dtype == "tf32"] * 2
    assert now() == before


def test_a_gpus_clock_waits_once_a_block(monkeypatch: pytest.MonkeyPatch) -> None:
    """Events are recorded around every run and read after the last; prepare() lies between them. The first run,
    for which the device had to wait, does not count."""
    log: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            log.append("record")

        def elapsed_time(self, end: Event) -> float:
            log.append("read")
            return 1.5

    class Counted:
        def prepare(self) -> None:
            log.append("prepare")

        def run(self) -> None:
            log.append("run")

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: log.append("wait"))
    assert clock("cuda")(Counted(), 2) == [1.5e-3] * 2  # type: ignore[arg-type]
    once = ["prepare", "record", "run", "record"]
    assert log == ["wait", *once, *once, *once, "wait", "read", "read"]


@pytest.mark.gpu
@pytest.mark.timeout(110)  # its processes that measure memory start torch and Triton one after the other
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")
def test_a_whole_run_on_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(GRIDS, "tiny", Grid(T=(4,), B=(8,), H=(32,), steps=(32,)))
    providers = ("torch", "cell", "triton", "auto")
    workload = small(tmp_path, device="cuda", cells=("GRU",), dtypes=("tf32",), memory=True, providers=providers)
    (path,) = execute(workload, Console(file=io.StringIO(), width=200))
    results = Results.load(path)
    assert set(results.providers()) == {"torch", "cell", "triton", "auto"}
    assert all(row.refused is None for row in results.rows.values()), [r for r in results.rows.values() if r.refused]
    assert results.runs[0]["multiprocessors"] > 0
