"""What is recorded of a module's calls: a backend that runs the reference loop and looks on."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from fused_rnn.call import LayerCall
from fused_rnn.cells import CELLS
from fused_rnn.cells.descriptor import Step
from fused_rnn.checks import in_transform
from fused_rnn.diagnosis.gates import ENDS, Example, Keeper, Looking, keeper
from fused_rnn.diagnosis.probe import Probe
from fused_rnn.nn.recurrent import Recurrent
from fused_rnn.reference.loop import run_layer, without_autocast

NEAR = 0.05  # an activation is saturated within this share of its range from an end


@dataclass
class Call:
    """One call of a layer in one direction.

    squares: [S, T, B], of every state's gradient the sum of squares over units.
    kinds: of each gate that is squashed, by what.
    ends: of each of these, and each of its ends, how many activations were near it, [2, T].
    seen: [T], how many activations there were of each gate.
    gains: of each sequence the factors of its steps, from its end back; 0 where there is none. probe.py.
    """

    squares: Tensor
    seen: Tensor
    gains: Sequence[Tensor] = ()
    kinds: dict[int, str] = field(default_factory=dict)
    ends: dict[int, Tensor] = field(default_factory=dict)


@dataclass
class Record:
    """One layer in one direction.

    path: its module's.  gate_names: of its cell.  normed: whether its gates have a norm already.
    weights: of its recurrences, as the last call had them.
    gated: whether a state reaches the next one by a product with an activation.  keeper: the gate of that.
    """

    path: str
    cell: str
    layer: int
    reverse: bool
    gate_names: tuple[str, ...]
    normed: bool
    calls: list[Call] = field(default_factory=list)
    weights: list[Any] = field(default_factory=list)
    gated: bool = False
    keeper: Keeper | None = None

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
        name = self.gate_names[number]
        return name if not name.isdigit() else "h" if self.cell.startswith("rnn_") else f"gate{name}"


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
    watches: list[_Watch] = field(default_factory=list)
    place: int = 0  # of the layer that comes next
    before: dict[str, Any] = field(default_factory=dict)

    def start(self) -> None:
        """Take the place of the module's backend."""
        module = self.module
        program = CELLS[module._fused_cell].program
        normed = bool(getattr(module, "_fused_normed", program is not None and program.forward.rows))
        for layer in range(module.num_layers):
            for reverse in (False, True)[: 1 + module.bidirectional]:
                self.records.append(Record(self.path, module._fused_cell, layer, reverse, module._fused_gates, normed))
        attributes = vars(module)
        self.before = {"_fused_backend": attributes["_fused_backend"]} if "_fused_backend" in attributes else {}
        attributes["_fused_backend"] = self

    def stop(self) -> None:
        """Give it back."""
        attributes = vars(self.module)
        if attributes.get("_fused_backend") is self:
            del attributes["_fused_backend"]
            attributes.update(self.before)

    def probe(self) -> None:
        """Find what the recurrences make of gradients, of the calls that got one."""
        for watch in self.watches:
            watch.follow()

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
            self.watches.append(watch)
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
            self.calls.append(Call(squares, seen))
            record.calls.append(self.calls[-1])
            record.weights = call.each[k * self.heads : (k + 1) * self.heads]
        # The loop's cell may be a variant of the module's, with more states: nn/extras.py.
        self.own = [spec.states.index(name) for name in records[0].states]
        self.names = spec.states
        self.squashed: dict[int, tuple[str, Tensor]] = {}
        self.records, self.probe = records, Probe(call)
        self.examples: dict[int, Example] = {}

    def follow(self) -> None:
        """Find which gates keep a state, and send a gradient back through the recurrence alone."""
        for side, example in self.examples.items():
            self.records[side].gated, self.records[side].keeper = bool(example.kept), keeper(example)
        if not any(bool(call.squares.any()) for call in self.calls):
            return
        for call, gains in zip(self.calls, self.probe.follow(self.heads), strict=True):
            if call.squares.any():
                call.gains = gains.unbind(1)

    def step(self, step: Step) -> Step:
        """The cell's step, under an eye on what it squashes. What it hands on as it was given is another tensor."""

        def watched(x: Sequence[Tensor], r: Sequence[Tensor], *more: Any) -> tuple[Tensor, ...]:
            with Looking(x, r, more[0]) as seen:
                after = step(x, r, *more)
            own = [after[k] for k in self.own]
            self.squashed = seen.found(own)
            kept = [(k, gate) for k, gate in seen.kept(after) if k in self.own]
            detached = [[t.detach() for t in each] for each in (x, r or (), *more)]
            self.example = Example(step, self.names, detached, kept)
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
        self.examples[recurrence // self.heads] = self.example
        for place, state in enumerate(self.own):
            _hook(after[state], call.squares[place, time])
        out = [s.view_as(s) for s in after]
        self.probe.listen(recurrence, time, out)
        return out, out


def _hook(s: Tensor, squares: Tensor) -> None:
    """The squares of s's gradient, summed over units, go onto `squares`."""

    def add(gradient: Tensor) -> None:
        squares.add_(gradient.detach().double().square().sum(-1))

    if s.requires_grad:
        s.register_hook(add)


def _near_ends(how: str, activation: Tensor) -> tuple[Tensor, Tensor]:
    """Where an activation is near its lower end, and its upper one."""
    low, high = ENDS[how]
    a = activation.detach()
    if high == float("inf"):  # a relu has one end, which it reaches
        return a <= low, torch.zeros_like(a, dtype=torch.bool)
    margin = NEAR * (high - low)
    return a < low + margin, a > high - margin
