"""Builds fused_rnn._C: the CPU loops once per instruction set, the ops on LibTorch's stable ABI. With FUSED_RNN_CUDA=1
fused_rnn._cuda as well, the CUDA loops, by nvcc, GPU or not; the architectures are TORCH_CUDA_ARCH_LIST's.
FUSED_RNN_CUDA_DEBUG=1: a CTA that waits 2 s for another one fails the kernel and says so, where it would hang the GPU.
MAX_JOBS: compilers at a time. FUSED_RNN_ISAS: of the instruction sets only these, and the baseline.
FUSED_RNN_MORE_CELLS: the full path of a header with cells beside those of csrc/cells.
Of torch the headers and libraries are read, and it is not imported: FUSED_RNN_TORCH names its folder, else it is that
of this environment, or of the one that pip installs into from an isolated build."""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import os
import platform
import re
import runpy
import shlex
import shutil
import site
import subprocess
import sys
import sysconfig
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from itertools import takewhile
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build import build
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
OBJECTS = Path("build/objects")  # named by what goes into them; all interpreters share those that know no Python
OLDEST = (2, 10)  # the LibTorch whose stable ABI we use
TORCH_TARGET = "0x020a000000000000"
HOW = "pip install torch, and then, in the same environment, pip install --no-build-isolation ."


def find_torch() -> tuple[Path, str]:
    """The folder and the version of torch: the one named, or one that can be imported, or one where pip installs to."""
    named = os.environ.get("FUSED_RNN_TORCH")
    installed = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    installed += [site.getusersitepackages()] * (
        sys.prefix == sys.base_prefix
    )  # which a virtual environment does not see
    found = importlib.util.find_spec("torch")
    found_here = [Path(found.origin).parent] if found is not None and found.origin else []
    for place in [Path(named)] if named else [*found_here, *(Path(folder, "torch") for folder in installed)]:
        if (place / "include").is_dir():
            version = runpy.run_path(str(place / "version.py"))["__version__"]
            if tuple(map(int, re.findall(r"\d+", version)[:2])) < OLDEST:
                raise SystemExit(f"torch: got {version} in {place.parent}, expected 2.10 or later to build fused_rnn")
            return place, version
    if named:
        raise SystemExit(f"FUSED_RNN_TORCH: got {named}, expected the folder of an installed torch, with its include")
    raise SystemExit(f"fused_rnn is compiled against the torch it will run with, and there is none here: {HOW}")


TORCH, TORCH_VERSION = find_torch()
HEADERS = (TORCH / "include").resolve()
INCLUDE = [HEADERS, HEADERS / "torch/csrc/api/include", *map(sysconfig.get_path, ("include", "platinclude"))]

# -ffp-contract=fast lets a * b + c become one FMA; nothing that changes the meaning of NaN, infinity or order is on.
COMMON = ["-std=c++17", "-O3", "-g0", "-DNDEBUG", "-fwrapv", "-fPIC", "-fvisibility=hidden", "-ffp-contract=fast"]
# Where the linker happens to put a small loop costs it up to a fifth of its time; not so on whole cache lines.
COMMON += ["-falign-functions=64"]
COMMON += ["-Wall", "-Wextra", "-Wno-maybe-uninitialized"]
# Errors quote torch's headers, not where the builder had them; warnings are about our files.
PYTHON = [f"-isystem{folder}" for folder in dict.fromkeys(INCLUDE)] + [f"-ffile-prefix-map={HEADERS.parent.parent}/="]
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mprefer-vector-width=512"]
# select.cpp asks the processor for every flag named here before it uses the file's code. The slowest to compile first.
ISA_FLAGS = {
    "isa_avx512.cpp": AVX512,
    "isa_baseline.cpp": [],
    "isa_avx2.cpp": AVX2,
    "isa_avx512bf16.cpp": [*AVX512, "-mavx512bf16", "-mavx512vnni"],
    "isa_amx.cpp": [*AVX512, "-mavx512bf16", "-mavx512vnni", "-mamx-tile", "-mamx-bf16"],
}
X86 = platform.machine() in ("x86_64", "AMD64")
WANTED_ISAS = os.environ.get("FUSED_RNN_ISAS", "").split()
ISAS = {name for name in ISA_FLAGS if "baseline" in name or (X86 and (not WANTED_ISAS or name[4:-4] in WANTED_ISAS))}
MORE_CELLS = os.environ.get("FUSED_RNN_MORE_CELLS")
SANITIZE = os.environ.get("FUSED_RNN_SANITIZE")  # e.g. "address,undefined": see scripts/sanitize.sh
EXTRA = [f"-fsanitize={SANITIZE}", "-fno-omit-frame-pointer", "-g1", "-O1", "-w"] if SANITIZE else []

