"""A visit to a GPU, rehearsed where there is none: `make gpu-rehearse`.

    python scripts/gpu_rehearse.py [--python PYTHON --pack build/pack] [--scene well|ill] [--out build/rehearsal]

Runs the two commands of a visit, `scripts/gpu.py first` and `next`, in a copy of the tree, against a GPU that is none
(rehearsal/sitecustomize.py) and stand-ins for nvcc, ncu and compute-sanitizer. Twice: once all is well and `next` goes
on measuring; once a cell's results are wrong, a program hangs and compute-sanitizer is missing, each of which may cost
itself alone, and `next` goes back to what failed. Both are held against what a visit has room for: seconds, files and
their sizes, the lines of the summary, what travels; and of what Triton has compiled once, `next` may compile nothing.

With a pack it is what scripts/gpu_pack.py made that travels, PYTHON is the interpreter it was made for, every Triton
kernel of the smoke is asked for, and none may be compiled. Without, a kernel of each kind: the tests run that.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parent))
from gpu import PLANS, ROOT, TRITON_CACHE

SECONDS = {"first": 540, "next": 240}
PATIENCE = 3  # a GPU's machine has more cores than this one: stages have so many times their seconds here
TRAVELS = 60 << 20  # bytes
FILES, FILE_BYTES, LINES = 8, 16 << 20, 60  # that come back; of the summary
SHORT = ("cuda primitives", "cuda lstm bf16 cluster", "cuda gru tf32 grid", "triton gru bf16 cooperative")
BENCH = "--quick --cell lstm --dtype bf16 --no-memory --provider torch --provider torch-fp16"
ARGUMENTS = {  # of the stages: this machine has no GPU to hurry them
    "HOST_ARGS": "--count 3",
    "TEST_ARGS": "--lane emulator",
    "STEPS_ARGS": "--cell lstm --number bf16 --hidden 128",
    "BENCH_ARGS": f"{BENCH} --provider cuda",
    "VARIANTS_ARGS": f"{BENCH} --provider cuda --variant lengths --variant resets",
    "TRITON_ARGS": f"{BENCH} --provider triton",
    "SANITIZE_ARGS": "--cell lstm --number bf16",
    "AGAIN_ARGS": "--seconds 150",
}
FOLDERS = ("fused_rnn", "scripts", "tests", "benchmarks", "csrc")  # that travel, and the files beside them
NOT_MEANT = ("TRITON_INTERPRET", "PYTEST_ADDOPTS")  # of the environment


class Scene(NamedTuple):
    """statuses: of stages that are not "ok"; plan: what `next` then is; tools: that are missing."""

    environment: dict[str, str]
    statuses: dict[str, str]
    plan: str
    missing: tuple[str, ...] = ()


SCENES = {
    "well": Scene({}, {}, "green"),
    "ill": Scene(
        {"FUSED_RNN_REHEARSAL_WRONG": "gru", "FUSED_RNN_REHEARSAL_HANGS": "1"},
        {"parts": "timed out", "smoke": "failed", "again": "failed", "sanitize": "failed"},
        "red",
        ("compute-sanitizer",),
    ),
}


def size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def copy_tree(tree: Path, pack: Path | None) -> int:
    """What travels, and how many bytes it has; then the programs in it that need a GPU become others."""
    shutil.rmtree(tree, ignore_errors=True)
    tree.mkdir(parents=True)
    built = shutil.ignore_patterns("__pycache__", "*.so", "*.egg-info")
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, tree / folder, ignore=built)
    for path in ROOT.iterdir():
        if path.is_file():
            shutil.copy(path, tree)
    there = tree / "build" / "pack"
    if pack is not None:
        shutil.copytree(pack, there)
    else:
        (there / "debug").mkdir(parents=True)
        (there / "debug" / "_cuda.none.so").touch()
        for module in (ROOT / "fused_rnn").glob("_C.*.so"):
            shutil.copy(module, there)
    travels = size(tree)
    for program in (tree / "scripts" / "rehearsal" / "programs").iterdir():
        shutil.copy(program, there)
    for module in there.glob("_C.*.so"):  # what stands for the GPU needs it before anything is unpacked
        shutil.copy(module, tree / "fused_rnn")
    emulated = ROOT / "build" / "cuda_emulated"
    emulated.mkdir(parents=True, exist_ok=True)
    (tree / "build" / "cuda_emulated").symlink_to(emulated)
    return travels


def without(missing: tuple[str, ...], folder: Path) -> str:
    """PATH, where none of these is found. folder: for links to what else lies beside one."""
    places = []
    for number, place in enumerate(os.environ["PATH"].split(os.pathsep)):
        if any(Path(place, name).exists() for name in missing):
            links = folder / str(number)
            links.mkdir(parents=True)
            for path in Path(place).iterdir():
                if path.name not in missing:
                    (links / path.name).symlink_to(path)
            place = str(links)
        places.append(place)
    return os.pathsep.join(places)


def environment(tree: Path, scene: Scene, cache: Path, smoke: str) -> dict[str, str]:
    tools = tree / "scripts" / "rehearsal" / "tools"
    for name in scene.missing:
        (tools / name).unlink()
    inherited = {name: value for name, value in os.environ.items() if name not in NOT_MEANT}
    return {
        **inherited, **ARGUMENTS, **scene.environment, "SMOKE_ARGS": f"{smoke} --seconds 150",
        "PATH": os.pathsep.join([str(tools), without(scene.missing, tree / "build" / "path")]),
        "PYTHONPATH": str(tools.parent), "FUSED_RNN_REHEARSAL": "1", "TRITON_CACHE_DIR": str(cache),
        "OMP_NUM_THREADS": "1",
    }  # fmt: skip


def compiled(cache: Path) -> int:
    """Triton's kernels in a cache."""
    return sum(1 for _ in cache.rglob("*.cubin"))


