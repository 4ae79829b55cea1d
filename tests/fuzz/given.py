"""The tensors of a call, drawn from its two numbers."""

from __future__ import annotations

import zlib
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fused_rnn.cells import CELLS

from .generate import Call

MAPPED = 3  # the size of the dimension that vmap runs over
LARGEST = {"float32": 1e18, "float64": 1e150, "bfloat16": 1e18, "float16": 200.0}  # squares, and their sums, are finite
DENORMAL = {"float32": 1e-40, "float64": 1e-310, "bfloat16": 1e-40, "float16": 1e-6}


class Given(NamedTuple):
    """Bases of x and hx, of which `view` makes the arguments; weights in the order of torch's _flat_weights."""

    x: Tensor
    hx: list[Tensor]
    weights: list[Tensor]
    lengths: Tensor | None
    batch_sizes: Tensor | None  # of packed input
    order: Tensor | None  # of unsorted packed input: sorted_indices
    reset: Tensor | None

    def to(self, dtype: torch.dtype) -> Given:
        """All floating tensors rounded to dtype."""
        hx, weights = ([t.to(dtype) for t in tensors] for tensors in (self.hx, self.weights))
        return self._replace(x=self.x.to(dtype), hx=hx, weights=weights)


def base_shape(shape: tuple[int, ...], memory: str) -> tuple[int, ...]:
    """The shape of the tensor of which `view` makes one of `shape`."""
    if memory == "strided":
        return (*shape[:-1], 2 * shape[-1])
    if memory == "transposed" and len(shape) > 1:
        return (shape[-1], *shape[1:-1], shape[0])
    return (1, *shape[1:]) if memory == "expanded" and shape[0] else shape


def view(base: Tensor, memory: str, shape: tuple[int, ...]) -> Tensor:
    """The argument of that shape: another view of the base's memory."""
    if memory == "strided":
        return base[..., 1::2]
    if memory == "transposed":
        return base.transpose(0, -1)
    return base.expand(shape) if memory == "expanded" else base


def draw(call: Call, again: int = 0) -> Given:
    """In the call's dtype; what the sums are over never overflows. again: other values, of the same lengths."""
    random = _generator(call, 0)
    lengths, batch_sizes, order = _lengths(call, random)
    time_batch = (call.B, call.T) if call.batch_first else (call.T, call.B)
    reset = torch.rand(time_batch, generator=random) < 0.2 if call.reset else None
    random = _generator(call, 1 + again)
    x = _normal(random, _mapped(call, base_shape(x_shape(call, batch_sizes), call.memory)))
    hx = [_normal(random, base_shape(shape, call.hx)) for shape in hx_shapes(call)] if call.hx != "none" else []
    weights = [_uniform(random, shape, call.H) for shape in weight_shapes(call)]
    if call.cell == "rnn_relu" and call.dtype != "float64":
        x, hx, weights = _far_from_the_kink(x, hx, weights)
    x, hx, weights = _with_special(call, random, x, hx, weights)
    if call.special == "past_end" and lengths is not None:
        x = _nan_past_end(call, x, lengths)
    return Given(x, hx, weights, lengths, batch_sizes, order, reset).to(getattr(torch, call.dtype))


def _generator(call: Call, stream: int) -> torch.Generator:
    return torch.Generator().manual_seed(zlib.crc32(f"{call.seed}:{call.index}:{stream}".encode()))


def x_shape(call: Call, batch_sizes: Tensor | None = None) -> tuple[int, ...]:
    if batch_sizes is not None:
        return (int(batch_sizes.sum()), call.D)
    if call.is_cell:
        return (call.D,) if call.form == "unbatched" else (call.B, call.D)
    if call.form == "unbatched":
        return (call.T, call.D)
    return (call.B, call.T, call.D) if call.batch_first else (call.T, call.B, call.D)


def hx_shapes(call: Call) -> list[tuple[int, ...]]:
    batch = () if call.form == "unbatched" else (call.B,)
    leading = batch if call.is_cell else (call.layers * call.R, *batch)
    return [(*leading, call.P), (*leading, call.H)][: 1 + call.has_c]


