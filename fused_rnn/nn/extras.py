"""What our modules have beside torch.nn's: regularisers in the loop, and states and gates over time.

They are plain attributes of a module, read at each call. With the loop's own masks, drawn here by torch's generator, a
layer runs a variant of its cell: flex/variant.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fused_rnn import layers
from fused_rnn.cells import CELLS
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


def give(module: Any, given: dict[str, Any]) -> None:
    """Take the extra arguments out of a constructor's keywords; a module that asks for none has no attribute more."""
    values = {name: given.pop(name, default) for name, default in DEFAULTS.items()}
    if all(type(values[name]) is type(default) and values[name] == default for name, default in DEFAULTS.items()):
        return
    for name, value in values.items():
        if name != "return_sequences" or not hasattr(type(module), name):  # FlexRNN has its own
            setattr(module, name, value)
    module._fused_extras = True
    read(module)


def read(module: Any) -> Extras:
    """The extras of a module that has some. Raises TypeError, ValueError for what they cannot be."""
    dropped, on, zoneout, weights, sequences, gates = [getattr(module, name) for name in DEFAULTS]
    spec, states = CELLS[module._fused_cell], module._fused_states
    drop, weight = _probability("recurrent_dropout", dropped), _probability("weight_dropout", weights)
    if not isinstance(gates, bool):
        raise TypeError(f"return_gates: got {gates!r}, expected True or False")
    if sequences not in ("h", "states"):
        raise ValueError(f"return_sequences: got {sequences!r}, expected 'h' or 'states'")
    if on not in ("h", "g"):
        raise ValueError(f"recurrent_dropout_on: got {on!r}, expected 'h' or 'g'")
    if isinstance(zoneout, (tuple, list)):
        if len(zoneout) != states:
            raise ValueError(
                f"zoneout: got {len(zoneout)} probabilities, expected one, or one for each of {states} states"
            )
        zones = tuple(_probability("zoneout", each) for each in zoneout)
    else:
        zones = (_probability("zoneout", zoneout),) * states
    if on == "g" and (spec.parts is None or spec.parts.candidate is None):
        raise ValueError("recurrent_dropout_on: got 'g', expected 'h': only LSTM and GRU have a gate for what is new")
    if not spec.recurrent and (weight or (drop and on == "h")):
        name = "weight_dropout" if weight else "recurrent_dropout"
        raise ValueError(f"{name}: got {weight or drop}, expected 0: the cell has no W_hh")
    asked = {"recurrent_dropout": drop > 0, "zoneout": any(zones), "return_gates": gates}
    if module.proj_size and any(asked.values()):
        name = next(name for name, there in asked.items() if there)
        raise ValueError(f"{name}: got {name}= of a module with proj_size, expected proj_size = 0")
    return Extras(drop, on, zones, weight, sequences == "states", gates)


def _probability(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: got {value!r}, expected a probability")
    if not 0 <= value < 1:
        raise ValueError(f"{name}: got {value!r}, expected a probability of at least 0 and less than 1")
    return float(value)


def are_plain(module: Any) -> bool:
    """Whether the module's next call is that of a module without extras."""
    now = read(module)
    random = module.training and (now.recurrent_dropout > 0 or now.weight_dropout > 0)
    return not (random or any(now.zoneout) or now.states or now.gates)


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
    x: Tensor,
    weights: Sequence[Tensor],
    states: Sequence[Tensor],
    num_layers: int,
    lengths: Any,
    reset: Tensor | None,
) -> tuple[tuple[Tensor, ...], list[Tensor]]:
    """The layers, with what the module's extras ask for: what is returned over time of the last one, the states after.

    x: [T, B, D].  states: () or of [L·R, B, H] each.
    """
    now, heads, sides = read(module), module._fused_heads, 1 + module.bidirectional
    training, count = module.training, len(weights) // (num_layers * sides * heads)
    dropped = now.recurrent_dropout_on if training and now.recurrent_dropout > 0 else ""
    zones = tuple(None if training and p > 0 else p for p in now.zoneout)
    cell = module._fused_cell
    if dropped or now.gates or any(p is None or p > 0 for p in zones):
        cell = program(cell, dropped, zones, now.gates)
    number, finals = module._fused_states, []
    over_time: tuple[Tensor, ...] = ()
    first = int(dropped == "h")
    sequences = bool(first or now.states or now.gates)
    for layer in range(num_layers):
        own: list[Tensor] = []
        masks: list[Tensor] = []
        for r in range(layer * sides * heads, (layer + 1) * sides * heads):
            mine = list(weights[r * count : (r + 1) * count])
            if training and now.weight_dropout > 0:
                mine[1] = torch.dropout(mine[1], now.weight_dropout, True)
            drawn = _masks(now, dropped, zones, x, module.hidden_size // heads)
            masks += drawn[: bool(dropped)]
            own += [*mine, *drawn]
        entering: list[Any] = [s[layer * sides : (layer + 1) * sides] for s in states]
        if entering:
            if first:
                by_side = [torch.cat(masks[k : k + heads], -1) for k in range(0, len(masks), heads)]
                entering.insert(0, entering[0] * torch.cat(by_side))
            entering += [None] * (len(CELLS[cell].states) - len(entering))
        outputs = layers.run(
            cell, x, own, entering, 1, module.bidirectional, 0.0, training, lengths, reset, module._fused_save,
            module._fused_backend, heads, sequences,
        )  # fmt: skip
        made = len(CELLS[cell].states)
        finals.append(outputs[1 + first : 1 + first + number])
        histories = (outputs[0], *outputs[1 + made :])
        x = histories[first]
        if layer + 1 < num_layers:
            x = torch.dropout(x, module.dropout, True) if module.dropout and training else x
        else:
            over_time = (*histories[first : first + (number if now.states else 1)], *histories[first + number :])
    return over_time, [torch.cat(list(each)) for each in zip(*finals, strict=True)]


def _masks(now: Extras, dropped: str, zones: tuple[float | None, ...], x: Tensor, units: int) -> list[Tensor]:
    """The masks of a recurrence: of h or of what is new the same at all times, then of the states that zone out."""
    steps, batch = x.shape[:2]
    drawn = [torch.dropout(x.new_ones(1, batch, units), now.recurrent_dropout, True)] if dropped else []
    kept = [p for p, zone in zip(now.zoneout, zones, strict=True) if zone is None]
    return drawn + [torch.bernoulli(x.new_full((steps, batch, units), p)) for p in kept]


def returned(module: Any, y: Any, hx: Any) -> Any:
    """What a call returns. y: what `run` returned over time, in the input's layout."""
    now = read(module)
    number = module._fused_states if now.states else 1
    states = y[:number] if now.states else y[0]
    if not now.gates:
        return states, hx
    return states, hx, dict(zip(module._fused_gates, y[number:], strict=True))
