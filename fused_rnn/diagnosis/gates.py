"""What a step makes of its gates: their activations, and which of them keep a state."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from fused_rnn.cells.descriptor import Step

# The ends of what squashes.
ENDS = {"sigmoid": (0.0, 1.0), "tanh": (-1.0, 1.0), "relu": (0.0, float("inf"))}
MUCH_RATHER = 10
_PRODUCTS = {"mul", "__mul__", "__rmul__", "div", "__truediv__", "true_divide"}
_LINEAR = {
    *_PRODUCTS, "add", "sub", "neg", "__add__", "__radd__", "__sub__", "__rsub__", "rsub", "__neg__", "where",
    "view_as", "to", "clone", "contiguous",
}  # fmt: skip
_OVER_UNITS = {"sum", "var", "mean", "linear"}  # a unit's result is no longer of its own numbers


class _Made(NamedTuple):
    """What a tensor is made of, by pointwise operations.

    gates: not squashed yet.  squashed: gates of which an activation, or another nonlinear function, is in it.
    states: linearly.  kept: those that were multiplied by an activation, each with a gate of that.
    """

    gates: frozenset[int] = frozenset()
    squashed: frozenset[int] = frozenset()
    states: frozenset[int] = frozenset()
    kept: frozenset[tuple[int, int]] = frozenset()


_NOTHING = _Made()


class Looking(TorchFunctionMode):
    """Follows a step's gates and states while it runs. An expand that does nothing is left out, for a state to be what
    the step computes with."""

    def __init__(self, x: Sequence[Tensor], r: Sequence[Tensor], states: Sequence[Tensor]) -> None:
        super().__init__()
        self.made: dict[int, _Made] = {}  # by id
        self.alive: list[Any] = []  # so that no id is used again
        self.into: dict[int, list[tuple[str, Tensor]]] = {}  # of each gate the activations that it goes into
        self.mixed: set[int] = set()  # gates that go into an activation with others
        for side in (x, r or ()):
            for gate, t in enumerate(side):
                self.made[id(t)] = _Made(gates=frozenset((gate,)))
        for state, t in enumerate(states):
            self.made[id(t)] = _Made(states=frozenset((state,)))

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "")
        if name == "expand" and result.shape == args[0].shape:
            return args[0]
        if isinstance(result, Tensor):
            self.alive.append(result)
            if result.dtype.is_floating_point and name not in _OVER_UNITS:
                made = self._of(name, [self.made.get(id(a), _NOTHING) for a in args])
                if name in ENDS:
                    self._squashed(name, made.gates, result)
                    made = made._replace(gates=frozenset())
                self.made[id(result)] = made
        return result

    def _of(self, name: str, args: Sequence[_Made]) -> _Made:
        gates = frozenset[int]().union(*(a.gates for a in args))
        squashed = frozenset[int]().union(*(a.squashed for a in args))
        if name not in _LINEAR:
            return _Made(gates, squashed | gates)
        kept = {pair for a in args for pair in a.kept}
        if name in _PRODUCTS and len(args) == 2:
            kept |= {(s, g) for a, by in (args, args[::-1]) for s in a.states for g in by.squashed}
        return _Made(gates, squashed, frozenset[int]().union(*(a.states for a in args)), frozenset(kept))

    def _squashed(self, name: str, gates: frozenset[int], result: Tensor) -> None:
        if len(gates) > 1:
            self.mixed |= gates
        for gate in gates:
            self.into.setdefault(gate, []).append((name, result))

    def found(self, after: Iterable[Tensor]) -> dict[int, tuple[str, Tensor]]:
        """The activations of the gates that have one of their own, and go nowhere else. after: the states."""
        lost = self.mixed.union(*(self.made.get(id(s), _NOTHING).gates for s in after))
        return {gate: into[0] for gate, into in sorted(self.into.items()) if len(into) == 1 and gate not in lost}

    def kept(self, after: Sequence[Tensor]) -> list[tuple[int, int]]:
        """The states that reach the next step by a product with an activation, each with a gate of that."""
        return sorted(pair for k, s in enumerate(after) for pair in self.made.get(id(s), _NOTHING).kept if pair[0] == k)


class Example(NamedTuple):
    """A step as it ran once.

    states: their names.  given: x, r, the states before, and what else there was.
    kept: the states that an activation keeps, each with a gate of that.
    """

    step: Step
    states: Sequence[str]
    given: Sequence[Sequence[Tensor]]
    kept: Sequence[tuple[int, int]]


class Keeper(NamedTuple):
    """The gate by which a state is kept best. larger: whether that takes a larger pre-activation, or a smaller one."""

    gate: int
    state: str
    larger: bool


def keeper(example: Example) -> Keeper | None:
    """Of the gates that keep a state that on which it depends most, as the example has it, how much of the state is in
    the next one; rather one that has to be larger, a forget gate, than one that has to be smaller."""
    with torch.enable_grad():
        x, r, states, *rest = [[t.double() for t in each] for each in example.given]
        for t in (*x, *r, *states):
            t.requires_grad_()
        after = example.step(x, r, states, *rest)
        found: dict[Keeper, float] = {}
        for state, gate in example.kept:
            (share,) = torch.autograd.grad(after[state].sum(), states[state], create_graph=True)
            sides = [side[gate] for side in (x, r) if side]
            changes = torch.autograd.grad(
                share.abs().sum(), sides, allow_unused=True, materialize_grads=True, retain_graph=True
            )
            much = sum(float(change.sum()) for change in changes)
            if much and math.isfinite(much):
                found[Keeper(gate, example.states[state], much > 0)] = abs(much) * (MUCH_RATHER if much > 0 else 1)
    return max(found, key=found.__getitem__, default=None)
