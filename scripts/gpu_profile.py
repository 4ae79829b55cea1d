"""What bounds the worst points: Nsight Compute's pages on the loops' kernels, where torch.nn is nearest or ahead.

    python scripts/gpu_profile.py --results FOLDER --out FOLDER [--count 2] [--provider cuda] [--minutes 3]
    python scripts/gpu_profile.py --one '{"cell": "LSTM", ...}' --provider cuda

Takes the points with the least speed-up of all result files in the folder, a different cell each; for each writes a
report (profile-N.ncu-rep) and its pages as text (profile-N.txt). Clocks are left as they are. Run by scripts/gpu.py.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))  # a checkout built in place, with nothing installed

from fused_rnn.commands.bench.grid import SEQUENCES, Point
from fused_rnn.commands.bench.results import Results

KERNELS = "regex:fused_rnn"  # a part of their names; torch's own kernels have no say
LAUNCHES = 2  # that are profiled: the forward loop and the backward one, or two of a stepwise loop


def worst(results: list[Results], provider: str, count: int) -> list[tuple[float, Point]]:
    """(speed-up, point), the least first: of the loops, so T > 1, and of each cell once."""
    every = (pair for one in results for pair in one.speedups(provider).items())
    loops = sorted(((s, p) for p, s in every if p.mode in SEQUENCES and p.T > 1), key=lambda pair: pair[0])
    found: dict[str, tuple[float, Point]] = {}
    for speedup, point in loops:
        found.setdefault(point.cell, (speedup, point))
    return list(found.values())[:count]


def run_once(point: Point, provider: str) -> None:
    """What is profiled. The first run, of two steps, is not: it compiles, plans, and asks the device."""
    import torch

    from fused_rnn.commands.bench.measure import float32_as
    from fused_rnn.commands.bench.providers import build

    with float32_as(point.dtype, "cuda"):
        for part in (Point(**{**asdict(point), "T": 2}), point):
            call = build(provider, part, "cuda")
            call.prepare()
            torch.cuda.synchronize()
            if part is point:
                torch.cuda.cudart().cudaProfilerStart()  # type: ignore[no-untyped-call]
            call.run()
            torch.cuda.synchronize()


def command_of(point: Point, provider: str, report: Path) -> list[str]:
    ncu = ["ncu", "--clock-control", "none", "--profile-from-start", "off", "--set", "full", "-f", "-o", str(report)]
    ncu += ["--kernel-name-base", "demangled", "--kernel-name", KERNELS, "--launch-count", str(LAUNCHES)]
    return [*ncu, sys.executable, __file__, "--one", json.dumps(asdict(point)), "--provider", provider]


def main() -> int:
    parser = argparse.ArgumentParser(prog="gpu_profile", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--results", type=Path, help="folder of result files")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--count", type=int, default=2)
    parser.add_argument("--provider", default="cuda")
    parser.add_argument("--minutes", type=float, default=3.0)
    parser.add_argument("--one", help="a point, to be run here")
    chosen = parser.parse_args()
    if chosen.one:
        run_once(Point(**json.loads(chosen.one)), chosen.provider)
        return 0
    if shutil.which("ncu") is None:
        print("ncu is not on the PATH")
        return 1
    results = [Results.load(path) for path in sorted(chosen.results.glob("*.json"))]
    points = worst(results, chosen.provider, chosen.count)
    if not points:
        print(f"{chosen.results} has no point of {chosen.provider}: run the bench first")
        return 1
    end, done = time.monotonic() + 60 * chosen.minutes, 0
    for number, (speedup, point) in enumerate(points):
        report = chosen.out / f"profile-{number}.ncu-rep"
        print(f"{speedup:.2f} of torch.nn's speed: {point}", flush=True)
        left = end - time.monotonic()
        try:
            subprocess.run(command_of(point, chosen.provider, report), check=True, timeout=max(left, 1))
            pages = subprocess.run(
                ["ncu", "--import", str(report), "--page", "details"], check=True, capture_output=True, timeout=60
            )
        except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
            print(f"not profiled: {error}", flush=True)
            continue
        report.with_suffix(".txt").write_bytes(f"{point}\n".encode() + pages.stdout)
        done += 1
    print(f"{done} of {len(points)} points profiled")
    return 0 if done == len(points) else 1


if __name__ == "__main__":
    sys.exit(main())
