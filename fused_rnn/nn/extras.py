"""What our modules have beside torch.nn's: regularisers in the loop, and states and gates over time.

They are plain attributes of a module, read at each call. With the loop's own masks, drawn here by torch's generator, a
layer runs a variant of its cell: flex/variant.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from numbers import Real
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.compiler import is_compiling

from fused_rnn import layers, ops
from fused_rnn.cells import CELLS
from fused_rnn.checks import check_dtypes, in_transform, is_as_it_seems
from fused_rnn.flex.variant import program

DEFAULTS: dict[str, Any] = {
    "recurrent_dropout": 0.0, "recurrent_dropout_on": "h", "zoneout": 0.0, "weight_dropout": 0.0,
    "return_sequences": "h", "return_gates": False,
}  # fmt: skip
REGULARISERS = ("recurrent_dropout", "zoneout", "weight_dropout")


class Extras(NamedTuple):
    """The attributes' values, checked. zoneout: of each state."""

    recurrent_dropout: float
    recurrent_dropout_on: str
    zoneout: tuple[float, ...]
    weight_dropout: float
    states: bool
    gates: bool


def may_ask(module: Any) -> bool:
    """Whether to set an extra's attribute is to ask for it: of our classes, or where the constructor was given some. A
    class derived from ours may have such a name for something else."""
    return module._fused_extras or type(module).__module__.startswith("fused_rnn.")


def give(module: Any, given: dict[str, Any]) -> None:
    """Give a module its constructor's extra arguments; one that asks for none has no attribute more."""
    values = DEFAULTS | given
    if all(type(values[name]) is type(default) and values[name] == default for name, default in DEFAULTS.items()):
        return
    complete(module, values)
    read(module)


def complete(module: Any, values: dict[str, Any] = DEFAULTS) -> None:
    """Give the module those attributes that it has not, and let its calls read them."""
    for name, value in values.items():
        if name not in module.__dict__ and not hasattr(type(module), name):  # FlexRNN's return_sequences is a property
            module.__dict__[name] = value
    # A tuple is a constant to Dynamo; of a number that has changed it makes a symbol, and none is in a cell's program.
    module.__dict__["_fused_zones"] = _zones(module.zoneout)
    module.__dict__["_fused_extras"] = True


def asks(module: Any) -> bool:
    """Whether any of the module's extras is another than torch.nn's modules have."""
    if not module._fused_extras:
        return False
    try:
        now = read(module)
    except (TypeError, ValueError):
        return True
    return bool(now.recurrent_dropout or any(now.zoneout) or now.weight_dropout or now.states or now.gates)


def forget(module: Any) -> None:
    """Leave a module that asks for none without the attributes."""
    if module.__dict__.pop("_fused_extras", False):
        for name in (*DEFAULTS, "_fused_zones"):
            module.__dict__.pop(name, None)


class Variant(NamedTuple):
    """What a call of a module with extras runs.

    now: what was asked for.  cell, dropped: as flex/variant.py has them.  zoned: of each state that a mask holds the
    probability.  states: how many the cell has.  masked_h: whether its first is what h is times a mask.  over_time:
    whether more than the first is returned of every step.
    """

    now: Extras
    cell: str
    dropped: str
    zoned: tuple[float, ...]
    states: int
    masked_h: bool
    over_time: bool


def read(module: Any) -> Extras:
    """The extras of a module that has some. Raises TypeError, ValueError for what they cannot be."""
    return _read(*_given(module))


def _is_each(zoneout: Any) -> bool:
    """Whether it has a probability for each state."""
    return isinstance(zoneout, (tuple, list))


def _zones(zoneout: Any) -> tuple[Any, ...]:
    return tuple(zoneout) if _is_each(zoneout) else (zoneout,)


def _given(module: Any) -> tuple[Any, ...]:
    dropped, on, zoneout, weights, sequences, gates = [getattr(module, name) for name in DEFAULTS]
    zones = module._fused_zones if is_compiling() else _zones(zoneout)
    return (
        module._fused_cell, module._fused_states, module._fused_zoned, module._fused_refused, module.proj_size,
        dropped, on, weights, sequences, gates, _is_each(zoneout), *zones,
    )  # fmt: skip


