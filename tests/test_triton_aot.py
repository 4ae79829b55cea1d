"""Kernels compiled ahead of time with no GPU, a sample of what `make cubin` compiles all of; the interpreter is off."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed")
ROOT = Path(__file__).parent.parent


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    "chosen",
    [
        ["--arch", "sm_80", "sm_90", "sm_100", "sm_120", "gfx942", "--cell", "gru", "--kind", "half", "--hidden", "32"],
        ["--arch", "sm_90", "--cell", "rnn_tanh", "--kind", "tf32", "--hidden", "256"],
    ],
    ids=["each_architecture", "teams"],
)
def test_kernels_compile_without_spills(chosen: list[str]) -> None:
    done = run("-m", "fused_rnn.triton_kernels.cubin", "--jobs", "1", *chosen)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 with a fault" in done.stdout
    assert "registers" in done.stdout
    assert "bytes shared" in done.stdout


def test_what_counts_as_a_fault() -> None:
    from fused_rnn.triton_kernels import tiles
    from fused_rnn.triton_kernels.cubin import Job, Outcome

    shape = tiles.Shape("gru", 3, "half", 32, False)
    plan = tiles.shipped(shape, tiles.ARCHITECTURES["sm_80"])[0]
    outcome = Outcome(Job("sm_80", shape, "bfloat16", "ieee", plan, ()), registers=64, shared=163 * 1024)
    assert outcome.fault == ""
    assert outcome._replace(shared=163 * 1024 + 1).fault.startswith("takes 166913 bytes of shared memory")
    assert outcome._replace(spills=tiles.SPILLS).fault == ""
    assert outcome._replace(spills=72).fault == "spills 72 bytes a thread"
    assert outcome._replace(error="PassManager failed").fault == "PassManager failed"


def test_a_fault_fails() -> None:
    """A tile that Triton cannot compile: sizes must be powers of two."""
    program = """
import sys
from dataclasses import replace
from fused_rnn.triton_kernels import cubin, tiles
def odd(shape, device, made=tiles.shipped):
    return [replace(p, tile=replace(p.tile, batch=24)) for p in made(shape, device)]
if __name__ == "__main__":
    shape = tiles.Shape("gru", 3, "half", 32, True)
    plan = odd(shape, tiles.ARCHITECTURES["sm_90"])[0]
    outcome = cubin.compile_job(cubin.Job("sm_90", shape, "bfloat16", "ieee", plan, ()))
    sys.exit(3 if outcome.fault else 0)
"""
    done = run("-c", program)
    assert done.returncode == 3, done.stdout + done.stderr


def test_sizes_are_never_compiled_for() -> None:
    """T, B and R are arguments that Triton does not specialise on: no 1, no multiple of 16 makes another kernel."""
    program = """
from fused_rnn.triton_kernels import aot
from fused_rnn.triton_kernels.backward import bwd_kernel
from fused_rnn.triton_kernels.forward import fwd_kernel
for kernel in (fwd_kernel, bwd_kernel):
    pointers = aot._pointers(kernel, "bfloat16", {})
    for p in kernel.params:
        assert p.is_constexpr or p.name in pointers or p.do_not_specialize, p.name
"""
    done = run("-c", program)
    assert done.returncode == 0, done.stdout + done.stderr
