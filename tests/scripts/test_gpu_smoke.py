"""scripts/gpu_smoke.py, gpu_steps.py, gpu_field.py without a GPU: what hangs, crashes or is wrong is named; times."""

from __future__ import annotations

import json
import shutil
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cuda_cases import DEVICE
from cuda_cases import PRECISIONS as DTYPES
from emulated import on_the_emulator
from gpu_scripts import script
from torch import Tensor

import fused_rnn
from fused_rnn import ops
from fused_rnn.gpu import chunks as of_time

# --- the stage of first launches


KERNELS = """
import os, sys, time
for name in sys.argv[1:]:
    print(name, flush=True)
    print("forward", flush=True)
    if name == "hangs":
        print("backward", flush=True)
        time.sleep(60)
    if name == "raises":
        sys.exit("RuntimeError: CUDA error: misaligned address")
    if name == "asserts":
        sys.exit("exchange.h:0: wait: block: [3,0,0] Assertion `2 s for the peers` failed.\\nRuntimeError: asserted")
    if name == "dies":
        os._exit(7)
    print("= error 1e-3", flush=True)
"""


def test_a_kernel_that_hangs_or_fails_is_named_and_the_others_go_on() -> None:
    smoke = script("gpu_smoke")
    names = ["good", "hangs", "better", "raises", "asserts", "dies", "best"]
    assert list(smoke.launched([sys.executable, "-c", KERNELS], names, 3)) == [
        ("good", "error 1e-3"),
        ("hangs", "HUNG: still in backward after 3 s"),
        ("better", "error 1e-3"),
        ("raises", "FAILED in forward: RuntimeError: CUDA error: misaligned address"),
        ("asserts", "FAILED in forward: exchange.h:0: wait: block: [3,0,0] Assertion `2 s for the peers` failed."),
        ("dies", "FAILED in forward: exit status 7"),
        ("best", "error 1e-3"),
    ]


