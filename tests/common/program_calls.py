"""Calls of the ops whose cell is a program: arguments, and what the ops and plain loops make of them."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fused_rnn import ops
from fused_rnn.call import Kinds, LayerCall
from fused_rnn.cells import CELLS
from fused_rnn.cells.program import PREFIX
from fused_rnn.reference.loop import run_layer

Results = dict[str, Tensor]


def make_call(
    cell: str, T: int = 5, B: int = 3, D: int = 4, H: int = 17, directions: tuple[int, ...] = (1,), bias: bool = True,
    lengths: bool = False, reset: bool = False, hx: bool = True, save: str = "gates",
    dtype: torch.dtype = torch.float32, seed: int = 0,
) -> LayerCall:  # fmt: skip
    """A layer that returns its sequences, of random numbers; lengths hold 0 and T where B allows it."""
    random, spec = torch.Generator().manual_seed(seed), CELLS[cell]

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random, dtype=torch.float64).to(dtype)

    kinds = Kinds(0, bias, False, spec.recurrent, len(spec.matrices), spec.masks)
    shapes = kinds.shapes(spec, D, H, H)
    each = shapes[: len(shapes) - spec.masks]
    ends = torch.randint(0, T + 1, (B,), generator=random)
    if B > 2:
        ends[0], ends[-1] = 0, T
    cuts = torch.rand(T, B, generator=random) < 0.2
    states = [normal(len(directions), B, H) for _ in spec.states] if hx else []
    weights: list[Tensor] = []
    for _ in directions:
        uniform = [torch.rand(*s, generator=random, dtype=torch.float64) * 2 - 1 for s in each]
        weights += [(w * H**-0.5).to(dtype) for w in uniform]
        for k in range(spec.masks):  # by turns the same at all times, and others at each
            kept = torch.rand(1 if k % 2 == 0 else T, B, H, generator=random) < 0.75
            weights.append(kept.to(dtype) / 0.75)
    return LayerCall(
        normal(T, B, D), weights, states, ends if lengths else None, cuts if reset else None, cell, directions, save,
        False, True,
    )  # fmt: skip


def gradients_of(call: LayerCall, seed: int = 1) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """dy, of the states after, of their sequences: NaN past a sequence's end, where nobody may look."""
    random, (steps, batch, _) = torch.Generator().manual_seed(seed), call.x.shape

    def normal(shape: Any) -> Tensor:
        return torch.randn(*shape, generator=random, dtype=torch.float64).to(call.x.dtype)

    dy = normal((steps, batch, call.recurrences * call.width))
    dstates, dsequences = (
        [normal(shape) for shape in shapes] for shapes in (call.state_shapes(), call.sequence_shapes())
    )
    if call.lengths is not None:
        past = torch.arange(steps).unsqueeze(1) >= call.lengths
        for sequence in dsequences:
            sequence.masked_fill_(past[..., None, None], float("nan"))
    return dy, dstates, dsequences


def named(call: LayerCall, outputs: list[Tensor], gradients: list[Tensor]) -> Results:
    """What forward and backward return, by name."""
    more = call.spec.states[1:]
    forward = ["y", *(f"{s}_n" for s in call.spec.states), *(f"{s} over time" for s in more)]
    backward = ["dx", *(f"d{s}0" for s in call.spec.states[: len(call.states)])]
    backward += [f"dweights[{k}]" for k in range(len(call.weights))]
    results = dict(zip([*forward, *backward], [*outputs[: len(forward)], *gradients], strict=True))
    of_masks = [f"dweights[{k}]" for k in range(len(call.weights)) if call.kinds.is_mask(k)]  # they have none
    return {name: value for name, value in results.items() if name not in of_masks}


def by_ops(call: LayerCall, forward: Any, backward: Any) -> Results:
    """A call by a pair of ops."""
    outputs = forward(*call)
    n = 1 + len(call.spec.states)
    over_time, (saved, *histories, _) = outputs[n : n + len(call.spec.states) - 1], outputs[2 * n - 2 :]
    histories = over_time if call.save == "gates" else histories
    dy, dstates, dsequences = gradients_of(call)
    kept = (outputs[0], saved, histories, call.cell, call.directions, call.save, True, True)
    return named(call, outputs, backward(dy, dstates, *call[:5], *kept, dsequences))


