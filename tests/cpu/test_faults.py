"""What the environment does to calls: no memory, Ctrl-C, threads that die, forks, many calls, long ones."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from fused_rnn import ops

from .faults import FAULTS

PROGRAM = Path(__file__).with_name("faults.py")
NEEDS = {"more_than_32_bits_count": 8}  # GiB that are free
pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="reads /proc"),
    pytest.mark.skipif(ops.MISSING is not None, reason=f"cpu: {ops.MISSING}"),
]


def available() -> float:
    """GiB."""
    found = re.search(r"MemAvailable: +(\d+)", Path("/proc/meminfo").read_text())
    return int(found[1]) / 2**20 if found else 0.0


@pytest.mark.parametrize("name", FAULTS)
def test_fault(name: str) -> None:
    if available() < NEEDS.get(name, 1):
        pytest.skip(f"needs {NEEDS[name]} GiB of memory")
    quiet = {**os.environ, "PYTHONWARNINGS": "ignore", "OMP_WAIT_POLICY": "passive"}
    quiet["PYTHONPATH"] = os.pathsep.join(map(str, (PROGRAM.parents[2], PROGRAM.parents[1] / "common")))
    command = [sys.executable, str(PROGRAM), name]
    done = subprocess.run(command, env=quiet, capture_output=True, text=True, timeout=500, check=False)
    told = f"exit status {done.returncode}\n{done.stdout}{done.stderr}"
    assert done.returncode == 0 and done.stdout.endswith("ok\n"), told