def test_the_stage_names_every_kernel_and_those_that_are_wrong(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    smoke = script("gpu_smoke")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(smoke, "first_product", lambda: 12.0)
    monkeypatch.setattr(sys, "argv", ["gpu_smoke.py", "--seconds", "7"])

    def launched(command: list[str], names: list[str], seconds: float) -> list[tuple[str, str]]:
        assert command == [sys.executable, smoke.__file__, "--these"] and seconds == 7
        hung = "HUNG: still in forward after 7 s"
        return [(name, hung if name == "cuda gru tf32 grid" else "error 1e-3") for name in names]

    monkeypatch.setattr(smoke, "launched", launched)
    assert smoke.main() == 1
    first, *kernels, last = capsys.readouterr().out.splitlines()
    assert first == "torch's first product took 12 s"
    assert "cuda primitives                  error 1e-3" in kernels
    assert "cuda gru tf32 grid               HUNG: still in forward after 7 s" in kernels
    assert len(set(kernels)) == len(kernels) > 80
    assert last.startswith(f"{len(kernels) - 1} of {len(kernels)} kernels ran")
    assert last.endswith("; not cuda gru tf32 grid")


@pytest.mark.parametrize(
    ("program", "said"),
    [
        ("echo 'ok      mma_bf16'; echo 'ok      flags'", "error none in 2"),
        ("echo 'ok      mma_bf16'; echo 'FAILED  flags: 1 3'; exit 1", "WRONG: flags: 1 3"),
        ("echo 'ok      mma_bf16'; exec sleep 60", "WRONG: hung after 1 s, behind mma_bf16"),
        ("exit 1", "WRONG: it said nothing, behind the start"),
    ],
    ids=["right", "wrong", "hung", "dead"],
)
def test_primitives_that_are_not_what_they_should_be(
    program: str, said: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    compiler = tmp_path / "nvcc"  # writes that program, and keeps what it was asked
    compiler.write_text(
        f'#!/bin/sh\necho "$@" > {tmp_path}/asked\nfor made; do :; done\n'
        f"cat > $made <<'END'\n#!/bin/sh\n{program}\nEND\nchmod +x $made\n"
    )
    compiler.chmod(0o755)
    monkeypatch.setattr(script("gpu_smoke"), "PACKED", tmp_path / "nothing")
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    assert script("gpu_smoke").primitives(1.0) == said
    asked = (tmp_path / "asked").read_text().split()
    assert "-arch=sm_90a" in asked
    assert Path(asked[-3]).exists()


@pytest.mark.skipif(ops.MISSING is not None, reason=str(ops.MISSING))
@pytest.mark.skipif(shutil.which("g++") is None, reason="the emulator is compiled by g++")
@pytest.mark.timeout(1200)  # the first to need it builds the module, on a busy machine for minutes
def test_kernels_that_are_right_and_one_that_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    smoke, cases = script("gpu_smoke"), script("gpu_cases")
    backward = cases.backward

    def wrong(given: Any, y: Tensor) -> list[Tensor]:
        grads = backward(given, y)
        return grads if y.dtype == torch.float64 else [*grads[:-1], grads[-1] * float("nan")]

    with on_the_emulator():
        for name in ("cuda lstm bf16 cluster", "cuda gru tf32 grid", "cuda rnn_tanh f64 stepwise"):
            assert smoke.one(name, "cpu").startswith("error ")
        monkeypatch.setattr(cases, "backward", wrong)
        assert smoke.one("cuda lstm bf16 cta", "cpu") == "WRONG: error nan"


@pytest.mark.skipif(ops.MISSING is not None, reason=str(ops.MISSING))
def test_every_kernel_of_the_smoke_and_the_sanitizers_has_a_plan() -> None:
    cases = script("gpu_cases")
    kernels = cases.kernels("cuda", True, rows=(0, 8, 16, 32))
    assert len(kernels) == len(set(kernels)) > 100
    for kernel in kernels:
        if kernel.way == "stepwise" or kernel.way in cases.SIZES:
            continue
        for backward in (False, True):
            plan = fused_rnn.plan(
                kernel.cell, 11, cases.size(kernel)[0], dtype=DTYPES[kernel.number],
                tf32=kernel.number == "tf32", recurrences=2,
                backward=backward, device=DEVICE, exchange=kernel.way, rows=kernel.rows,
            )  # fmt: skip
            assert plan.reason is None, (kernel, plan.reason)
    assert not any(kernel.way == "cluster" for kernel in cases.kernels("cuda", False))


# --- the time of a step


@pytest.mark.skipif(ops.MISSING is not None, reason=str(ops.MISSING))
@pytest.mark.skipif(shutil.which("g++") is None, reason="the emulator is compiled by g++")
@pytest.mark.timeout(1200)  # as above
def test_stacks_are_timed_in_chunks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    steps, called = script("gpu_steps"), []

    def milliseconds(call: Any) -> float:
        called.append(call())
        return 2.0

    monkeypatch.setattr(steps, "STACKS", [("LSTM", 16, 3, 2, 4), ("GRU", 16, 3, 3, 4)])
    monkeypatch.setattr(steps, "milliseconds", milliseconds)
    with on_the_emulator():
        steps.stacks(tmp_path, time.monotonic() + 600, device="cpu")
    rows = [json.loads(line) for line in (tmp_path / "stacks.json").read_text().splitlines()]
    assert len(rows) == len(called) == 2 * 2 * len(steps.CHUNKS)
    expected = {"kind": "GRU", "H": 16, "B": 3, "L": 3, "T": 4, "way": "training", "chunks": 16, "ms": 2.0}
    assert rows[-1] == expected


@pytest.mark.skipif(ops.MISSING is not None, reason=str(ops.MISSING))
def test_cells_of_the_field_are_timed_beside_torchs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """With and without chunks of time; a way that fails costs itself alone."""
    field, chunks = script("gpu_field"), []

    def milliseconds(call: Any) -> float:
        call()
        chunks.append(of_time.FEWEST_CHUNKS)
        return 2.0

    def module_of(cell: str, backend: str, hidden: int, device: str) -> torch.nn.Module:
        if backend == "triton":
            raise ValueError("not here")
        return made(cell, "cpu" if backend == "cuda" else backend, hidden, device)

    made = field.module_of
    monkeypatch.setattr(field, "SHAPES", ((5, 3, 16),))
    monkeypatch.setattr(field, "milliseconds", milliseconds)
    monkeypatch.setattr(field, "module_of", module_of)
    before = of_time.FEWEST_CHUNKS
    assert field.measure(("LayerNormGRU", "MinGRU"), tmp_path, time.monotonic() + 600, device="cpu") == 3
    rows = [json.loads(line) for line in (tmp_path / "field.json").read_text().splitlines()]
    failed = [row["way"] for row in rows if "error" in row]
    assert failed == ["triton", "triton", "triton, one chunk"]
    timed = [(row["cell"], row["way"]) for row in rows if row["mode"] == "training"]
    assert timed == [
        ("LayerNormGRU", "torch.nn.GRU"), ("LayerNormGRU", "cuda"),
        ("MinGRU", "torch.nn.GRU"), ("MinGRU", "cuda"), ("MinGRU", "cuda, one chunk"),
    ]  # fmt: skip
    assert chunks == [before] * 8 + [field.NEVER] * 2 and before == of_time.FEWEST_CHUNKS


FIELD = """
import os, pathlib, sys, time
out, first = pathlib.Path(sys.argv[1]), int(sys.argv[2])
for number in range(first, 5):
    (out / "at").write_text(str(number))
    if number == 1:
        time.sleep(60)
    if number in (2, 3):
        os._exit(3 if number == 2 else 7)
    with (out / "done").open("a") as done:
        print(number, file=done)
(out / "at").write_text("18")
"""


def test_a_cell_of_the_field_that_hangs_or_crashes_costs_itself_alone(tmp_path: Path) -> None:
    field = script("gpu_field")
    command, end = [sys.executable, "-c", FIELD, str(tmp_path)], time.monotonic() + 60
    assert field.in_processes(command, ("SLSTM", "MGU"), tmp_path, end, 2) == 3
    assert (tmp_path / "done").read_text().split() == ["0", "4"]
    errors = [json.loads(line)["error"] for line in (tmp_path / "field.json").read_text().splitlines()]
    assert errors == ["hung for 2 s", "exit status 7"]


@pytest.mark.skipif(ops.MISSING is not None, reason=str(ops.MISSING))
@pytest.mark.skipif(shutil.which("g++") is None, reason="the emulator is compiled by g++")
@pytest.mark.timeout(1200)  # as above
def test_steps_are_timed_by_the_kernels_that_ran(monkeypatch: pytest.MonkeyPatch) -> None:
    steps = script("gpu_steps")
    with on_the_emulator():
        for cell in ("lstm", "gru", "rnn_relu"):
            steps.training(cell, "bf16", 17, 3, 2, device="cpu")()
    monkeypatch.setattr(steps, "STEPS", 100)
    monkeypatch.setattr(steps, "RUNS", 2)
    kernel = "void fused_rnn::cuda::persistent_fwd_kernel<Lstm, Bf16, 1>(fused_rnn::cuda::ForwardLoop)"
    events = [
        SimpleNamespace(key=kernel, device_time_total=300.0),
        SimpleNamespace(key=kernel.replace("1>", "2>"), device_time_total=100.0),
        SimpleNamespace(key="ampere_sgemm", device_time_total=1000.0),
        SimpleNamespace(key=kernel.replace("fwd", "bwd"), device_time_total=800.0),
    ]
    assert steps.times(events) == {"forward": 2.0, "backward": 4.0}
    assert {"exchange": "cluster", "members": 16, "rows": 8} in list(steps.teams(every=True))
    plan = steps.plan_of("lstm", "bf16", 512, 64, "forward", {})
    assert plan.reason is None and sum(plan.cycles) > 0
