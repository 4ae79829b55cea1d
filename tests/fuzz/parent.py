"""The process around the worker: it takes a crash or a hang for an outcome, and goes on with a new one."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
from pathlib import Path
from types import TracebackType

ROOT = Path(__file__).parents[2]
STARTING = 300.0  # seconds for importing torch on a busy machine
# Threads that wait do not spin, for the processor may be in use by others.
ENVIRONMENT = {"OMP_WAIT_POLICY": "passive", "PYTHONWARNINGS": "ignore"}


class Answer:
    """An outcome as the worker told it."""

    def __init__(self, kind: str, reason: str = "", details: str = "") -> None:
        self.kind, self.reason, self.details = kind, reason, details

    @property
    def is_finding(self) -> bool:
        return self.kind not in ("right", "refused", "raised")


class Worker:
    """A child process that makes calls of one seed; started when it is needed, and again after a crash or a hang."""

    def __init__(self, seed: int, timeout: float, plant: str | None = None, quiet: bool = True) -> None:
        self._timeout, self._quiet = timeout, quiet
        self._arguments = ["--worker", str(seed), *(["--plant", plant] if plant else [])]
        self._process: subprocess.Popen[str] | None = None
        self._answers = -1
        self._buffer = b""

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._stop()

    def call(self, index: int) -> Answer:
        """The outcome of the call of this number."""
        if self._process is None:
            self._start()
        assert self._process is not None and self._process.stdin is not None
        try:
            self._process.stdin.write(f"{index}\n")
            self._process.stdin.flush()
            line = self._read(self._timeout)
        except TimeoutError:
            self._stop()
            return Answer("hang", f"no answer within {self._timeout:g} s")
        except (EOFError, BrokenPipeError):
            return Answer("crash", f"the process ended with {self._ending()}")
        return Answer(**json.loads(line))

    def _start(self) -> None:
        reading, writing = os.pipe()
        command = [sys.executable, "-m", "tests.fuzz", *self._arguments, "--answers", str(writing)]
        self._process = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, **ENVIRONMENT},
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL if self._quiet else None,
            pass_fds=[writing],
            text=True,
        )
        os.close(writing)
        self._answers, self._buffer = reading, b""
        try:
            ready = self._read(STARTING)
        except (EOFError, TimeoutError):
            raise RuntimeError("the worker did not start; try `python -m tests.fuzz --repeat 0:0`") from None
        assert ready == "ready"

    def _read(self, timeout: float) -> str:
        while b"\n" not in self._buffer:
            if not select.select([self._answers], [], [], timeout)[0]:
                raise TimeoutError
            part = os.read(self._answers, 1 << 16)
            if not part:
                raise EOFError
            self._buffer += part
        line, self._buffer = self._buffer.split(b"\n", 1)
        return line.decode()

    def _ending(self) -> str:
        assert self._process is not None
        code = self._process.wait()
        self._stop()
        return signal.Signals(-code).name if code < 0 else f"exit status {code}"

    def _stop(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        process.kill()
        with contextlib.suppress(BrokenPipeError):
            process.communicate()
        os.close(self._answers)
