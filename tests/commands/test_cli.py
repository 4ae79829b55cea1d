"""The command line as a user calls it, and the demo's parts."""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
from pathlib import Path

import click
import pytest
import torch
from click.testing import CliRunner

import fused_rnn
from fused_rnn import ops
from fused_rnn.commands import demo, info
from fused_rnn.commands.bench.grid import GRIDS, Grid
from fused_rnn.commands.bench.limits import Limits
from fused_rnn.commands.bench.measure import Timing
from fused_rnn.commands.bench.readme import markers
from fused_rnn.commands.bench.results import Results
from fused_rnn.commands.cli import cli
from fused_rnn.dispatch import BACKENDS

from .test_bench import two_pages

EXAMPLES = Path(__file__).parents[2] / "examples"


def run(*arguments: str, code: int = 0) -> str:
    result = CliRunner().invoke(cli, list(arguments))
    assert result.exit_code == code, result.output
    return result.output


def test_info_names_every_backend_and_the_versions() -> None:
    text = run("info")
    assert f"{fused_rnn.__version__}, from {Path(fused_rnn.__file__).parent}" in re.sub(r"\n *", "", text)
    assert torch.__version__ in text
    for name in BACKENDS:
        assert name in text
    assert "available" in text


def test_info_gives_a_reason_for_what_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(BACKENDS["cpu"], "supports", lambda problem: "the weather is bad")
    assert "not available: the weather is bad" in info.as_text()


