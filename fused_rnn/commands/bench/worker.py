"""One of several processes that run points at the same time, with one thread each; `Team` starts and commands them.

python -m fused_rnn.commands.bench.worker      a request a line on stdin, an answer a line on stdout, both JSON
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import asdict

import torch

from fused_rnn.commands.bench.calls import Call
from fused_rnn.commands.bench.grid import Point
from fused_rnn.commands.bench.providers import build


class Team:
    """So many workers, which run what they are told at the same time. Close it, or use it with `with`."""

    def __init__(self, workers: int) -> None:
        command = [sys.executable, "-m", "fused_rnn.commands.bench.worker"]
        one_thread = os.environ | {"OMP_NUM_THREADS": "1"}
        self.workers = [
            subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=one_thread)
            for _ in range(workers)
        ]

    def __enter__(self) -> Team:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the workers. What they are at, after an error or an interrupt, is not waited for."""
        for worker in self.workers:
            worker.kill()
            worker.communicate()

    def rate(self, point: Point, provider: str, seconds: float, workers: int) -> float:
        """Sequences a second of so many of the workers together, each calling for so long; none of the others runs.

        With seconds = 0 they only get ready. Raises RuntimeError if a worker ended.
        """
        request = json.dumps({"point": asdict(point), "provider": provider, "seconds": seconds})
        for worker in self.workers[:workers]:
            assert worker.stdin is not None
            worker.stdin.write(request + "\n")
            worker.stdin.flush()
        answers = [_answer(worker) for worker in self.workers[:workers]]
        return sum(point.B * answer["calls"] / answer["seconds"] for answer in answers)


def _answer(worker: subprocess.Popen[str]) -> dict[str, float]:
    assert worker.stdout is not None
    line = worker.stdout.readline()
    if not line:
        raise RuntimeError(f"a process that measured ended with status {worker.wait()}; it said why on stderr")
    answer: dict[str, float] = json.loads(line)
    return answer


def serve(requests: Iterable[str]) -> None:
    """Answer every request."""
    torch.set_num_threads(1)
    calls: dict[tuple[str, Point], Call] = {}
    for line in requests:
        request = json.loads(line)
        key = request["provider"], Point(**request["point"])
        if key not in calls:
            calls[key] = build(*key)
        print(json.dumps(_run(calls[key], request["seconds"])), flush=True)


def _run(call: Call, seconds: float) -> dict[str, float]:
    """At least one call; what is done between them does not count, as by the clock of measure.py."""
    done, spent = 0, 0.0
    while not done or spent < seconds:
        call.prepare()
        start = time.perf_counter()
        call.run()
        spent += time.perf_counter() - start
        done += 1
    return {"calls": done, "seconds": spent}


if __name__ == "__main__":
    serve(sys.stdin)
