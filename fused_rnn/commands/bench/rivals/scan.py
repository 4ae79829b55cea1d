"""JAX's lax.scan beside this process: started, handed its problems, and asked for its times. See scan_worker.py."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fused_rnn.commands.bench.calls import Call
from fused_rnn.commands.bench.grid import SEQUENCES
from fused_rnn.commands.bench.rivals.rival import Build, Rival, installed, restricted


class Scan:
    """The process in which JAX runs, with as many threads as torch has now. Close it, or use it with `with`.

    core_time: whether its times are what all its threads had a core, or a clock's.
    """

    def __init__(self, python: str, core_time: bool = False) -> None:
        threads = torch.get_num_threads()
        own = os.environ | {"JAX_PLATFORMS": "cpu", "NPROC": str(threads), "OMP_NUM_THREADS": str(threads)}
        if threads == 1:
            own["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false"
        command = [python, str(Path(__file__).with_name("scan_worker.py")), "process" if core_time else "wall"]
        self.folder = tempfile.TemporaryDirectory()
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=own)

    def __enter__(self) -> Scan:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()
        self.folder.cleanup()

    def ask(self, **request: Any) -> dict[str, Any]:
        """The answer to a request. Raises RuntimeError if the process ended."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"JAX's process ended with status {self.process.wait()}; it said why on stderr")
        answer: dict[str, Any] = json.loads(line)
        return answer


class ScanCall(Call):
    """lax.scan at a point. It is timed in its own process."""

    def __init__(self, scan: Scan, call: Call) -> None:
        import numpy as np

        super().__init__(call.point, call.module, call.forward, call.x, call.dy)
        self.scan = scan
        inputs, self._results = (str(Path(scan.folder.name, name)) for name in ("inputs.npz", "results.npz"))
        given = zip(("x", "w_ih", "w_hh", "b_ih", "b_hh", "dy"), (call.x, *call.parameters, call.dy), strict=True)
        arrays: dict[str, Any] = {name: t.detach().numpy() for name, t in given}
        np.savez(inputs, **arrays)
        answer = scan.ask(cell=call.point.cell, training=call.training, inputs=inputs, results=self._results)
        self.compile_s = answer["compile_s"]

    def prepare(self) -> None:
        """Nothing: it keeps no result."""

    def run(self) -> None:
        self.seconds(1)

    def seconds(self, times: int) -> list[float]:
        """What each of so many calls takes."""
        found: list[float] = self.scan.ask(times=times)["seconds"]
        return found

    def results(self) -> list[Tensor]:
        import numpy as np

        with np.load(self._results) as found:
            return [torch.from_numpy(found[f"arr_{i}"]) for i in range(len(found.files))]


def version(python: str) -> str | None:
    """Of the JAX that an interpreter has; None where it has none."""
    if python == sys.executable:
        return installed("jax").get("jax")
    ask = "from importlib.metadata import version; print(version('jax'))"
    try:
        done = subprocess.run([python, "-c", ask], capture_output=True, text=True, check=False)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def missing(python: str) -> str | None:
    """What is to be done for lax.scan to run."""
    return None if version(python) else f"pip install jax for {python}, or --jax-python with one that has it"


def versions(python: str) -> dict[str, str]:
    return {"jax": version(python) or ""}


@contextmanager
def _opened(python: str) -> Iterator[Build]:
    with Scan(python, core_time=torch.get_num_threads() == 1) as scan:
        yield partial(ScanCall, scan)


RIVAL = Rival("lax.scan of JAX", partial(restricted, modes=SEQUENCES, dtypes=("fp32",)), missing, versions, _opened)
