"""What GPU backends share, over loops in plain PyTorch: what fused_rnn.gpu.loops.Loops means, as a program.

In float64 it is compared with the reference loop, of which it has nothing but the cells' formulas.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import program_cases
import pytest
import torch
from cases import PROJECTIONS, Case, inputs, option_cases
from oracle import by_backend, by_reference, by_torch
from program_cases import ProgramCase, call_of
from programs import PROGRAMS
from tolerances import assert_as_good_as_torch, assert_same_formula
from torch import Tensor

from fused_rnn import dispatch
from fused_rnn.call import BackwardCall, LayerCall
from fused_rnn.gpu import op, precision
from fused_rnn.gpu.loops import Layer, Loops
from fused_rnn.reference.sequence import entering
from fused_rnn.transforms import fake


class PlainLoops:
    """Step by step and recurrence by recurrence; backward by autograd through one step's cell."""

    def __init__(self, layer: Layer) -> None:
        self.layer, self.cell = layer, layer.cell

    def _places(self, window: tuple[int, int]) -> Iterator[tuple[int, int, int, Tensor, Tensor]]:
        """(r, t, t's place in a window's buffer, which rows run it, which of those the state before reaches)."""
        layer, (first, last) = self.layer, window
        for r, direction in enumerate(layer.directions):
            for step in range(first, last):
                t = step if direction > 0 else layer.steps - 1 - step
                base = first if direction > 0 else layer.steps - last
                every = torch.ones(layer.batch, 1, dtype=torch.bool)
                valid = every if layer.lengths is None else (t < layer.lengths).unsqueeze(-1)
                live = valid if layer.reset is None else valid & (layer.reset[t] == 0).unsqueeze(-1)
                yield r, t, t - base, valid, live

    def _step(self, gx: Tensor, gh: Any, before: list[Tensor], p: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The states after, from gates [B, G, H] and the states before."""
        return self.cell.step(gx.unbind(1), () if gh is None else gh.unbind(1), before, p)

    def _kept(self, gx: Tensor, gh: Any, before: list[Tensor], p: Sequence[Tensor]) -> Tensor:
        """Of LSTM its activated gates, of GRU r, z, n and n's recurrent side: [B, S, H]."""
        if self.cell.program:
            gates = gx if gh is None else gx + gh
            joined = self.cell.gates - self.cell.apart
            a = gates.unbind(1) if not self.cell.apart else (*gates[:, :joined].unbind(1), *gx[:, joined:].unbind(1))
            a = [*a, *gh[:, joined:].unbind(1)] if self.cell.apart else a
            kept = self.cell.program.forward.run([*a, *before, *p])[1]
            return torch.stack([v.expand(gx.shape[0], gx.shape[2]) for v in kept], 1)
        if not self.cell.apart:
            i, f, g, o = (gx + gh).unbind(1)
            return torch.stack([i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()], 1)
        r, z = ((gx + gh)[:, k].sigmoid() for k in range(2))
        return torch.stack([r, z, (gx[:, 2] + r * gh[:, 2]).tanh(), gh[:, 2]], 1)

    def _recurrent(self, h: Tensor, w: Any, bias: Any, r: int) -> Any:
        return None if w is None else self._biased(torch.einsum("bk,gnk->bgn", h, w[r]), bias, r)

    def _biased(self, gh: Tensor, bias: Any, r: int) -> Tensor:
        if bias is not None:
            gh[:, -self.cell.apart :] += bias[r]
        return gh

    def forward(
        self, *, gx: Tensor, w: Any, bias: Any, params: Any, h0: Tensor, carried: list[Tensor], y: Tensor, h_n: Tensor,
        saved: Any, histories: list[Tensor], checkpoints: list[Tensor], every: int,
    ) -> None:  # fmt: skip
        h_n.copy_(h0)
        others = carried[self.cell.reads_h :]
        for step in range(self.layer.steps):
            if step % every == 0:
                for checkpoint, state in zip(checkpoints, others, strict=False):
                    checkpoint[step // every] = state
            for r, t, _, valid, live in self._places((step, step + 1)):
                before, p = [s[r] * live for s in (h_n, *others)], () if params is None else params[r]
                gh = self._recurrent(before[0], w, bias, r)
                for state, new in zip((h_n, *others), self._step(gx[t, :, r], gh, before, p), strict=True):
                    state[r] = torch.where(valid, new, state[r])
                y[t, :, r] = h_n[r] * valid
                if saved is not None and self.cell.saved:
                    saved[t, :, r] = self._kept(gx[t, :, r], gh, before, p) * valid.unsqueeze(-1)
                for history, state in zip(histories, others, strict=False):
                    history[t, :, r] = state[r] * valid
        if self.cell.reads_h:
            carried[0].copy_(h_n)

    def replay(
        self, *, gx: Tensor, given: Any, bias: Any, params: Any, h0: Tensor, hidden: Tensor, carried: list[Tensor],
        saved: Tensor, histories: list[Tensor], window: tuple[int, int],
    ) -> None:  # fmt: skip
        for r, t, at, valid, live in self._places(window):
            gh = None if given is None else self._biased(given[at, :, r].clone(), bias, r)
            h = entering(hidden[:, :, r], h0[r], self.layer.lengths, self.layer.reset, self.layer.directions[r])[t]
            before, p = [h, *(s[r] * live for s in carried)], () if params is None else params[r]
            if self.cell.saved:
                saved[at, :, r] = self._kept(gx[at, :, r], gh, before, p) * valid.unsqueeze(-1)
            after = self._step(gx[at, :, r], gh, before, p)
            for state, new, history in zip(carried, after[1:], histories, strict=True):
                state[r] = torch.where(valid, new, state[r])
                history[at, :, r] = state[r] * valid

    def backward(
        self, *, dy: Any, dsequences: list[Tensor], w: Any, params: Any, states: list[Tensor], first: list[Tensor],
        saved: Any, dgates: Tensor, dstates: list[Tensor], dparams: Any, window: tuple[int, int] | None = None,
    ) -> None:  # fmt: skip
        layer, window = self.layer, window or (0, self.layer.steps)
        for r, t, at, valid, live in reversed(list(self._places(window))):
            step = t if layer.directions[r] > 0 else layer.steps - 1 - t
            before, after = [], []
            for k, (history, begins) in enumerate(zip(states, first, strict=True)):
                here = at if k else t  # of h there is all of time
                if step == (window[0] if k else 0):
                    state = begins[r]
                else:
                    state = history[here - layer.directions[r], :, r]
                if layer.directions[r] < 0 and layer.lengths is not None:
                    state = torch.where((t + 1 >= layer.lengths).unsqueeze(-1), begins[r], state)
                before.append(state * live)
                after.append(history[here, :, r])
            d_after = [d[r] for d in dstates]
            for k, d_output in enumerate([dy, *dsequences]):
                if d_output is not None:
                    d_after[k] = d_after[k] + torch.where(valid, d_output[t, :, r], 0)
            p = () if params is None else params[r]
            d, d_before, dp = self._pull(d_after, saved if saved is None else saved[at, :, r], before, after, p)
            d = torch.where(valid.unsqueeze(-1), d, 0)
            dgates[t, :, r] = d
            if dparams is not None:
                dparams[r] += torch.where(valid.unsqueeze(-1), torch.stack(dp, 1), 0)
            if w is not None:
                d_before[0] = d_before[0] + torch.einsum("bgn,gnk->bk", d[:, -self.cell.gates :], w[r])
            for dstate, new in zip(dstates, d_before, strict=True):
                dstate[r] = torch.where(valid, new * live, dstate[r])

    def _pull(
        self, d_after: list[Tensor], kept: Any, before: list[Tensor], after: list[Tensor], p: Sequence[Tensor]
    ) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """Gradients of the gates [B, G + apart, H]; of the states before by the formula alone; of the params."""
        name, dh, program = self.cell.name, d_after[0], self.cell.program
        if program:
            values = () if kept is None else kept.unbind(1)
            groups = program.backward.run([*values, *before, *after, *p, *d_after])
            gates, states, vectors = ([v.expand(dh.shape) for v in group] for group in groups)
            return torch.stack(gates, 1), states, vectors
        if name == "lstm":
            (i, f, g, o), c = kept.unbind(1), after[1]
            dc = d_after[1] + dh * o * (1 - c.tanh() ** 2)
            d = [dc * g * i * (1 - i), dc * before[1] * f * (1 - f), dc * i * (1 - g * g), dh * c.tanh() * o * (1 - o)]
            return torch.stack(d, 1), [torch.zeros_like(dh), dc * f], []
        if name == "gru":
            r, z, n, hn = kept.unbind(1)
            dn = dh * (1 - z) * (1 - n * n)
            d = [dn, dn * hn * r * (1 - r), dh * (before[0] - n) * z * (1 - z), dn * r]
            return torch.stack(d, 1), [dh * z], []
        slope = 1 - after[0] * after[0] if name == "rnn_tanh" else (after[0] > 0).to(dh.dtype)
        return (dh * slope).unsqueeze(1), [torch.zeros_like(dh)], []


def make(layer: Layer, x: Tensor, backward: bool) -> Loops:
    return PlainLoops(layer)


@pytest.fixture(scope="module", autouse=True)
def _backend() -> Iterator[None]:
    """A backend of the name "plain"."""
    if not hasattr(torch.ops.fused_rnn, "plain_forward"):
        op.define("plain", make, ("CPU",))
    plain = SimpleNamespace(
        NAME="plain",
        DIFFERENTIABLE=False,
        stack=None,
        supports=lambda problem: None,
        forward=lambda call: torch.ops.fused_rnn.plain_forward.default(*call),
        backward=lambda call: torch.ops.fused_rnn.plain_backward.default(*call),
    )
    patch = pytest.MonkeyPatch()
    patch.setitem(dispatch.BACKENDS, "plain", plain)
    dispatch._choose_cached.cache_clear()
    yield
    patch.undo()
    dispatch._choose_cached.cache_clear()


MORE = [
    Case("lstm", T=1, B=3, proj=5, lengths=True, bidirectional=True, dtype=torch.float64),
    Case("lstm", T=7, B=5, proj=3, lengths=True, bidirectional=True, reset=True, hx=False, dtype=torch.float64),
]


@pytest.mark.parametrize("case", [*option_cases((torch.float64,)), *MORE], ids=str)
def test_float64_is_the_reference(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fused_rnn.call.CHECKPOINT_EVERY", 4)
    given = inputs(case)
    ours, reference = by_backend(case, given, "plain"), by_reference(case, given)
    assert ours.keys() == reference.keys()
    for name, value in ours.items():
        assert_same_formula(value, reference[name])


PROGRAM_OPTIONS: list[dict[str, Any]] = [
    {},
    {"bidirectional": True, "lengths": True, "reset": True, "sequences": True},
    {"save": "recompute", "bidirectional": True, "lengths": True, "sequences": True, "bias": False},
    {"save": "recompute", "T": 9, "reset": True, "hx": False},
]


@pytest.mark.parametrize("options", PROGRAM_OPTIONS, ids=lambda options: "-".join(options) or "plain")
@pytest.mark.parametrize("cell", PROGRAMS)
def test_programs_in_float64(cell: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fused_rnn.call.CHECKPOINT_EVERY", 4)
    call = call_of(ProgramCase(cell, dtype=torch.float64, **options))
    ours, reference = program_cases.by_backend(call, "plain"), program_cases.by_reference(call)
    assert ours.keys() == reference.keys()
    for name, value in ours.items():
        assert_same_formula(value, reference[name])


@pytest.mark.parametrize("save", ["gates", "recompute"])
def test_sequences_of_a_projected_cell(save: str) -> None:
    given = inputs(Case("lstm", T=6, proj=5, bidirectional=True, lengths=True, dtype=torch.float64))
    call = LayerCall(given.x, given.weights, given.hx, given.lengths, None, "lstm", (1, -1), save, False, True)
    ours, reference = program_cases.by_backend(call, "plain"), program_cases.by_reference(call)
    for name, value in ours.items():
        assert_same_formula(value, reference[name])


@pytest.mark.parametrize("sequences", [False, True])
@pytest.mark.parametrize("save", ["none", "gates", "recompute"])
def test_what_forward_returns(save: str, sequences: bool) -> None:
    call = call_of(ProgramCase("sru", save=save, sequences=sequences, bidirectional=True))
    outputs = torch.ops.fused_rnn.plain_forward.default(*call)
    expected = fake.forward(*call)
    assert [(t.shape, t.dtype) for t in outputs] == [(t.shape, t.dtype) for t in expected]
    torch.library.opcheck(
        torch.ops.fused_rnn.plain_forward.default, tuple(call), test_utils=("test_schema", "test_faketensor")
    )


def test_backward_refuses_sequences_of_other_sizes() -> None:
    call = call_of(ProgramCase("lstm", sequences=True))
    y, h_n, c_n, cs, saved, hidden = torch.ops.fused_rnn.plain_forward.default(*call)
    back = BackwardCall(y, (h_n, c_n), *call[:5], hidden, saved, (cs,), *call[5:8], True, True, (cs[:, 1:],))
    back = back._replace(hidden=y)
    for dsequences, message in (((cs[:, 1:],), "dsequences: got"), ((cs, cs), "dsequences: got 2 tensors")):
        with pytest.raises(RuntimeError, match=message):
            torch.ops.fused_rnn.plain_backward.default(*back._replace(dsequences=dsequences))


@pytest.mark.parametrize("options", PROJECTIONS, ids=str)
def test_float32_projection(options: dict[str, Any]) -> None:
    case = Case("lstm", **options)
    given = inputs(case)
    assert_as_good_as_torch(by_backend(case, given, "plain"), by_torch(case, given), by_reference(case, given))


@pytest.mark.parametrize("save", ["gates", "recompute"])
def test_opcheck_with_a_projection(save: str) -> None:
    case = Case("lstm", T=2, B=2, H=4, proj=3, bidirectional=True, lengths=True, reset=True, dtype=torch.float64)
    given = inputs(case)
    call = LayerCall(given.x, given.weights, given.hx, given.lengths, given.reset, "lstm", [1, -1], save, True)
    forward, backward = torch.ops.fused_rnn.plain_forward.default, torch.ops.fused_rnn.plain_backward.default
    torch.library.opcheck(forward, tuple(call), test_utils=("test_schema", "test_faketensor"))
    saved, *histories, hidden = forward(*call)[3:]
    back = BackwardCall(given.dout[0], given.dout[1:], *call[:5], hidden, saved, histories, *call[5:8], True, True)
    torch.library.opcheck(backward, tuple(back), test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("matmul", ["ieee", "tf32", "none"])
@pytest.mark.parametrize("allowed", [False, True])
def test_products_outside_the_loops_follow_cudnn(allowed: bool, matmul: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "tf32_allowed", lambda: allowed)
    flags = torch.backends.cuda.matmul
    before = flags.fp32_precision
    try:
        flags.fp32_precision = matmul
        with precision.as_in_cudnn():
            assert flags.fp32_precision == ("tf32" if allowed else "ieee")
        assert flags.fp32_precision == matmul
    finally:
        flags.fp32_precision = before
