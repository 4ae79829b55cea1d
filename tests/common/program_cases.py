"""Problems of cells that are programs, for one layer: params, sequences, no W_hh. By a backend and by the loop."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import torch
from programs import PROGRAMS
from torch import Tensor

from fused_rnn import autograd
from fused_rnn.call import LayerCall, kinds
from fused_rnn.cells import CELLS
from fused_rnn.dispatch import BACKENDS
from fused_rnn.reference import loop
from fused_rnn.reference.sequence import past_end

Results = dict[str, Tensor]


class ProgramCase(NamedTuple):
    """A layer. cell: of PROGRAMS, or a name of CELLS.  sequences: as in LayerCall."""

    cell: str
    T: int = 5
    B: int = 3
    D: int = 4
    H: int = 17
    bidirectional: bool = False
    bias: bool = True
    lengths: bool = False
    reset: bool = False
    hx: bool = True
    sequences: bool = False
    save: str = "gates"
    dtype: torch.dtype = torch.float32

    def __str__(self) -> str:
        size = f"{self.cell}-T{self.T}-B{self.B}-D{self.D}-H{self.H}"
        options = [size, str(self.dtype).removeprefix("torch.")]
        options += [name for name in ("bidirectional", "lengths", "reset", "sequences") if getattr(self, name)]
        options += [f"no_{name}" for name in ("bias", "hx") if not getattr(self, name)]
        return "-".join(options + ([self.save] if self.save != "gates" else []))


def call_of(case: ProgramCase, seed: int = 0) -> LayerCall:
    """Random tensors in the case's dtype. lengths hold 0 and T where B allows it."""
    name = PROGRAMS.get(case.cell, case.cell)
    cell, directions = CELLS[name], (1, -1)[: 1 + case.bidirectional]
    random = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random, dtype=torch.float64).to(case.dtype)

    sides = 1 + cell.recurrent
    own = len(cell.params) + len(cell.matrices) + cell.masks
    found = kinds(cell, sides * (1 + case.bias) + own)
    assert found is not None
    shapes = found.shapes(cell, case.D, case.H, case.H)
    weights: list[Tensor] = []
    for k, shape in enumerate(shapes * len(directions)):
        if found.is_mask(k):  # by turns the same at all times, and others at each
            kept = torch.rand(1 if k % 2 else case.T, case.B, case.H, generator=random) < 0.75
            weights.append(kept.to(case.dtype) / 0.75)
        else:
            weights.append(normal(*shape) * (case.H**-0.5 if shape != (case.H,) else 0.5))
    states = [normal(len(directions), case.B, case.H) for _ in cell.states] if case.hx else []
    random.manual_seed(seed + 1)
    lengths = torch.randint(0, case.T + 1, (case.B,), generator=random)
    if case.B > 2:
        lengths[0], lengths[-1] = 0, case.T
    reset = torch.rand(case.T, case.B, generator=random) < 0.2
    return LayerCall(
        normal(case.T, case.B, case.D), weights, states, lengths if case.lengths else None,
        reset if case.reset else None, name, directions, case.save, False, case.sequences,
    )  # fmt: skip


def mapped(call: LayerCall, change: Callable[[Tensor], Tensor]) -> LayerCall:
    """The call with its x, weights and states changed."""
    each: Any = ([change(t) for t in tensors] for tensors in (call.weights, call.states))
    weights, states = each
    return call._replace(x=change(call.x), weights=weights, states=states)


def douts(outputs: Sequence[Tensor], states: int, lengths: Tensor | None) -> list[Tensor]:
    """Of each output a random gradient; of what has a time, NaN past a sequence's end."""
    random = torch.Generator().manual_seed(1)
    made = [torch.randn(t.shape, generator=random, dtype=torch.float64).to(t) for t in outputs]
    for k in [0, *range(1 + states, len(made))] if lengths is not None else ():
        over = past_end(lengths, made[k].shape[0])
        made[k][over] = float("nan")
    return made


def results(call: LayerCall, run: Callable[[LayerCall], Sequence[Tensor]]) -> Results:
    """Named outputs of run, and the gradients of a fixed sum of them in x, the initial states and the weights."""
    leaves = mapped(call, lambda t: t.detach().clone().requires_grad_())
    outputs = run(leaves)
    names = ["y", *(f"{name}_n" for name in call.spec.states), *(f"{name}s" for name in call.spec.states[1:])]
    own = [k for k in range(len(call.weights)) if not call.kinds.is_mask(k)]  # masks have no gradient
    inputs = [leaves.x, *leaves.states, *(leaves.weights[k] for k in own)]
    grads = torch.autograd.grad(
        outputs, inputs, douts(outputs, len(call.spec.states), call.lengths), allow_unused=True, materialize_grads=True
    )
    of = ["dx", *(f"d{name}0" for name in call.spec.states[: len(call.states)])]
    of += [f"dweights[{k}]" for k in own]
    made = dict(zip(names, (t.detach() for t in outputs), strict=False))
    return made | dict(zip(of, grads, strict=True))


def by_backend(call: LayerCall, backend: str | ModuleType) -> Results:
    """By one of our backends, under autograd where save says what is kept."""
    module = BACKENDS[backend] if isinstance(backend, str) else backend
    return results(call, lambda leaves: autograd.layer(module, leaves))


def by_reference(call: LayerCall) -> Results:
    """The judge: the plain loop in float64 on the same inputs."""
    return results(mapped(call, torch.Tensor.double), loop.run_layer)


def by_loop(call: LayerCall) -> Results:
    """What a user's own loop over his step makes in the inputs' dtype, every operation of it rounded."""

    def run(leaves: LayerCall) -> list[Tensor]:
        spec, initial, each = leaves.spec, leaves.initial(), []
        for r, (w, direction) in enumerate(zip(leaves.each, leaves.directions, strict=True)):
            own = [s[r] for s in initial]
            each.append(loop._run_recurrence(leaves.x, w, own, leaves.lengths, leaves.reset, spec, direction))
        over_time = [list(sequences) for sequences, _ in each]
        outputs = [torch.cat([sequences[0] for sequences in over_time], -1)]
        outputs += [torch.stack(states) for states in zip(*(after for _, after in each), strict=True)]
        if leaves.sequences:
            outputs += [torch.stack(s, 2) for s in zip(*(more[1:] for more in over_time), strict=True)]
        return outputs

    return results(call, run)
