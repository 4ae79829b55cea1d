"""A GPU that is none, for every Python that finds this folder on its path: run by scripts/gpu_rehearse.py.

torch says that there is an H100, and puts on the CPU what goes to it. Launches go as far as they can: Triton's through
its real compiler to a driver that launches nothing, those of the persistent CUDA kernels to a count. What they would
have computed comes from the emulator, as a product and a pointwise kernel a step.

FUSED_RNN_REHEARSAL: without it nothing happens. FUSED_RNN_REHEARSAL_WRONG: a cell whose results are to be wrong.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

ROOT = Path(__file__).parents[2]
LONGEST = 8  # steps that are computed: who times longer loops does not look at what they give
WRONG = os.environ.get("FUSED_RNN_REHEARSAL_WRONG", "")
launches: list[tuple[str, int]] = []  # of persistent kernels: forward or backward, steps


# --- torch


def fake_torch() -> None:
    import torch
    from torch.overrides import TorchFunctionMode

    def on_the_cpu(value: Any) -> Any:
        is_gpu = isinstance(value, (str, torch.device)) and str(value).partition(":")[0] == "cuda"
        return torch.device("cpu") if is_gpu else value

    class OnTheCpu(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is torch.Tensor.cuda:
                return args[0]
            return func(*map(on_the_cpu, args), **{name: on_the_cpu(value) for name, value in (kwargs or {}).items()})

    properties = {
        "name": "a GPU that is none", "major": 9, "minor": 0, "multi_processor_count": 132, "clock_rate": 1980000,
        "total_memory": 80 << 30, "L2_cache_size": 50 << 20, "shared_memory_per_block_optin": 227 << 10,
    }  # fmt: skip
    answers = {
        "is_available": True, "device_count": 1, "current_device": 0, "synchronize": None, "empty_cache": None,
        "get_device_name": properties["name"], "get_device_capability": (9, 0), "is_current_stream_capturing": False,
        "get_device_properties": SimpleNamespace(**properties), "is_initialized": False,
        "current_stream": SimpleNamespace(cuda_stream=0),
        "cudart": SimpleNamespace(cudaProfilerStart=lambda: None, cudaProfilerStop=lambda: None),
    }  # fmt: skip
    for name, answer in answers.items():
        setattr(torch.cuda, name, lambda *_, answer=answer, **__: answer)
    torch.cuda.Event = Event
    torch.profiler.profile = Profile
    OnTheCpu().__enter__()


class Event:
    def __init__(self, **_: Any) -> None:
        self.seconds = 0.0

    def record(self, *_: Any) -> None:
        self.seconds = time.perf_counter()

    def elapsed_time(self, end: Event) -> float:
        return 1e3 * max(end.seconds - self.seconds, 1e-9)


class Profiled(list[Any]):
    def table(self, **_: Any) -> str:
        return "no table of a GPU that is none"


class Profile:
    """Of the persistent kernels that were counted, each step a microsecond."""

    def __init__(self, **_: Any) -> None:
        self.begin = 0

    def __enter__(self) -> Profile:
        self.begin = len(launches)
        return self

    def __exit__(self, *_: Any) -> None: ...

    def key_averages(self) -> Profiled:
        names = {"forward": "persistent_fwd_kernel", "backward": "persistent_bwd_kernel"}
        return Profiled(
            SimpleNamespace(key=f"fused_rnn::cuda::{names[way]}", device_time_total=float(steps))
            for way, steps in launches[self.begin :]
        )


# --- the library


class Counted:
    """The emulator's module, whose persistent loops launch nothing."""

    def __init__(self, module: Any) -> None:
        self.module = module

    def __getattr__(self, name: str) -> Any:
        return getattr(self.module, name)

    def Forward(self, *arguments: Any, **arrays: Any) -> Any:
        return self._loop("forward", self.module.Forward, *arguments, **arrays)

    def Backward(self, *arguments: Any, **arrays: Any) -> Any:
        return self._loop("backward", self.module.Backward, *arguments, **arrays)

    def _loop(self, way: str, bind: Any, cell: str, precision: int, plan: Any, steps: Any, **arrays: Any) -> Any:
        loop = bind(cell, precision, plan, steps, **arrays)
        if plan is None:
            return loop
        return SimpleNamespace(
            workspace_bytes=loop.workspace_bytes, run=lambda *_: launches.append((way, steps.T))
        )  # fmt: skip


def computing(loops: Any, plain: Any) -> type:
    """Loops that go as far as a launch, and are then run by the plain ones a step at a time."""

    def going(way: str) -> Any:
        def run(self: Any, **tensors: Any) -> None:
            layer = self.layer
            too_long = layer.steps > LONGEST
            if too_long and getattr(self, "plan", self) is None:  # all of it is in the emulator, step by step
                return
            changed = [tensor for name in ("carried", "dstates") for tensor in tensors.get(name, ())]
            before = [tensor.clone() for tensor in changed]
            getattr(loops, way)(self, **tensors)
            if too_long:
                return
            for tensor, value in zip(changed, before, strict=True):
                tensor.copy_(value)
            stepwise = plain(layer, tensors["w"], way == "backward")
            stepwise.plan = None
            getattr(stepwise, way)(**tensors)
            if layer.cell.name == WRONG:
                (tensors["dstates"][0] if way == "backward" else tensors["y"]).fill_(float("nan"))

        return run

    return type("Computing", (loops,), {way: going(way) for way in ("forward", "backward")})


def fake_library() -> None:
    from emulated import emulated

    from fused_rnn.commands.bench import grid, limits, measure
    from fused_rnn.cuda import launch, module
    from fused_rnn.cuda import plain as short
    from fused_rnn.triton import device

    plain, limits_of, plan = launch.Loops, limits.measure_limits, sys.modules["fused_rnn.plan"]
    module._emulated = Counted(emulated())
    launch.Loops = computing(plain, plain)
    short.forward = short.backward = lambda _: []  # it has no loops in Python that could be counted
    plan._device = lambda _: plan.DEVICES["sm_90"]

    def install_triton(_: str) -> None:
        """When it is first asked for: most processes never do."""
        import gpu_triton_cache

        from fused_rnn.triton import launch

        gpu_triton_cache.install()
        launch.Loops = computing(launch.Loops, plain)

    device.refusal = install_triton
    limits.measure_limits = lambda dtype, _: limits_of(dtype, "cpu")
    measure.GPU_BLOCK_S, measure.MIN_ROUNDS = 1e-3, 2
    grid.GRIDS["quick-cuda"] = grid.Grid(T=(2, 4), B=(8,), H=(64, 128), steps=(64,))


if os.environ.get("FUSED_RNN_REHEARSAL"):
    os.environ["FUSED_RNN_REHEARSAL"] = sys.executable  # by which the stand-ins know where a command begins
    sys.path[:0] = [str(ROOT), str(ROOT / "scripts"), str(ROOT / "tests/common")]
    fake_torch()
    fake_library()