@pytest.mark.slow
def test_info_needs_neither_click_nor_rich() -> None:
    block = "import sys; sys.modules['click'] = None; sys.modules['rich'] = None; sys.argv = ['x', *{}]\n"
    code = block + "from fused_rnn.__main__ import main; main()"
    done = subprocess.run([sys.executable, "-c", code.format(["info"])], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert fused_rnn.__version__ in done.stdout
    done = subprocess.run([sys.executable, "-c", code.format(["demo"])], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "pip install click rich matplotlib numpy" in done.stderr


def test_bench_writes_files_and_readme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(GRIDS, "cpu", Grid(T=(2,), B=(8,), H=(4,), steps=(4,)))
    out = ("--out", str(tmp_path / "results"))
    run("bench", "--dtype", "fp32", "--threads", "1", "--cell", "GRU", "--minutes", "0", "--no-memory", *out)
    assert (tmp_path / "results" / "fp32-1t.json").exists()
    page, full = two_pages(tmp_path)
    assert "tables written" in run("bench", "--readme", str(page), *out)
    assert "**fp32, 1 thread**" in full.read_text()
    assert "| training, batches of 8 to 128, fp32 | – | **" in page.read_text()


def test_bench_writes_where_git_looks_away_and_says_where(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(GRIDS, "cpu", Grid(T=(2,), B=(8,), H=(4,), steps=(4,)))
    monkeypatch.chdir(tmp_path)
    subprocess.run(["git", "init", "-q"], check=True)
    printed = run("bench", "--dtype", "fp32", "--threads", "1", "--cell", "GRU", "--minutes", "0", "--no-memory")
    assert Path("bench-out/cpu/fp32-1t.json").exists()
    assert "bench-out/cpu/fp32-1t.json" in " ".join(printed.split())
    assert [path.name for path in tmp_path.iterdir() if path.name != ".git"] == ["bench-out"]
    assert not subprocess.run(["git", "status", "--porcelain"], check=True, capture_output=True).stdout


def test_bench_of_ones_own_shape(tmp_path: Path) -> None:
    asked = ("--shape", "6,3,5,8", "--shape", "1,1,5,8", "--cell", "GRU", "--layers", "2", "--bidirectional")
    printed = run("bench", *asked, "--minutes", "0", "--threads", "1", "--out", str(tmp_path))
    for part in ("T=6 B=3 D=5 H=8", "2 layers, both directions", "Training: GRU ", "as fast as torch.nn: "):
        assert part in printed, part
    assert str(tmp_path / "shapes-fp32-1t.json") in printed
    assert max(map(len, printed.splitlines())) <= max(80, 11 + len(str(tmp_path / "shapes-fp32-1t.json")))
    points = {point for point, _, _ in Results.load(tmp_path / "shapes-fp32-1t.json").rows}
    assert len(points) == 4
    assert {(p.width, p.layers, p.directions) for p in points} == {(5, 2, 2)}


@pytest.mark.slow
def test_memory_is_measured_at_ones_own_shape(tmp_path: Path) -> None:
    asked = ("--shape", "6,3,5,8", "--cell", "RNN", "--mode", "inference", "--memory")
    printed = run("bench", *asked, "--minutes", "0", "--threads", "1", "--out", str(tmp_path))
    assert "Peak memory, T=6 B=3 D=5 H=8: MiB, × torch.nn's" in " ".join(printed.split())
    metrics = {metric for _, _, metric in Results.load(tmp_path / "shapes-fp32-1t.json").rows}
    assert metrics == {"time_us", "peak_memory_mib"}


@pytest.mark.skipif(ops.MISSING is not None, reason=str(ops.MISSING))
def test_bench_of_streams(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fused_rnn.commands.bench.stream.SIZES", (8,))
    out = ("--out", str(tmp_path))
    printed = run("bench", "--stream", "--cell", "GRU", "--minutes", "0", *out)
    assert "GRU H=8 " in printed and " µs" in printed and "int8" in printed
    assert max(map(len, printed.splitlines()[:-2])) <= 80
    results = Results.load(tmp_path / "stream-fp32-1t.json")
    (point,) = {point for point, _, _ in results.rows}
    assert set(results.speedups("stream")) == {point}
    assert all(row.p50 for row in results.rows.values())
    run("bench", "--stream", "--cell", "RNN", "--minutes", "0", *out)
    both = Results.load(tmp_path / "stream-fp32-1t.json")
    assert {point.cell for point, _, _ in both.rows} == {"GRU", "RNN"}, "the rows of the first run stay"
    results.save(tmp_path / "fp32-1t.json")
    page, full = two_pages(tmp_path)
    for one in (page, full):
        one.write_text(one.read_text() + "\n".join(markers("rivals")))
    run("bench", "--readme", str(page), *out)
    assert f"| GRU, int8 weights | {results.value(point, 'stream int8'):.3g} (" in full.read_text()


def test_an_error_leaves_the_streams_measured_before_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fused_rnn.commands.bench.stream.SIZES", (8, 16))
    monkeypatch.setattr("fused_rnn.commands.bench.stream.measure_limits", lambda *_: Limits(1e11, ((1 << 12, 1e11),)))
    times = iter([dict.fromkeys(("cell", "torch", "auto", "stream"), Timing(1e-3, 1e-3, 1e-3, 5))])
    monkeypatch.setattr("fused_rnn.commands.bench.stream.measure", lambda *_: next(times))
    asked = ["bench", "--stream", "--cell", "GRU", "--minutes", "0", "--out", str(tmp_path)]
    assert isinstance(CliRunner().invoke(cli, asked).exception, StopIteration)
    assert {point.H for point, _, _ in Results.load(tmp_path / "stream-fp32-1t.json").rows} == {8}


ANYTHING = {
    "--cell": "GRU", "--dtype": "bf16", "--threads": "1", "--shape": "8,2,8,8", "--layers": "2",
    "--bidirectional": None, "--mode": "training", "--variant": "layers", "--provider": "loop", "--device": "cuda",
    "--grid": "quick", "--quick": None, "--minutes": "0", "--memory": None, "--stream": None, "--model": "a:b",
    "--scaling": None,
    "--flex": None, "--field": None, "--isas": None, "--jax-python": "python", "--out": "nowhere",
    "--choose": None, "--readme": "README.md",
}  # fmt: skip
GRID = {"--cell", "--dtype", "--threads", "--mode", "--variant", "--provider", "--device", "--minutes", "--memory"}
GRID |= {"--jax-python"}
KINDS = {
    "--readme": {"--device", "--out"},
    "--choose": {"--device", "--out"},
    "--model": {"--threads", "--mode", "--device", "--minutes"},
    "--stream": {"--cell", "--threads", "--minutes", "--out"},
    "--flex": {"--cell", "--jax-python", "--minutes", "--out"},
    "--field": {"--minutes", "--out"},
    "--isas": {"--cell", "--dtype", "--mode", "--minutes", "--out"},
    "--scaling": {"--cell", "--dtype", "--threads", "--shape", "--layers", "--bidirectional"}
    | {"--mode", "--minutes", "--out"},
    "--shape": GRID | {"--layers", "--bidirectional", "--out"},
}


@pytest.mark.parametrize(("kind", "takes"), KINDS.items())
def test_an_option_that_would_have_no_effect_is_refused(
    kind: str, takes: set[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every one that is not taken; those that are taken get past the check."""
    from fused_rnn.commands.bench import command as module

    assert {option for param in module.bench.params for option in param.opts if option != "--help"} == {*ANYTHING}
    monkeypatch.chdir(tmp_path)
    Path("README.md").touch()
    passed = module._check_kind

    def stop() -> None:
        passed()
        raise click.ClickException("gets past the check")

    monkeypatch.setattr(module, "_check_kind", stop)
    asked = [kind] if ANYTHING[kind] is None else [kind, str(ANYTHING[kind])]
    earlier = list(KINDS)[: list(KINDS).index(kind)]
    for option, value in ANYTHING.items():
        if option == kind:
            continue
        arguments = ["bench", *asked, option, *([] if value is None else [value])]
        text = " ".join(CliRunner().invoke(cli, arguments).output.split())
        if option in takes or kind in KINDS.get(option, ()):
            assert "gets past the check" in text, option
        else:
            refused, other = (kind, option) if option in earlier else (option, kind)
            assert f"Invalid value for {refused}: does not go with {other}" in text
    assert "gets past the check" in CliRunner().invoke(cli, ["bench", *asked, "--device", "cpu", "--no-memory"]).output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["bench", "--provider", "nobody"], "got 'nobody', expected one of"),
        (
            ["bench", "--provider", "scan", "--jax-python", "/nowhere"],
            "scan is not measured, it needs: pip install jax",
        ),
        (["bench", "--jax-python", "python"], "goes with --flex and --provider scan"),
        (["bench", "--grid", "deepbench", "--quick"], "got 'deepbench' with --quick, expected one of the two"),
        (["bench", "--grid", "deepbench", "--shape", "1,2,3,4"], "does not go with --shape"),
        (["bench", "--dtype", "int8"], "Invalid value"),
        (["bench", "--dtype", "tf32"], "which is a GPU's"),
        (["bench", "--threads", "0"], "Invalid value"),
        (["bench", "--readme", "no-such-file"], "does not exist"),
        (["bench", "--shape", "1,2,3"], "got '1,2,3', expected T,B,D,H: four positive integers"),
        (["bench", "--shape", "1,2,0,4"], "expected T,B,D,H"),
        (["bench", "--layers", "2"], "goes with --shape"),
        (["bench", "--bidirectional"], "goes with --shape"),
        (["bench", "--shape", "1,2,3,4", "--mode", "step"], "give a shape with T=1"),
        (["bench", "--shape", "1,2,3,4", "--quick"], "does not go with --shape"),
        (["bench", "--shape", "1,2,3,4", "--layers", "2", "--variant", "layers"], "'layers', which has three"),
        (["demo", "prose"], "got 'prose', expected one of text, speech"),
        (["demo", "--steps", "5"], "got '--steps', expected one of text, speech"),
        (["demo", "text", "--steps", "0"], "argument --steps: got '0', expected a whole number from 1 to 999999999"),
        (["demo", "text", "--cell", "Transformer"], "argument --cell: invalid choice: 'transformer'"),
    ],
)
def test_bad_arguments_are_refused_in_words(arguments: list[str], message: str) -> None:
    assert message in run(*arguments, code=2)


def test_readme_without_results_is_a_clear_error(tmp_path: Path) -> None:
    page, _ = two_pages(tmp_path)
    assert "no result file" in run("bench", "--readme", str(page), "--out", str(tmp_path), code=1)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_bench_on_a_missing_gpu_says_so() -> None:
    assert "no GPU" in run("bench", "--device", "cuda", code=1)


def test_demo_without_a_name_says_which_there_are() -> None:
    for text in (run("demo"), run("demo", "--help")):
        assert all(program in text for program in demo.PROGRAMS)


def test_demo_hands_on_its_options(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(demo, "run", lambda *given: calls.append(given))
    run("demo", "memory", "--quick", "--help", "--cell", "gru")
    assert calls == [(EXAMPLES / "memory.py", ("--quick", "--help", "--cell", "gru"))]


def test_a_wheel_has_the_programs_of_the_demo() -> None:
    """setup.py cannot ask the package which these are: it would import torch."""
    listed = re.search(r"^DEMOS = \((.*)\)$", (EXAMPLES.parent / "setup.py").read_text(), re.MULTILINE)
    assert listed is not None
    assert set(re.findall(r'"(\w+)"', listed[1])) == {*demo.PROGRAMS, *demo.SHARED}
    assert demo.folder() == EXAMPLES
    run_by_make = re.search(r"^USES +\?= (.*)$", (EXAMPLES.parent / "Makefile").read_text(), re.MULTILINE)
    assert run_by_make is not None and run_by_make[1].split() == [*demo.PROGRAMS]


def test_demo_without_its_programs_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused_rnn, "__file__", str(tmp_path / "fused_rnn" / "__init__.py"))
    assert "the demos' programs are not with this installation" in run("demo", "text", code=1)


@pytest.mark.skipif(ops.MISSING is not None, reason=str(ops.MISSING))
def test_the_cell_of_ones_own_trains_as_by_the_loop(capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(EXAMPLES / "own_cell.py"))["main"](steps=3)
    assert "the losses differ by" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["swap.py", "lengths_and_resets.py", "streaming.py"])
def test_the_short_examples_run(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    assert capsys.readouterr().out
