"""Scratch memory of the loops of programs (arena.cpp): measured as it is laid out, and little for few steps."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from linear_cells import SCANS
from programs import PROGRAMS
from stage_cells import STAGED

from fused_rnn.cells.program import parse

CSRC = Path(__file__).parents[2] / "csrc"
SOURCES = ("team", "scan", "bytecode", "program_text")
PLAIN = [PROGRAMS["lstm"], PROGRAMS["gru"], STAGED["deep"].program.text]
BLOCKS = [parse(text)._replace(diagonal=3).text for text in PLAIN]
TEXTS = [*PLAIN, *BLOCKS, *(cell.program.text for cell in SCANS.values())]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")
def test_what_is_measured_is_what_is_taken(tmp_path: Path) -> None:
    texts, program = tmp_path / "cells", tmp_path / "program"
    texts.write_text("".join(f"{text}\n" for text in TEXTS))
    sources = [Path(__file__).with_name("arena.cpp"), *(CSRC / "cpu" / f"{name}.cpp" for name in SOURCES)]
    flags = ["-std=c++17", "-fwrapv", "-w", "-pthread", f"-I{CSRC}"]
    subprocess.run(["g++", *flags, *sources, "-o", program], check=True, timeout=600)
    done = subprocess.run([program, texts], capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0 and done.stdout == "ok\n", done.stdout
