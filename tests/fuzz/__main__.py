"""The random caller: calls of every kind, compared with torch's; whatever is wrong, crashes or hangs, is a line.

    python -m tests.fuzz --seconds 60 --seed 1      as many calls as there is time for
    python -m tests.fuzz --calls 1000 --seed 1      as many calls
    python -m tests.fuzz --repeat 1:17              call 17 of seed 1, and all there is to say about it

The exit status is 1 where anything was found.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [path for path in (str(ROOT / "tests/common"), str(ROOT)) if path not in sys.path]


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m tests.fuzz", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--seconds", type=float, help="how long to go on (60, if no number of calls is given)")
    parser.add_argument("--calls", type=int, help="how many calls to make")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="the number of the first call")
    parser.add_argument("--repeat", metavar="SEED:INDEX", help="one call")
    parser.add_argument("--timeout", type=float, default=120, help="seconds after which a call hangs")
    parser.add_argument("--plant", help="a fault to be found, of plants.py")
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--answers", type=int, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> int:
    told = _arguments()
    if told.worker is not None:
        from .worker import work

        with os.fdopen(told.answers, "w") as answers:
            work(told.worker, told.plant, answers)
        return 0
    if told.repeat:
        seed, index = (int(part) for part in told.repeat.split(":"))
        return _repeat(seed, index, told.timeout, told.plant)
    return _go_on(told)


def _prepare() -> bool:
    """Build the emulator, which takes a minute the first time, outside any call's time; whether there is one."""
    if shutil.which("g++") is None:
        return False
    from emulated import emulated

    emulated()
    return True


def _go_on(told: argparse.Namespace) -> int:
    from .generate import generate
    from .parent import Worker
    from .report import Report, line

    emulates = _prepare()
    seconds = told.seconds or (60.0 if told.calls is None else float("inf"))
    report, index, end = Report(), told.first, time.monotonic() + seconds
    last = float("inf") if told.calls is None else told.first + told.calls
    with Worker(told.seed, told.timeout, told.plant) as worker:
        while index < last and time.monotonic() < end:
            call = generate(told.seed, index)
            index += 1
            if call.backend == "cuda" and not emulates:
                continue
            answer = worker.call(call.index)
            report.add(call, answer)
            if answer.is_finding:
                print(line(call, answer, told.plant), flush=True)
    print(report)
    return 1 if report.found else 0


def _repeat(seed: int, index: int, timeout: float, plant: str | None) -> int:
    from .generate import generate
    from .parent import Worker
    from .report import line

    call = generate(seed, index)
    if call.backend == "cuda":
        _prepare()
    print(call)
    with Worker(seed, timeout, plant, quiet=False) as worker:
        answer = worker.call(index)
    print("\n".join(part for part in (f"{answer.kind}: {answer.reason}", answer.details) if part))
    if answer.is_finding:
        print(line(call, answer, plant))
    return 1 if answer.is_finding else 0


if __name__ == "__main__":
    sys.exit(main())
