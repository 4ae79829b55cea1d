"""Calls that must raise: each a valid call with one thing wrong. torch is not asked, whose kernels some would crash."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from fused_rnn import functional

from .generate import Call
from .given import hx_shapes
from .run import Subject, call_functional

Break = Callable[[Subject], Any]
BREAKS: dict[str, Break] = {}
_KINDS: dict[str, tuple[tuple[str, ...], Callable[[Call], bool]]] = {}
SEQUENCES, STEPS = ("module", "functional"), ("cell", "functional_cell")
FUNCTIONS = ("functional", "functional_cell")
EVERY = SEQUENCES + STEPS
OWNING = ("module", "cell")


def add(name: str, function: Break, kinds: tuple[str, ...], when: Callable[[Call], bool] = lambda call: True) -> None:
    """function runs a call of these kinds with something wrong."""
    BREAKS[name], _KINDS[name] = function, (kinds, when)


def breaks(*kinds: str, when: Callable[[Call], bool] = lambda call: True) -> Callable[[Break], Break]:
    def register(function: Break) -> Break:
        add(function.__name__.strip("_"), function, kinds, when)
        return function

    return register


def choices(call: Call) -> list[str]:
    """The names of what can be wrong with this call."""
    return [name for name, (kinds, when) in _KINDS.items() if call.kind in kinds and when(call)]


def run_broken(call: Call, subject: Subject) -> Any:
    """The broken call; what it returns where it does not raise."""
    assert call.broken is not None
    return BREAKS[call.broken](subject)


# ---- parts


def _with_input(subject: Subject, change: Callable[[Tensor], Any]) -> Any:
    """The call, its input changed; of packed input the data."""
    given = subject.given
    data, hx = subject.arguments(given.x, given.hx)
    packed = isinstance(data, PackedSequence)
    return _call(subject, data._replace(data=change(data.data)) if packed else change(data), hx)


def _with_hx(subject: Subject, change: Callable[[Tensor], Any], which: int | None = None) -> Any:
    """The call, its states changed, or the one of this number; they are zeros where the call has none."""
    given = subject.given
    data, hx = subject.arguments(given.x, given.hx)
    states = list(zeros(subject) if hx is None else hx if isinstance(hx, tuple) else (hx,))
    states = [change(h) if which in (None, k) else h for k, h in enumerate(states)]
    return _call(subject, data, tuple(states) if subject.call.has_c else states[0])


def zeros(subject: Subject) -> list[Tensor]:
    return [torch.zeros(shape, dtype=subject.given.x.dtype) for shape in hx_shapes(subject.call)]


def _call(subject: Subject, data: Any, hx: Any, **extras: Any) -> Any:
    call, given = subject.call, subject.given
    if call.kind in FUNCTIONS:
        return call_functional(call, given, data, hx, given.weights, **extras)
    if call.kind == "cell":
        return subject.module(data, hx)
    own = {"lengths": given.lengths, "reset": given.reset} | extras
    return subject.module(data, hx, **{name: value for name, value in own.items() if value is not None})


def _packed(call: Call) -> bool:
    return call.form in ("packed", "unsorted")


def _plain(call: Call) -> bool:
    return call.form == "plain"


def _batched(call: Call) -> bool:
    return call.form != "unbatched"


def other_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype == torch.float64 else torch.float64


def grown(t: Tensor, dim: int) -> Tensor:
    """One larger there."""
    first = t.narrow(dim, 0, 1) if t.size(dim) else t.new_zeros(*t.shape[:dim], 1, *t.shape[dim + 1 :])
    return torch.cat([t, first], dim)


# ---- the input


@breaks(*EVERY)
def _input_too_wide(subject: Subject) -> Any:
    return _with_input(subject, lambda x: grown(x, x.dim() - 1))


@breaks(*EVERY, when=lambda call: call.D > 1)
def _input_too_narrow(subject: Subject) -> Any:
    return _with_input(subject, lambda x: x[..., :-1])


@breaks(*EVERY)
def _input_4d(subject: Subject) -> Any:
    return _with_input(subject, lambda x: x.reshape((1,) * (4 - x.dim()) + x.shape))


@breaks(*EVERY)
def _input_0d(subject: Subject) -> Any:
    return _with_input(subject, lambda x: x.new_zeros(()))


@breaks(*SEQUENCES)
def _input_1d(subject: Subject) -> Any:
    return _with_input(subject, lambda x: x.new_zeros(subject.call.D))


@breaks(*EVERY, when=lambda call: not call.autocast)
def _input_of_another_dtype(subject: Subject) -> Any:
    return _with_input(subject, lambda x: x.to(other_dtype(x.dtype)))


@breaks(*EVERY)
def _input_of_integers(subject: Subject) -> Any:
    return _with_input(subject, lambda x: torch.ones_like(x, dtype=torch.int64))


@breaks(*EVERY)
def _input_complex(subject: Subject) -> Any:
    return _with_input(subject, lambda x: torch.ones_like(x, dtype=torch.complex64))


@breaks(*EVERY)
def _input_on_meta(subject: Subject) -> Any:
    return _with_input(subject, lambda x: x.to("meta"))


@breaks(*EVERY)
def _input_a_list(subject: Subject) -> Any:
    return _with_input(subject, lambda x: [1.0, 2.0])


@breaks(*EVERY)
def _input_none(subject: Subject) -> Any:
    return _with_input(subject, lambda x: None)


@breaks(*SEQUENCES, when=_plain)
def _no_steps(subject: Subject) -> Any:
    return _with_input(subject, lambda x: x.narrow(1 if subject.call.batch_first else 0, 0, 0))


# ---- packed input


def _with_batch_sizes(subject: Subject, change: Callable[[Tensor], Any]) -> Any:
    given = subject.given
    data, hx = subject.arguments(given.x, given.hx)
    return _call(subject, data._replace(batch_sizes=change(data.batch_sizes)), hx)


@breaks("module", when=_packed)
def _batch_sizes_of_more_rows(subject: Subject) -> Any:
    return _with_batch_sizes(subject, lambda sizes: torch.cat([sizes, sizes[-1:]]))


@breaks("module", when=lambda call: _packed(call) and call.T > 1)
def _batch_sizes_of_fewer_rows(subject: Subject) -> Any:
    return _with_batch_sizes(subject, lambda sizes: torch.cat([sizes[:-1], sizes[-1:] - 1]))


@breaks("module", when=_packed)
def _batch_sizes_that_grow(subject: Subject) -> Any:
    total = int(subject.given.batch_sizes.sum())  # type: ignore[union-attr]
    return _with_batch_sizes(subject, lambda sizes: torch.tensor([1, total - 1] if total > 2 else [0, total]))


@breaks("module", when=_packed)
def _batch_sizes_negative(subject: Subject) -> Any:
    return _with_batch_sizes(subject, lambda sizes: torch.cat([sizes[:1] + 1, sizes[1:], -sizes.new_ones(1)]))


@breaks("module", when=_packed)
def _batch_sizes_empty(subject: Subject) -> Any:
    return _with_batch_sizes(subject, lambda sizes: sizes[:0])


@breaks("module", when=_packed)
def _batch_sizes_huge(subject: Subject) -> Any:
    return _with_batch_sizes(subject, lambda sizes: torch.tensor([2**40]))


@breaks("module", when=lambda call: call.form == "unsorted")
def _order_out_of_range(subject: Subject) -> Any:
    given = subject.given
    data, hx = subject.arguments(given.x, given.hx)
    return _call(subject, data._replace(sorted_indices=data.sorted_indices + 1), hx or _hx_zeros(subject))


def _hx_zeros(subject: Subject) -> Any:
    states = zeros(subject)
    return tuple(states) if subject.call.has_c else states[0]


@breaks("module", when=_packed)
def _lengths_beside_packed(subject: Subject) -> Any:
    given = subject.given
    return _call(subject, *subject.arguments(given.x, given.hx), lengths=torch.ones(subject.call.B, dtype=torch.int64))


# ---- states


@breaks(*EVERY)
def _hx_too_wide(subject: Subject) -> Any:
    return _with_hx(subject, lambda h: grown(h, h.dim() - 1))


@breaks(*EVERY, when=lambda call: call.has_c)
def _c_too_wide(subject: Subject) -> Any:
    return _with_hx(subject, lambda h: grown(h, h.dim() - 1), which=1)


# From a larger batch the order of an unsorted pack chooses, in torch too.
@breaks(*EVERY, when=lambda call: _batched(call) and call.form != "unsorted")
def _hx_of_a_larger_batch(subject: Subject) -> Any:
    return _with_hx(subject, lambda h: grown(h, h.dim() - 2))


@breaks(*EVERY, when=lambda call: _batched(call) and call.has_c and call.form != "unsorted")
def _c_of_a_larger_batch(subject: Subject) -> Any:
    return _with_hx(subject, lambda h: grown(h, h.dim() - 2), which=1)


@breaks(*EVERY, when=lambda call: _batched(call) and call.B > 0)
def _hx_of_a_smaller_batch(subject: Subject) -> Any:
    return _with_hx(subject, lambda h: h.narrow(h.dim() - 2, 0, subject.call.B - 1))


@breaks(*SEQUENCES)
def _hx_of_more_layers(subject: Subject) -> Any:
    return _with_hx(subject, lambda h: grown(h, 0))


@breaks(*SEQUENCES, when=lambda call: call.has_c)
def _c_of_more_layers(subject: Subject) -> Any:
    return _with_hx(subject, lambda h: grown(h, 0), which=1)


@breaks(*SEQUENCES, when=lambda call: call.layers * call.R > 1)
def _hx_of_fewer_layers(subject: Subject) -> Any:
    return _with_hx(subject, lambda h: h[:-1])


@breaks(*EVERY)
def _hx_of_another_rank(subject: Subject) -> Any:
    return _with_hx(subject, lambda h: h.reshape((1,) * (4 - h.dim()) + h.shape))


@breaks(*EVERY, when=lambda call: not call.autocast)
def _hx_of_another_dtype(subject: Subject) -> Any:
    return _with_hx(subject, lambda h: h.to(other_dtype(h.dtype)))


@breaks(*EVERY)
def _hx_of_integers(subject: Subject) -> Any:
    return _with_hx(subject, lambda h: torch.ones_like(h, dtype=torch.int64))


@breaks(*EVERY)
def _hx_on_meta(subject: Subject) -> Any:
    return _with_hx(subject, lambda h: h.to("meta"))


@breaks(*EVERY)
def _hx_a_number(subject: Subject) -> Any:
    return _with_hx(subject, lambda h: 1.0)


@breaks(*EVERY, when=lambda call: call.has_c)
def _hx_a_tensor(subject: Subject) -> Any:
    given = subject.given
    return _call(subject, subject.arguments(given.x, given.hx)[0], torch.stack(zeros(subject)))


@breaks(*EVERY, when=lambda call: not call.has_c)
def _hx_a_pair(subject: Subject) -> Any:
    given = subject.given
    return _call(subject, subject.arguments(given.x, given.hx)[0], tuple(zeros(subject) * 2))


@breaks(*EVERY, when=lambda call: call.has_c and _batched(call))  # of unbatched input torch looks at the first two
def _hx_of_three(subject: Subject) -> Any:
    given = subject.given
    return _call(subject, subject.arguments(given.x, given.hx)[0], (*zeros(subject), zeros(subject)[0]))


# ---- weights changed under a module, or of a function


@contextmanager
def changed(subject: Subject, which: int, change: Callable[[Tensor], Any]) -> Iterator[list[Any]]:
    """One weight replaced; put back afterwards."""
    weights: list[Any] = list(subject.given.weights)
    which %= len(weights)
    weights[which] = change(weights[which].detach())
    if subject.module is None:
        yield weights
        return
    name, before = list(subject.module.named_parameters())[which]
    own = weights[which]
    setattr(subject.module, name, torch.nn.Parameter(own, before.requires_grad) if own.is_floating_point() else own)
    try:
        yield weights
    finally:
        setattr(subject.module, name, before)


def _with_weight(subject: Subject, which: int, change: Callable[[Tensor], Any]) -> Any:
    given = subject.given
    data, hx = subject.arguments(given.x, given.hx)
    with changed(subject, which, change) as weights:
        if subject.module is None:
            return call_functional(subject.call, given, data, hx, weights)
        return _call(subject, data, hx)


@breaks(*EVERY)
def _w_hh_of_more_rows(subject: Subject) -> Any:
    return _with_weight(subject, 1, lambda w: grown(w, 0))


@breaks(*EVERY)
def _w_hh_of_fewer_rows(subject: Subject) -> Any:
    return _with_weight(subject, 1, lambda w: w[:-1])


@breaks(*EVERY)
def _w_hh_of_more_columns(subject: Subject) -> Any:
    return _with_weight(subject, 1, lambda w: grown(w, 1))


@breaks(*EVERY)
def _w_ih_of_more_rows(subject: Subject) -> Any:
    return _with_weight(subject, 0, lambda w: grown(w, 0))


@breaks(*EVERY)
def _w_ih_of_more_columns(subject: Subject) -> Any:
    return _with_weight(subject, 0, lambda w: grown(w, 1))


@breaks(*EVERY)
def _last_weight_longer(subject: Subject) -> Any:
    return _with_weight(subject, -1, lambda w: grown(w, 0))


@breaks(*EVERY, when=lambda call: call.bias)
def _bias_shorter(subject: Subject) -> Any:
    return _with_weight(subject, 2, lambda w: w[:-1])


@breaks(*EVERY, when=lambda call: not call.autocast)
def _weight_of_another_dtype(subject: Subject) -> Any:
    return _with_weight(subject, 1, lambda w: w.to(other_dtype(w.dtype)))


@breaks(*EVERY)
def _weight_on_meta(subject: Subject) -> Any:
    return _with_weight(subject, 1, lambda w: w.to("meta"))


@breaks(*EVERY)
def _weight_flat(subject: Subject) -> Any:
    return _with_weight(subject, 1, lambda w: w.flatten())


def _with_weights(subject: Subject, change: Callable[[list[Tensor]], Any]) -> Any:
    given = subject.given
    data, hx = subject.arguments(given.x, given.hx)
    return call_functional(subject.call, given, data, hx, change(list(given.weights)))


@breaks(*FUNCTIONS)
def _no_weights(subject: Subject) -> Any:
    return _with_weights(subject, lambda weights: [])


@breaks(*FUNCTIONS)
def _one_weight(subject: Subject) -> Any:
    return _with_weights(subject, lambda weights: weights[:1])


@breaks(*FUNCTIONS)
def _six_weights_more(subject: Subject) -> Any:
    return _with_weights(subject, lambda weights: weights + 6 * weights[-1:])


@breaks(*FUNCTIONS)
def _a_weight_none(subject: Subject) -> Any:
    return _with_weights(subject, lambda weights: [None, *weights[1:]])


# ---- lengths and resets


def _with_extras(subject: Subject, **extras: Any) -> Any:
    given = subject.given
    return _call(subject, *subject.arguments(given.x, given.hx), **extras)


def _some(call: Call) -> bool:
    return call.form == "plain" and call.B > 0


def _lengths(subject: Subject) -> Tensor:
    return torch.full((subject.call.B,), subject.call.T)


@breaks(*SEQUENCES, when=_some)
def _lengths_too_long(subject: Subject) -> Any:
    return _with_extras(subject, lengths=_lengths(subject) + 1)


@breaks(*SEQUENCES, when=_some)
def _lengths_negative(subject: Subject) -> Any:
    lengths = _lengths(subject)
    lengths[-1] = -1
    return _with_extras(subject, lengths=lengths.tolist() if subject.call.index % 2 else lengths)


@breaks(*SEQUENCES, when=_some)
def _lengths_huge(subject: Subject) -> Any:
    return _with_extras(subject, lengths=_lengths(subject) + 2**62)


@breaks(*SEQUENCES, when=_plain)
def _lengths_of_floats(subject: Subject) -> Any:
    return _with_extras(subject, lengths=_lengths(subject).float())


@breaks(*SEQUENCES, when=_plain)
def _lengths_of_bools(subject: Subject) -> Any:
    return _with_extras(subject, lengths=_lengths(subject).bool())


@breaks(*SEQUENCES, when=_plain)
def _lengths_too_many(subject: Subject) -> Any:
    return _with_extras(subject, lengths=[*_lengths(subject).tolist(), 1])


@breaks(*SEQUENCES, when=_plain)
def _lengths_2d(subject: Subject) -> Any:
    return _with_extras(subject, lengths=_lengths(subject).unsqueeze(0))


@breaks(*SEQUENCES, when=_plain)
def _lengths_a_word(subject: Subject) -> Any:
    return _with_extras(subject, lengths="long")


def _reset(subject: Subject, **options: Any) -> Tensor:
    call = subject.call
    shape = (call.B, call.T) if call.batch_first else (call.T, call.B)
    return torch.zeros(shape, **({"dtype": torch.bool} | options))


@breaks(*SEQUENCES, when=_plain)
def _reset_too_long(subject: Subject) -> Any:
    reset = _reset(subject)
    return _with_extras(subject, reset=grown(reset, 1 if subject.call.batch_first else 0))


@breaks(*SEQUENCES, when=_plain)
def _reset_of_another_batch(subject: Subject) -> Any:
    reset = _reset(subject)
    return _with_extras(subject, reset=grown(reset, 0 if subject.call.batch_first else 1))


@breaks(*SEQUENCES, when=lambda call: _plain(call) and call.T != call.B)
def _reset_transposed(subject: Subject) -> Any:
    return _with_extras(subject, reset=_reset(subject).t())


@breaks(*SEQUENCES, when=_plain)
def _reset_of_integers(subject: Subject) -> Any:
    return _with_extras(subject, reset=_reset(subject, dtype=torch.int64))


@breaks(*SEQUENCES, when=_plain)
def _reset_on_meta(subject: Subject) -> Any:
    return _with_extras(subject, reset=_reset(subject, device="meta"))


@breaks(*SEQUENCES, when=_plain)
def _reset_3d(subject: Subject) -> Any:
    return _with_extras(subject, reset=_reset(subject).unsqueeze(-1))


@breaks(*SEQUENCES, when=_plain)
def _reset_a_number(subject: Subject) -> Any:
    return _with_extras(subject, reset=1)


# ---- options


@breaks(*OWNING)
def _unknown_backend_set(subject: Subject) -> Any:
    subject.module.backend = "none of ours"
    return "set"


@breaks("module")
def _unknown_save_set(subject: Subject) -> Any:
    subject.module.save = "nothing"
    return "set"


@breaks("functional")
def _unknown_backend(subject: Subject) -> Any:
    return _with_extras(subject, backend="none of ours")


@breaks("functional")
def _unknown_save(subject: Subject) -> Any:
    return _with_extras(subject, save="nothing")


@breaks("functional")
def _no_layers(subject: Subject) -> Any:
    return _with_extras(subject, num_layers=0)


@breaks("functional")
def _negative_layers(subject: Subject) -> Any:
    return _with_extras(subject, num_layers=-1)


@breaks("functional")
def _other_directions(subject: Subject) -> Any:
    return _with_extras(subject, bidirectional=not subject.call.bidirectional)


@breaks("functional")
def _many_layers(subject: Subject) -> Any:
    return _with_extras(subject, num_layers=7)


@breaks("functional", when=lambda call: call.cell == "rnn_tanh")
def _unknown_nonlinearity(subject: Subject) -> Any:
    given = subject.given
    return functional.rnn(subject.arguments(given.x, [])[0], given.weights, nonlinearity="sine")


@breaks("module", when=lambda call: call.bidirectional)
def _stream_of_two_directions(subject: Subject) -> Any:
    return subject.module.stream(1)


@breaks("module", when=lambda call: not call.bidirectional)
def _stream_of_no_batch(subject: Subject) -> Any:
    return subject.module.eval().stream(0)