NVCC = shutil.which("nvcc") or shutil.which("nvcc", path=os.environ.get("CUDA_HOME", "/usr/local/cuda") + "/bin")
WANTED = os.environ.get("FUSED_RNN_CUDA") or "0"
ARCHITECTURES = os.environ.get("TORCH_CUDA_ARCH_LIST") or "8.0 8.6 8.9 9.0a 10.0 12.0+PTX"
NVCC_FLAGS = ["-std=c++17", "-O3", "--expt-relaxed-constexpr", "-Xcompiler", "-fPIC,-fvisibility=hidden"]
NVCC_FLAGS += ["-Xfatbin", "-compress-all"]  # a fourth of the size
if os.environ.get("FUSED_RNN_CUDA_DEBUG") == "1":
    NVCC_FLAGS.append("-DFUSED_RNN_BOUNDED_SPINS")
DEMOS = ("text", "speech", "translation", "sentiment", "prices", "memory", "material", "side_by_side")
JOBS = os.environ.get("MAX_JOBS") or str(len(os.sched_getaffinity(0)))
if not re.fullmatch("[1-9][0-9]*", JOBS):
    raise SystemExit(f"MAX_JOBS: got {JOBS!r}, expected a positive number")


def files(pattern: str, *parts: str) -> list[str]:
    return [str(p.relative_to(ROOT)) for part in parts for p in sorted((ROOT / "csrc" / part).glob(pattern))]


def kernels() -> list[tuple[str, str]]:
    """What csrc/cuda/instantiate.cu is compiled for: each registered cell's type in each precision."""
    text = "".join((ROOT / header).read_text() for header in files("*.h", "cells"))
    types = re.findall(r"^FUSED_RNN_CELL\(\d+, (\w+)\)", text, re.MULTILINE)
    return [(formula, precision) for formula in types for precision in ("bf16", "f16", "tf32", "ieee", "f64")]


def gencodes() -> list[str]:
    names = [name.partition("+") for name in ARCHITECTURES.replace(";", " ").split()]
    codes = [(number.replace(".", ""), kind) for number, _, ptx in names for kind in ("sm", "compute")[: 1 + bool(ptx)]]
    return [f"-gencode=arch=compute_{number},code={kind}_{number}" for number, kind in codes]


def check_compiler(command: list[str]) -> str:
    """The compiler's version, a line; SystemExit where it is missing, or knows not all that we ask of it."""
    flags = ["-std=c++17", "-fopenmp", *(ISA_FLAGS["isa_amx.cpp"] if X86 else [])]
    needs = "fused_rnn needs a C++17 compiler: GCC 11 or clang 12, or later (apt install g++; CXX names another one)"
    try:
        version = subprocess.run([*command, "--version"], capture_output=True, text=True, check=True).stdout
        program = [*command, *flags, "-fsyntax-only", "-x", "c++", "-"]
        done = subprocess.run(program, input="#include <vector>\n", capture_output=True, text=True, check=False)
    except (OSError, subprocess.CalledProcessError) as error:
        raise SystemExit(f"{command[0]}: {getattr(error, 'strerror', None) or error}. {needs}") from None
    version = version.partition("\n")[0]
    if done.returncode:
        raise SystemExit(f"{version}: {done.stderr.strip().partition(chr(10))[0]}. {needs}")
    return version


