"""The house: which module may import which, where torch's C++ headers are allowed, how long a file may be."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
from torch.utils._device import _device_constructors

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "fused_rnn"

# The rooms, floor by floor: a room imports from the floors below its own, and from no other room of its floor.
FLOORS: tuple[set[str], ...] = (
    {"__main__"},
    {"commands"},
    {"__init__"},
    {"quantize"},
    {"convert", "diagnosis"},
    {"nn"},
    {"stream", "functional"},
    {"layers"},
    {"autograd", "untraced"},
    {"dispatch"},
    {"backends"},
    {"triton", "cuda"},
    {"plan"},
    {"gpu", "ops"},
    {"transforms", "onnx", "checks"},
    {"reference", "flex"},
    {"call"},
    {"cells", "problem", "missing"},
)
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
MOST_LINES, MOST_LINES_IN_THE_PACKAGE = 600, 350


def name_of(path: Path) -> str:
    """The module that a file is."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {name_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def room_of(module: str) -> str:
    return module.split(".")[1] if "." in module else "__init__"


def imports_of(path: Path) -> set[str]:
    """The modules of this package that a file imports anywhere, in its functions and for types too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, f"{path}: relative import"
            names = (f"{node.module}.{alias.name}" for alias in node.names)
            found |= {name if name in MODULES else node.module for name in names}
    return {name for name in found if name.split(".")[0] == "fused_rnn"} - {name_of(path), "fused_rnn._C"}


IMPORTS = {module: imports_of(path) for module, path in MODULES.items()}


@pytest.mark.parametrize("module", MODULES)
def test_imports_run_downwards(module: str) -> None:
    room = room_of(module)
    for name in IMPORTS[module]:
        assert room_of(name) == room or FLOOR[room_of(name)] > FLOOR[room], f"{module} imports {name}"


def test_every_room_has_its_floor() -> None:
    assert set(FLOOR) == set(map(room_of, MODULES))


def test_modules_form_no_circle() -> None:
    """graphlib raises CycleError, which names the circle."""
    order = list(TopologicalSorter(IMPORTS).static_order())
    assert set(order) >= set(MODULES)


def reached_from(module: str) -> set[str]:
    """The module, and all that it imports, and so on."""
    found, waiting = set(), {module}
    while waiting:
        found.add(name := waiting.pop())
        waiting |= IMPORTS.get(name, set()) - found
    return found


def test_what_a_model_imports_has_no_commands() -> None:
    assert not {name for name in reached_from("fused_rnn") if room_of(name) == "commands"}


@pytest.mark.parametrize("module", ["info", "machine"])
def test_what_says_which_machine_this_is_has_no_benchmark(module: str) -> None:
    assert not {name for name in reached_from(f"fused_rnn.commands.{module}") if "bench" in name}


def test_backends_do_not_import_each_other() -> None:
    for path in (PACKAGE / "backends").glob("*.py"):
        assert not any(room_of(name) == "backends" for name in IMPORTS[name_of(path)]), path


def test_cells_import_torch_alone() -> None:
    for path in (PACKAGE / "cells").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = (
                [a.name for a in node.names]
                if isinstance(node, ast.Import)
                else [node.module or ""]
                if isinstance(node, ast.ImportFrom)
                else []
            )
            for name in names:
                top = name.split(".")[0]
                assert top in {"torch", *sys.stdlib_module_names} or name.startswith("fused_rnn.cells"), (
                    f"{path}: {name}"
                )


def test_every_factory_call_names_its_device() -> None:
    """What torch makes without one lands on torch.set_default_device's, wherever the user's tensors are."""
    factories = {function.__name__ for function in _device_constructors()}
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module == "torch":
                assert not factories & {alias.name for alias in node.names}, f"{path}: call it by torch's name"
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
                continue
            made = node.func.attr in factories and ast.unparse(node.func.value) == "torch"
            assert not made or {"device", None} & {k.arg for k in node.keywords}, f"{path}:{node.lineno}"


def test_torch_headers_only_in_ops() -> None:
    torchs = re.compile(r"^\s*#\s*include\s*[<\"](torch|ATen|c10)\b", re.MULTILINE)
    for path in (ROOT / "csrc").rglob("*"):
        if path.is_file() and path.relative_to(ROOT / "csrc").parts[0] != "ops":
            assert not torchs.search(path.read_text()), path


def test_the_extension_compiles_with_older_torchs() -> None:
    """Against the headers of torch 2.11: pybind11's end in an #error beside the stable ABI's target version, and of the
    stable ABI's macros there are but those that define ops."""
    pybind = re.compile(r"^\s*#\s*include\s*[<\"]pybind11\b", re.MULTILINE)
    for path in (ROOT / "csrc").rglob("*.*"):
        text = path.read_text()
        assert path.name == "pybind.h" or not pybind.search(text), f"{path}: include pybind.h"
        assert set(re.findall(r"STABLE_TORCH_\w+", text)) <= {"STABLE_TORCH_LIBRARY", "STABLE_TORCH_LIBRARY_IMPL"}, path


def test_c_plus_plus_includes_run_downwards() -> None:
    """ops → {cpu, cuda} → params → cells; ops reads the cells too."""
    include = re.compile(r"^\s*#\s*include\s*\"([^\"]+)\"", re.MULTILINE)
    allowed = {
        "ops": {"ops", "cpu", "cuda", "cells", ""},
        "cpu": {"cpu", "cells", ""},
        "cuda": {"cuda", "cells", "emulator", ""},  # the emulator stands in for CUDA's own headers
        "emulated": {"emulated", "cuda", "emulator"},
        "emulator": {"emulator"},
        "cells": {"cells"},
        "": {"", "cells"},
    }
    source = ROOT / "csrc"
    for path in source.rglob("*"):
        if path.suffix not in {".h", ".cpp", ".cu", ".cuh"}:
            continue
        own = "" if path.parent == source else path.relative_to(source).parts[0]
        for name in include.findall(path.read_text()):
            target = Path(os.path.normpath(path.parent / name))
            assert target.is_relative_to(source), f"{path} includes {name}"
            part = "" if target.parent == source else target.relative_to(source).parts[0]
            assert part in allowed.get(own, {own, ""}), f"{path} includes {name}"


def test_no_file_is_too_long() -> None:
    for folder in ("fused_rnn", "csrc", "tests", "benchmarks", "examples", "scripts"):
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in {".py", ".h", ".cpp", ".cu", ".cuh"}:
                most = MOST_LINES_IN_THE_PACKAGE if folder == "fused_rnn" else MOST_LINES
                assert len(path.read_text().splitlines()) <= most, path


def test_imports_and_runs_without_the_extension() -> None:
    """The reference and torch backends need no compiled code, and the cpu backend says what is missing."""
    program = """
import sys
sys.modules["fused_rnn._C"] = None
import torch, fused_rnn
from fused_rnn.functional import gru
x, weights = torch.randn(4, 2, 3), [torch.randn(15, 3), torch.randn(15, 5)]
torch.testing.assert_close(gru(x, weights, backend="reference"), gru(x, weights, backend="torch"))
gru(x, weights)
try:
    gru(x, weights, backend="cpu")
except NotImplementedError as error:
    assert "cpu: the compiled extension fused_rnn._C did not load" in str(error), error
else:
    raise AssertionError("backend='cpu' ran without its extension")
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
