"""A cell that the package does not have: registered from outside, it runs by every loop, forward and backward."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest
import torch
from torch import Tensor
from triton_cases import DEVICE, LOOPS, MARKS, quicker_interpreter

from fused_rnn import layers
from fused_rnn.cells import CELLS, Cell
from fused_rnn.triton import cells, planner

pytestmark = MARKS
T, B, D, H = 5, 3, 4, 17


def step(x: Sequence[Tensor], r: Sequence[Tensor], s: Sequence[Tensor], p: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    i, g, o = (a + b for a, b in zip(x, r, strict=True))
    c = (1 - i.sigmoid()) * s[1] + i.sigmoid() * g.tanh()
    return o.sigmoid() * c.tanh(), c


COUPLED = Cell("coupled_lstm", gates=3, states=("h", "c"), saved=3, step=step)


@pytest.fixture(autouse=True)
def _registered(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    quicker_interpreter()
    monkeypatch.setitem(CELLS, COUPLED.name, COUPLED)
    cells.register(COUPLED.name, "coupled_lstm_triton")
    yield
    del cells.MODULES[COUPLED.name]


def run(backend: str, given: Sequence[Tensor], masked: bool, save: str) -> list[Tensor]:
    """y, h_n, c_n and the gradients of a sum of them with fixed weights, in x, the states and the weights."""
    x, h0, c0, *weights = leaves = [t.clone().requires_grad_() for t in given]
    random = torch.Generator().manual_seed(1)
    masks = {
        "lengths": torch.tensor([5, 2, 4]).to(DEVICE),
        "reset": (torch.rand(T, B, generator=random) < 0.3).to(DEVICE),
    }
    options = masks if masked else {}
    outputs = layers.run(COUPLED.name, x, weights, [h0, c0], bidirectional=True, save=save, backend=backend, **options)
    douts = [torch.randn(t.shape, generator=random).to(x) for t in outputs]
    return [*outputs, *torch.autograd.grad(list(outputs), leaves, douts)]


@pytest.mark.parametrize(("masked", "save"), [(False, "gates"), (True, "gates"), (True, "recompute")])
@pytest.mark.parametrize("loop", LOOPS)
def test_forward_and_gradients(loop: str, masked: bool, save: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fused_rnn.transforms.fake.CHECKPOINT_EVERY", 2)
    random = torch.Generator().manual_seed(0)
    rows = COUPLED.gates * H
    shapes = [(T, B, D), (2, B, H), (2, B, H), *[(rows, D), (rows, H), (rows,), (rows,)] * 2]
    given = [torch.randn(shape, generator=random).mul(0.5).to(DEVICE) for shape in shapes]
    with planner.override(**LOOPS[loop]):
        ours = run("triton", given, masked, save)
    expected = run("reference", [t.double() for t in given], masked, "gates")
    for got, want in zip(ours, expected, strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-5)