def _read(
    cell: str, states: int, may_zone: int | None, refused: Sequence[str], proj_size: int, dropped: Any, on: Any,
    weights: Any, sequences: Any, gates: Any, each: bool, *zoneout: Any,
) -> Extras:  # fmt: skip
    spec, zoned = CELLS[cell], states if may_zone is None else may_zone
    drop, weight = _probability("recurrent_dropout", dropped), _probability("weight_dropout", weights)
    if not isinstance(gates, bool):
        raise TypeError(f"return_gates: got {gates!r}, expected True or False")
    if sequences not in ("h", "states"):
        raise ValueError(f"return_sequences: got {sequences!r}, expected 'h' or 'states'")
    if on not in ("h", "g"):
        raise ValueError(f"recurrent_dropout_on: got {on!r}, expected 'h' or 'g'")
    if each and len(zoneout) != states:
        raise ValueError(f"zoneout: got {len(zoneout)} probabilities, expected one, or one for each of {states} states")
    zones = tuple(_probability("zoneout", zone) for zone in zoneout)
    if not each:
        zones = zones * zoned + (0.0,) * (states - zoned)
    if any(zones[zoned:]):
        name = next(name for name, p in zip(spec.states[zoned:], zones[zoned:], strict=True) if p)
        raise ValueError(f"zoneout: got a probability for {name!r}, expected 0: it has no meaning without the others")
    if on == "g" and (spec.parts is None or spec.parts.candidate is None):
        raise ValueError("recurrent_dropout_on: got 'g', expected 'h': only LSTM and GRU have a gate for what is new")
    if not spec.recurrent and (weight or (drop and on == "h")):
        name = "weight_dropout" if weight else "recurrent_dropout"
        raise ValueError(f"{name}: got {weight or drop}, expected 0: the cell has no W_hh")
    for name, value in (("recurrent_dropout", drop), ("weight_dropout", weight)):
        if value and name in refused:
            raise ValueError(f"{name}: got {value!r}, expected 0: a gate stands before the recurrent product")
    asked = {"recurrent_dropout": drop > 0, "zoneout": any(zones), "return_gates": gates}
    if proj_size and any(asked.values()):
        name = next(name for name, there in asked.items() if there)
        raise ValueError(f"{name}: got {name}= of a module with proj_size, expected proj_size = 0")
    return Extras(drop, on, zones, weight, sequences == "states", gates)


def _probability(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float, Real)):
        raise TypeError(f"{name}: got {value!r}, expected a probability")
    if not 0 <= value < 1:  # type: ignore[operator]
        raise ValueError(f"{name}: got {value!r}, expected a probability of at least 0 and less than 1")
    return float(value)


def active(module: Any) -> Variant | None:
    """What the module's next call has to do; None where it is that of a module without extras."""
    given = (module.training, *_given(module))
    if is_compiling():
        return _variant(*given)
    try:
        return _known_variant(*given)
    except TypeError:  # what is no probability, and no key either
        return _variant(*given)


def _variant(training: bool, *given: Any) -> Variant | None:
    now, cell = _read(*given), given[0]
    random = training and (now.recurrent_dropout > 0 or now.weight_dropout > 0)
    if not (random or any(now.zoneout) or now.states or now.gates):
        return None
    dropped = now.recurrent_dropout_on if training and now.recurrent_dropout > 0 else ""
    zones = tuple(None if training and p > 0 else p for p in now.zoneout)
    if dropped or now.gates or any(now.zoneout):
        cell = program(cell, dropped, zones, now.gates)
    zoned = tuple(p for p in now.zoneout if training and p > 0)
    masked_h = dropped == "h"
    return Variant(now, cell, dropped, zoned, len(CELLS[cell].states), masked_h, masked_h or now.states or now.gates)


_known_variant = lru_cache(maxsize=256, typed=True)(_variant)


def stream_cell(module: Any) -> str:
    """The cell that a stream of the module runs: with zoneout its expectation. Raises RuntimeError in training."""
    now = read(module)
    for name, value in zip(REGULARISERS, (now.recurrent_dropout, any(now.zoneout), now.weight_dropout), strict=True):
        if module.training and value:
            raise RuntimeError(
                f"{name}: got {getattr(module, name)} in training mode, which a stream does not apply: eval()"
            )
    return program(module._fused_cell, "", now.zoneout) if any(now.zoneout) else module._fused_cell


