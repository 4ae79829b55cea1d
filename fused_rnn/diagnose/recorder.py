"""What is recorded of a module's calls: a backend that runs the reference loop and looks on."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from fused_rnn.call import LayerCall
from fused_rnn.cells import CELLS
from fused_rnn.cells.descriptor import Step
from fused_rnn.checks import in_transform
from fused_rnn.nn.recurrent import Recurrent
from fused_rnn.reference.loop import run_layer, without_autocast

# The ends of what squashes: an activation is saturated within 5 % of its range from one of them.
NEAR = 0.05
ENDS = {"sigmoid": (0.0, 1.0), "tanh": (-1.0, 1.0), "relu": (0.0, float("inf"))}


@dataclass
class Call:
    """One call of a layer in one direction.

    squares: [S, T, B], of every state's gradient the sum of squares over units.
    arriving, carried: [T, B], the same of all states together, without what goes through another state of this step:
        of all that comes, and of what comes from the next step alone.
    kinds: of each gate that is squashed, by what.
    ends: of each of these, and each of its ends, how many activations were near it, [2, T].
    seen: [T], how many activations there were of each gate.
    """

    squares: Tensor
    arriving: Tensor
    carried: Tensor
    seen: Tensor
    kinds: dict[int, str] = field(default_factory=dict)
    ends: dict[int, Tensor] = field(default_factory=dict)


@dataclass
class Record:
    """One layer in one direction. path: its module's. weights: of its recurrences, as the last call had them."""

    path: str
    cell: str
    layer: int
    reverse: bool
    calls: list[Call] = field(default_factory=list)
    weights: list[Any] = field(default_factory=list)

    def name(self, what: str = "") -> str:
        """What, named as torch.nn names weights, encoder.c_l0_reverse; of the layer itself encoder.l0_reverse."""
        place = f"l{self.layer}{'_reverse' if self.reverse else ''}"
        return ".".join(filter(None, (self.path, f"{what}_{place}" if what else place)))

    @property
    def states(self) -> tuple[str, ...]:
        """The states' names."""
        return CELLS[self.cell].states

    def gate(self, number: int) -> str:
        """A gate's name."""
        parts = CELLS[self.cell].parts
        return parts.names[number] if parts else "h" if self.cell.startswith("rnn_") else f"gate{number}"


@dataclass
class Recorder:
    """A backend for one module alone, in the place of its own while the context is on.

    As a dataclass it has no hash, so that dispatch, which remembers what it chose, holds none.
    """

    NAME: ClassVar[str] = "diagnose"
    DIFFERENTIABLE: ClassVar[bool] = True
    stack: ClassVar[None] = None
    wavefront: ClassVar[None] = None

    module: Recurrent
    path: str
    records: list[Record] = field(default_factory=list)
    place: int = 0  # of the layer that comes next
    before: dict[str, Any] = field(default_factory=dict)

    def start(self) -> None:
        """Take the place of the module's backend."""
        module = self.module
        for layer in range(module.num_layers):
            for reverse in (False, True)[: 1 + module.bidirectional]:
                self.records.append(Record(self.path, module._fused_cell, layer, reverse))
        attributes = vars(module)
        self.before = {"_fused_backend": attributes["_fused_backend"]} if "_fused_backend" in attributes else {}
        attributes["_fused_backend"] = self

    def stop(self) -> None:
        """Give it back."""
        attributes = vars(self.module)
        if attributes.get("_fused_backend") is self:
            del attributes["_fused_backend"]
            attributes.update(self.before)

    def forward(self, call: LayerCall) -> list[Tensor]:
        """One layer; result as of the op fused_rnn::forward."""
        # Hooks are no part of a graph, and Dynamo would look into the functions called here, too.
        run = torch.compiler.disable(self._run) if "torch._dynamo" in sys.modules else self._run
        outputs: list[Tensor] = run(call)
        return outputs

    forward._torchdynamo_disable = True  # type: ignore[attr-defined]

    def _run(self, call: LayerCall) -> list[Tensor]:
        if in_transform():
            raise NotImplementedError("diagnose: got a call under a transform of torch.func, expected a plain call")
        place, self.place = self.place, 0  # 0 too where this call fails
        watch = None
        if torch.is_grad_enabled():
            sides = 1 + self.module.bidirectional
            watch = _Watch(self.records[place * sides : (place + 1) * sides], call)
        with without_autocast(call.x):
            outputs = run_layer(call, watch)
        self.place = (place + 1) % self.module.num_layers
        return outputs

    def __repr__(self) -> str:
        return self.NAME

    def __reduce__(self) -> Any:
        """In a copy of the module, and where it is pickled, there is its own backend."""
        return _itself, (self.before.get("_fused_backend"),)


