"""torch.compile of what people write: a Python loop over torch's cell, which it unrolls, or torch's `scan`.

What it takes to compile, with no caches on disk and for this one shape, is the first run.
"""

from __future__ import annotations

import shutil
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fused_rnn.commands.bench.calls import Call, CellLoop
from fused_rnn.commands.bench.grid import SEQUENCES, Point
from fused_rnn.commands.bench.rivals.rival import Build, Rival, restricted


class CellScan(CellLoop):
    """torch's higher order `scan` over `torch.nn.<Kind>Cell`."""

    def forward(self, x: Tensor) -> Tensor:
        from torch._higher_order_ops.scan import scan

        def step(hx: Any, x_t: Tensor) -> Any:
            # The states are cloned, too: torch refuses one that is also kept for backward (pytorch#195977).
            states = self.cell(x_t, hx)
            if isinstance(states, tuple):
                return tuple(state.clone() for state in states), states[0].clone()
            return states.clone(), states.clone()

        zeros = x.new_zeros(x.shape[1], self.cell.hidden_size)
        enter = (zeros, zeros.clone()) if isinstance(self.cell, nn.LSTMCell) else zeros
        y: Tensor = scan(step, enter, x)[1]
        return y


class CompiledCall(Call):
    """A module over a cell, compiled in its first run."""

    latest: Point | None = None  # what Dynamo has compilations of

    def __init__(self, kind: type[CellLoop], call: Call) -> None:
        point = call.point
        loop = kind(point.cell, point.width, point.H, device="cpu", dtype=call.x.dtype)
        loop.cell.load_state_dict({k.removesuffix("_l0"): v for k, v in call.module.state_dict().items()})
        x = call.x.detach().requires_grad_(call.training)
        if CompiledCall.latest != point:  # it keeps eight of a function, and then runs it as it is
            torch.compiler.reset()
            CompiledCall.latest = point
        forward: Callable[[Tensor], Tensor] = torch.compile(loop, dynamic=False)
        super().__init__(point, loop, lambda: forward(x), x, call.dy)

    def run(self) -> None:
        if self.compile_s is not None:
            super().run()
            return
        import torch._dynamo.config
        import torch._inductor.config

        scan_needs = torch._dynamo.config.patch(capture_scalar_outputs=True)
        without_caches = torch._inductor.config.patch(force_disable_caches=True)
        with scan_needs, without_caches, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that there are no caches
            start = time.perf_counter()
            super().run()
            self.compile_s = time.perf_counter() - start


def _missing(_: str) -> str | None:
    from torch._inductor import config

    compilers = [name for name in config.cpp.cxx if name]
    return None if any(map(shutil.which, compilers)) else f"a C++ compiler, {' or '.join(compilers)}"


@contextmanager
def _opened(kind: type[CellLoop], _: str) -> Iterator[Build]:
    torch.compile(torch.neg)(torch.zeros(2, device="cpu"))  # what torch loads first is no layer's
    yield partial(CompiledCall, kind)


def _rival(title: str, kind: type[CellLoop]) -> Rival:
    supports = partial(restricted, modes=SEQUENCES, dtypes=("fp32", "bf16"))
    return Rival(title, supports, _missing, lambda _: {}, partial(_opened, kind))


LOOP = _rival("torch.compile of the loop", CellLoop)
SCAN = _rival("torch.compile of scan", CellScan)
