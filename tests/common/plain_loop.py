"""A user's cell by FlexRNN and by what a user without it writes: a Python loop over the step, which judges it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import literature
import torch
from tolerances import assert_as_good_as_torch
from torch import Tensor
from torch.nn.functional import linear

import fused_rnn
from fused_rnn import UserCell
from fused_rnn.reference.sequence import past_end

Results = dict[str, Tensor]
UNITS = 30


class Own(NamedTuple):
    """A FlexRNN of a cell of the literature, and how it is called; `lengths`, `reset`, `hx`: whether it has them."""

    cell: str
    T: int = 5
    B: int = 3
    D: int = 4
    H: int = 6
    layers: int = 1
    bidirectional: bool = False
    heads: int = 1
    bias: bool = True
    lengths: bool = False
    reset: bool = False
    hx: bool = True
    save: str = "gates"
    dtype: torch.dtype = torch.float32

    def __str__(self) -> str:
        options = [f"{self.cell}-T{self.T}-B{self.B}-D{self.D}-H{self.H}", str(self.dtype).removeprefix("torch.")]
        options += [f"{name}{getattr(self, name)}" for name in ("layers", "heads") if getattr(self, name) > 1]
        options += [name for name in ("bidirectional", "lengths", "reset") if getattr(self, name)]
        options += [f"no_{name}" for name in ("bias", "hx") if not getattr(self, name)]
        return "-".join(options + (["recompute"] if self.save == "recompute" else []))

    def fit(self) -> Own:
        """The case; of a cell with a kink in 16 bits fewer units over fewer steps."""
        if self.cell not in literature.KINKED or self.dtype.itemsize > 2:
            return self
        return self._replace(T=min(self.T, 2), B=min(self.B, 3), H=min(self.H, 6 * self.heads), layers=1)

    @property
    def step(self) -> UserCell:
        return literature.CELLS[self.cell]

    def module(self, backend: str | None = None) -> fused_rnn.FlexRNN:
        """Weights and params drawn: nothing is zero, or the same for two units."""
        rnn = fused_rnn.FlexRNN(
            self.step, self.D, self.H, self.layers, self.bias, bidirectional=self.bidirectional, heads=self.heads,
            dtype=torch.float64, backend=backend, save=self.save,
        )  # fmt: skip
        with torch.no_grad():
            for name, weight in rnn.named_parameters():
                base = name.rpartition("_l")[0]
                if base in self.step.params:
                    weight.copy_(drawn(self.cell, base, weight.shape))
        return rnn.to(self.dtype)


def drawn(cell: str, name: str, shape: Sequence[int]) -> Tensor:
    """Values of a state or a param, where the cell's paper has them."""
    low, high = literature.RANGES.get(cell, {}).get(name, (0.0, 0.0))
    if low < high:
        return low + (high - low) * torch.rand(*shape, dtype=torch.float64)
    return torch.randn(*shape, dtype=torch.float64)


class Given(NamedTuple):
    """What a module is called with; the gradients of y and of every state after."""

    x: Tensor
    hx: list[Tensor]
    lengths: Tensor | None
    reset: Tensor | None
    dout: list[Tensor]

    def to(self, dtype: torch.dtype) -> Given:
        return self._replace(
            x=self.x.to(dtype), hx=[s.to(dtype) for s in self.hx], dout=[d.to(dtype) for d in self.dout]
        )

    def on(self, device: str) -> Given:
        def move(t: Tensor | None) -> Tensor | None:
            return None if t is None else t.to(device)

        hx, dout = ([t.to(device) for t in each] for each in (self.hx, self.dout))
        return Given(self.x.to(device), hx, move(self.lengths), move(self.reset), dout)


def given(case: Own) -> Given:
    """Inputs in the case's dtype. lengths hold 0 and T where B allows it; a state starts where its paper has it."""
    recurrences = 1 + case.bidirectional
    shape = (case.layers * recurrences, case.B, case.H)
    lengths = torch.randint(0, case.T + 1, (case.B,))
    lengths[0], lengths[-1] = 0, case.T
    bounded = literature.RANGES.get(case.cell, {}).keys() & {*case.step.states}
    return Given(
        torch.randn(case.T, case.B, case.D, dtype=torch.float64),
        [drawn(case.cell, name, shape) for name in case.step.states] if case.hx or bounded else [],
        lengths if case.lengths else None,
        torch.rand(case.T, case.B) < 0.2 if case.reset else None,
        [
            torch.randn(*s, dtype=torch.float64)
            for s in ((case.T, case.B, recurrences * case.H), *(shape for _ in case.step.states))
        ],
    ).to(case.dtype)


Run = Callable[[Tensor, Sequence[Tensor], Mapping[str, Tensor]], Sequence[Tensor]]


def differentiate(run: Run, call: Given, weights: Mapping[str, Tensor]) -> Results:
    """The outputs of run, y and each state after, and the gradients of x, of the states before and of the weights."""
    states = len(call.dout) - 1
    leaves = [t.detach().clone().requires_grad_() for t in (call.x, *call.hx, *weights.values())]
    own = dict(zip(weights, leaves[1 + len(call.hx) :], strict=True))
    outputs = run(leaves[0], leaves[1 : 1 + len(call.hx)], own)
    grads = torch.autograd.grad(outputs, leaves, call.dout, allow_unused=True, materialize_grads=True)
    names = ["y", *(f"state {k} after" for k in range(states))]
    inputs = ["x", *(f"state {k} before" for k in range(len(call.hx))), *weights]
    return dict(zip(names, (o.detach() for o in outputs), strict=True)) | dict(
        zip((f"gradient of {name}" for name in inputs), grads, strict=True)
    )


