"""Shapes of one's own, the verdict in words, and how tables look in a terminal."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from click.testing import CliRunner
from rich.console import Console

from fused_rnn import ops
from fused_rnn.commands import machine
from fused_rnn.commands.bench.grid import SEQUENCES, Point
from fused_rnn.commands.bench.measure import Timing, measure
from fused_rnn.commands.bench.providers import HALF
from fused_rnn.commands.bench.results import Results, time_row
from fused_rnn.commands.bench.tables import duration, report
from fused_rnn.commands.bench.verdict import judge, verdict
from fused_rnn.commands.cli import cli

from .test_bench import RUN, row, some_results


def shaped_results(micros: dict[str, tuple[float, float]], spread: float = 1.1) -> Results:
    """Of two shapes, the second twice as slow with us: by cell torch.nn's time and ours."""
    results, rows = Results([dict(RUN)]), []
    for cell, (theirs, ours) in micros.items():
        for mode in SEQUENCES:
            for T, factor in ((8, 1), (16, 2)):
                point = Point(cell, mode, "fp32", T, 2, 64, D=80, depth=2, bidirectional=True)
                timing = Timing(ours * factor * 1e-6, ours * factor * 1e-6, ours * factor * spread * 1e-6, 5)
                rows += [row(point, "torch", theirs), time_row(point, "auto", timing, 0)]
    results.replace(rows)
    return results


def test_the_verdict_is_in_words() -> None:
    words = verdict(shaped_results({"LSTM": (30, 10), "GRU": (15, 10), "RNN": (5, 10)})).plain
    assert "Training: LSTM 2.12× as fast as torch.nn: take it; the worst of 2, 1.50× at T=16 B=2 D=80 H=64." in words
    assert "GRU 1.06× as fast as torch.nn: take it, but not for the worst of 2, 0.75× at T=16" in words
    assert "Inference: RNN 0.35× as fast as torch.nn: leave it; the worst of 2, 0.25×" in words
    assert words.count("\n") == 6
    assert [judge(s) for s in (0.94, 0.96, 1.04, 1.06)] == ["leave it", "no difference", "no difference", "take it"]
    assert verdict(Results([dict(RUN)])).plain == ""


def test_a_disturbed_machine_gives_no_verdict_it_cannot_stand_by() -> None:
    words = verdict(shaped_results({"LSTM": (300, 10), "GRU": (20, 10)}, spread=4.0)).plain
    assert "LSTM 21.2× as fast as torch.nn: take it (the machine was disturbed: 4.77× at least)" in words
    assert "GRU 1.41× as fast as torch.nn: measure again (the machine was disturbed: 0.32× at least)" in words


def test_the_least_is_counted_against_the_fastest_way_in_torch() -> None:
    """As the mean is: in bfloat16 that may be torch.nn in float16, whose 20th percentile is 45 µs here."""
    point = Point("LSTM", "inference", "bf16", 8, 2, 64, D=80)
    results = Results([dict(RUN, dtype="bf16")])
    ours = time_row(point, "auto", Timing(9e-6, 10e-6, 20e-6, 5), 0)
    results.replace([row(point, "torch", 100), row(point, HALF, 50), ours])
    assert results.speedups("auto") == {point: 5.0}
    words = verdict(results).plain
    assert "LSTM 5.00× as fast as torch.nn: take it (the machine was disturbed: 2.25× at least)." in words


def test_points_of_shapes_survive_the_file(tmp_path: Path) -> None:
    results = shaped_results({"LSTM": (30, 10)})
    results.save(tmp_path / "a.json")
    assert Results.load(tmp_path / "a.json").rows == results.rows
    point = next(iter(results.rows))[0]
    of_layers = (8 * 80 + 7 * 64) + (8 * 128 + 7 * 64)
    assert point.flops == 2 * 2 * 4 * 64 * 2 * of_layers * (3 if point.mode == "training" else 1)


@pytest.mark.parametrize("mode", SEQUENCES)
def test_a_shape_of_ones_own_agrees_with_torch(mode: str) -> None:
    point = Point("LSTM", mode, "fp32", 5, 3, 8, D=11, depth=2, bidirectional=True)
    timings = measure(point, ["torch", "loop", "auto"], "cpu", 0.0)
    assert set(timings) == {"torch", "auto"}
    assert timings["auto"].refused is None
    single = Point("GRU", mode, "fp32", 5, 3, 8, D=11)
    assert measure(single, ["torch", "loop"], "cpu", 0.0)["loop"].refused is None


def widths(text: str) -> int:
    return max(len(line.rstrip()) for line in text.splitlines())


@pytest.mark.parametrize("what", ["grid", "step", "shapes"])
def test_tables_fit_a_terminal_and_have_units(what: str) -> None:
    """80 columns, nothing cut off, no table without a row."""
    results = shaped_results({"LSTM": (30e3, 10), "GRU": (1.2e6, 10)}) if what == "shapes" else some_results()
    if what == "step":
        results = Results([dict(RUN)])
        results.replace([r for r in some_results().every_row() if r.point.mode == "step"])
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(report(results))
    text = console.export_text()
    assert widths(text) <= 80
    assert "…" not in text
    wide = Console(width=200, record=True, file=io.StringIO())
    wide.print(report(results))
    assert widths(wide.export_text()) <= 90, "nothing had to be folded"
    assert ("mode " in text) == (what != "step"), "no table of regions"
    unit = {"grid": "5.00 µs 2.00× 10%", "step": "1.00 µs 4.00× 50%", "shapes": "30.0 ms"}[what]
    assert unit in text
    assert "1.20 s" in text or what != "shapes"


@pytest.mark.parametrize(
    ("micros", "text"),
    [(0.5, "500 ns"), (1.234, "1.23 µs"), (999.6, "1.00 ms"), (123456, "123 ms"), (1e7, "10.0 s"), (1.2e9, "1200 s")],
)
def test_durations_have_three_digits_and_a_unit(micros: float, text: str) -> None:
    assert duration(micros) == text


def test_what_was_disturbed_is_marked() -> None:
    results = shaped_results({"LSTM": (30, 10)}, spread=1.6)
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(report(results))
    text = console.export_text()
    assert "~10.0 µs" in text
    assert "~ at 4 of 8 times" in text
    quiet = Console(width=80, record=True, file=io.StringIO())
    quiet.print(report(shaped_results({"LSTM": (30, 10)})))
    assert "~" not in quiet.export_text()


def test_threads_are_not_judged_on_cores_that_others_use(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.nn waits for the core that is taken: 49 times as slow with two threads, which says nothing of either."""
    monkeypatch.setattr(machine.os, "sched_getaffinity", lambda _: {0, 1})

    def busy(idle: int) -> str | None:
        ticks = iter([(1000, 2000), (1000 + idle, 2100)])
        monkeypatch.setattr(machine, "_ticks", lambda: next(ticks))
        return machine.crowded(2, seconds=0)

    assert busy(90) is None
    assert "Of 2 cores 1.0 are free of other work, and 2 threads wait" in (busy(50) or "")
    assert machine.crowded(1) is None


def test_nothing_is_measured_without_our_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "MISSING", "they are not there")
    done = CliRunner().invoke(cli, ["bench", "--shape", "2,1,2,2"])
    assert done.exit_code == 1
    assert "torch would be measured beside itself: they are not there" in done.output
