"""Builds fused_rnn._C: the CPU loops once per instruction set, the ops on LibTorch's stable ABI. And fused_rnn._cuda,
the CUDA loops, if FUSED_RNN_CUDA=1, or with auto where nvcc is and torch is a CUDA build, GPU or not; the architectures
are TORCH_CUDA_ARCH_LIST's. FUSED_RNN_CUDA_DEBUG=1: a CTA that waits 2 s for another one fails the kernel and says so,
where it would hang the GPU. MAX_JOBS: compilers at a time."""

from __future__ import annotations

import os
import platform
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
TORCH = Path(torch.__file__).parent
INCLUDE = [str(TORCH / "include"), str(TORCH / "include/torch/csrc/api/include")]
TORCH_TARGET = "0x020a000000000000"  # the oldest LibTorch whose stable ABI we use: 2.10

# -ffp-contract=fast lets a * b + c become one FMA; nothing that changes the meaning of NaN, infinity or order is on.
COMMON = ["-std=c++17", "-O3", "-g0", "-fPIC", "-fvisibility=hidden", "-ffp-contract=fast"]
COMMON += [f"-ffile-prefix-map={TORCH.parent}/="]  # errors quote torch's headers, not where the builder had them
COMMON += ["-Wall", "-Wextra", "-Wno-maybe-uninitialized"]
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mprefer-vector-width=512"]
# select.cpp asks the processor for every flag named here before it uses the file's code.
ISA_FLAGS = {
    "isa_baseline.cpp": [],
    "isa_avx2.cpp": AVX2,
    "isa_avx512.cpp": AVX512,
    "isa_avx512bf16.cpp": [*AVX512, "-mavx512bf16"],
    "isa_amx.cpp": [*AVX512, "-mavx512bf16", "-mamx-tile", "-mamx-bf16"],
}
X86 = platform.machine() in ("x86_64", "AMD64")
SANITIZE = os.environ.get("FUSED_RNN_SANITIZE")  # e.g. "address,undefined": see scripts/sanitize.sh
EXTRA = [f"-fsanitize={SANITIZE}", "-fno-omit-frame-pointer", "-g1", "-O1", "-w"] if SANITIZE else []

NVCC = shutil.which("nvcc") or shutil.which("nvcc", path=os.environ.get("CUDA_HOME", "/usr/local/cuda") + "/bin")
WANTED = os.environ.get("FUSED_RNN_CUDA", "auto")
ARCHITECTURES = os.environ.get("TORCH_CUDA_ARCH_LIST") or "8.0 8.6 8.9 9.0a 10.0 12.0+PTX"
NVCC_FLAGS = ["-std=c++17", "-O3", "--expt-relaxed-constexpr", "-Xcompiler", "-fPIC,-fvisibility=hidden"]
if os.environ.get("FUSED_RNN_CUDA_DEBUG") == "1":
    NVCC_FLAGS.append("-DFUSED_RNN_BOUNDED_SPINS")
NUMBERS = ("bf16", "f16", "tf32", "ieee", "f64")


def files(pattern: str, *parts: str) -> list[str]:
    return [str(p.relative_to(ROOT)) for part in parts for p in sorted((ROOT / "csrc" / part).glob(pattern))]


def gencodes() -> list[str]:
    names = [name.partition("+") for name in ARCHITECTURES.replace(";", " ").split()]
    codes = [(number.replace(".", ""), kind) for number, _, ptx in names for kind in ("sm", "compute")[: 1 + bool(ptx)]]
    return [f"-gencode=arch=compute_{number},code={kind}_{number}" for number, kind in codes]


class Build(build_ext):
    """Compiles each file with its own flags, as many at a time as there are cores."""

    def build_extension(self, ext: Extension) -> None:
        cuda = ext.name.endswith("_cuda")
        own = re.sub(r"\W", "-", " ".join([ARCHITECTURES, *NVCC_FLAGS[5:]]))
        place = Path(self.build_temp, own) if cuda else Path(self.build_temp)

        def compile_one(unit: tuple[str, str]) -> list[str]:
            source, number = unit
            made = place / Path(source).with_suffix(f".{number}.o" if number else ".o")
            inputs = [source, __file__, *ext.depends]
            if not self.force and made.exists() and made.stat().st_mtime > max(os.path.getmtime(p) for p in inputs):
                return [str(made)]
            if source.endswith(".cu"):
                made.parent.mkdir(parents=True, exist_ok=True)
                command = [str(NVCC), *NVCC_FLAGS, *gencodes(), *[f"-DFUSED_RNN_NUMBER={number}"] * bool(number)]
                self.spawn([*command, "-c", source, "-o", str(made)])
                return [str(made)]
            flags = COMMON + ISA_FLAGS.get(Path(source).name, []) + ["-fopenmp"] * source.endswith("team.cpp") + EXTRA
            return self.compiler.compile([source], str(place), ext.define_macros, INCLUDE, extra_postargs=flags)

        units = [(s, n) for s in ext.sources for n in (NUMBERS if "instantiate" in s else ("",))]
        with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)) as pool:
            objects = [o for found in pool.map(compile_one, units) for o in found]
        made = self.get_ext_fullpath(ext.name)
        if cuda:  # with the static runtime, hidden from torch's own: the module loads where there is no driver
            Path(made).parent.mkdir(parents=True, exist_ok=True)
            self.spawn([str(NVCC), "-shared", *objects, "-Xlinker", "--exclude-libs,ALL", "-o", made])
            return
        # No rpath: torch's import has loaded its libraries before ours is. So it has the OpenMP runtime that it brings,
        # under the same name: the regions share its threads.
        link = ["-fopenmp", f"-L{TORCH / 'lib'}", "-ltorch_cpu", "-lc10", *EXTRA]
        self.compiler.link_shared_object(objects, made, extra_postargs=link, target_lang="c++")


if WANTED not in ("auto", "0", "1") or (WANTED == "1" and not NVCC):
    raise SystemExit(f"FUSED_RNN_CUDA={WANTED}: " + ("nvcc is nowhere" if WANTED == "1" else "expected auto, 0 or 1"))
cpu = [s for s in files("*.cpp", "cpu", "ops") if X86 or "isa_" not in s or "baseline" in s] + ["csrc/cuda/plan.cpp"]
macros, headers = [("TORCH_TARGET_VERSION", TORCH_TARGET)], files("*.h", "", "cells", "cpu", "cuda", "ops")
extensions = [Extension("fused_rnn._C", cpu, INCLUDE, macros, depends=headers, language="c++")]
if WANTED == "1" or (WANTED == "auto" and NVCC and torch.version.cuda):
    macros = [("FUSED_RNN_MODULE", "_cuda"), ("FUSED_RNN_ARCHITECTURES", f'"{ARCHITECTURES}"')]
    sources, headers = files("*.c*", "cuda", "cuda/instantiate"), files("*.h", "", "cells", "cuda", "cuda/primitives")
    extensions += [Extension("fused_rnn._cuda", sources, INCLUDE, macros, depends=headers, language="c++")]
setup(ext_modules=extensions, cmdclass={"build_ext": Build})
