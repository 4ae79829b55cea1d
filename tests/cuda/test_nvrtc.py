"""Users' cells and narrow weights by NVRTC, which needs no GPU, where there is one; how kernels are kept and loaded."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from emulated_printed import SHAPES
from linear_cells import SCANS
from programs import GRU, LEAKY, LSTM, SRU
from stage_cells import STAGED

from fused_rnn.cells import CELLS
from fused_rnn.cuda import module, nvrtc, printer, programs
from fused_rnn.cuda.printer import Kernel
from fused_rnn.cuda.scan import summary_of

ROOT = Path(__file__).parents[2]
needs_nvrtc = pytest.mark.skipif(nvrtc.missing() is not None, reason=str(nvrtc.missing()))
needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on the PATH")
KERNELS = [
    (LSTM, Kernel("persistent_fwd", "bf16", 1)),
    (LEAKY, Kernel("persistent_bwd", "tf32", 1)),
    (GRU, Kernel("pointwise_bwd", "f64")),
    (SRU, Kernel("pointwise_fwd", "f16")),
    (SCANS["many"].descriptor().name, Kernel("pointwise_fwd", "bf16")),
    *(
        (summary_of(SCANS["min_lstm"].descriptor().name).name, Kernel(f"pointwise_{kind}", "bf16"))
        for kind in ("fwd", "bwd")
    ),
    (STAGED["reset_before"].descriptor().name, Kernel("persistent_fwd", "bf16", 1)),
    (STAGED["layer_norm"].descriptor().name, Kernel("persistent_bwd", "bf16", 1)),
    (STAGED["deep"].descriptor().name, Kernel("stages_fwd", "f64")),
    (STAGED["layer_norm_lstm"].descriptor().name, Kernel("stages_bwd", "bf16")),
    (LSTM, Kernel("persistent_fwd", "bf16", 1, shape=SHAPES.index((False, "cluster", 4, 16)))),
    (GRU, Kernel("persistent_bwd", "tf32", 1, shape=SHAPES.index((True, "scatter", 4, 16)))),
    (LSTM, Kernel("persistent_bwd", "bf16", 1, shape=SHAPES.index((True, "direct", 64, 16)))),
    ("lstm", Kernel("persistent_fwd", "tf32", 1, narrow="int8")),
    ("gru", Kernel("persistent_fwd", "bf16", 4, narrow="int8")),
    ("rnn_relu", Kernel("persistent_fwd", "ieee", 2, narrow="bf16")),
    (LEAKY, Kernel("persistent_fwd", "f16", 2, narrow="int8")),
    ("lstm", Kernel("persistent_fwd", "bf16", 1, shape=SHAPES.index((False, "grid", 64, 16)), narrow="int8")),
    ("lstm", Kernel("persistent_fwd", "tf32", 1, shape=SHAPES.index((False, "grid", 32, 32)), narrow="int8")),
]


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSED_RNN_CACHE_DIR", str(tmp_path / "kernels"))
    monkeypatch.setattr(programs, "_loaded", {})


@needs_nvrtc
@pytest.mark.parametrize("arch", [80, 90, 100, 120])
@pytest.mark.parametrize(("text", "kernel"), KERNELS, ids=lambda value: getattr(value, "kind", None))
def test_kernels_compile(text: str, kernel: Kernel, arch: int) -> None:
    made = programs.compiled(CELLS[text], kernel, False, arch)
    assert made.image[:4] == b"\x7fELF"
    assert made.spills == 0
    assert kernel.kind in made.name


def test_a_file_that_is_none(tmp_path: Path) -> None:
    """Whatever another program has left there."""
    path = tmp_path / "one.kernel"
    for content in (b"", b"[1]\n", b"null\n", b'"bytes"\nabc', b'{"bytes": 3}\nabc', b"\xff\n", b'{"bytes": 4}\nabc'):
        path.write_bytes(content)
        assert programs._read(path) is None, content
    made = nvrtc.Compiled("name", b"image", 0)
    programs._write(path, made)
    assert programs._read(path) == made
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


@needs_nvcc
@pytest.mark.parametrize(
    ("text", "kernel"), [*KERNELS[1:3], KERNELS[-1]], ids=lambda value: getattr(value, "kind", None)
)
def test_the_same_source_by_nvcc(text: str, kernel: Kernel, tmp_path: Path) -> None:
    path = tmp_path / "cell.cu"
    path.write_text(printer.source(printer.definition(CELLS[text]), [kernel]))
    flags = ["-std=c++17", "-cubin", "-arch=sm_90a", "--expt-relaxed-constexpr", "-Xptxas", "-v", f"-I{ROOT / 'csrc'}"]
    done = subprocess.run(
        ["nvcc", *flags, str(path), "-o", str(tmp_path / "cell.cubin")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "0 bytes spill stores, 0 bytes spill loads" in done.stdout + done.stderr


def counting(monkeypatch: pytest.MonkeyPatch, spills: int = 0) -> list[tuple[str, str, list[str]]]:
    """NVRTC's calls, none of which compiles anything."""
    calls: list[tuple[str, str, list[str]]] = []

    def compiled(text: str, expression: str, options: list[str]) -> nvrtc.Compiled:
        calls.append((text, expression, options))
        fewer = int(text.partition("FEWER_BLOCKS ")[2].partition("\n")[0])
        return nvrtc.Compiled("_Zname", b"\x7fELF\n\x00image", max(0, spills - fewer))

    monkeypatch.setattr(nvrtc, "compiled", compiled)
    monkeypatch.setattr(nvrtc, "target", lambda arch: f"sm_{arch}")
    monkeypatch.setattr(nvrtc, "version", lambda: (13, 0))
    return calls


