"""Threads and processes: what is measured, that processes run at the same time, what becomes of a file."""

from __future__ import annotations

import io
import json
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from rich.console import Console

from fused_rnn.commands.bench import readme, scaling, worker
from fused_rnn.commands.bench.grid import CELLS, SEQUENCES, Point
from fused_rnn.commands.bench.providers import build
from fused_rnn.commands.bench.scaling import AtThreads, Rate, counts, points, summary, table
from fused_rnn.commands.bench.worker import Team, serve
from fused_rnn.commands.cli import cli

from .test_bench import RUN, some_results, two_pages

POINT = Point("GRU", "inference", "fp32", 4, 2, 8)


def some_rates() -> list[Rate]:
    """Ours at 100 sequences a second, twice torch.nn; two threads do 1.5 times that with ours, two processes twice."""
    rates = []
    for point in points("fp32", ("LSTM", "GRU"), SEQUENCES):
        for way, ours, theirs in (((1, 1), 100, 50), ((2, 1), 150, 50), ((1, 2), 200, 80)):
            for provider, rate in (("auto", ours), ("torch", theirs)):
                rates.append(Rate(point, provider, way, rate * 0.9, rate, rate * 1.1, 7))
    return rates


def test_counts_are_powers_of_two_and_the_cores() -> None:
    assert [counts(cores) for cores in (1, 2, 6, 8)] == [(1,), (1, 2), (1, 2, 4, 6), (1, 2, 4, 8)]


def test_points_are_those_promised() -> None:
    found = points("fp32", CELLS, SEQUENCES)
    assert len(found) == 3 * 3
    assert {(p.mode, p.B) for p in found} == {("inference", 1), ("inference", 32), ("training", 32)}
    assert points("fp32", ("GRU",), ("inference",), [(4, 2, 5, 8)]) == [Point("GRU", "inference", "fp32", 4, 2, 8, D=5)]


def test_layers_and_directions_are_measured_and_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measure_nothing(monkeypatch, 2, "abc")
    asked = ("--shape", "3,2,5,8", "--cell", "GRU", "--threads", "1", "--out", str(tmp_path))
    printed = bench(*asked, "--layers", "2", "--bidirectional")
    _, rates = scaling.load(tmp_path / "scaling-fp32.json")
    assert {(rate.point.layers, rate.point.directions) for rate in rates} == {(2, 2)}
    assert "2 layers, both directions" in " ".join(printed.split())
    assert "| GRU, training, T=3 B=2 D=5 H=8, 2 layers, both directions |" in scaling.tables(tmp_path)


def test_a_call_has_its_number_of_threads_and_a_run_to_start_them() -> None:
    call = build("auto", POINT)
    runs: list[int] = []
    inner = call.forward
    call.forward = lambda: runs.append(torch.get_num_threads()) or inner()  # type: ignore[func-returns-value]
    two, one = AtThreads(call, 2), AtThreads(call, 1)
    for each in (two, two, one):
        each.prepare()
        each.run()
    assert runs == [2, 2, 2, 1, 1]


@pytest.mark.slow
def test_workers_run_at_the_same_time_and_are_ended() -> None:
    with Team(2) as team:
        assert team.rate(POINT, "auto", 0.0, 2) > 0
        both = team.rate(POINT, "torch", 0.05, 2)
        assert team.rate(POINT, "torch", 0.05, 1) > 0 and both > 0
        with pytest.raises(RuntimeError, match="a process that measured ended with status 1"):
            team.rate(POINT, "nobody", 0.0, 2)
    assert all(worker.poll() is not None for worker in team.workers)


def test_a_worker_counts_its_calls(capsys: pytest.CaptureFixture[str]) -> None:
    request = {"point": {**POINT.__dict__, "mode": "training"}, "provider": "auto", "seconds": 0.02}
    serve([json.dumps({**request, "seconds": 0.0}), json.dumps(request)])
    once, many = map(json.loads, capsys.readouterr().out.splitlines())
    assert once["calls"] == 1
    assert many["calls"] > 1 and many["seconds"] >= 0.02


def test_a_worker_does_not_count_the_writing_of_the_weights() -> None:
    """Nor does the clock of the threads, by which its rate is divided."""
    call = build("auto", Point("GRU", "training", "fp32", 4, 2, 8))
    written: list[int] = []
    prepare = call.prepare
    call.prepare = lambda: written.append(1) or time.sleep(0.02) or prepare()  # type: ignore[func-returns-value]
    call.run = lambda: time.sleep(0.001)
    answer = worker._run(call, 0.004)
    assert len(written) == answer["calls"] > 1
    assert 0.004 <= answer["seconds"] < 0.02 * answer["calls"]


def test_tables_and_sentences() -> None:
    said = summary(some_rates())
    assert "2 threads do 1.50× (1.50 to 1.50) of what one does with ours, 1.00× (1.00 to 1.00) with torch.nn." in said
    assert "2 processes do 2.00× (2.00 to 2.00) of what one does with ours, 1.60× (1.60 to 1.60) with torch.nn." in said
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(table(some_rates(), RUN))
    text = console.export_text()
    assert "150/s (3.00×)" in text and "200/s (2.50×)" in text and "1 thread " in text and "2 processes" in text
    assert max(len(line.rstrip()) for line in text.splitlines()) <= 80