def assert_same_by_any_threads(call: LayerCall) -> None:
    """The CPU's loops, whoever does their work. Of a program in stages the gradients of its params are summed over the
    rows of a strip, and strips are others with other threads: they are the same from run to run."""
    torch.set_num_threads(1)
    first = by_ops(call, ops.forward, ops.backward)
    of_params = [name for name, value in first.items() if name.startswith("dweights") and value.shape == (call.width,)]
    apart = of_params if CELLS[call.cell].program.stages > 1 else []
    for threads in (2, 3, 4, 2):
        torch.set_num_threads(threads)
        for key, value in by_ops(call, ops.forward, ops.backward).items():
            assert not value.isnan().any(), key
            if key in apart:
                torch.testing.assert_close(value, first[key], rtol=1e-4, atol=1e-4 * float(first[key].abs().max()))
                assert torch.equal(value, by_ops(call, ops.forward, ops.backward)[key]), key
            else:
                assert torch.equal(value, first[key]), key


def by_reference(call: LayerCall) -> Results:
    """The plain loop in float64: the judge."""
    wide = in_double(call)
    return _by_loop(wide, run_layer, [t.double() for t in flat(gradients_of(call))])


def by_steps(call: LayerCall) -> Results:
    """The plain loop in the call's dtype, to which it rounds its states at every step, as all loops do."""
    return _by_loop(call, step_by_step, flat(gradients_of(call)))


def flat(gradients: tuple[Tensor, list[Tensor], list[Tensor]]) -> list[Tensor]:
    return [gradients[0], *gradients[1], *gradients[2]]


def in_double(call: LayerCall) -> LayerCall:
    weights, states = [w.double() for w in call.weights], [s.double() for s in call.states]
    return call._replace(x=call.x.double(), weights=weights, states=states)


def _by_loop(call: LayerCall, run: Any, given: list[Tensor]) -> Results:
    leaves = [t.clone().requires_grad_() for t in (call.x, *call.states, *call.weights)]
    n = 1 + len(call.states)
    outputs = run(call._replace(x=leaves[0], states=leaves[1:n], weights=leaves[n:]))
    masked = [g.masked_fill(g.isnan(), 0) for g in given]
    grads = torch.autograd.grad(outputs, leaves, masked, allow_unused=True, materialize_grads=True)
    return named(call, [o.detach() for o in outputs], list(grads))


def step_by_step(call: LayerCall) -> list[Tensor]:
    number, sequences = len(call.weights) // call.recurrences, []
    after = []
    for r, direction in enumerate(call.directions):
        states, made = [s[r : r + 1] for s in call.initial()], []
        for t in range(call.x.shape[0])[::direction]:
            lengths = None if call.lengths is None else (call.lengths - t).clamp(0, 1)
            reset = None if call.reset is None else call.reset[t : t + 1]
            weights = [
                w[t : t + 1] if call.kinds.is_mask(k) and len(w) > 1 else w
                for k, w in enumerate(call.weights[r * number : (r + 1) * number])
            ]
            one = LayerCall(call.x[t : t + 1], weights, states, lengths, reset, call.cell, (1,), sequences=True)
            y, *rest = run_layer(one)
            states = rest[: len(states)]
            made.append([y, *(s for s in rest[len(states) :])])
        sequences.append([torch.cat(list(each)) for each in zip(*made[::direction], strict=True)])
        after.append(states)
    y, *others = zip(*sequences, strict=True)
    return [torch.cat(y, -1), *(torch.cat(s) for s in zip(*after, strict=True)), *(torch.cat(s, 2) for s in others)]


def run_changed(texts: Sequence[str], times: int, characters: str) -> int:
    """How many of these texts, each changed at random so often, the loops ran; the others they refused."""
    draw, ran = random.Random(0), 0
    for text in (*texts,) * times:
        changed = list(text)
        for _ in range(draw.randint(1, 3)):
            place = draw.randrange(len(PREFIX), len(text))
            changed[place] = draw.choice("0123456789" if text[place].isdigit() else characters)
        other = "".join(changed)
        if ops._C.refusal(other) is not None:
            continue
        try:
            call = make_call(other, T=2, B=2, H=5)
        except ValueError:  # what Python refuses
            continue
        ran += 1
        outputs = ops.forward(*call)
        n = len(call.spec.states)
        dy, dstates, _ = gradients_of(call)
        histories, saved = outputs[1 + n : 2 * n], outputs[2 * n]
        ops.backward(dy, dstates, *call[:5], outputs[0], saved, histories, other, (1,), "gates", True, True, ())
    return ran