def faults(command: str, scene: Scene, out: Path, seconds: float, status: int) -> list[str]:
    """What a visit would have suffered from."""
    stages = json.loads((out / "summary.json").read_text())["stages"]
    plan = PLANS["first" if command == "first" else scene.plan]
    found = []
    for name in (stage.partition(":")[0] for stage in plan):
        statuses = {s["status"] for s in stages if s["stage"].partition("-")[0] == name}
        if statuses != {expected := scene.statuses.get(name, "ok")}:
            found.append(f"{name}: {', '.join(sorted(statuses)) or 'did not run'}, expected {expected}")
    if (status == 0) != (not scene.statuses):
        found.append(f"exit status {status}")
    files = [path for path in out.rglob("*") if path.is_file()]
    lines = len((out / "summary.txt").read_text().splitlines())
    for what, got, most in (
        ("seconds", seconds, PATIENCE * SECONDS[command]),
        ("files", len(files), FILES),
        ("bytes of a file", max(path.stat().st_size for path in files), FILE_BYTES),
        ("folders deep", max(len(path.relative_to(out).parts) - 1 for path in files), 2),
        ("lines of the summary", lines, LINES),
    ):
        if got > most:
            found.append(f"{what}: {got:.0f}, of {most} at most")
    return found


def run(name: str, scene: Scene, tree: Path, python: str, given: dict[str, str], out: Path, known: int) -> list[str]:
    """Both commands in a tree; what was wrong with them. known: kernels that Triton's cache came with."""
    found, cache = [], Path(given["TRITON_CACHE_DIR"])
    for command in SECONDS:
        came, began = out / f"{name}-{command}", time.monotonic()
        arguments = ["scripts/gpu.py", command, "--out", str(came), "--patience", str(PATIENCE)]
        with (out / f"{name}-{command}.log").open("w") as log:
            status = subprocess.run([python, *arguments], cwd=tree, env=given, stdout=log, stderr=log).returncode
        seconds = time.monotonic() - began
        if not (came / "summary.json").exists():
            return [*found, f"{name}, {command}: no summary"]
        print(f"--- {name}: {command}, {seconds:.0f} s, {size(came) / 2**20:.1f} MiB came back", flush=True)
        print((came / "summary.txt").read_text(), flush=True)
        found += [f"{name}, {command}: {fault}" for fault in faults(command, scene, came, seconds, status)]
        if known and (new := compiled(cache) - known):
            found.append(f"{name}, {command}: Triton compiled {new} kernels that its cache should have had, of {known}")
        known = compiled(cache)
    return found if known else [*found, f"{name}: Triton compiled nothing"]


def rehearse(python: str, pack: Path | None, out: Path, scenes: Iterable[str] = SCENES) -> list[str]:
    shutil.rmtree(out, ignore_errors=True)
    found: list[str] = []
    smoke = "triton" if pack is not None else " ".join(f"--only '{name}'" for name in SHORT)
    cache = out / "triton" if pack is None else TRITON_CACHE
    shutil.rmtree(cache, ignore_errors=True)
    for name in scenes:
        scene, tree = SCENES[name], out / "trees" / name
        travels = copy_tree(tree, pack)
        if travels > TRAVELS:
            found.append(f"{travels} bytes travel, of {TRAVELS} at most")
        given = environment(tree, scene, cache, smoke)
        # What is not part of a visit: the emulator's build, by all there is; and what a pack brings has been brought.
        path = {"PATH": os.environ["PATH"]}
        subprocess.run([python, "-c", "import sitecustomize"], cwd=tree, env={**given, **path}, check=True)
        if pack is not None:
            shutil.unpack_archive(pack / "triton.tar.gz", cache.parent, filter="data")
        found += run(name, scene, tree, python, given, out, compiled(cache))
    print(f"{travels / 2**20:.1f} MiB travel; Triton's cache has {compiled(cache)} kernels")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(prog="gpu_rehearse", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--python", default=sys.executable)
    parser.add_argument("--pack", type=Path)
    parser.add_argument("--scene", action="append", choices=list(SCENES), help="and no other")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "rehearsal")
    chosen = parser.parse_args()
    pack = None if chosen.pack is None else chosen.pack.resolve()
    found = rehearse(chosen.python, pack, chosen.out.resolve(), chosen.scene or SCENES)
    for fault in found:
        print(f"FAULT {fault}")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
