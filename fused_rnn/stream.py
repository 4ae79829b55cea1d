"""A stack of layers that runs step by step: it holds its state, and its weights as they were when it was made."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch._C import _is_tracing as is_tracing  # torch.jit.trace
from torch.autograd import forward_ad
from torch.compiler import is_compiling, is_exporting

from fused_rnn import checks, layers, ops
from fused_rnn.call import Kinds
from fused_rnn.cells import CELLS
from fused_rnn.transforms import op_gradient

NARROW = {None: 0, "bf16": 1, "int8": 2}  # csrc/params.h, Narrow
_DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}  # csrc/params.h, Dtype
_PLAIN = (Tensor, nn.Parameter)

State = Tensor | tuple[Tensor, Tensor]
Quick = Callable[[Tensor, Tensor | None], Tensor | None]  # a step, or None for a call out of the ordinary


class Stream:
    """What `module.stream(batch_size)` returns: the module's layers, run as the steps of a sequence arrive.

    Letters: T time, B batch_size, D input_size, P proj_size or else hidden_size H, L num_layers.

    Every step continues from the state that the one before has left; the first starts from zeros. The results are
    those of one call of the module, in eval mode, on all steps since the last `reset`. No gradient flows through a
    stream. It runs on a copy of the weights: a change of the module's weights is seen after `refresh()`, not before.

    A returned tensor is the caller's own; later steps leave it alone. One stream belongs to one thread at a time, and a
    step while another thread is in one raises RuntimeError; several streams may run in several threads. A stream that
    is copied or pickled reads the weights anew.

    Examples:
        >>> stream = fused_rnn.GRU(10, 20).stream(batch_size=3)
        >>> y_t = stream.step(torch.randn(3, 10))
        >>> y = stream.steps(torch.randn(5, 3, 10))
        >>> stream.reset(torch.tensor([False, True, False]))
    """

    def __init__(
        self,
        cell: str,
        read: Callable[[], Sequence[Tensor]],
        *,
        batch_size: int = 1,
        num_layers: int = 1,
        batch_first: bool = False,
        weights: str | None = None,
        backend: str | None = None,
    ) -> None:
        """cell: lstm, gru, rnn_tanh or rnn_relu.  read: returns the weights, in the order of torch's _flat_weights."""
        if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
            raise ValueError(f"batch_size: got {batch_size!r}, expected a positive integer")
        if weights not in NARROW:
            raise ValueError(f"weights: got {weights!r}, expected None, 'bf16' or 'int8'")
        self._read = read
        self._options = {
            "batch_size": batch_size, "num_layers": num_layers, "batch_first": batch_first, "weights": weights,
            "backend": backend,
        }  # fmt: skip
        self._cell, self.batch_size, self.num_layers, self.batch_first = cell, batch_size, num_layers, batch_first
        flat = [w.detach() for w in read()]
        self.dtype, self.device, self.input_size = flat[0].dtype, flat[0].device, flat[0].shape[-1]
        sizes = hidden, width, _ = checks.check_weights(cell, flat[0], flat, self.input_size, num_layers, 1)
        self.output_size = width
        if self.dtype not in _DTYPES:
            raise ValueError(f"dtype: got {self.dtype}, expected float32, float64, bfloat16 or float16")
        if weights is not None and self.dtype != torch.float32:
            raise ValueError(f"weights: got {weights!r} for a module of {self.dtype}, expected one of torch.float32")
        packs = self.device.type == "cpu" and backend in (None, "cpu") and ops.MISSING is None
        if weights is not None and not packs:
            where = f"backend={backend!r} on {self.device}"
            raise NotImplementedError(f"weights={weights!r} goes with the cpu backend, got {where} ({ops.MISSING})")
        # Also in inference mode the state is of ordinary tensors, which may be written outside it.
        with torch.inference_mode(False), torch.no_grad():
            wide = torch.float64 if self.dtype == torch.float64 else torch.float32
            place: dict[str, Any] = {"dtype": wide if packs else self.dtype, "device": self.device}
            self._h = torch.zeros(num_layers, batch_size, width, **place)
            self._c = torch.zeros(num_layers, batch_size, hidden, **place) if len(CELLS[cell].states) > 1 else None
            kind = _Packed if packs else _Buffered
            self._runner: _Runner = kind(cell, backend, weights, self.input_size, sizes, self._h, self._c, self.dtype)
            self._runner.take(flat)
        self._quick = self._runner.quick

    def step(self, x_t: Tensor, *, out: Tensor | None = None) -> Tensor:
        """One step: x_t [B, D] → y_t [B, P], the last layer's output, of the module's dtype and device.

        Args:
            x_t: [B, D], of the module's dtype and device.
            out: [B, P], where to put y_t, which saves its allocation. It is returned, and may be x_t itself.

        Raises:
            ValueError: naming x_t or out where shape, dtype or device do not fit.
            TypeError: for what is no plain tensor.
            RuntimeError: if a gradient is asked for, or a torch.func transform is under way.
        """
        if self._quick is not None and not (is_compiling() or is_tracing()):
            y = self._quick(x_t, out)
            if y is not None:
                return y
        self._check("x_t", x_t, (self.batch_size, self.input_size), "[B, D]")
        if out is not None:
            self._check("out", out, (self.batch_size, self.output_size), "[B, P]")
        y = self._runner.run(x_t.unsqueeze(0)).squeeze(0)
        if out is None:
            return y
        with torch.no_grad():
            return out.copy_(y)

    def steps(self, x: Tensor) -> Tensor:
        """A chunk of any number of steps: x [T, B, D] → y [T, B, P]; if the module is batch_first, [B, T, ·] both.

        The same numbers as T calls of `step`. Raises as `step` does; RuntimeError for T = 0, as the module does.
        """
        time = 1 if self.batch_first else 0
        length = x.size(time) if isinstance(x, Tensor) and x.dim() == 3 else 1
        shape, letters = (length, self.batch_size), "[T, B, D]"
        if self.batch_first:
            shape, letters = (self.batch_size, length), "[B, T, D]"
        self._check("x", x, (*shape, self.input_size), letters)
        if length == 0:
            raise RuntimeError("Expected sequence length to be larger than 0 in RNN")
        y = self._runner.run(x.transpose(0, time))
        return y.transpose(0, time)

    def reset(self, mask: Tensor | None = None) -> None:
        """Set the state to zero, of all sequences, or of those where mask, [B] bool on the stream's device, is true.

        Raises ValueError for another shape, dtype or device; TypeError for what is no tensor.
        """
        if mask is not None:
            if not isinstance(mask, Tensor):
                raise TypeError(f"mask: got {type(mask).__name__}, expected a tensor [B] of torch.bool")
            if mask.dtype != torch.bool or mask.shape != (self.batch_size,) or mask.device != self.device:
                got = f"{checks.shape_text(mask.shape)} of {mask.dtype} on {mask.device}"
                expected = f"[B] = [{self.batch_size}] of torch.bool on {self.device}"
                raise ValueError(f"mask: got {got}, expected {expected}")
        with torch.no_grad():
            for buffer in self._buffers().values():
                if mask is None:
                    buffer.zero_()
                else:
                    buffer.masked_fill_(mask[None, :, None], 0)

    @property
    def state(self) -> State:
        """A copy of the state, h [L, B, P], for an LSTM (h, c [L, B, H]), of the module's dtype. Setting copies too."""
        h = self._h.to(self.dtype, copy=True)
        return h if self._c is None else (h, self._c.to(self.dtype, copy=True))

    @state.setter
    def state(self, value: State) -> None:
        pair = self._c is not None
        if pair and not (isinstance(value, (tuple, list)) and len(value) == 2):
            raise TypeError(f"state: got {type(value).__name__}, expected a pair (h, c) of tensors")
        given = tuple(value) if pair else (value,)
        for (name, buffer), new in zip(self._buffers().items(), given, strict=True):
            self._check(f"state ({name})", new, tuple(buffer.shape), "[L, B, P]" if name == "h" else "[L, B, H]")
        with torch.no_grad():
            for buffer, new in zip(self._buffers().values(), given, strict=True):
                buffer.copy_(new)

    def state_dict(self) -> dict[str, Tensor]:
        """A copy of the state, "h" and for an LSTM "c", in the dtype it is kept in, for an exact continuation."""
        return {name: buffer.clone() for name, buffer in self._buffers().items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Continue from what `state_dict` gave. Raises ValueError for other names or shapes."""
        buffers = self._buffers()
        if state.keys() != buffers.keys():
            raise ValueError(f"state: got the names {sorted(state)}, expected {sorted(buffers)}")
        for name, buffer in buffers.items():
            if state[name].shape != buffer.shape:
                expected = checks.shape_text(buffer.shape)
                raise ValueError(f"state[{name!r}]: got {checks.shape_text(state[name].shape)}, expected {expected}")
        with torch.no_grad():
            for name, buffer in buffers.items():
                buffer.copy_(state[name])

    def refresh(self) -> None:
        """Take the module's weights as they are now; the state stays.

        Raises ValueError if the shape, dtype or device of any has changed.
        """
        flat = [w.detach() for w in self._read()]
        like = torch.empty(0, dtype=self.dtype, device=self.device)
        sizes = checks.check_weights(self._cell, like, flat, self.input_size, self.num_layers, 1)
        if sizes != self._runner.sizes:
            raise ValueError(f"weights: H, P and their number became {sizes}, expected {self._runner.sizes} as before")
        with torch.inference_mode(False), torch.no_grad():
            self._runner.take(flat)

    def __repr__(self) -> str:
        weights = self._options["weights"]
        extra = "" if weights is None else f", weights={weights!r}"
        sizes = f"{self.input_size}, {self._runner.sizes[0]}, num_layers={self.num_layers}"
        return f"Stream({self._cell}, {sizes}, batch_size={self.batch_size}{extra})"

    def __reduce__(self) -> Any:
        return _again, (self._cell, self._read, self._options, self.state_dict())

    def _buffers(self) -> dict[str, Tensor]:
        return {"h": self._h} if self._c is None else {"h": self._h, "c": self._c}

    def _check(self, name: str, t: Tensor, shape: tuple[int, ...], letters: str) -> None:
        if checks.in_transform():
            raise RuntimeError("stream: a torch.func transform is under way, which a stream's state cannot follow")
        if op_gradient.is_jit_tracing() or is_exporting():
            who = "torch.export" if is_exporting() else "torch.jit.trace"
            raise RuntimeError(f"stream: {who} is recording, which does not see its steps; give it the module")
        if not isinstance(t, Tensor):
            raise TypeError(f"{name}: got {type(t).__name__}, expected a tensor {letters}")
        if t.shape != shape:
            raise ValueError(
                f"{name}: got {checks.shape_text(t.shape)}, expected {letters} = {checks.shape_text(shape)}"
            )
        if t.dtype != self.dtype or t.device != self.device:
            raise ValueError(f"{name}: got {t.dtype} on {t.device}, expected {self.dtype} on {self.device}")
        if not is_compiling() and (type(t) not in _PLAIN or t.layout is not torch.strided):
            raise TypeError(f"{name}: got a {type(t).__name__} of {t.layout}, expected a plain tensor {letters}")
        if forward_ad._current_level >= 0 and forward_ad.unpack_dual(t).tangent is not None:
            raise RuntimeError(f"{name}: carries a tangent of forward-mode differentiation, which a stream has not")
        if t.requires_grad and torch.is_grad_enabled():
            raise RuntimeError(
                f"{name}: requires a gradient, which a stream has not; detach it, or use torch.no_grad()"
            )


def _again(
    cell: str, read: Callable[[], Sequence[Tensor]], options: dict[str, Any], state: dict[str, Tensor]
) -> Stream:
    """What pickle and copy call."""
    stream = Stream(cell, read, **options)
    stream.load_state_dict(state)
    return stream


class _Runner(Protocol):
    """Runs the steps of a stream, whose state it is given."""

    sizes: tuple[int, int, Kinds]  # H, P, the weights of a layer
    quick: Quick | None

    def take(self, weights: Sequence[Tensor]) -> None:
        """Copy the weights."""

    def run(self, x: Tensor) -> Tensor:
        """x [T, B, D], checked → y [T, B, P]."""


class _Packed:
    """The CPU kernels on packed weights, all layers in one call."""

    def __init__(
        self,
        cell: str,
        _backend: str | None,
        weights: str | None,
        input_size: int,
        sizes: tuple[int, int, Kinds],
        h: Tensor,
        c: Tensor | None,
        dtype: torch.dtype,
    ) -> None:
        self.sizes = sizes
        hidden, self._width, self._kinds = sizes
        layers, batch, _ = h.shape
        self._narrow = weights
        self._native = ops._C.Stream(
            cell, _DTYPES[dtype], NARROW[weights], batch, input_size, hidden, self._width, layers,
            self._kinds.projects, [t.data_ptr() for t in (h, c) if t is not None],
        )  # fmt: skip
        self._state = h, c  # whose memory the native stream works in
        like = torch.empty(batch, self._width, dtype=dtype, device=h.device)
        self.quick: Quick | None = None if ops.fast_path is None else self._native.fast_path(like)

    def take(self, weights: Sequence[Tensor]) -> None:
        for k, w in enumerate(weights):
            if type(w) not in _PLAIN:
                raise TypeError(f"weights[{k}]: got a {type(w).__name__}, expected a plain tensor")
            if self._narrow == "int8" and not bool(w.isfinite().all()):
                raise ValueError(f"weights[{k}]: got a value that is not finite, which int8 cannot hold")
        plain = [w.resolve_neg().contiguous() for w in weights]
        each = self._kinds.split(plain)
        self._native.pack([[0 if t is None else t.data_ptr() for t in w[:5]] for w in each])

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


class _Buffered:
    """Any backend, by `functional`.

    State and weights lie in buffers that are written in place, so that a captured CUDA graph finds them.
    """

    quick: Quick | None = None

    def __init__(
        self,
        cell: str,
        backend: str | None,
        _weights: str | None,
        _input_size: int,
        sizes: tuple[int, int, Kinds],
        h: Tensor,
        c: Tensor | None,
        _dtype: torch.dtype,
    ) -> None:
        self.sizes = sizes
        self._h, self._c = h, c
        self._weights: list[Tensor] = []
        self._cell, self._backend = cell, backend

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
        states = [self._h] if self._c is None else [self._h, self._c]
        y, *after = layers.run(self._cell, x, self._weights, states, self._h.size(0), backend=self._backend)
        for state, new in zip(states, after, strict=True):
            state.copy_(new)
        return y
