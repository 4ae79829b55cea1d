"""What GPU backends share, over loops in plain PyTorch: what fused_rnn.gpu.loops.Loops means, as a program.

In float64 it is compared with the reference loop, of which it has nothing but the cells' formulas.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cases import PROJECTIONS, Case, inputs, option_cases
from oracle import by_backend, by_reference, by_torch
from tolerances import assert_as_good_as_torch, assert_same_formula
from torch import Tensor

from fused_rnn import dispatch
from fused_rnn.cells import CELLS
from fused_rnn.gpu import op, precision, run
from fused_rnn.gpu.loops import Layer, Loops


class PlainLoops:
    """Step by step and recurrence by recurrence; backward by autograd through one step's cell."""

    def __init__(self, layer: Layer) -> None:
        self.layer, self.spec = layer, CELLS[layer.cell.name]

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

    def _cell(self, gx: Tensor, gh: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """(h', the state after) from gates [B, G, H] and the state before: c of LSTM, h of GRU."""
        c = state if self.layer.cell.has_c else None
        h, c = self.spec.step(gx.flatten(1), gh.flatten(1), state, c)
        return h, h if c is None else c

    def _kept(self, gx: Tensor, gh: Tensor) -> Tensor:
        """Of LSTM its activated gates, of GRU r, z, n and n's recurrent side: [B, S, H]."""
        if self.layer.cell.has_c:
            i, f, g, o = (gx + gh).unbind(1)
            return torch.stack([i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()], 1)
        r, z = ((gx + gh)[:, k].sigmoid() for k in range(2))
        return torch.stack([r, z, (gx[:, 2] + r * gh[:, 2]).tanh(), gh[:, 2]], 1)

    def _recurrent(self, h: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
        gh = torch.einsum("bk,gnk->bgn", h, w)
        if bias is not None:
            gh[:, -1] += bias
        return gh

    def forward(
        self, *, gx: Tensor, w: Tensor, bias: Any, h0: Tensor, state: Any, y: Tensor, h_n: Tensor, saved: Any,
        cells: Any, checkpoints: Any, every: int,
    ) -> None:  # fmt: skip
        h_n.copy_(h0)
        state = torch.zeros_like(h0) if state is None else state
        for step in range(self.layer.steps):
            if checkpoints is not None and step % every == 0:
                checkpoints[step // every] = state
            for r, t, _, valid, live in self._places((step, step + 1)):
                gh = self._recurrent(h_n[r] * live, w[r], None if bias is None else bias[r])
                h, s = self._cell(gx[t, :, r], gh, state[r] * live)
                h_n[r], state[r] = torch.where(valid, h, h_n[r]), torch.where(valid, s, state[r])
                y[t, :, r] = h * valid
                if saved is not None and self.layer.cell.stored:
                    saved[t, :, r] = self._kept(gx[t, :, r], gh) * valid.unsqueeze(-1)
                if cells is not None:
                    cells[t, :, r] = state[r]

    def replay(
        self, *, gx: Tensor, given: Tensor, bias: Any, h0: Tensor, hidden: Tensor, state: Any, saved: Tensor,
        cells: Any, window: tuple[int, int],
    ) -> None:  # fmt: skip
        for r, _, at, valid, live in self._places(window):
            gh = given[at, :, r].clone()
            if bias is not None:
                gh[:, -1] += bias[r]
            saved[at, :, r] = self._kept(gx[at, :, r], gh) * valid.unsqueeze(-1)
            if cells is not None:
                state[r] = torch.where(valid, self._cell(gx[at, :, r], gh, state[r] * live)[1], state[r])
                cells[at, :, r] = state[r]

    def backward(
        self, *, dy: Any, w: Tensor, states: Tensor, first_state: Tensor, saved: Any, dgates: Tensor, dh: Tensor,
        dc: Any, window: tuple[int, int] | None = None,
    ) -> None:  # fmt: skip
        layer, window = self.layer, window or (0, self.layer.steps)
        has_c, G = layer.cell.has_c, layer.cell.gates
        for r, t, at, valid, live in reversed(list(self._places(window))):
            here, before_t = (at, t)[not has_c], t - layer.directions[r]
            begins = (window[0] if has_c else 0) == (t if layer.directions[r] > 0 else layer.steps - 1 - t)
            before = first_state[r] if begins else states[here - layer.directions[r], :, r]
            if layer.directions[r] < 0 and layer.lengths is not None:
                before = torch.where((before_t >= layer.lengths).unsqueeze(-1), first_state[r], before)
            dh_t = dh[r] + (0 if dy is None else dy[t, :, r]) * valid
            d, carried, dc_before = self._pull(
                dh_t, None if dc is None else dc[r], saved if saved is None else saved[at, :, r], before * live,
                states[here, :, r],
            )  # fmt: skip
            d = torch.where(valid.unsqueeze(-1), d, 0)
            dgates[t, :, r] = d
            carried = carried + torch.einsum("bgn,gnk->bk", d[:, -G:], w[r])
            dh[r] = torch.where(valid, carried * live, dh[r])
            if dc is not None:
                dc[r] = torch.where(valid, dc_before * live, dc[r])

    def _pull(self, dh: Tensor, dc: Any, kept: Any, before: Tensor, state: Tensor) -> tuple[Tensor, Tensor, Any]:
        """Gradients of the gates [B, DG, H], of h_{t-1} by the cell alone, of c_{t-1}."""
        name = self.layer.cell.name
        if name == "lstm":
            i, f, g, o = kept.unbind(1)
            dc = dc + dh * o * (1 - state.tanh() ** 2)
            d = [dc * g * i * (1 - i), dc * before * f * (1 - f), dc * i * (1 - g * g), dh * state.tanh() * o * (1 - o)]
            return torch.stack(d, 1), torch.zeros_like(dh), dc * f
        if name == "gru":
            r, z, n, hn = kept.unbind(1)
            dn = dh * (1 - z) * (1 - n * n)
            d = [dn, dn * hn * r * (1 - r), dh * (before - n) * z * (1 - z), dn * r]
            return torch.stack(d, 1), dh * z, None
        slope = 1 - state * state if name == "rnn_tanh" else (state > 0).to(dh.dtype)
        return (dh * slope).unsqueeze(1), torch.zeros_like(dh), None


def make(layer: Layer, x: Tensor, backward: bool) -> Loops:
    return PlainLoops(layer)


@pytest.fixture(scope="module", autouse=True)
def _backend() -> Iterator[None]:
    """A backend of the name "plain"."""
    if not hasattr(torch.ops.fused_rnn, "plain_forward"):
        op.define("plain", make, ("CPU",))
    plain = SimpleNamespace(
        NAME="plain", DIFFERENTIABLE=False, stack=None, supports=lambda problem: None,
        forward=torch.ops.fused_rnn.plain_forward.default, backward=torch.ops.fused_rnn.plain_backward.default,
    )  # fmt: skip
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
    monkeypatch.setattr(run, "CHECKPOINT_EVERY", 4)
    given = inputs(case)
    ours, reference = by_backend(case, given, "plain"), by_reference(case, given)
    assert ours.keys() == reference.keys()
    for name, value in ours.items():
        assert_same_formula(value, reference[name])


@pytest.mark.parametrize("options", PROJECTIONS, ids=str)
def test_float32_projection(options: dict[str, Any]) -> None:
    case = Case("lstm", **options)
    given = inputs(case)
    assert_as_good_as_torch(by_backend(case, given, "plain"), by_torch(case, given), by_reference(case, given))


@pytest.mark.parametrize("save", ["gates", "recompute"])
def test_opcheck_with_a_projection(save: str) -> None:
    case = Case("lstm", T=2, B=2, H=4, proj=3, bidirectional=True, lengths=True, reset=True, dtype=torch.float64)
    given = inputs(case)
    tail = (given.weights, *given.hx, given.lengths, given.reset, "lstm", [1, -1], save)
    forward, backward = torch.ops.fused_rnn.plain_forward.default, torch.ops.fused_rnn.plain_backward.default
    torch.library.opcheck(forward, (given.x, *tail, True), test_utils=("test_schema", "test_faketensor"))
    saved, cells, hidden = forward(given.x, *tail, True)[-3:]
    call = (*given.dout, given.x, *tail[:5], hidden, saved, cells, *tail[5:], True, True)
    torch.library.opcheck(backward, call, test_utils=("test_schema", "test_faketensor"))


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
