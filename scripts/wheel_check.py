"""Whether wheels are fit to give away: what is in them, what they link to, and their tests beside other torches.

    python scripts/wheel_check.py dist/*.whl --torch torch==2.11.0 --torch torch
    python scripts/wheel_check.py dist/*.whl --torch path/to/python      an environment that has its torch already
    python scripts/wheel_check.py --installed                            only the tests, of what is installed here

Of each torch, any pip requirement, a fresh environment is made in build/wheel-check, by the interpreter that a wheel is
for. `make wheel-check` runs this.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import subprocess
import sys
import zipfile
from io import BytesIO
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import wheels

ROOT = Path(__file__).resolve().parent.parent
PLACE = ROOT / "build/wheel-check"
# What depends on torch's version: the ops, the modules' contract with torch.nn, autograd, conversion. No compilers.
TESTS = ("ops/test_ops", "ops/test_fast_path", "nn/test_modules", "nn/test_contract", "convert/test_convert")
NEEDS = ("numpy", "pytest>=8", "pytest-timeout>=2.3")


def run(*command: str | Path, **environment: str) -> str:
    print("$", shlex.join(map(str, command)), flush=True)
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | environment
    done = subprocess.run(list(map(str, command)), cwd=PLACE, env=env, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{done.stdout}\nfailed with status {done.returncode}")
    return done.stdout


def check_files(wheel: Path) -> None:
    """The package and nothing else, typed, with its compiled module; the version is that of the sources."""
    names = zipfile.ZipFile(wheel).namelist()
    version = re.search(r'^__version__ = "(.+)"$', (ROOT / "fused_rnn/__init__.py").read_text(), re.MULTILINE)
    assert version and wheel.name.startswith(f"fused_rnn-{version[1]}-"), f"{wheel.name}: expected version {version}"
    assert "manylinux" in wheel.name, f"{wheel.name}: expected a manylinux wheel, which make wheel makes"
    tops = {name.split("/")[0] for name in names}
    assert tops == {"fused_rnn", f"fused_rnn-{version[1]}.dist-info"}, f"{wheel.name}: holds {tops}"
    sources = {str(path.relative_to(ROOT)) for path in (ROOT / "fused_rnn").rglob("*.py")} | {"fused_rnn/py.typed"}
    assert sources <= set(names), f"{wheel.name}: lacks {sources - set(names)}"


def check_links(wheel: Path) -> None:
    """The compiled module needs torch's libraries and the system's, wherever they are, and names no folder."""
    from elftools.elf.elffile import ELFFile

    archive = zipfile.ZipFile(wheel)
    modules = [name for name in archive.namelist() if name.endswith(".so")]
    assert [name for name in modules if name.startswith("fused_rnn/_C.")], f"{wheel.name}: no fused_rnn/_C"
    for name in modules:
        dynamic = ELFFile(BytesIO(archive.read(name))).get_section_by_name(".dynamic")
        tags = [(tag.entry.d_tag, getattr(tag, "needed", "")) for tag in dynamic.iter_tags()]
        assert not [tag for tag, _ in tags if tag in ("DT_RPATH", "DT_RUNPATH")], f"{name}: has an rpath"
        print(f"{name} needs", ", ".join(needed for tag, needed in tags if tag == "DT_NEEDED"))


def environment(python: str, torch: str) -> Path:
    """The interpreter of a fresh environment with this torch."""
    place = PLACE / re.sub(r"\W+", "-", f"{wheels.version_of(python)} {torch}")
    run(python, "-m", "venv", "--clear", place)
    run(place / "bin/python", "-m", "pip", "install", "--quiet", *shlex.split(torch))
    return place / "bin/python"


def check_beside(wheel: Path, torch: str, interpreters: dict[str, str]) -> None:
    """The tests, in an environment with this torch: a fresh one, or that of the interpreter `torch` is the path of."""
    major, minor = re.search(r"-cp(\d)(\d+)-", wheel.name).groups()
    version = f"{major}.{minor}"
    given = Path(torch).is_file()
    if version != wheels.version_of(torch) if given else version not in interpreters:
        print(f"Python {version}, {torch}: not tested, " + ("another Python" if given else "no such Python here"))
        return
    python = Path(torch).absolute() if given else environment(interpreters[version], torch)
    run(python, "-m", "pip", "install", "--quiet", *NEEDS)
    run(python, "-m", "pip", "install", "--quiet", "--no-deps", "--force-reinstall", wheel)
    print(f"Python {version}, {torch}: {check_installed(python).strip().splitlines()[-1]}", flush=True)


def check_installed(python: Path | str) -> str:
    """pytest's output of the chosen tests, for what this interpreter has installed."""
    found = Path(run(python, "-c", "import fused_rnn, fused_rnn._C; print(fused_rnn.__file__)").strip())
    assert not found.is_relative_to(ROOT / "fused_rnn"), f"{found}: expected an installed package, not the sources"
    tests = [ROOT / f"tests/{name}.py" for name in TESTS]
    return run(python, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheels", type=Path, nargs="*")
    parser.add_argument("--torch", action="append", default=[], help="a pip requirement, or a path to a python")
    parser.add_argument("--installed", action="store_true", help="run the tests in this environment, and no more")
    args = parser.parse_args()
    PLACE.mkdir(parents=True, exist_ok=True)
    if args.installed:
        print(check_installed(sys.executable))
        return
    if not args.wheels:
        parser.error("wheels: got none, expected paths")
    found = wheels.interpreters()
    for wheel in args.wheels:
        print(wheel.name, flush=True)
        check_files(wheel.resolve())
        check_links(wheel.resolve())
        for torch in args.torch:
            check_beside(wheel.resolve(), torch, found)


if __name__ == "__main__":
    main()
