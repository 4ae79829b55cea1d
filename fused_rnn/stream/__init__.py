"""A stack of layers that runs step by step: it holds its state, and its weights as they were when it was made."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C import _is_tracing as is_tracing  # torch.jit.trace
from torch.autograd import forward_ad
from torch.compiler import is_compiling, is_exporting

from fused_rnn import checks, ops
from fused_rnn.backends import cuda
from fused_rnn.call import NARROW, Kinds
from fused_rnn.cells import CELLS
from fused_rnn.plan import NARROWED
from fused_rnn.problem import Problem
from fused_rnn.stream.runners import DTYPES, PLAIN, Buffered, Narrowed, Packed
from fused_rnn.transforms import op_gradient

State = Tensor | tuple[Tensor, ...]


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
        heads: int = 1,
    ) -> None:
        """cell: its name.  read: returns the weights as fused_rnn.layers.run takes them.  heads: as there."""
        if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
            raise ValueError(f"batch_size: got {batch_size!r}, expected a positive integer")
        if weights not in NARROW:
            raise ValueError(f"weights: got {weights!r}, expected None, 'bf16' or 'int8'")
        self._read = read
        self._options: dict[str, Any] = {
            "batch_size": batch_size, "num_layers": num_layers, "batch_first": batch_first, "weights": weights,
            "backend": backend, "heads": heads,
        }  # fmt: skip
        self._cell, self.batch_size, self.num_layers, self.batch_first = cell, batch_size, num_layers, batch_first
        flat = [w.detach() for w in read()]
        self.dtype, self.device, self.input_size = flat[0].dtype, flat[0].device, flat[0].shape[-1]
        sizes = hidden, width, _ = checks.check_weights(cell, flat[0], flat, self.input_size, num_layers, heads)
        self.output_size = width * heads
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype: got {self.dtype}, expected float32, float64, bfloat16 or float16")
        packs = self.device.type == "cpu" and backend in (None, "cpu") and ops.MISSING is None
        packs = packs and heads == 1 and (CELLS[cell].program is None or ops._C.refusal(cell) is None)
        if weights is not None:
            self._check_narrow(weights, packs, sizes)
        # Also in inference mode the state is of ordinary tensors, which may be written outside it.
        with torch.inference_mode(False), torch.no_grad():
            wide = torch.float64 if self.dtype == torch.float64 else torch.float32
            place: dict[str, Any] = {"dtype": wide if packs else self.dtype, "device": self.device}
            # By the states' names: h [L, B, P], the others [L, B, H].
            self._states = {
                name: torch.zeros(num_layers, batch_size, (hidden if k else width) * heads, **place)
                for k, name in enumerate(CELLS[cell].states)
            }
            states = list(self._states.values())
            self._runner: Packed | Buffered | Narrowed
            if packs:
                self._runner = Packed(cell, weights, self.input_size, sizes, states, self.dtype)
            elif weights is not None:
                self._runner = Narrowed(cell, weights, sizes, states)
            else:
                self._runner = Buffered(cell, backend, sizes, states, heads)
            self._runner.take(flat)
        self._quick = self._runner.quick

    def _check_narrow(self, weights: str, packs: bool, sizes: tuple[int, int, Kinds]) -> None:
        """Raises for weights in fewer bytes that no loop takes. packs: whether the CPU's are asked."""
        backend, heads, (hidden, width, kinds) = self._options["backend"], self._options["heads"], sizes
        on_cuda = heads == 1 and (backend == "cuda" or (backend is None and self.device.type == "cuda"))
        dtypes = NARROWED[weights] if on_cuda else (torch.float32,)
        if self.dtype not in dtypes:
            expected = ", ".join(map(str, dtypes))
            raise ValueError(f"weights: got {weights!r} for a module of {self.dtype}, expected one of {expected}")
        why = None if packs else ops.MISSING
        if on_cuda:
            problem = Problem(
                self._cell, self.dtype, self.device.type, False, self.batch_size, self.input_size, hidden, width,
                self.num_layers, 1, kinds.bias, False, False, "none", False, False,
            )  # fmt: skip
            why = cuda.narrows(problem)
        if not packs and (why or not on_cuda):
            where = f"backend={backend!r} on {self.device}" + (f" with heads={heads}" if heads > 1 else "")
            why = f" ({why})" if why else ""
            raise NotImplementedError(f"weights={weights!r} goes with the cpu and cuda backends, got {where}{why}")

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
            for buffer in self._states.values():
                if mask is None:
                    buffer.zero_()
                else:
                    buffer.masked_fill_(mask[None, :, None], 0)

    @property
    def state(self) -> State:
        """A copy of the state in the module's dtype, as its hx, h [L, B, P], for an LSTM (h, c [L, B, H]).
        Setting copies too."""
        states = [buffer.to(self.dtype, copy=True) for buffer in self._states.values()]
        return states[0] if len(states) == 1 else tuple(states)

    @state.setter
    def state(self, value: State) -> None:
        several = len(self._states) > 1
        if several and not (isinstance(value, (tuple, list)) and len(value) == len(self._states)):
            names = ", ".join(self._states)
            got = (
                f"{type(value).__name__} of {len(value)}" if isinstance(value, (tuple, list)) else type(value).__name__
            )
            what = "pair" if len(self._states) == 2 else "tuple"
            raise TypeError(f"state: got {got}, expected a {what} ({names}) of tensors")
        given = tuple(value) if several else (value,)
        for k, ((name, buffer), new) in enumerate(zip(self._states.items(), given, strict=True)):
            self._check(f"state ({name})", new, tuple(buffer.shape), "[L, B, H]" if k else "[L, B, P]")
        with torch.no_grad():
            for buffer, new in zip(self._states.values(), given, strict=True):
                buffer.copy_(new)

    def state_dict(self) -> dict[str, Tensor]:
        """A copy of the state, "h" and for an LSTM "c", in the dtype it is kept in, for an exact continuation."""
        return {name: buffer.clone() for name, buffer in self._states.items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Continue from what `state_dict` gave. Raises ValueError for other names or shapes."""
        buffers = self._states
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
        sizes = checks.check_weights(self._cell, like, flat, self.input_size, self.num_layers, self._options["heads"])
        if sizes != self._runner.sizes:
            now, before = ((hidden, width, kinds.number) for hidden, width, kinds in (sizes, self._runner.sizes))
            raise ValueError(f"weights: H, P and their number became {now}, expected {before} as before")
        with torch.inference_mode(False), torch.no_grad():
            self._runner.take(flat)

    def __repr__(self) -> str:
        weights = self._options["weights"]
        extra = "" if weights is None else f", weights={weights!r}"
        hidden = self._runner.sizes[0] * self._options["heads"]
        sizes = f"{self.input_size}, {hidden}, num_layers={self.num_layers}"
        return f"Stream({CELLS[self._cell].title}, {sizes}, batch_size={self.batch_size}{extra})"

    def __reduce__(self) -> Any:
        return _again, (self._cell, self._read, self._options, self.state_dict())

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
        if not is_compiling() and (type(t) not in PLAIN or t.layout is not torch.strided):
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
