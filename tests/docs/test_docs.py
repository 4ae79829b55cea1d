"""The documentation: every example in it runs, every public name is in it, and the site builds without a warning."""

from __future__ import annotations

import doctest
import inspect
import re
import runpy
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

import fused_rnn

ROOT = Path(__file__).parents[2]
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
PAGES = sorted((ROOT / "docs").glob("*.md"))
FUNCTIONS = [
    f"functional.{name}"
    for name, value in vars(fused_rnn.functional).items()
    if inspect.isfunction(value) and value.__module__ == "fused_rnn.functional" and not name.startswith("_")
]
PUBLIC = [name for name in fused_rnn.__all__ if name != "functional"] + FUNCTIONS

# What the README's blocks leave open, for they are there to be read.
README_NAMES = """
import torch, fused_rnn
D, H, T, B = 3, 5, 7, 2
x, h_0, lengths, reset = torch.randn(T, B, D), torch.randn(1, B, H), torch.tensor([7, 4]), torch.zeros(T, B).bool()
x_t = x[0]
model = torch.nn.Sequential(torch.nn.LSTM(D, H))
somebody_elses_model = lambda: torch.nn.GRU(D, H)
"""


def public(name: str) -> Any:
    value: Any = fused_rnn
    for part in name.split("."):
        value = getattr(value, part)
    return value


# torch's own, of what its compiler and exporters do inside
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("page", [ROOT / "README.md", *PAGES], ids=lambda page: page.stem)
def test_python_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In order, in one namespace, in an empty folder; with prompts, what they print is compared."""
    sybil = pytest.importorskip("sybil", reason="pip install '.[test]'")
    myst = import_module("sybil.parsers.myst")
    monkeypatch.chdir(tmp_path)
    parsers = [myst.PythonCodeBlockParser(doctest_optionflags=FLAGS), myst.SkipParser()]
    document = sybil.Sybil(parsers).parse(page)
    if page.stem == "README":
        exec(README_NAMES, document.namespace)
    for example in document.examples():
        example.evaluate()


@pytest.mark.parametrize("name", PUBLIC)
def test_docstring_has_examples_that_run(name: str) -> None:
    names = {"torch": torch, "fused_rnn": fused_rnn}
    found = doctest.DocTestFinder(recurse=False).find(public(name), name, globs=names)
    assert found and found[0].examples, f"{name}: its docstring has no example"
    report: list[str] = []
    doctest.DocTestRunner(optionflags=FLAGS).run(found[0], out=report.append)
    assert not report, "".join(report)


def test_every_public_name_is_on_the_api_page() -> None:
    text = (ROOT / "docs/api.md").read_text()
    listed = re.findall(r"^\.\. auto(?:class|function):: (?:fused_rnn\.)?(\S+)", text, re.MULTILINE)
    assert set(PUBLIC) <= set(listed), f"not in docs/api.md: {', '.join(sorted(set(PUBLIC) - set(listed)))}"


def included() -> Iterator[tuple[Path, Path, str]]:
    """(page, file it takes a piece of, text where that piece begins or ends)."""
    for page in PAGES:
        for name, options in re.findall(r"^```\{(?:literal)?include\} (\S+)\n((?::.*\n)*)```", page.read_text(), re.M):
            for text in re.findall(r"^:(?:start|end)-\w+: \"(.*)\"$", options, re.MULTILINE):
                yield page, (page.parent / name).resolve(), text


def test_included_pieces_are_where_the_pages_look_for_them() -> None:
    pieces = list(included())
    assert pieces
    for page, source, text in pieces:
        assert text in source.read_text(), f"docs/{page.name} includes {source.name} from or up to {text!r}"


def test_the_picture_is_that_of_the_committed_results() -> None:
    pytest.importorskip("rich", reason="pip install '.[cli]'")
    found = runpy.run_path(str(ROOT / "scripts/readme_picture.py"))
    drawn = found["draw"](found["Results"].load(found["RESULTS"]))
    assert drawn == found["PICTURE"].read_text(), "docs/speed.svg: run python scripts/readme_picture.py"


def test_the_first_lines_say_what_was_measured() -> None:
    """The figures in README's prose, and on the front page, which no command writes."""
    pytest.importorskip("rich", reason="pip install '.[cli]'")
    from fused_rnn.commands.bench.goals import judged
    from fused_rnn.commands.bench.grid import Point
    from fused_rnn.commands.bench.results import Results, geometric_mean
    from fused_rnn.commands.bench.tables import regions

    folder = ROOT / "benchmarks/results"
    means: dict[str, list[float]] = {}
    for *_, cells in regions(Results.load(folder / "cpu/fp32-1t.json"), "cpu"):
        for cell, values in cells.items():
            means.setdefault(cell, []).append(geometric_mean(values))
    lstm, gru = ((min(means[cell]), max(means[cell])) for cell in ("LSTM", "GRU"))
    streams = Results.load(folder / "cpu/stream-fp32-1t.json")
    small = Point("GRU", "stream", "fp32", 1, 1, 32)
    stream = streams.value(small, "cell") / streams.value(small, "stream")  # type: ignore[operator]
    readme, front = (" ".join(path.read_text().split()) for path in (ROOT / "README.md", ROOT / "docs/index.md"))
    for page in (readme, front):
        assert f"an LSTM runs {lstm[0]:.1f} to {lstm[1]:.1f} times as fast" in page
        assert f"a GRU {gru[0]:.1f} to {gru[1]:.0f} times" in page
        assert f"up to {stream:.0f} times as fast as `torch.nn`'s cell" in page
    for dtype, before in (("bf16", "ran "), ("tf32", "with TF32, ")):
        bars = judged(Results.load(folder / f"h200/{dtype}.json"), "cuda")
        inference, training = (value for goal, value in bars if goal.name.endswith("× torch.nn") and value)
        text = f"{before}{inference:.1f} times as fast in inference and {training:.1f}"
        assert text in readme or f"{before}{inference:.1f} and {training:.1f} times" in readme


def linked() -> Iterator[tuple[Path, str]]:
    """(page, target) of every link to a file of the repository, of README and the documentation."""
    for page in (ROOT / "README.md", *PAGES):
        for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
            if not re.match(r"\w+:|#", target):
                yield page, target


def test_links_lead_to_files_and_headings() -> None:
    links = list(linked())
    assert links
    for page, target in links:
        name, _, heading = target.partition("#")
        path = page.parent / name
        assert path.exists(), f"{page.name} links to {target}"
        if heading:
            titles = re.findall(r"^#+ (.*)$", path.read_text(), re.MULTILINE)
            slugs = [re.sub(r"[^\w -]", "", title).strip().lower().replace(" ", "-") for title in titles]
            assert heading in slugs, f"{page.name} links to {target}"


def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    for name in ("sphinx", "myst_parser", "furo"):
        pytest.importorskip(name, reason="the site's generator: pip install '.[docs]'")
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html", str(ROOT / "docs")]
    done = subprocess.run([*command, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "index.html").exists()
