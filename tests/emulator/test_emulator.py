"""The CUDA primitives and the emulator that runs them on a CPU: the programs in tests/emulator, in every build."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
SOURCES = ROOT / "tests" / "emulator"
COMMON = ["-std=c++17", "-O1", "-g1", "-Wall", "-Wextra", "-Werror", "-I", str(ROOT / "csrc")]
# The race build is compiled with -fsanitize=thread but not linked: the emulator answers the calls that this puts in.
COMPILE = {
    "plain": [],
    "asan": ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
    "race": ["-fsanitize=thread", "-DFUSED_RNN_EMULATE_RACES"],
}
LINK = {"plain": [], "asan": ["-fsanitize=address,undefined"], "race": []}
ARCHITECTURES = ["80", "86", "89", "90a", "100", "120"]
ABORTING = ["a_write_past_the_end", "a_read_between_arrays"]  # AddressSanitizer ends the process there

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")
needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")


def call(*command: str | Path, timeout: int = 300) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0"}
    done = subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, check=False, timeout=timeout, env=environment
    )
    done.stdout += done.stderr
    return done


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("emulator")


def build(folder: Path, name: str, variant: str) -> Path:
    """The program of tests/emulator/<name>.cpp, made once for the module."""
    made, program = folder / f"{name}-{variant}.o", folder / f"{name}-{variant}"
    if not program.exists():
        source = SOURCES / f"{name}.cpp"
        done = call("g++", *COMMON, "-DFUSED_RNN_EMULATE", *COMPILE[variant], "-c", source, "-o", made)
        assert done.returncode == 0, done.stdout
        done = call("g++", *LINK[variant], made, "-o", program)
        assert done.returncode == 0, done.stdout
    return program


def names_of(name: str) -> list[str]:
    lines = (SOURCES / f"{name}.cpp").read_text().splitlines()
    return [line[5 : line.index(")")] for line in lines if line.startswith("TEST(")]


@needs_compiler
@pytest.mark.parametrize("variant", COMPILE)
@pytest.mark.parametrize("name", ["primitives_test", "machine_test", "exchange_test"])
def test_program(folder: Path, name: str, variant: str) -> None:
    names = [test for test in names_of(name) if variant != "asan" or test not in ABORTING]
    done = call(build(folder, name, variant), *names)
    assert done.returncode == 0, done.stdout
    assert done.stdout.count("\nok ") + done.stdout.startswith("ok ") == len(names), done.stdout


@needs_compiler
@pytest.mark.parametrize("test", ABORTING)
def test_an_index_off_by_one_is_an_address_error(folder: Path, test: str) -> None:
    done = call(build(folder, "machine_test", "asan"), test)
    assert done.returncode != 0, done.stdout
    assert "AddressSanitizer: use-after-poison" in done.stdout, done.stdout
    assert f"ok      {test}" not in done.stdout


@needs_nvcc
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_instructions_are_those_meant(folder: Path, architecture: str) -> None:
    """Compiles for a GPU as for the emulator, without a warning; what a device lacks is not in its code."""
    program = folder / f"primitives-{architecture}.ptx"
    done = call(
        *["nvcc", "-x", "cu", "-std=c++17", "-I", ROOT / "csrc", "-Werror", "all-warnings", "-ptx"],
        *[f"-arch=sm_{architecture}", SOURCES / "primitives_test.cpp", "-o", program],
    )
    assert done.returncode == 0, done.stdout
    text = program.read_text()
    wanted = [
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32",
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32",
        "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32",
        "cp.async.cg.shared.global",
        "cp.async.wait_group 1",
        "red.release.gpu.global.add.u32",
        "ld.acquire.gpu.global.u32",
        "tanh.approx.f32",
        "ex2.approx.ftz.f32",
        "cvt.rn.bf16x2.f32",
        "cvt.rna.tf32.f32",
    ]
    cluster = [
        "st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.b32",
        "mbarrier.try_wait.parity.shared::cta.b64",
        "mbarrier.arrive.expect_tx.shared::cta.b64",
        "fence.mbarrier_init.release.cluster",
        "mapa.shared::cluster.u32",
        "barrier.cluster.arrive.release",
    ]
    assert [line for line in wanted if line not in text] == []
    if architecture in ("80", "86", "89"):
        assert "mbarrier" not in text and "cluster" not in text
    else:
        assert [line for line in cluster if line not in text] == []
    assert "fence.acquire" not in text  # it would wait for every load that is on its way
    assert "globaltimer" not in text  # waits are bounded in a build for debugging alone


@needs_nvcc
def test_a_build_for_debugging_bounds_its_waits(folder: Path) -> None:
    """FUSED_RNN_CUDA_DEBUG=1, as setup.py hands it on: a wait of 2 s ends in a message and an error."""
    program = folder / "bounded.ptx"
    done = call(
        *["nvcc", "-x", "cu", "-std=c++17", "-I", ROOT / "csrc", "-Werror", "all-warnings", "-ptx", "-arch=sm_90a"],
        *["-DFUSED_RNN_BOUNDED_SPINS", SOURCES / "primitives_test.cpp", "-o", program],
    )
    assert done.returncode == 0, done.stdout
    text = program.read_text()
    assert "globaltimer" in text
    assert "__assertfail" in text
    assert "FUSED_RNN_BOUNDED_SPINS" in (ROOT / "setup.py").read_text()


@needs_nvcc
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")
def test_primitives_on_the_gpu(folder: Path) -> None:
    """The emulator's meaning of a primitive is the hardware's: the same program, compiled by nvcc."""
    program = folder / "primitives-gpu"
    major, minor = torch.cuda.get_device_capability()
    architecture = f"sm_{major}{minor}" + ("a" if major == 9 else "")
    source = SOURCES / "primitives_test.cpp"
    done = call("nvcc", "-x", "cu", "-std=c++17", "-I", ROOT / "csrc", f"-arch={architecture}", source, "-o", program)
    assert done.returncode == 0, done.stdout
    done = call(program)
    assert done.returncode == 0, done.stdout
