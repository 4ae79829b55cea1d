"""Every instruction set of a machine: the processes that measure them, and the table of files in part."""

from __future__ import annotations

import io
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner
from rich.console import Console

from fused_rnn import ops
from fused_rnn.commands import machine
from fused_rnn.commands.bench import isas, limits, readme
from fused_rnn.commands.bench.grid import CELLS, GRIDS, SEQUENCES, Point
from fused_rnn.commands.bench.isas import execute, places, tables
from fused_rnn.commands.bench.limits import BEYOND, BUFFER_BYTES, Limits, measure_limits
from fused_rnn.commands.bench.results import FLOOR, Results
from fused_rnn.commands.cli import cli

from .test_bench import RUN, row, some_results, two_pages

needs_kernels = pytest.mark.skipif(ops.MISSING is not None, reason=str(ops.MISSING))
CACHES = {"L1": 48 << 10, "L2": 1 << 20, "L3": 32 << 20}
READ = tuple((size, 1e11 / (1 + i)) for i, size in enumerate(BUFFER_BYTES))


def some_isa(isa: str, modes: tuple[str, ...] = SEQUENCES, cells: tuple[str, ...] = CELLS, ours: float = 20) -> Results:
    """The limit at 10 µs, ours at 20 but for the GRU, which takes 40; torch.nn at 30."""
    of_isa = {"flops": 2e11, "read": [list(entry) for entry in READ], "by": "our own product"}
    results = Results([{**RUN, "kernels": isa, "limits": of_isa, "caches": CACHES}])
    rows = []
    for point in GRIDS["machine"].points("fp32", cells, modes):
        own = 2 * ours if point.cell == "GRU" else ours
        rows += [row(point, name, micros) for name, micros in (("torch", 30), ("auto", own), (FLOOR, 10))]
    results.replace(rows)
    return results


def save(results: Results, folder: Path) -> None:
    results.save(folder / f"isa-{results.runs[0]['kernels']}-machine-fp32-1t.json")


@needs_kernels
def test_a_process_for_each_with_its_own_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[list[str], dict[str, str]]] = []

    def run(command: list[str], env: dict[str, str], **_: Any) -> SimpleNamespace:
        asked.append((command, env))
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(subprocess, "run", run)
    execute(("GRU",), ("training",), "bf16", 60.0, tmp_path, Console(file=io.StringIO()))
    assert {env["FUSED_RNN_ISA"] for _, env in asked} == {*ops._C.available_isas().split(", ")}
    command, env = asked[0]
    assert env["FUSED_RNN_ISA"] == "baseline" and env["ATEN_CPU_CAPABILITY"] == "default"
    said = " ".join(command)
    for part in ("--grid machine --threads 1 --dtype bf16", "--cell GRU --mode training", f"--out {tmp_path}"):
        assert part in said
    assert f"--minutes {1 / len(asked)}" in said


@needs_kernels
@pytest.mark.slow
@pytest.mark.timeout(180)
def test_a_run_names_the_isa_that_it_ran_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(isas, "TORCH", {"baseline": isas.TORCH["baseline"]})
    asked = ["bench", "--isas", "--cell", "RNN", "--mode", "inference", "--minutes", "0", "--out", str(tmp_path)]
    result = CliRunner().invoke(cli, asked)
    assert result.exit_code == 0, result.output
    (path,) = tmp_path.glob("*.json")
    assert path.name == "isa-baseline-machine-fp32-1t.json"
    results = Results.load(path)
    run = results.runs[0]
    assert run["kernels"] == "baseline" and run["isa"] in ("DEFAULT", "NO AVX")
    assert "baseline" in result.output and "inference, B=64, H=512" in result.output
    assert all(0 < share <= 1.001 for share in isas.shares(results).values())


@needs_kernels
def test_a_process_that_fails_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failed = SimpleNamespace(returncode=1, stderr="no such thing", stdout="")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(RuntimeError, match="FUSED_RNN_ISA=baseline failed: no such thing"):
        execute(CELLS, SEQUENCES, "fp32", 0.0, tmp_path, Console(file=io.StringIO()))


def test_the_table_says_how_far_each_is_from_the_limit(tmp_path: Path) -> None:
    assert tables(tmp_path) == ""
    save(some_isa("avx512", ours=12.5), tmp_path)
    save(some_isa("baseline"), tmp_path)
    text = tables(tmp_path)
    assert "| fp32, 1 thread: % of the limit, mean of the cells (least) | baseline | avx512 |" in text
    assert "| inference, B=1, H=64 | 40 (GRU 25) | 63 (GRU 40) |" in text
    assert "| × torch.nn's speed, training | 1.19× (0.75) | 1.90× (1.20) |" in text
    assert "| GFLOP/s, and whose | 200 (ours) | 200 (ours) |" in text
    assert "| GB/s from L1 | 50 | 50 |" in text and "| GB/s from memory | 12 | 12 |" in text
    assert "L1 48 KiB, L2 1024 KiB, L3 32768 KiB" in text


def test_the_table_of_files_in_part(tmp_path: Path) -> None:
    save(some_isa("baseline", ("training",)), tmp_path)
    save(some_isa("avx2", ("inference",), ("RNN",)), tmp_path)
    other = some_isa("avx512")
    other.runs[0]["device_name"] = "another CPU"
    del other.runs[0]["caches"]
    save(other, tmp_path)
    text = tables(tmp_path)
    assert "| inference, B=1, H=64 | – | 50 |" in text
    assert "| training, B=1, H=64 | 40 (GRU 25) | – |" in text
    assert text.count("% of the limit") == 2, "a table for each machine"
    assert "| inference, B=1, H=64 | 40 (GRU 25) |\n" in text


def test_the_page_has_the_table_and_the_readme_has_not(tmp_path: Path) -> None:
    pages = two_pages(tmp_path)
    some_results().save(tmp_path / "fp32-1t.json")
    save(some_isa("avx2"), tmp_path)
    with pytest.raises(ValueError, match="must contain the lines <!-- isas:begin -->"):
        readme.update(pages[0], tmp_path, "cpu")
    pages[1].write_text(pages[1].read_text() + "\n".join(readme.markers("isas")))
    assert readme.update(pages[0], tmp_path, "cpu")
    assert "% of the limit" in pages[1].read_text() and "% of the limit" not in pages[0].read_text()


def test_buffers_lie_where_they_are_said_to() -> None:
    known = Limits(1e11, READ)
    assert places({"caches": CACHES}, known) == {"L1": 16 << 10, "L2": 256 << 10, "L3": 16 << 20, "memory": 64 << 20}
    assert "memory" not in places({"caches": CACHES | {"L3": 64 << 20}}, known)
    assert places({}, known) == {}


def test_caches_are_read_from_the_system(monkeypatch: pytest.MonkeyPatch) -> None:
    assert all(size >= 4096 for size in machine.caches().values())
    monkeypatch.setattr(limits, "read_rate", lambda size, device: 1e9)
    monkeypatch.setattr(limits, "_products", lambda dtype, device: [(1e9, "torch.mm")])
    monkeypatch.setattr(limits, "caches", lambda: {"L3": 256 << 20})
    assert measure_limits("fp32", "cpu").read[-1] == (BEYOND[0], 1e9), "beyond a cache of 64 MiB or more"
    monkeypatch.setattr(limits, "caches", dict)
    assert measure_limits("fp32", "cpu").read[-1][0] == BUFFER_BYTES[-1]


def test_a_point_of_the_machines_grid() -> None:
    assert Point("GRU", "training", "fp32", 32, 64, 512) in {*GRIDS["machine"].points("fp32")}
