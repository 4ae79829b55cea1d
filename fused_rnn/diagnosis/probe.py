"""A gradient of one place, sent back through a layer's recurrence alone: what the recurrence makes of it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from fused_rnn.call import LayerCall
from fused_rnn.cells.descriptor import Step
from fused_rnn.reference.loop import run_layer, without_autocast


class Probe:
    """Of one layer's call: the gradients that arrive at the ends of sequences, and where they go from there when
    nothing else enters. An end is the step after which a sequence is over, or is reset."""

    def __init__(self, call: LayerCall) -> None:
        self.call = call._replace(
            x=call.x.detach(), weights=[w.detach() for w in call.weights], states=[s.detach() for s in call.states]
        )
        self.ends = [_ends(call, direction) for direction in call.directions]
        self.times = [ends.any(1).tolist() for ends in self.ends]
        self.arrived: dict[tuple[int, int, int], Tensor] = {}  # by recurrence, step and state

    def listen(self, recurrence: int, time: int, after: Sequence[Tensor]) -> None:
        """Remember, in backward, what arrives at the states after a step that ends something."""
        if self.times[recurrence][time]:
            for k, s in enumerate(after):
                if s.requires_grad:
                    s.register_hook(partial(self._add, (recurrence, time, k)))

    def _add(self, place: tuple[int, int, int], gradient: Tensor) -> None:
        own = gradient.detach().double()
        self.arrived[place] = self.arrived[place] + own if place in self.arrived else own

    def follow(self, heads: int) -> list[Tensor]:
        """Of each direction the factors by which every step back multiplies the norm of all states together, those of a
        sequence that were last first, [T - 1, B]; 0 where there is none.

        The layer runs once more, in float64. Into the end of each sequence goes a vector of norm one: in the direction
        of what arrived there, a fixed one where nothing did.
        """
        call = self.call
        wide = call._replace(x=call.x.double(), weights=[w.double() for w in call.weights], sequences=False)
        seen = _Seen(call.x.shape[0], call.recurrences)
        with torch.enable_grad(), without_autocast(call.x):
            initial = [s.double().requires_grad_() for s in call.initial()]
            run_layer(wide._replace(states=initial), seen)
        places = [(r, t, k) for r, steps in enumerate(seen.after) for t, s in enumerate(steps) for k in range(len(s))]
        places = [place for place in places if seen.at(place).requires_grad]
        if not places:
            return [call.x.new_zeros(0, call.x.shape[1]).double()] * (call.recurrences // heads)
        entering = self._entering(seen, heads)
        entering = {place: entering[place] for place in places if place in entering}
        back = torch.autograd.grad(
            [seen.at(place) for place in entering], [seen.at(place) for place in places], list(entering.values()),
            allow_unused=True, materialize_grads=True,
        )  # fmt: skip
        found: dict[tuple[int, int], list[Tensor]] = {}
        for (r, t, _), gradient in zip(places, back, strict=True):
            found.setdefault((r // heads, t), []).append(gradient)
        gains = []
        for side in range(call.recurrences // heads):
            norms = torch.stack([_norm(found[side, t]) for t in range(len(seen.after[0]))])
            ends = self.ends[side * heads]
            if call.directions[side * heads] > 0:
                norms, ends = norms.flip(0), ends.flip(0)
            gains.append((norms[1:] / norms[:-1]).masked_fill((norms[:-1] == 0) | ends[1:], 0))
        return gains

    def _entering(self, seen: _Seen, heads: int) -> dict[tuple[int, int, int], Tensor]:
        """What goes into the states at the ends, by recurrence, step and state."""
        entering = {}
        for first in range(0, self.call.recurrences, heads):
            for time, ends in enumerate(self.times[first]):
                if not ends:
                    continue
                states = range(len(seen.after[first][time]))
                places = [(r, time, k) for r in range(first, first + heads) for k in states]
                vectors = [self.arrived.get(p, torch.zeros_like(seen.at(p), requires_grad=False)) for p in places]
                norm = _norm(vectors)
                there = (norm.isfinite() & (norm > 0)).unsqueeze(-1)
                fixed = [_fixed(v) * (k == 0) for (_, _, k), v in zip(places, vectors, strict=True)]
                of_fixed = _norm(fixed).unsqueeze(-1)
                is_end = self.ends[first][time].unsqueeze(-1)
                for place, v, other in zip(places, vectors, fixed, strict=True):
                    unit = torch.where(there, v / norm.unsqueeze(-1), other / of_fixed)
                    entering[place] = torch.where(is_end, unit, 0.0)
        return entering


class _Seen:
    """The states after every step of a layer that runs."""

    def __init__(self, steps: int, recurrences: int) -> None:
        self.after: list[list[Sequence[Tensor]]] = [[()] * steps for _ in range(recurrences)]

    def at(self, place: tuple[int, int, int]) -> Tensor:
        """A state."""
        recurrence, time, state = place
        return self.after[recurrence][time][state]

    def step(self, step: Step) -> Step:
        """The cell's own."""
        return step

    def states(self, recurrence: int, time: int, after: Sequence[Tensor]) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        """The states, as tensors of their own: a cell may hand on what it was given."""
        own = [s.view_as(s) for s in after]
        self.after[recurrence][time] = own
        return own, own


def _ends(call: LayerCall, direction: int) -> Tensor:
    """[T, B]: after which steps a sequence is over, or the next one begins anew."""
    steps, batch = call.x.shape[:2]
    last = torch.full((batch,), steps, device=call.x.device) if call.lengths is None else call.lengths
    time = torch.arange(steps, device=call.x.device).unsqueeze(1)
    reset = torch.zeros(steps, batch, dtype=torch.bool, device=call.x.device) if call.reset is None else call.reset
    over = torch.ones_like(reset[:1])
    if direction > 0:
        return (time < last) & ((time == last - 1) | torch.cat([reset[1:], over]))
    return (time < last) & torch.cat([over, reset[:-1]])


def _norm(parts: Sequence[Tensor]) -> Tensor:
    """[B]: of all parts [B, ·] together, without squaring what is very small or large."""
    whole = torch.cat(list(parts), -1)
    scale = whole.abs().amax(-1, keepdim=True)
    unit = whole / scale.masked_fill(scale == 0, 1)
    norm: Tensor = torch.linalg.vector_norm(unit, dim=-1)
    return scale.squeeze(-1) * norm


def _fixed(like: Tensor) -> Tensor:
    """A vector for each row in which no unit is like another."""
    return torch.arange(1, like.shape[-1] + 1, dtype=like.dtype, device=like.device).cos().expand_as(like)
