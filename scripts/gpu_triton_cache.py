"""Fills TRITON_CACHE_DIR without a GPU with what an H100 or H200 would compile: run by scripts/gpu_pack.py.

The real JIT runs, under a driver that looks like that GPU's and launches nothing. What is compiled for: the smoke's
kernels and those of the quick bench. Needs that machine's Python and Triton; the folder's path must be the same there.
"""

from __future__ import annotations

import platform
import re
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import triton
import triton.backends.nvidia.driver as nvidia
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime import build, driver

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]
import gpu_cases as cases  # noqa: E402

from fused_rnn.commands.bench.grid import GRIDS  # noqa: E402
from fused_rnn.triton import device as devices  # noqa: E402
from fused_rnn.triton.target import Target  # noqa: E402

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
H100 = Target("sm_90", 132, 227 * 1024)
signatures: dict[str, dict[int, str]] = {}  # of the launches that were asked for
found: list[bool] = []  # of each kernel that was asked for, whether the cache had it


class Utils:
    """What the driver is asked about the device and its code."""

    def get_device_properties(self, _: int) -> dict[str, int]:
        return {
            "max_shared_mem": H100.shared,
            "multiprocessor_count": H100.processors,
            "max_num_regs": 65536,
            "warpSize": 32,
            "sm_clock_rate": 1980000,
            "mem_clock_rate": 2619000,
            "mem_bus_width": 5120,
        }

    def load_binary(self, _: str, kernel: bytes, *__: Any) -> tuple[int, int, int, int, int]:
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(kernel)
            file.flush()
            text = subprocess.check_output([TOOLS / "cuobjdump", "-res-usage", file.name], text=True)
        found = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
        return 1, 1, found["REG"], (found["STACK"] + found["LOCAL"]) // 4, 1024


class Launcher:
    def __init__(self, src: Any, metadata: Any) -> None:
        signatures[str(src.signature)] = dict(src.signature)

    def __call__(self, *_: Any) -> None:
        pass


class Driver(DriverBase):
    utils, launcher_cls = Utils(), Launcher

    @staticmethod
    def is_active() -> bool:
        return True

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def set_current_device(self, _: int) -> None:
        pass

    def get_current_stream(self, _: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_benchmarker(self) -> Any:
        raise NotImplementedError

    def get_device_interface(self) -> Any:
        raise NotImplementedError


def install() -> None:
    """The loops take tensors on the cpu for that GPU's from now on, and nothing is launched."""
    knobs.compilation.listener = lambda *, cache_hit, **_: found.append(cache_hit)
    driver.set_active(Driver())  # type: ignore[no-untyped-call]
    torch.cuda.current_device = lambda: 0
    torch.cuda.is_current_stream_capturing = lambda: False
    devices.refusal = lambda _: None
    devices.target_of = lambda _: H100
    devices.target_at = lambda _: H100  # type: ignore[assignment]


def smoke() -> None:
    for kernel in cases.kernels("triton", True):
        given = cases.given(kernel, "gates", "cpu")
        with cases.forced(kernel):
            cases.backward(given, cases.forward(kernel, given, "triton"))


def bench() -> None:
    """The shapes of the quick bench, T alone made short: kernels do not depend on it."""
    from fused_rnn.commands.bench.providers import build as call

    done = set()
    for point in GRIDS["quick-cuda"].points("bf16", modes=("inference", "training")):
        short = type(point)(**{**vars(point), "T": 2})
        if short not in done:
            done.add(short)
            call("triton", short).run()


def compile_launchers() -> None:
    """Triton's own C, which calls the kernels: linked against a libcuda with nothing in it, and so not loaded here."""
    sources = [("cuda_utils", Path(nvidia.dirname, "driver.c").read_text())]
    sources += [("__triton_launcher", nvidia.make_launcher({}, signature, None)) for signature in signatures.values()]
    here = build.platform_key()
    with tempfile.TemporaryDirectory() as stub:
        library = f"{stub}/libcuda.so.1"
        command = ["gcc", "-shared", "-Wl,-soname,libcuda.so.1", "-o", library, "-x", "c", "/dev/null"]
        subprocess.run(command, check=True)
        # The key holds what `platform` finds out by the program `file`, which a machine may lack.
        for key in {here, ",".join([platform.machine(), platform.system(), "64bit", ""])}:
            build.platform_key = lambda key=key: key
            for name, source in sources:
                with suppress(ImportError):
                    build.compile_module_from_src(
                        src=source,
                        name=name,
                        library_dirs=[nvidia.libdevice_dir, stub],
                        include_dirs=nvidia.include_dirs,
                        libraries=nvidia.libraries,
                    )


def main() -> None:
    install()
    torch.set_num_threads(1)
    smoke()
    bench()
    compile_launchers()
    print(f"{len(found)} kernels, {found.count(False)} of them compiled; {len(signatures)} launchers")


if __name__ == "__main__":
    main()