def knows_python(source: str) -> bool:
    """Whether a file includes Python's and torch's headers."""
    return Path(source).parent.name == "ops" or Path(source).name == "python.cpp"


class Fresh(build):
    """What an earlier build has left is not packed: a module without its source, kernels that were not asked for."""

    def run(self) -> None:
        shutil.rmtree(Path(self.build_lib, "fused_rnn"), ignore_errors=True)
        super().run()


class Sources(build_py):
    """With the headers that NVRTC compiles users' cells from, and the demos; in place they lie beside the package."""

    def run(self) -> None:
        super().run()
        headers = files("*", "cells", "cuda", "cuda/primitives", "nvrtc")
        copied = [path for path in headers if Path(path).suffix in ("", ".h")]
        copied += [f"examples/{name}.py" for name in DEMOS]
        for path in [] if self.editable_mode else filter(os.path.isfile, copied):
            made = Path(self.build_lib, "fused_rnn", path)
            self.mkpath(str(made.parent))
            self.copy_file(path, str(made))


class Build(build_ext):
    """Compiles each file with its own flags, as many at a time as there are cores, and no file twice."""

    def run(self) -> None:
        super().run()
        wheel = "bdist_wheel" in self.distribution.commands
        if wheel:  # Python that is started in this folder imports the package in it
            self.copy_extensions_to_source()
        if (wheel or self.inplace) and WANTED == "0":  # kernels of an earlier build, and other sources
            (ROOT / self.get_ext_filename("fused_rnn._cuda")).unlink(missing_ok=True)

    def build_extensions(self) -> None:
        command = getattr(self.compiler, "compiler_so_cxx", None) or self.compiler.compiler_so
        self.cxx = [*takewhile(lambda word: not word.startswith("-"), command)]  # not the flags Python was built with
        self.cxx_version = check_compiler(self.cxx)
        super().build_extensions()

    def build_extension(self, ext: Extension) -> None:
        longest_first = sorted(ext.sources, key=lambda source: [*ISA_FLAGS, Path(source).name].index(Path(source).name))
        units = [(s, kernel) for s in longest_first for kernel in (kernels() if "instantiate" in s else [()])]
        started = time.monotonic()
        with ThreadPoolExecutor(int(JOBS)) as pool:
            running = [pool.submit(self.compile_one, ext, *unit) for unit in units]
            try:
                for count, done in enumerate(as_completed(running), 1):
                    name, passed = Path(done.result()).name, time.monotonic() - started
                    self.announce(f"[{count}/{len(units)}] {name} {passed:.0f} s", level=logging.INFO)
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)  # an error is seen at once
                raise
        made = Path(self.get_ext_fullpath(ext.name))
        made.parent.mkdir(parents=True, exist_ok=True)
        part = made.with_suffix(".part")  # new, or the linker is left out; renamed, for who has loaded the old one
        part.unlink(missing_ok=True)
        self.link(ext, [done.result() for done in running], str(part))
        part.replace(made)

    def link(self, ext: Extension, objects: list[str], made: str) -> None:
        if ext.name.endswith("_cuda"):  # with the static runtime, hidden from torch's own: it loads without a driver
            self.spawn([str(NVCC), "-shared", *objects, "-Xlinker", "--exclude-libs,ALL", "-o", made])
        else:
            # No rpath: torch's import has loaded its libraries before ours is. So it has the OpenMP runtime that it
            # brings, under the same name: the regions share its threads.
            link = ["-fopenmp", f"-L{TORCH / 'lib'}", "-ltorch_cpu", "-lc10", *EXTRA]
            self.compiler.link_shared_object(objects, made, extra_postargs=link, target_lang="c++")

    def compile_one(self, ext: Extension, source: str, kernel: tuple[str, ...]) -> str:
        """The path of the object: compiled, or there already of the same sources by the same command."""
        command = self.command(ext, source, kernel)
        version = NVCC_VERSION if source.endswith(".cu") else self.cxx_version
        loops = Path(source).parent.name == "cpu"  # they take minutes, and know nothing of these
        foreign = ("cuda", "ops") if loops else ()
        inputs = [source, *(header for header in ext.depends if Path(header).parent.name not in foreign)]
        content = hashlib.sha256(b"".join(Path(path).read_bytes() for path in inputs)).hexdigest()[:12]
        if knows_python(source):
            version += f" torch {TORCH_VERSION} Python {sys.version}"  # whose headers may change in their place
        folder = OBJECTS / hashlib.sha256("\n".join([version, *command]).encode()).hexdigest()[:12]
        name = "-".join([source.removeprefix("csrc/").replace("/", "-"), *kernel])
        made = folder / f"{name}.{content}.o"
        if self.force or not made.exists():
            folder.mkdir(parents=True, exist_ok=True)
            part = made.with_suffix(f".{os.getpid()}")
            self.spawn([*command, "-c", source, "-o", str(part)])
            part.replace(made)
            for old in {*folder.glob(f"{name}.*.o")} - {made}:
                old.unlink(missing_ok=True)
        return str(made)

    def command(self, ext: Extension, source: str, kernel: tuple[str, ...]) -> list[str]:
        if source.endswith(".cu"):
            defines = [f"-DFUSED_RNN_FORMULA={kernel[0]}", f"-DFUSED_RNN_PRECISION={kernel[1]}"] if kernel else []
            return [str(NVCC), *NVCC_FLAGS, *gencodes(), *defines]
        path = Path(source)
        macros = [f"-D{name}={value}" for name, value in ext.define_macros]
        flags = COMMON + ISA_FLAGS.get(path.name, []) + ["-fopenmp"] * (path.name == "team.cpp") + EXTRA
        own = shlex.split(os.environ.get("CXXFLAGS", os.environ.get("CFLAGS", "")))
        return [*self.cxx, *flags, *macros, *PYTHON * knows_python(source), *own]


