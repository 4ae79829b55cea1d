"""What is given away: one version, an sdist that builds and tests itself, a module without paths, types for checkers.

Wheels under other versions of torch are `make wheel-check`'s.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

import fused_rnn
from fused_rnn import ops

from . import typed_usage

ROOT = Path(__file__).parents[2]


def run(program: str) -> str:
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_version_stands_in_one_place() -> None:
    """In fused_rnn.__version__, where setuptools reads it without importing the package, nor torch."""
    program = """
import sys
sys.modules["torch"] = sys.modules["fused_rnn"] = None
from setuptools.config.pyprojecttoml import read_configuration
print(read_configuration("pyproject.toml")["project"]["version"])
"""
    assert run(program).strip() == fused_rnn.__version__
    for name in ("pyproject.toml", "setup.py", "docs/conf.py", "Makefile"):
        assert f'"{fused_rnn.__version__}"' not in (ROOT / name).read_text(), name


def test_the_sdist_holds_what_the_checkout_does(tmp_path: Path) -> None:
    """Sources, headers, tests, documentation: all but what git alone and continuous integration read."""
    program = f"import setuptools.build_meta as b; b.build_sdist({str(tmp_path)!r})"
    before = {path.name for path in ROOT.iterdir()}
    run(program)
    if "fused_rnn.egg-info" not in before:
        shutil.rmtree(ROOT / "fused_rnn.egg-info")
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as sdist:
        packed = {name.partition("/")[2] for name in sdist.getnames()}
    wanted = {
        str(path.relative_to(ROOT))
        for folder in ("benchmarks", "csrc", "docs", "examples", "fused_rnn", "scripts", "tests")
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and path.suffix not in (".pyc", ".so")
    }
    wanted |= {"README.md", "LICENSE", "Makefile", "pyproject.toml", "setup.py"}
    assert wanted <= packed, f"not in the sdist: {sorted(wanted - packed)}"
    assert not [name for name in packed if name.endswith((".so", ".pyc"))]


@pytest.mark.skipif(shutil.which("readelf") is None, reason="readelf, of binutils, is nowhere")
@pytest.mark.skipif(ops._C is None, reason="the extension is not built")
def test_the_compiled_module_names_no_folder_of_the_builder() -> None:
    """An rpath, or the paths of headers in error messages, would be those of another machine."""
    module = Path(ops._C.__file__)
    dynamic = subprocess.run(["readelf", "-d", module], capture_output=True, text=True, check=True).stdout
    assert "libtorch_cpu.so" in dynamic
    assert "RPATH" not in dynamic and "RUNPATH" not in dynamic
    assert os.fsencode(sys.prefix) not in module.read_bytes()


@pytest.mark.slow
def test_types_of_the_public_api() -> None:
    """mypy --strict of what users write; and what it reads runs."""
    pytest.importorskip("mypy", reason="pip install '.[test]'")
    assert (Path(fused_rnn.__file__).parent / "py.typed").exists()
    command = [sys.executable, "-m", "mypy", "--strict", "--follow-imports=silent", "--config-file="]
    done = subprocess.run(
        [*command, str(ROOT / "tests/package/typed_usage.py")],
        cwd=ROOT,
        env=os.environ | {"MYPYPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("name", ["sequences", "cells", "functions", "models"])
def test_typed_usage_runs(name: str) -> None:
    getattr(typed_usage, name)()


def test_what_type_checkers_refuse_is_refused() -> None:
    with pytest.raises((TypeError, ValueError)):
        typed_usage.refused()