def test_the_pages_have_the_table_between_lines_of_its_own(tmp_path: Path) -> None:
    pages = two_pages(tmp_path)
    some_results().save(tmp_path / "fp32-1t.json")
    scaling._save(tmp_path / "scaling-fp32.json", [RUN], some_rates())
    with pytest.raises(ValueError, match="must contain the lines <!-- threads:begin -->"):
        readme.update(pages[0], tmp_path, "cpu")
    for page in pages:
        page.write_text(page.read_text() + "\n".join(readme.markers("threads")))
    assert readme.update(pages[0], tmp_path, "cpu")
    for page in pages:
        assert "| LSTM, inference, B=1 | 100/s (2.00×) | 150/s (3.00×) | 200/s (2.50×) |" in page.read_text()
        assert "python -m fused_rnn bench --scaling" in page.read_text()


def bench(*arguments: str) -> str:
    result = CliRunner().invoke(cli, ["bench", "--scaling", *arguments])
    assert result.exit_code == 0, result.output
    return result.output


@pytest.mark.slow
def test_a_whole_run_and_what_it_leaves_alone(tmp_path: Path) -> None:
    asked = ("--out", str(tmp_path), "--minutes", "0", "--shape", "3,2,5,8", "--mode", "training", "--threads", "2")
    before = torch.get_num_threads()
    printed = bench(*asked, "--cell", "gru")
    assert torch.get_num_threads() == before
    assert "2 processes do " in printed
    path = tmp_path / "scaling-fp32.json"
    assert str(path) in printed
    (run,), rates = scaling.load(path)
    assert run["cores"] and run["torch"] == torch.__version__
    point = Point("GRU", "training", "fp32", 3, 2, 8, D=5)
    ways = [(1, 1), (2, 1), (1, 2)]
    assert {rate.key for rate in rates} == {(point, name, way) for name in ("torch", "auto") for way in ways}
    assert all(0 < rate.p20 <= rate.p50 <= rate.p80 for rate in rates)
    more = Rate(point, "auto", (8, 1), 1.0, 1.0, 1.0, 7)
    facts = {**run, "dtype": "fp32"}
    console = Console(file=io.StringIO(), width=400)
    keys = {rate.key for rate in rates}
    assert scaling._continued(path, facts, keys, console) == (path, [run], rates)
    other = {(Point("RNN", "training", "fp32", 3, 2, 8, D=5), "auto", (1, 1))}
    assert scaling._continued(path, facts, other, console) == (path, [run], rates)
    for there, description in (([*rates, more], facts), (rates, {**facts, "torch": "1"})):
        scaling._save(path, [description], there)
        assert scaling._continued(path, facts, keys, console) == (tmp_path / "scaling-fp32-2.json", [], [])


def measure_nothing(monkeypatch: pytest.MonkeyPatch, upto: int, commit: str) -> None:
    """Every rate is a given one, without processes; after so many points an interrupt."""
    left = iter(range(upto))

    def rates(point: Point, threads: object, budget_s: float) -> Iterator[Rate]:
        if next(left, None) is None:
            raise KeyboardInterrupt
        yield from (Rate(point, name, (1, 1), 1.0, 1.0, 1.0, 7) for name in ("torch", "auto"))

    monkeypatch.setattr(scaling, "_in_one_process", rates)
    monkeypatch.setattr(scaling, "Team", lambda workers: nullcontext())
    monkeypatch.setattr(scaling, "describe", lambda device: {**RUN, "commit": commit})


def commits(path: Path) -> dict[str, str]:
    runs, rates = scaling.load(path)
    return {rate.point.cell: runs[rate.run]["commit"] for rate in rates}


def test_rates_keep_the_run_they_are_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    console = Console(file=io.StringIO())
    measure_nothing(monkeypatch, 9, "old")
    path = scaling.execute(points("fp32", ("GRU", "RNN"), ("training",)), (1,), 0.0, tmp_path, console)
    measure_nothing(monkeypatch, 9, "new")
    scaling.execute(points("fp32", ("RNN",), ("training",)), (1,), 0.0, tmp_path, console)
    assert commits(path) == {"GRU": "old", "RNN": "new"}
    caption = scaling.tables(tmp_path).splitlines()[-1]
    assert "GRU training: commit old, 2026-01-01T00:00Z; RNN training: commit new, 2026-01-01T00:00Z;" in caption
    scaling.execute(points("fp32", ("GRU",), ("training",)), (1,), 0.0, tmp_path, console)
    assert [run["commit"] for run in scaling.load(path)[0]] == ["new", "new"], "no rate is of the old run any more"


def test_an_interrupt_leaves_the_points_before_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    console, wanted = Console(file=io.StringIO()), points("fp32", CELLS, ("training",))
    measure_nothing(monkeypatch, 9, "old")
    path = scaling.execute(wanted, (1,), 0.0, tmp_path, console)
    measure_nothing(monkeypatch, 2, "new")
    with pytest.raises(KeyboardInterrupt):
        scaling.execute(wanted, (1,), 0.0, tmp_path, console)
    assert commits(path) == {"LSTM": "new", "GRU": "new", "RNN": "old"}


def test_a_file_whose_rows_name_no_run_is_of_its_one(tmp_path: Path) -> None:
    path = tmp_path / "scaling-fp32.json"
    scaling._save(path, [RUN], some_rates())
    path.write_text(path.read_text().replace(', "run": 0}', "}"))
    assert '"run":' not in path.read_text()
    assert scaling.load(path) == ([RUN], some_rates())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--device", "cuda"], "goes by the CPU's"), (["--mode", "step"], "expected inference or training")],
)
def test_what_it_cannot_measure_is_refused(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    result = CliRunner().invoke(cli, ["bench", "--scaling", "--out", str(tmp_path), *arguments])
    assert result.exit_code == 2
    assert message in result.output