def by_module(rnn: fused_rnn.FlexRNN, call: Given) -> Results:
    """The module's, as a user calls it."""

    def run(x: Tensor, hx: Sequence[Tensor], weights: Mapping[str, Tensor]) -> list[Tensor]:
        states = None if not hx else hx[0] if len(rnn.cell.states) == 1 else tuple(hx)
        y, after = torch.func.functional_call(
            rnn, dict(weights), (x, states), {"lengths": call.lengths, "reset": call.reset}
        )
        return [y, after] if isinstance(after, Tensor) else [y, *after]

    return differentiate(run, call, dict(rnn.named_parameters()))


def by_loop(rnn: fused_rnn.FlexRNN, call: Given, dtype: torch.dtype) -> Results:
    """The plain loop's, in a dtype."""

    def run(x: Tensor, hx: Sequence[Tensor], weights: Mapping[str, Tensor]) -> list[Tensor]:
        return plain_loop(rnn, x, hx, weights, call.lengths, call.reset)

    return differentiate(run, call.to(dtype), {name: w.to(dtype) for name, w in rnn.named_parameters()})


def plain_loop(
    rnn: fused_rnn.FlexRNN,
    x: Tensor,
    hx: Sequence[Tensor],
    weights: Mapping[str, Tensor],
    lengths: Tensor | None = None,
    reset: Tensor | None = None,
) -> list[Tensor]:
    """[y, each state after] by the step as the user wrote it, and torch's operations."""
    cell, recurrences, finals = rnn.cell, 1 + rnn.bidirectional, []
    for layer in range(rnn.num_layers):
        ys = []
        for r in range(recurrences):
            suffix = f"_l{layer}" + "_reverse" * r
            state = [s[layer * recurrences + r] for s in hx] or [
                x.new_zeros(x.shape[1], rnn.hidden_size) for _ in cell.states
            ]
            own = {name.removesuffix(suffix): w for name, w in weights.items() if name.endswith(suffix)}
            y, state = _over_time(cell, x, state, own, lengths, reset, backwards=r == 1)
            ys.append(y)
            finals.append(state)
        x = torch.cat(ys, -1)
    return [x, *(torch.stack(states) for states in zip(*finals, strict=True))]


def _over_time(
    cell: UserCell,
    x: Tensor,
    state: list[Tensor],
    w: Mapping[str, Tensor],
    lengths: Tensor | None,
    reset: Tensor | None,
    backwards: bool,
) -> tuple[Tensor, list[Tensor]]:
    steps = x.shape[0]
    params = {name: w[name] for name in cell.params}
    outputs: list[Any] = [None] * steps
    for t in reversed(range(steps)) if backwards else range(steps):
        entering = state if reset is None else [s.masked_fill(reset[t].unsqueeze(-1), 0) for s in state]
        own = linear(x[t], w["weight_ih"], w.get("bias_ih")).chunk(cell.gates, -1)
        sides = None if not cell.recurrent else _recurrent_sides(cell, entering[0], w)
        after = cell(own, sides, entering, params)
        over = None if lengths is None else (t >= lengths).unsqueeze(-1)
        if over is None:
            state, outputs[t] = list(after), after[0]
        else:
            state = [torch.where(over, old, new) for old, new in zip(state, after, strict=True)]
            outputs[t] = after[0].masked_fill(over, 0)
    return torch.stack(outputs), state


def _recurrent_sides(cell: UserCell, h: Tensor, w: Mapping[str, Tensor]) -> list[Tensor]:
    w_hh, bias = w["weight_hh"], w.get("bias_hh")
    if w_hh.dim() == 2:
        return list(linear(h, w_hh, bias).chunk(cell.gates, -1))
    parts = zip(h.chunk(len(w_hh), -1), w_hh, strict=True)
    heads = [linear(part, own).chunk(cell.gates, -1) for part, own in parts]
    sides = [torch.cat(gate, -1) for gate in zip(*heads, strict=True)]
    return sides if bias is None else [s + b for s, b in zip(sides, bias.chunk(cell.gates), strict=True)]


def check(case: Own, backend: str | None, device: str = "cpu") -> None:
    """The module against the loop in float64, with the error of the loop in the case's dtype as the measure.

    Over so many draws that they have some thirty units together: of few sums one implementation's roundings may cancel
    by luck, as oracle.over_draws has it.
    """
    found: list[list[Results]] = []
    for _ in range(max(1, round(UNITS / case.H))):
        rnn, call = case.module(backend).to(device), given(case).on(device)
        reference = by_loop(rnn, call, torch.float64)
        own = reference if case.dtype == torch.float64 else by_loop(rnn, call, case.dtype)
        if call.lengths is not None:  # the loop has numbers past the end, the module need not
            call = call._replace(x=call.x.masked_fill(past_end(call.lengths, case.T).unsqueeze(-1), float("nan")))
        found.append([by_module(rnn, call), own, reference])
    assert_as_good_as_torch(
        *(
            {name: torch.stack([results[name] for results in each]) for name in each[0]}
            for each in zip(*found, strict=True)
        )
    )
