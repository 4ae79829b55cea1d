"""Many steps at once, compiled alone (scan.cpp): right, without races; and planted mistakes are found."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from linear_cells import SCANS

import fused_rnn

ROOT = Path(__file__).parents[2]
FLAGS = ["-std=c++17", "-O1", "-fwrapv", "-Wno-maybe-uninitialized", "-pthread"]  # without OpenMP: by plain threads
WATCHED = ["-fsanitize=thread", "-g1"]
SOURCES = ("team", "scan", "bytecode", "program_text")
PROGRAM = ROOT / "tests" / "cpu" / "scan.cpp"
pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")

# (file, what is there, what is planted). Numbers show them.
MISTAKES = {
    "a reset": ("forward_scan.h", "if (loop.cut(t, b)) s[e] = V{};", ""),
    "past the end": ("forward_scan.h", "if (!loop.active(t, b)) continue;", ""),
    "a factor": ("scan.h", "load(factor.at + row * factor.stride) * v + added", "v + added"),
    "a rest": ("scan.h", "* v + added : added", "* v : added"),
    "a window's first state": ("forward_scan.h", "else store(m.states[j] + b * loop.state_stride + u * L, s[e]);", ""),
    "a window's border": ("forward_scan.h", "q1 - q < loop.chunk_steps ? q1 :", "q1 - q < loop.chunk_steps ? q1 - 1 :"),
    "the order of steps": ("forward_scan.h", "t += way)", "++t)"),
    "a checkpoint": ("forward_scan.h", "step % every == 0", "step % every == 1"),
    "the last h": ("forward_scan.h", "!loop.active(t + 1, b) : t == window.time", "false : t == window.time"),
    "a gradient's reset": ("backward_scan.h", "masked && loop.cut(t, b) ? V{} : next", "next"),
    "a gradient past the end": ("backward_scan.h", "if (!loop.active(t, b)) continue;", ""),
    "a gradient's row": ("backward_scan.h", "step_of[e](row, d[e])", "step_of[e](row + 1, d[e])"),
    "a gradient over time": ("backward_scan.h", "if (given) d[e] +=", "if (given && t > 0) d[e] +="),
    "the last h's gradient": ("backward_scan.h", "if (last && rows.on[e]) d +=", "if (false) d +="),
    "a gradient handed on": ("backward_scan.h", "if (!scan.handed_on[0] && loop.active", "if (false && loop.active"),
    "what entered first": ("backward_scan.h", "const bool kept_one = has_before(t) &&", "const bool kept_one ="),
    "a state that a reset hides": ("backward_scan.h", "rows.cut[e] ? V{}", "false ? V{}"),
    "a window's params": ("backward_scan.h", "before = window;", ""),
    "a rest's field": ("scan.cpp", "kNoField : field(of.rest[j]);", "kNoField : made.factor[j];"),
    "a window": ("scan.h", "done += most)", "done += most + 1)"),
}  # fmt: skip
# The detector of races sees these, too.
RACES = {
    "no wait before the states": ("forward_scan.h", "barrier.wait(share.me);\n      states(", "states("),
    "no wait after them": ("backward_scan.h", "barrier.wait(share.me);\n      after_gradients(", "after_gradients("),
    "no wait before other rows": ("scan.h", "if (done > 0 && n < most) barrier.wait(s.me);", ""),
}  # fmt: skip


def call(*command: object) -> subprocess.CompletedProcess[str]:
    quiet = {**os.environ, "TSAN_OPTIONS": "exitcode=66"}
    return subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, check=False, timeout=600, env=quiet
    )


def build(csrc: Path, names: Sequence[str], out: Path, flags: Sequence[str]) -> list[Path]:
    """The objects of some sources."""

    def compiled(name: str) -> Path:
        source, made = (PROGRAM if name == "main" else csrc / "cpu" / f"{name}.cpp"), out / f"{name}.o"
        done = call("g++", *FLAGS, *flags, f"-I{csrc}", "-c", source, "-o", made)
        assert done.returncode == 0, done.stderr
        return made

    out.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(compiled, names))


def run(objects: Sequence[Path], out: Path, flags: Sequence[str]) -> subprocess.CompletedProcess[str]:
    texts = out / "cells"
    cells = [*SCANS.values(), fused_rnn.MinGRU(3, 5).cell, fused_rnn.SRU(3, 5, recurrent_terms=False).cell]
    texts.write_text("".join(f"{cell.program.text}\n" for cell in cells))
    done = call("g++", *FLAGS, *flags, *objects, "-o", out / "program")
    assert done.returncode == 0, done.stderr
    return call(out / "program", texts)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, dict[str, Path]]:
    """The objects without a mistake; watched or not."""
    made = {}
    for watched in (False, True):
        out = tmp_path_factory.mktemp("objects")
        names = (*SOURCES, "main")
        objects = build(ROOT / "csrc", names, out, WATCHED if watched else [])
        made[watched] = dict(zip(names, objects, strict=True))
    return made


def planted(mistake: tuple[str, str, str], folder: Path) -> Path:
    """A copy of csrc with it."""
    name, old, new = mistake
    for part in ("cells", "cpu"):
        shutil.copytree(ROOT / "csrc" / part, folder / part)
    shutil.copy(ROOT / "csrc" / "params.h", folder)
    path = folder / "cpu" / name
    text = path.read_text()
    assert text.count(old) == 1, (name, old)
    path.write_text(text.replace(old, new))
    return folder


@pytest.mark.parametrize("watched", [False, True], ids=["numbers", "races"])
def test_without_a_mistake(watched: bool, sources: dict[bool, dict[str, Path]], tmp_path: Path) -> None:
    done = run(list(sources[watched].values()), tmp_path, WATCHED if watched else [])
    assert done.returncode == 0 and done.stdout == "ok\n", done.stdout + done.stderr[:2000]


@pytest.mark.slow
@pytest.mark.parametrize("name", [*MISTAKES, *RACES])
def test_a_mistake_is_found(name: str, sources: dict[bool, dict[str, Path]], tmp_path: Path) -> None:
    watched, mistake = name in RACES, {**MISTAKES, **RACES}[name]
    flags = WATCHED if watched else []
    csrc = planted(mistake, tmp_path / "csrc")
    changed = [mistake[0].removesuffix(".cpp")] if mistake[0].endswith(".cpp") else ["main"]
    objects = sources[watched] | dict(zip(changed, build(csrc, changed, tmp_path, flags), strict=True))
    done = run(list(objects.values()), tmp_path, flags)
    # On a busy machine a race may have spoiled the numbers before the detector sees one.
    assert done.returncode in ((1, 66) if watched else (1,)), done.stdout + done.stderr[:2000]