def weight_shapes(call: Call) -> list[tuple[int, ...]]:
    rows, shapes = CELLS[call.cell].gates * call.H, []
    for layer in range(call.layers):
        own = [(rows, call.R * call.P if layer else call.D), (rows, call.P)]
        own += [(rows,), (rows,)] if call.bias else []
        shapes += (own + ([(call.P, call.H)] if call.proj else [])) * call.R
    return shapes


def random_like(t: Tensor, random: torch.Generator) -> Tensor:
    return torch.randn(t.shape, generator=random, dtype=torch.float64).to(t.dtype)


def _normal(random: torch.Generator, shape: tuple[int, ...]) -> Tensor:
    return torch.randn(shape, generator=random, dtype=torch.float64)


def _uniform(random: torch.Generator, shape: tuple[int, ...], H: int) -> Tensor:
    return (torch.rand(shape, generator=random, dtype=torch.float64) * 2 - 1) * H**-0.5


def _mapped(call: Call, shape: tuple[int, ...]) -> tuple[int, ...]:
    return (MAPPED, *shape) if call.transform == "vmap" else shape


def _lengths(call: Call, random: torch.Generator) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    if call.form in ("packed", "unsorted"):
        # As pack_padded_sequence has it; the longest need not be T, which is then the longest.
        lengths = torch.randint(1, call.T + 1, (call.B,), generator=random)
        order = lengths.argsort(descending=True)
        batch_sizes = (torch.arange(int(lengths.max())).unsqueeze(1) < lengths).sum(1)
        return None, batch_sizes, order if call.form == "unsorted" else None
    if call.lengths == "none":
        return None, None, None
    lengths = torch.randint(0, call.T + 1, (call.B,), generator=random)
    return lengths.int() if call.lengths == "int32" else lengths, None, None


def _far_from_the_kink(x: Tensor, hx: list[Tensor], weights: list[Tensor]) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """A relu whose every input is clearly positive, or clearly negative: its odd units are off.

    At the kink rounding alone decides whether a gradient passes; then any two implementations differ without a fault.
    """
    sign = [1.0 - 2.0 * (torch.arange(w.size(0)) % 2).double() for w in weights]
    scaled = [w.abs() * (w.size(0) ** -0.5 if w.dim() == 2 else 1) for w in weights]
    signed = [w * (s.unsqueeze(1) if w.dim() == 2 else s) for w, s in zip(scaled, sign, strict=True)]
    return x.abs() + 0.5, [h.abs() for h in hx], signed


def _with_special(
    call: Call, random: torch.Generator, x: Tensor, hx: list[Tensor], weights: list[Tensor]
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    if call.special in ("none", "past_end"):
        return x, hx, weights
    targets: dict[str, list[Tensor]] = {"x": [x], "hx": hx, "weights": weights}
    for t in targets[call.target]:
        if call.special in ("zeros", "denormal"):
            t.mul_(0.0 if call.special == "zeros" else DENORMAL[call.dtype])
        elif t.numel():
            value = {"inf": float("inf"), "nan": float("nan"), "large": LARGEST[call.dtype]}[call.special]
            for _ in range(1 + int(torch.randint(3, (), generator=random))):
                place = int(torch.randint(t.numel(), (), generator=random))
                off = call.cell == "rnn_relu" or bool(torch.rand((), generator=random) < 0.5)
                t.view(-1)[place] = value if off else -value
        if call.target == "weights":
            break  # one layer's w_ih is enough
    return x, hx, weights


def _nan_past_end(call: Call, x: Tensor, lengths: Tensor) -> Tensor:
    """What stands in x past a sequence's end is not looked at."""
    if call.memory != "contiguous":
        return x
    past = torch.arange(call.T).unsqueeze(1) >= lengths
    return x.masked_fill((past.t() if call.batch_first else past).unsqueeze(-1), float("nan"))


def lengths_argument(call: Call, given: Given) -> Any:
    return given.lengths.tolist() if call.lengths == "list" and given.lengths is not None else given.lengths
