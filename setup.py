"""Builds fused_rnn._C: the CPU loops once per instruction set, and the ops on LibTorch's stable ABI."""

from __future__ import annotations

import os
import platform
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
TORCH = Path(torch.__file__).parent
TORCH_TARGET = "0x020a000000000000"  # the oldest LibTorch whose stable ABI we use: 2.10

# -ffp-contract=fast lets a * b + c become one FMA; nothing that changes the meaning of NaN, infinity or order is on.
COMMON = ["-std=c++17", "-O3", "-g0", "-fPIC", "-fvisibility=hidden", "-ffp-contract=fast"]
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


def files(pattern: str, *parts: str) -> list[Path]:
    return [p.relative_to(ROOT) for part in parts for p in sorted((ROOT / "csrc" / part).glob(pattern))]


def sources() -> list[str]:
    keep = [p for p in files("*.cpp", "cpu", "ops") if X86 or p.name not in ISA_FLAGS or p.name == "isa_baseline.cpp"]
    return [str(p) for p in keep]


class Build(build_ext):
    """Compiles each file with its own flags, as many at a time as there are cores."""

    def build_extension(self, ext: Extension) -> None:
        extra = [f"-fsanitize={SANITIZE}", "-fno-omit-frame-pointer", "-g1", "-O1", "-w"] if SANITIZE else []

        def compile_one(source: str) -> list[str]:
            name = Path(source).name
            made = Path(self.build_temp, source).with_suffix(".o")
            inputs = [source, __file__, *ext.depends]
            if not self.force and made.exists() and made.stat().st_mtime > max(os.path.getmtime(p) for p in inputs):
                return [str(made)]
            openmp = ["-fopenmp"] if name == "team.cpp" else []
            return self.compiler.compile(
                [source],
                output_dir=self.build_temp,
                macros=ext.define_macros,
                include_dirs=ext.include_dirs,
                extra_postargs=[*COMMON, *ISA_FLAGS.get(name, []), *openmp, *extra],
                depends=ext.depends,
            )

        jobs = int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)
        with ThreadPoolExecutor(jobs) as pool:
            objects = [o for found in pool.map(compile_one, ext.sources) for o in found]
        self.compiler.link_shared_object(
            objects,
            self.get_ext_fullpath(ext.name),
            libraries=["torch_cpu", "c10"],
            library_dirs=[str(TORCH / "lib")],
            # torch brings the OpenMP runtime that is loaded first, under the same name: the regions share its threads.
            extra_postargs=["-fopenmp", f"-Wl,-rpath,{TORCH / 'lib'}", *extra],
            target_lang="c++",
        )


setup(
    ext_modules=[
        Extension(
            "fused_rnn._C",
            sources(),
            include_dirs=[str(TORCH / "include"), str(TORCH / "include/torch/csrc/api/include")],
            define_macros=[("TORCH_TARGET_VERSION", TORCH_TARGET)],
            depends=[str(p) for p in files("*.h", "", "cells", "cpu", "ops")],
            language="c++",
        )
    ],
    cmdclass={"build_ext": Build},
)
