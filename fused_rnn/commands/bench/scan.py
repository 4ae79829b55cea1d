"""JAX's lax.scan beside this process: started, handed its problems, and asked for its times. See scan_worker.py."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fused_rnn.commands.bench.calls import Call


class NoJax(Exception):
    """Why lax.scan is not measured."""


class Scan:
    """The process in which JAX runs. Raises NoJax. Close it, or use it with `with`."""

    def __init__(self, python: str) -> None:
        one = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
        own = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": one, "OMP_NUM_THREADS": "1"}
        command = [python, str(Path(__file__).with_name("scan_worker.py"))]
        found = subprocess.run([python, "-c", "import jax"], capture_output=True, text=True, check=False)
        if found.returncode:
            raise NoJax(f"{python} has no jax: pip install jax there, or give --jax-python one that has it")
        self.folder = tempfile.TemporaryDirectory()
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=own)
        self.version = ""

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
        self.version = answer["jax"]
        return answer


class ScanCall:
    """lax.scan at a point. It is timed in its own process."""

    def __init__(self, scan: Scan, call: Call) -> None:
        import numpy as np

        self.scan = scan
        inputs, self._results = (str(Path(scan.folder.name, name)) for name in ("inputs.npz", "results.npz"))
        given = zip(("x", "w_ih", "w_hh", "b_ih", "b_hh", "dy"), (call.x, *call.parameters, call.dy), strict=True)
        arrays: dict[str, Any] = {name: t.detach().numpy() for name, t in given}
        np.savez(inputs, **arrays)
        scan.ask(cell=call.point.cell, training=call.training, inputs=inputs, results=self._results)

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