def _itself(backend: str | None) -> str | None:
    return backend


class _Watch:
    """Of one layer's call: gradients by hooks on the states, gates by what the step squashes."""

    def __init__(self, records: Sequence[Record], call: LayerCall) -> None:
        steps, batch = call.x.shape[:2]
        device, spec = call.x.device, call.spec
        self.heads = call.recurrences // len(records)
        self.valid = torch.ones(steps, batch, dtype=torch.bool, device=device)
        if call.lengths is not None:
            self.valid = torch.arange(steps, device=device).unsqueeze(1) < call.lengths
        seen = self.valid.sum(1) * (call.hidden_size * self.heads)
        self.calls = []
        for k, record in enumerate(records):
            squares = torch.zeros(len(record.states), steps, batch, dtype=torch.float64, device=device)
            arriving, carried = torch.zeros_like(squares[0]), torch.zeros_like(squares[0])
            self.calls.append(Call(squares, arriving, carried, seen))
            record.calls.append(self.calls[-1])
            record.weights = call.each[k * self.heads : (k + 1) * self.heads]
        # The loop's cell may be a variant of the module's, with more states: nn/extras.py.
        self.own = [spec.states.index(name) for name in records[0].states]
        self.squashed: dict[int, tuple[str, Tensor]] = {}

    def step(self, step: Step) -> Step:
        """The cell's step, under an eye on what it squashes. What it hands on as it was given is another tensor."""

        def watched(x: Sequence[Tensor], r: Sequence[Tensor], *more: Any) -> tuple[Tensor, ...]:
            with _Looking(x, r) as seen:
                after = step(x, r, *more)
            self.squashed = seen.found
            given = {id(t) for each in (x, r, *more) for t in each}
            return tuple(s.view_as(s) if id(s) in given else s for s in after)

        return watched

    def states(self, recurrence: int, time: int, after: Sequence[Tensor]) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        """The states after a step, with hooks: on what the step made, on what is read of that, on what goes on."""
        call = self.calls[recurrence // self.heads]
        steps, valid = len(self.valid), self.valid[time].unsqueeze(-1)
        for gate, (how, activation) in self.squashed.items():
            call.kinds[gate] = how
            near = call.ends.setdefault(gate, torch.zeros(2, steps, dtype=torch.float64, device=valid.device))
            for end, is_near in enumerate(_near_ends(how, activation)):
                near[end, time] += (is_near & valid).sum()
        for place, state in enumerate(self.own):
            _hook(after[state], call.squares[place, time])
        out = [_hook(s.view_as(s), call.arriving[time]) for s in after]
        return out, [_hook(s.view_as(s), call.carried[time]) for s in out]


def _hook(s: Tensor, squares: Tensor) -> Tensor:
    """s, whose gradient's squares, summed over units, go onto `squares`."""

    def add(gradient: Tensor) -> None:
        squares.add_(gradient.detach().double().square().sum(-1))

    if s.requires_grad:
        s.register_hook(add)
    return s


def _near_ends(how: str, activation: Tensor) -> tuple[Tensor, Tensor]:
    """Where an activation is near its lower end, and its upper one."""
    low, high = ENDS[how]
    a = activation.detach()
    if high == float("inf"):  # a relu has one end, which it reaches
        return a <= low, torch.zeros_like(a, dtype=torch.bool)
    margin = NEAR * (high - low)
    return a < low + margin, a > high - margin


class _Looking(TorchFunctionMode):
    """Finds, while a step runs, of each gate the activation: the first sigmoid, tanh or relu of what its
    pre-activation goes into. An expand that does nothing is left out, for a state to be what the step computes with."""

    def __init__(self, *sides: Sequence[Tensor]) -> None:
        super().__init__()
        self.gates: dict[int, frozenset[int]] = {}  # by id, of what was made: the gates that it is made of, unsquashed
        self.alive: list[Any] = []  # so that no id is used again
        self.found: dict[int, tuple[str, Tensor]] = {}
        for side in sides:
            for gate, t in enumerate(side or ()):
                self.gates[id(t)] = frozenset((gate,))

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if getattr(func, "__name__", "") == "expand" and result.shape == args[0].shape:
            return args[0]
        if isinstance(result, Tensor):
            made = frozenset[int]().union(*(self.gates.get(id(a), ()) for a in args))
            name = getattr(func, "__name__", "")
            if name in ENDS:
                for gate in made:
                    self.found.setdefault(gate, (name, result))
            elif made:
                self.gates[id(result)] = made
            self.alive.append(result)
        return result