if WANTED not in ("0", "1"):
    raise SystemExit(f"FUSED_RNN_CUDA: got {WANTED!r}, expected 0 or 1")
if WANTED == "1" and not NVCC:
    raise SystemExit("FUSED_RNN_CUDA=1: nvcc is neither on the PATH nor in CUDA_HOME; it comes with the CUDA toolkit")
cpu = [s for s in files("*.cpp", "cpu", "ops") if "isa_" not in s or Path(s).name in ISAS] + ["csrc/cuda/plan.cpp"]
macros, headers = [("TORCH_TARGET_VERSION", TORCH_TARGET)], files("*.h", "", "cells", "cpu", "cuda", "ops")
if MORE_CELLS:
    macros, headers = [*macros, ("FUSED_RNN_MORE_CELLS", f'"{MORE_CELLS}"')], [*headers, MORE_CELLS]
extensions = [Extension("fused_rnn._C", cpu, define_macros=macros, depends=headers, language="c++")]
if WANTED == "1":
    NVCC_VERSION = subprocess.run([str(NVCC), "--version"], capture_output=True, text=True, check=True).stdout
    macros = [("FUSED_RNN_MODULE", "_cuda"), ("FUSED_RNN_ARCHITECTURES", f'"{ARCHITECTURES}"')]
    sources, headers = files("*.c*", "cuda"), files("*.h", "", "cells", "cuda", "cuda/primitives")
    extensions += [Extension("fused_rnn._cuda", sources, define_macros=macros, depends=headers, language="c++")]
setup(ext_modules=extensions, cmdclass={"build": Fresh, "build_py": Sources, "build_ext": Build})
