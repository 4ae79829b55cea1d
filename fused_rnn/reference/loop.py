"""The reference loop over time: plain differentiable PyTorch, slow and obvious.

It judges every backend, and it is what a second derivative differentiates.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import linear

from fused_rnn.call import LayerCall, Weights
from fused_rnn.cells import Cell
from fused_rnn.cells.descriptor import Step
from fused_rnn.cells.diagonal import recurrent_side
from fused_rnn.reference.sequence import zero_past_end


def without_autocast(x: Tensor) -> AbstractContextManager[None]:
    """A context in which operations on x's device keep their dtype."""
    if x.is_meta or not torch.is_autocast_enabled(x.device.type):
        return nullcontext()
    return torch.autocast(x.device.type, enabled=False)


class Watch(Protocol):
    """Who looks on while a layer runs."""

    def step(self, step: Step) -> Step:
        """The cell's step as it is to be run."""
        ...

    def states(self, recurrence: int, time: int, after: Sequence[Tensor]) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        """The states after a step, twice: as its outputs, and as the next step gets them."""
        ...


def run_layer(call: LayerCall, watch: Watch | None = None) -> list[Tensor]:
    """One layer: [y [T, B, R·P], h_n [R, B, P], the other states after [R, B, H], their sequences [T, B, R, H] if asked
    for], in x's dtype.

    16-bit types compute in float32. Differentiable any number of times, in forward mode too, in x, weights and states;
    works under vmap.
    """
    dtype = call.x.dtype
    if dtype in (torch.bfloat16, torch.float16):
        weights, states = [w.float() for w in call.weights], [s.float() for s in call.states]
        call = call._replace(x=call.x.float(), weights=weights, states=states)
    x, spec, initial = zero_past_end(call.x, call.lengths), call.spec, call.initial()
    if watch is not None:
        spec = spec._replace(step=watch.step(spec.step))
    ys, finals, over_time = [], [], []
    for r, (w, direction) in enumerate(zip(call.each, call.directions, strict=True)):
        own = x if x.dim() == 3 else x[:, :, r]
        (y, *others), after = _run_recurrence(
            own, w, [s[r] for s in initial], call.lengths, call.reset, spec, direction, r, watch
        )
        ys.append(y)
        finals.append(after)
        over_time.append(others)
    y = ys[0] if len(ys) == 1 else torch.cat(ys, -1)
    outputs = [y, *(torch.stack(each) for each in zip(*finals, strict=True))]
    if call.sequences:
        outputs += [torch.stack(each, 2) for each in zip(*over_time, strict=True)]
    return [t.to(dtype) for t in outputs]


def _run_recurrence(
    x: Tensor,
    w: Weights,
    states: Sequence[Tensor],
    lengths: Tensor | None,
    reset: Tensor | None,
    spec: Cell,
    direction: int,
    recurrence: int = 0,
    watch: Watch | None = None,
) -> tuple[list[Tensor], Sequence[Tensor]]:
    """x [T, B, D], states [B, ·] → the states of every step [T, B, ·], zeros past the end, and those after."""
    steps = x.shape[0]
    gates_x = linear(x, w.w_ih, w.b_ih)
    outputs: list[Sequence[Tensor]] = []
    for t in range(steps) if direction > 0 else range(steps - 1, -1, -1):
        entering = states
        over = None if lengths is None else (t >= lengths).unsqueeze(-1)
        # What stands still enters no step: the gradient of zero that comes back, times a NaN in it, would be one.
        for gone in (over, None if reset is None else reset[t].unsqueeze(-1)):
            if gone is not None:
                entering = [s.masked_fill(gone, 0) for s in entering]
        side = None if w.w_hh is None else recurrent_side(entering[0], w.w_hh, w.b_hh, spec.gates, spec.diagonal)
        sides = () if side is None else side.chunk(spec.gates, -1)
        own = (w.matrices, [mask[t if len(mask) > 1 else 0] for mask in w.masks]) if w.matrices or w.masks else ()
        new = spec.step(gates_x[t].chunk(spec.gates, -1), sides, entering, w.params, *own)
        if w.w_hr is not None:
            new = (linear(new[0], w.w_hr), *new[1:])
        out, on = (new, new) if watch is None else watch.states(recurrence, t, new)
        if over is None:
            states = on
            outputs.append(out)
        else:
            # Past its end a sequence's state stands still. A reverse loop meets those steps first, and so enters the
            # last valid one with h0.
            states = [torch.where(over, s, n) for s, n in zip(states, on, strict=True)]
            outputs.append([n.masked_fill(over, 0) for n in out])
    if direction < 0:
        outputs.reverse()
    return [torch.stack(each) for each in zip(*outputs, strict=True)], states