def test_a_kernel_is_compiled_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls, (text, kernel) = counting(monkeypatch), KERNELS[0]
    first = programs.compiled(CELLS[text], kernel, False, 90)
    assert programs.compiled(CELLS[text], kernel, False, 90) == first
    assert len(calls) == 1
    (kept,) = (tmp_path / "kernels").iterdir()
    for changed in (
        (CELLS[LEAKY], kernel, False, 90),
        (CELLS[text], kernel._replace(tiles=2), False, 90),
        (CELLS[text], kernel, True, 90),
        (CELLS[text], kernel, False, 80),
    ):
        programs.compiled(*changed)
    assert len(calls) == 5
    kept.write_bytes(kept.read_bytes()[:-1])  # not all of it
    assert programs.compiled(CELLS[text], kernel, False, 90) == first
    assert len(calls) == 6


def test_another_header_is_another_kernel(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    copied = tmp_path / "csrc"
    shutil.copytree(ROOT / "csrc", copied)
    before = programs._content.__wrapped__(copied)
    (copied / "cuda/unit_fwd.h").write_text("// changed")
    assert programs._content.__wrapped__(copied) != before


def test_a_folder_that_cannot_be_written_to(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FUSED_RNN_CACHE_DIR", str(tmp_path / "file" / "below"))
    calls, (text, kernel) = counting(monkeypatch), KERNELS[0]
    programs.compiled(CELLS[text], kernel, False, 90)
    programs.compiled(CELLS[text], kernel, False, 90)
    assert len(calls) == 2


def test_where_the_kernels_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FUSED_RNN_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert programs.cache_folder() == Path("/somewhere/fused_rnn")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert programs.cache_folder() == Path.home() / ".cache" / "fused_rnn"


class Module:
    """What is asked of fused_rnn._cuda to load a kernel and to plan it."""

    def __init__(self) -> None:
        self.given: list[tuple[bytes, str]] = []
        self.asked: list[tuple[bool, int]] = []  # a known team or not, blocks left to shared memory

    def device(self, _: int) -> Any:
        return SimpleNamespace(arch=90)

    def load(self, image: bytes, name: str) -> int:
        self.given.append((image, name))
        return 1000 + len(self.given)

    def make_plan(self, *arguments: Any) -> Any:
        known, fewer, *_ = arguments[-4:]
        self.asked.append((known, fewer))
        return SimpleNamespace(refusal="", rows=8, shape=0 if known else -1)


def test_kernels_are_loaded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls, loops = counting(monkeypatch), Module()
    monkeypatch.setattr(module, "_cuda", loops)
    cell = CELLS[LSTM]
    for loop in ("Forward", "Backward", "Forward"):
        assert programs.pointwise(cell, loop, torch.bfloat16, 0) == 1001 + (loop == "Backward")
    assert len(calls) == 2
    assert loops.given[0] == (b"\x7fELF\n\x00image", "_Zname")
    assert programs.pointwise(CELLS["lstm"], "Forward", torch.bfloat16, 0) == 0
    for narrow, loaded in ((None, 0), ("int8", 1003), ("int8", 1003)):  # of whole weights the module has it
        assert programs.loaded(CELLS["lstm"], Kernel("persistent_fwd", "tf32", 1, narrow=narrow), 0) == loaded


@pytest.mark.parametrize(("spills", "tries"), [(0, []), (3, [0, 2, 4]), (1000, list(range(0, 14, 2)))])
def test_a_kernel_that_spills_gets_fewer_blocks(spills: int, tries: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Each try by a plan of its own, the known team first; where none has the registers it runs a step at a time."""
    counting(monkeypatch, spills)
    loops = Module()
    monkeypatch.setattr(module, "_cuda", loops)
    plan, loaded = programs.planned(CELLS[LSTM], 0, (0, False, 4, 8, 64, 1))
    assert loops.asked == [(True, 0), *((False, fewer) for fewer in tries)]
    assert (plan is None, loaded == 0) == ((True, True) if spills == 1000 else (False, False))


def test_what_is_missing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSED_RNN_NVRTC", "/nowhere/libnvrtc.so")
    nvrtc._library.cache_clear()
    try:
        assert "not built in are compiled by NVRTC, and /nowhere/libnvrtc.so cannot be loaded" in str(nvrtc.missing())
        assert programs.refusal() == nvrtc.missing()
        with pytest.raises(RuntimeError, match=r"/nowhere/libnvrtc\.so"):
            nvrtc._ask("nvrtcVersion")
    finally:
        nvrtc._library.cache_clear()


@needs_nvrtc
def test_an_error_has_the_compilers_words() -> None:
    with pytest.raises(RuntimeError, match="expected"):
        nvrtc.compiled("nonsense", "x", ["-std=c++17"])
    with pytest.raises(RuntimeError, match=r"knows no sm_30: a newer torch"):
        nvrtc.target(30)
    assert nvrtc.target(90) == "sm_90a"


DRIVER = """
#include <cstdio>
#include <cuda.h>
extern "C" {
CUresult cuCtxGetCurrent(CUcontext* c) { *c = (CUcontext)1; return CUDA_SUCCESS; }
CUresult cuModuleLoadData(CUmodule* m, const void* image) { *m = (CUmodule)2; printf("image %s\\n", (const char*)image); return CUDA_SUCCESS; }
CUresult cuModuleGetFunction(CUfunction* f, CUmodule m, const char* name) {
  if (name[0] == '?') return CUDA_ERROR_NOT_FOUND;
  *f = (CUfunction)3; printf("function %s\\n", name); return CUDA_SUCCESS;
}
CUresult cuFuncSetAttribute(CUfunction, CUfunction_attribute a, int value) { printf("attribute %d %d\\n", (int)a, value); return CUDA_SUCCESS; }
CUresult cuGetErrorString(CUresult, const char** s) { *s = "not found"; return CUDA_SUCCESS; }
CUresult cuLaunchKernelEx(const CUlaunchConfig* c, CUfunction f, void** p, void**) {
  printf("launch %u x %u, %u bytes, stream %p, T %d", c->gridDimX, c->blockDimX, c->sharedMemBytes, (void*)c->hStream, *(int*)p[0]);
  for (unsigned i = 0; i < c->numAttrs; ++i)
    printf(", %d: %u", (int)c->attrs[i].id, c->attrs[i].id == CU_LAUNCH_ATTRIBUTE_COOPERATIVE ? c->attrs[i].value.cooperative : c->attrs[i].value.clusterDim.x);
  printf("\\n");
  return CUDA_SUCCESS;
}
}
"""  # noqa: E501
PROGRAM = """
#include <cstdio>
#include "cuda/loaded.h"
using namespace fused_rnn::cuda;
int main() {
  std::string error;
  void* kernel = load("code", "_Zname", error);
  if (!kernel) { printf("%s\\n", error.c_str()); return 1; }
  ForwardLoop loop{};
  loop.steps.T = 7;
  const Shape shapes[] = {{32, 256, 16, 200000, false}, {64, 128, 1, 100000, true}, {3, 256, 1, 0, false}};
  for (const Shape& shape : shapes)
    printf("%s", launch_loaded(kernel, &loop, shape, (void*)0x40).c_str());
  load("code", "?", error);
  printf("%s\\n", error.c_str());
}
"""


@needs_nvcc
def test_what_the_driver_is_told(tmp_path: Path) -> None:
    """By a driver that is none: clusters, cooperative launches, shared memory as of the kernels of built-in cells."""
    for name, text in (("driver.cu", DRIVER), ("program.cpp", PROGRAM)):
        (tmp_path / name).write_text(text)
    stub, program = tmp_path / "libcuda.so.1", tmp_path / "program"
    for command in (
        ["nvcc", "-shared", "-Xcompiler", "-fPIC", str(tmp_path / "driver.cu"), "-o", str(stub)],
        ["nvcc", "-std=c++17", f"-I{ROOT / 'csrc'}", str(tmp_path / "program.cpp"), str(ROOT / "csrc/cuda/loaded.cu"),
         "-o", str(program)],
    ):  # fmt: skip
        subprocess.run(command, capture_output=True, check=True)
    said = subprocess.run(
        [str(program)], env={"LD_LIBRARY_PATH": str(tmp_path)}, capture_output=True, text=True, check=True
    ).stdout
    assert said.splitlines() == [
        "image code",
        "function _Zname",
        "attribute 14 1",  # CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED
        "attribute 8 200000",  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        "launch 32 x 256, 200000 bytes, stream 0x40, T 7, 4: 16",  # CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
        "launch 64 x 128, 100000 bytes, stream 0x40, T 7, 2: 1",  # CU_LAUNCH_ATTRIBUTE_COOPERATIVE
        "launch 3 x 256, 0 bytes, stream 0x40, T 7",
        "image code",
        "cuModuleGetFunction: not found",
    ]
    missing = subprocess.run([str(program)], env={}, capture_output=True, text=True, check=False)
    assert missing.stdout in ("libcuda.so.1 cannot be loaded\n", said), missing.stdout


@needs_nvcc
def test_an_object_file_of_the_module_compiles(tmp_path: Path) -> None:
    """nvcc hands what is not a kernel's on to g++, rewritten: kernels alone, as cubin.py makes them, do not show it."""
    defines = ["-DFUSED_RNN_FORMULA=Gru", "-DFUSED_RNN_PRECISION=f64", "-arch=sm_90a"]
    flags = ["-std=c++17", "--expt-relaxed-constexpr", "-c", "-o", str(tmp_path / "one.o")]
    for source, more in (("instantiate.cu", defines), ("launch.cu", defines[2:]), ("loaded.cu", defines[2:])):
        command = ["nvcc", *flags, *more, str(ROOT / "csrc" / "cuda" / source)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
