"""What runs a stream's steps: the CPU kernels on packed weights; any backend, or the CUDA loops on weights in fewer
bytes, on buffers that never move."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from fused_rnn import layers, ops
from fused_rnn.backends import cuda
from fused_rnn.call import NARROW, Kinds, LayerCall, Weights
from fused_rnn.gpu.narrow import Narrow, narrowed, widened

DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}  # csrc/params.h, Dtype
PLAIN = (Tensor, nn.Parameter)

Quick = Callable[[Tensor, Tensor | None], Tensor | None]  # a step, or None for a call out of the ordinary


def _check(weights: Sequence[Tensor], narrow: str | None) -> None:
    """Raises for what can be neither packed nor narrowed."""
    for k, w in enumerate(weights):
        if type(w) not in PLAIN:
            raise TypeError(f"weights[{k}]: got a {type(w).__name__}, expected a plain tensor")
        if narrow == "int8" and not bool(w.isfinite().all()):
            raise ValueError(f"weights[{k}]: got a value that is not finite, which int8 cannot hold")


def _outside_of_graphs(run: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """run(x), which torch.compile does not look into."""
    if is_compiling():
        from fused_rnn.untraced import call  # here: it imports Dynamo, which takes a second and 140 MiB

        y: Tensor = call(run, x)
        return y
    return run(x)


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
        _check(weights, self._narrow)
        plain = [w.resolve_neg().contiguous() for w in weights]
        each = self._kinds.split(plain)
        self._native.pack([[0 if t is None else t.data_ptr() for t in (*w[:5], *w.matrices, *w.params)] for w in each])

    def run(self, x: Tensor) -> Tensor:
        return _outside_of_graphs(self._run, x)

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


def _buffers(weights: list[Tensor], narrow: Narrow | None) -> list[Tensor]:
    """All of a layer's memory."""
    return weights if narrow is None or narrow.scale is None else [*weights, narrow.scale]


class Narrowed:
    """The CUDA loops, layer by layer, in buffers as Buffered has them: W_hh in fewer bytes, as the loops read it.

    The products before the loops are torch's, of what the other matrices' numbers in fewer bytes stand for, in the
    module's dtype. So is W_hh where a projection stands behind it, which the loops multiply it with beforehand.
    """

    quick: Quick | None = None

    def __init__(self, cell: str, weights: str, sizes: tuple[int, int, Kinds], states: list[Tensor]) -> None:
        self.sizes = sizes
        self._cell, self._narrow, self._states = cell, weights, states
        self._layers: list[tuple[list[Tensor], Narrow | None]] = []

    def take(self, weights: Sequence[Tensor]) -> None:
        _check(weights, self._narrow)
        kinds = self.sizes[2]
        layers = [self._narrowed(w, kinds.recurrent and not kinds.projects) for w in kinds.split(weights)]
        if not self._layers:
            self._layers = layers
            return
        for own, new in zip(self._layers, layers, strict=True):
            for buffer, value in zip(_buffers(*own), _buffers(*new), strict=True):
                buffer.copy_(value)

    def _narrowed(self, w: Weights, keeps: bool) -> tuple[list[Tensor], Narrow | None]:
        """A layer's weights as the loops take them. keeps: W_hh in fewer bytes."""

        def rounded(matrix: Tensor | None) -> Tensor | None:
            return None if matrix is None else widened(*narrowed(matrix, self._narrow), matrix.dtype)

        made, narrow = w._replace(w_ih=rounded(w.w_ih), w_hr=rounded(w.w_hr)), None
        if keeps:
            values, scale = narrowed(w.w_hh, self._narrow)
            made = made._replace(w_hh=values)
            narrow = Narrow(self._narrow, None if scale is None else scale.view(1, -1, w.w_hh.shape[1]))
        else:
            made = made._replace(w_hh=rounded(w.w_hh))
        flat = [*made[:5], *made.params]
        return [t.clone() for t in flat if t is not None], narrow

    def run(self, x: Tensor) -> Tensor:
        return _outside_of_graphs(self._run, x)

    def _run(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            for k, (weights, narrow) in enumerate(self._layers):
                states = [state[k : k + 1] for state in self._states]
                call = LayerCall(x, weights, states, None, None, self._cell, (1,))
                x, *after = cuda.forward(call) if narrow is None else cuda.forward_narrow(call, narrow)
                for state, new in zip(states, after, strict=True):
                    state.copy_(new)
        return x
