"""Cells that the package does not have: registered from outside, they run by every loop, forward and backward."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest
import torch
from coupled_lstm import COUPLED
from leaky import LEAKY
from torch import Tensor
from triton_cases import DEVICE, LOOPS, MARKS, quicker_interpreter

from fused_rnn import layers
from fused_rnn.cells import CELLS, Cell
from fused_rnn.triton import cells, planner

pytestmark = MARKS
T, B, D, H = 5, 3, 4, 17


Tensors = Sequence[Tensor]


@pytest.fixture(autouse=True)
def _registered(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    quicker_interpreter()
    for cell in (COUPLED, LEAKY):
        monkeypatch.setitem(CELLS, cell.name, cell)
        cells.register(cell.name, f"{cell.name}_triton")
    yield
    for cell in (COUPLED, LEAKY):
        del cells.MODULES[cell.name]


def run(cell: Cell, backend: str, given: Tensors, masked: bool, save: str) -> list[Tensor]:
    """y, the states after and the gradients of a sum of them with fixed weights, in x, the states and the weights."""
    x, *rest = leaves = [t.clone().requires_grad_() for t in given]
    random = torch.Generator().manual_seed(1)
    masks = {
        "lengths": torch.tensor([5, 2, 4]).to(DEVICE),
        "reset": (torch.rand(T, B, generator=random) < 0.3).to(DEVICE),
    }
    options = masks if masked else {}
    states, weights = rest[:2], rest[2:]
    outputs = layers.run(cell.name, x, weights, states, bidirectional=True, save=save, backend=backend, **options)
    douts = [torch.randn(t.shape, generator=random).to(x) for t in outputs]
    return [*outputs, *torch.autograd.grad(list(outputs), leaves, douts)]


@pytest.mark.parametrize(
    ("cell", "masked", "save"),
    [(COUPLED, False, "gates"), (COUPLED, True, "gates"), (COUPLED, True, "recompute"), (LEAKY, True, "recompute")],
    ids=lambda value: value.name if isinstance(value, Cell) else str(value),
)
@pytest.mark.parametrize("loop", LOOPS)
def test_forward_and_gradients(cell: Cell, loop: str, masked: bool, save: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fused_rnn.call.CHECKPOINT_EVERY", 2)
    random = torch.Generator().manual_seed(0)
    rows = cell.gates * H
    shapes = [(T, B, D), (2, B, H), (2, B, H), *[(rows, D), (rows, H), (rows,), (rows,)] * 2]
    given = [torch.randn(shape, generator=random).mul(0.5).to(DEVICE) for shape in shapes]
    with planner.override(**LOOPS[loop]):
        ours = run(cell, "triton", given, masked, save)
    expected = run(cell, "reference", [t.double() for t in given], masked, "gates")
    for got, want in zip(ours, expected, strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-5)
