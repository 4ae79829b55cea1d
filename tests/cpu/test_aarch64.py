"""The CPU kernels compiled for 64-bit Arm, run in an emulator of it: numbers, and that vectors are NEON's.

Needs a cross compiler and qemu (Debian: g++-aarch64-linux-gnu, qemu-user-static); half a minute goes into the compiler.
"""

from __future__ import annotations

import hashlib
import re
import shutil
import struct
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from cases import DTYPES, Case, Inputs, inputs
from oracle import Results, by_reference, by_torch
from tolerances import assert_as_good_as_torch
from torch import Tensor

from fused_rnn.cells import CELLS

ROOT = Path(__file__).parents[2]
COMPILER, DISASSEMBLER = "aarch64-linux-gnu-g++", "aarch64-linux-gnu-objdump"
QEMU = shutil.which("qemu-aarch64-static") or shutil.which("qemu-aarch64")
# As setup.py compiles the file.
FLAGS = [
    "-std=c++17",
    "-O3",
    "-g0",
    "-fPIC",
    "-fvisibility=hidden",
    "-ffp-contract=fast",
    "-Wall",
    "-Wextra",
    "-Werror",
]
FLAGS += ["-Wno-maybe-uninitialized", "-fopenmp", f"-I{ROOT / 'csrc'}"]
SOURCES = ("csrc/cpu/isa_baseline.cpp", "csrc/cpu/select.cpp", "csrc/cpu/team.cpp", "tests/cpu/aarch64.cpp")
CODES = {"lstm": 0, "gru": 1, "rnn_tanh": 2, "rnn_relu": 3}  # each cell's own, in csrc/cells

pytestmark = [
    pytest.mark.skipif(shutil.which(COMPILER) is None, reason=f"{COMPILER} is not installed"),
    pytest.mark.skipif(QEMU is None, reason="qemu-aarch64 is not installed"),
    pytest.mark.timeout(900),  # on a busy machine the compiler takes minutes
]


@pytest.fixture(scope="module")
def objects() -> list[Path]:
    """The sources compiled, once for each state of them, into build/aarch64."""
    places = [ROOT / "csrc/params.h", ROOT / SOURCES[-1]]
    places += [path for part in ("cells", "cpu") for path in sorted((ROOT / "csrc" / part).iterdir())]
    text = hashlib.sha256(str(FLAGS).encode() + b"".join(path.read_bytes() for path in places))
    folder = ROOT / "build" / "aarch64" / text.hexdigest()[:16]
    made = [folder / f"{Path(source).stem}.o" for source in SOURCES]
    if not all(path.exists() for path in made):
        folder.mkdir(parents=True, exist_ok=True)
        with ThreadPoolExecutor(2) as pool:
            list(
                pool.map(
                    lambda pair: call(COMPILER, *FLAGS, "-c", ROOT / pair[0], "-o", pair[1]),
                    zip(SOURCES, made, strict=True),
                )
            )
    return made


def call(*command: object) -> str:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def few_cases() -> list[Case]:
    """Every cell and dtype with everything there is in a layer; odd shapes: ragged ends of vectors, rows and tiles."""
    full = {"bidirectional": True, "lengths": True, "reset": True}
    cases = []
    for cell in CELLS:
        for dtype in DTYPES:
            cases += [
                Case(cell, T=5, B=3, D=4, H=17, dtype=dtype, **full),
                Case(cell, T=2, B=33, D=33, H=34, dtype=dtype, bias=False),
                Case(cell, T=1, B=1, D=1, H=1, dtype=dtype),
            ]
    projected = [Case("lstm", T=4, B=3, D=5, H=9, proj=5, dtype=dtype, **full) for dtype in DTYPES]
    return [*cases, *projected]


def as_bytes(case: Case, given: Inputs, threads: int) -> bytes:
    """A layer as the driver reads it."""
    head = [CODES[case.cell], DTYPES.index(case.dtype), case.T, case.B, case.D, case.H, case.P, case.R]
    flags = [case.bias, case.lengths, case.reset, threads]
    tensors = [*given.weights, given.x, *given.hx]
    tensors += [t for t in (given.lengths, given.reset) if t is not None]
    arrays = [t.contiguous().view(torch.uint8).numpy().tobytes() for t in (*tensors, *given.dout)]
    return struct.pack("12q", *head, *flags) + b"".join(arrays)


class Reader:
    """The driver's results, in the case's dtype."""

    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def tensor(self, like: Tensor, dtype: torch.dtype) -> Tensor:
        stop = self.at + like.numel() * dtype.itemsize
        found = torch.frombuffer(bytearray(self.data[self.at : stop]), dtype=dtype).view(like.shape).to(like.dtype)
        self.at = stop
        return found

    def results(self, case: Case, given: Inputs) -> Results:
        wide = torch.float64 if case.dtype == torch.float64 else torch.float32
        states = ("h_n", "c_n")[: len(given.hx)]
        found = {"y": self.tensor(given.dout[0], case.dtype)}
        found |= {name: self.tensor(like, wide) for name, like in zip(states, given.hx, strict=True)}
        found |= {"dx": self.tensor(given.x, case.dtype)}
        found |= {f"d{name[0]}0": self.tensor(like, wide) for name, like in zip(states, given.hx, strict=True)}
        kinds = [torch.float64 if w.dim() == 1 else wide for w in given.weights]
        return found | {f"dweights[{k}]": self.tensor(w, kinds[k]) for k, w in enumerate(given.weights)}


def test_same_numbers(objects: list[Path], tmp_path: Path) -> None:
    program, problems, answers = tmp_path / "driver", tmp_path / "problems", tmp_path / "answers"
    call(COMPILER, "-static", "-fopenmp", *objects, "-o", program)
    cases = [(case, inputs(case), threads) for case in few_cases() for threads in (1, 3)]
    problems.write_bytes(b"".join(as_bytes(*case) for case in cases))
    call(QEMU, program, problems, answers)
    reader = Reader(answers.read_bytes())
    for case, given, _ in cases:
        assert_as_good_as_torch(reader.results(case, given), by_torch(case, given), by_reference(case, given))
    assert reader.at == len(reader.data)


def test_vectors_are_those_of_neon(objects: list[Path]) -> None:
    """Four floats or two doubles multiplied and added at a time, hardly a float alone; halves widened by fours."""
    code = call(DISASSEMBLER, "-d", "--no-show-raw-insn", objects[0])
    assert len(re.findall(r"\sfmla\s+v\d+\.4s", code)) > 1000
    assert len(re.findall(r"\sfmla\s+v\d+\.2d", code)) > 500
    assert len(re.findall(r"\sfmadd\s+s\d+", code)) < 100
    assert len(re.findall(r"\sfcvtl\s+v\d+\.4s", code)) > 50
