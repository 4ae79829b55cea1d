"""What runs a stream's steps: the CPU kernels on weights that lie packed, or any backend on buffers that never move."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from fused_rnn import layers, ops
from fused_rnn.call import Kinds

NARROW = {None: 0, "bf16": 1, "int8": 2}  # csrc/params.h, Narrow
DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}  # csrc/params.h, Dtype
PLAIN = (Tensor, nn.Parameter)

Quick = Callable[[Tensor, Tensor | None], Tensor | None]  # a step, or None for a call out of the ordinary


class Packed:
    """The CPU kernels on packed weights, all layers in one call."""

    def __init__(
        self,
        cell: str,
        weights: str | None,
        input_size: int,
        sizes: tuple[int, int, Kinds],
        states: list[Tensor],
        dtype: torch.dtype,
    ) -> None:
        self.sizes = sizes
        hidden, self._width, self._kinds = sizes
        layers, batch, _ = states[0].shape
        self._narrow = weights
        self._native = ops._C.Stream(
            cell, DTYPES[dtype], NARROW[weights], batch, input_size, hidden, self._width, layers,
            self._kinds.projects, [state.data_ptr() for state in states],
        )  # fmt: skip
        self._states = states  # whose memory the native stream works in
        like = torch.empty(batch, self._width, dtype=dtype, device=states[0].device)
        self.quick: Quick | None = None if ops.fast_path is None else self._native.fast_path(like)

    def take(self, weights: Sequence[Tensor]) -> None:
        for k, w in enumerate(weights):
            if type(w) not in PLAIN:
                raise TypeError(f"weights[{k}]: got a {type(w).__name__}, expected a plain tensor")
            if self._narrow == "int8" and not bool(w.isfinite().all()):
                raise ValueError(f"weights[{k}]: got a value that is not finite, which int8 cannot hold")
        plain = [w.resolve_neg().contiguous() for w in weights]
        each = self._kinds.split(plain)
        self._native.pack([[0 if t is None else t.data_ptr() for t in (*w[:5], *w.params)] for w in each])

    def run(self, x: Tensor) -> Tensor:
        if is_compiling():
            from fused_rnn.untraced import call  # here: it imports Dynamo, which takes a second and 140 MiB

            y: Tensor = call(self._run, x)
            return y
        return self._run(x)

    def _run(self, x: Tensor) -> Tensor:
        x = x.detach().resolve_neg().contiguous()
        steps, batch, _ = x.shape
        y = x.new_empty(steps, batch, self._width)
        self._native.run(x.data_ptr(), steps, y.data_ptr())
        return y


class Buffered:
    """Any backend, by `layers.run`.

    State and weights lie in buffers that are written in place, so that a captured CUDA graph finds them.
    """

    quick: Quick | None = None

    def __init__(
        self,
        cell: str,
        backend: str | None,
        sizes: tuple[int, int, Kinds],
        states: list[Tensor],
        heads: int = 1,
    ) -> None:
        self.sizes = sizes
        self._states = states
        self._weights: list[Tensor] = []
        self._cell, self._backend, self._heads = cell, backend, heads

    def take(self, weights: Sequence[Tensor]) -> None:
        if not self._weights:
            self._weights = [w.clone() for w in weights]
            return
        for own, w in zip(self._weights, weights, strict=True):
            own.copy_(w)

    def run(self, x: Tensor) -> Tensor:
        device = x.device.type
        with torch.no_grad():
            if torch.is_autocast_enabled(device):  # which would change the weights' dtype, and the result's
                with torch.autocast(device, enabled=False):
                    return self._advance(x)
            return self._advance(x)

    def _advance(self, x: Tensor) -> Tensor:
        states = self._states
        layer_count, run = states[0].size(0), layers.run
        y, *after = run(self._cell, x, self._weights, states, layer_count, backend=self._backend, heads=self._heads)
        for state, new in zip(states, after, strict=True):
            state.copy_(new)
        return y
