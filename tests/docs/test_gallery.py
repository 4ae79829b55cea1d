"""docs/gallery.md and the README's table say what benchmarks/results/examples does."""

from __future__ import annotations

import json
import runpy
import shutil
from pathlib import Path
from typing import Any

import pytest

from fused_rnn.commands.demo import PROGRAMS

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks/results/examples"


@pytest.fixture(scope="module")
def gallery() -> dict[str, Any]:
    return runpy.run_path(str(ROOT / "scripts/gallery.py"))


def test_the_pages_are_made_of_the_results(gallery: dict[str, Any], tmp_path: Path) -> None:
    pages = [shutil.copy(ROOT / name, tmp_path) for name in ("docs/gallery.md", "README.md")]
    assert gallery["write"](*map(Path, pages)) == [], "run: python scripts/gallery.py"


@pytest.mark.parametrize("program", PROGRAMS)
def test_each_program_has_results_of_a_full_run_and_a_picture(program: str) -> None:
    record = json.loads((RESULTS / f"{program}.json").read_text(encoding="utf-8"))
    assert record["program"] == program and record["standard"]
    assert record["quality"] and record["data"] and record["trainings"] and record["machine"]["commit"]
    assert (ROOT / f"docs/gallery/{program}.png").read_bytes().startswith(b"\x89PNG")
    assert f"gallery/{program}.png" in (ROOT / "docs/gallery.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("program", PROGRAMS)
def test_losses_coincide(program: str) -> None:
    """Of what is published."""
    record = json.loads((RESULTS / f"{program}.json").read_text(encoding="utf-8"))
    for label, training in record["trainings"].items():
        both = training["largest_difference"], training["largest_difference_in_float64"]
        assert (both[0] if both[1] is None else both[1]) <= 1e-3, label
        assert training["beside"] >= min(200, training["steps"]), label


def test_quick_runs_and_empty_folders_are_refused(gallery: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="has no results"):
        gallery["take"](tmp_path)
    (tmp_path / "text.json").write_text('{"standard": false}')
    with pytest.raises(SystemExit, match="is of a quick run"):
        gallery["take"](tmp_path)
    (tmp_path / "text.json").write_text('{"standard": true}')
    with pytest.raises(SystemExit, match="has no picture"):
        gallery["take"](tmp_path)


def test_a_page_without_marks_is_refused(gallery: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "page.md").write_text("<!-- text:begin -->")
    with pytest.raises(ValueError, match=r"expected <!-- text:begin --> and <!-- text:end -->"):
        gallery["fill"](tmp_path / "page.md", {"text": "anything"})