def run(
    module: Any,
    variant: Variant,
    x: Tensor,
    weights: Sequence[Tensor],
    states: Sequence[Tensor],
    lengths: Any,
    reset: Tensor | None,
) -> tuple[tuple[Tensor, ...], Sequence[Tensor]]:
    """A layer, with what the module's extras ask for: what is returned over time, the states after.

    x: [T, B, D].  states: () or of [R, B, H] each.
    """
    now, cell, dropped, zoned, count, first, over_time = variant
    heads, training, number = module._fused_heads, module.training, module._fused_states
    recurrences = (1 + module.bidirectional) * heads
    masks: list[Tensor] = []  # of h or what is new, of each recurrence
    if dropped or zoned or (training and now.weight_dropout > 0):
        if not x.is_floating_point():  # what masks are made of
            check_dtypes(x, weights)
        own: list[Tensor] = []
        units = module.hidden_size // heads
        draw, each = _Draw(x), len(weights) // recurrences
        for r in range(recurrences):
            mine = list(weights[r * each : (r + 1) * each])
            if now.weight_dropout > 0:
                mine[1] = mine[1] * draw(mine[1].detach(), now.weight_dropout)
            if dropped:
                masks.append(draw(x.new_empty(1, x.shape[1], units), now.recurrent_dropout))
                mine.append(masks[-1])
            own += mine + [draw(x.new_empty(*x.shape[:2], units), p, 1.0, 0.0) for p in zoned]
        weights = own
    entering: list[Any] = list(states)
    if entering:
        if first:  # before it is multiplied
            sizes = (module.hidden_size, module.hidden_size)
            layers.check_states(module._fused_cell, states, x, (recurrences // heads, x.shape[1]), sizes)
            by_side = [torch.cat(masks[k : k + heads], -1) for k in range(0, recurrences, heads)]
            entering.insert(0, entering[0] * torch.cat(by_side))
        entering += [None] * (count - len(entering))
    outputs = layers.run(
        cell, x, weights, entering, 1, module.bidirectional, 0.0, training, lengths, reset, module._fused_save,
        module._fused_backend, heads, over_time,
    )  # fmt: skip
    histories = (outputs[0], *outputs[1 + count :])
    own_states = list(histories[first : first + (number if now.states else 1)])
    if first and module._fused_save == "gates" and own_states[0].requires_grad and is_as_it_seems(own_states[0]):
        own_states[0] = own_states[0].clone()  # h, which the caller may change in place: layers.run copied m * h
    return (*own_states, *histories[first + number :]), outputs[1 + first : 1 + first + number]


class _Draw:
    """Masks by torch's generator of x's device: of a call one after the other."""

    def __init__(self, x: Tensor) -> None:
        self._by_op = x.is_cpu and ops.mask is not None and not in_transform()
        self._seed: Tensor | None = None
        self._number = 0

    def __call__(self, like: Tensor, p: float, low: float = 0.0, high: float | None = None) -> Tensor:
        """`low` with probability p, else `high`: 1 / (1 - p) if it is None. like: without a gradient, for shape and
        dtype."""
        high = 1 / (1 - p) if high is None else high
        if not self._by_op:
            # Made of no tensor of the call's: under vmap `randomness` alone says whether rows have masks of their own.
            share = torch.full(like.shape, p, dtype=like.dtype, device=like.device)
            return torch.where(torch.bernoulli(share) > 0, low, high).to(like.dtype)
        if self._seed is None:
            self._seed = torch.randint(-(2**63), 2**63 - 1, (1,), device="cpu")
        self._number += 1
        return ops.mask(self._seed, like, p, low, high, self._number)  # type: ignore[misc]


def returned(module: Any, variant: Variant, y: Any, hx: Any) -> Any:
    """What a call returns. y: what `run` returned over time, in the input's layout."""
    now = variant.now
    number = module._fused_states if now.states else 1
    states = y[:number] if now.states else y[0]
    if not now.gates:
        return states, hx
    return states, hx, dict(zip(module._fused_gates, y[number:], strict=True))
