"""The CPU loops leave out what lies past a sequence's end, rows and all: whatever the order of the lengths."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from cases import Case
from oracle import require
from torch import Tensor

import fused_rnn

T, B, D, H = 40, 33, 5, 17  # more rows than one range of backward has
FALLING = [max(0, T - 2 * b) for b in range(B)]
LENGTHS = {
    "longest first": FALLING,
    "shortest first": FALLING[::-1],
    "mixed": torch.tensor(FALLING)[torch.randperm(B, generator=torch.Generator().manual_seed(0))].tolist(),
    "but one": [*[T] * (B - 1), 7],
    "none": [0] * B,
}


def outcome(module: Any, lengths: Tensor, nan: float) -> list[Tensor]:
    """Outputs, final states, gradients of all that goes in; `nan` stands wherever there is no step."""
    generator = torch.Generator().manual_seed(1)

    def draw(*sizes: int) -> Tensor:
        return torch.randn(*sizes, dtype=torch.float64, generator=generator)

    width = module.proj_size or H
    past = (torch.arange(T).unsqueeze(1) >= lengths).unsqueeze(-1)
    x = draw(T, B, D).masked_fill(past, nan).requires_grad_()
    lstm = isinstance(module, fused_rnn.LSTM)
    hx = [draw(4, B, size).requires_grad_() for size in (width, H)[: 1 + lstm]]
    dy, reset = draw(T, B, 2 * width).masked_fill(past, nan), draw(T, B) > 1.6
    y, final = module(x, tuple(hx) if lstm else hx[0], lengths=lengths, reset=reset)
    finals = final if lstm else (final,)
    grads = (dy, *(torch.ones_like(state) for state in finals))
    return [y, *finals, *torch.autograd.grad((y, *finals), [x, *hx, *module.parameters()], grads)]


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize(("name", "projected"), [("LSTM", 0), ("LSTM", 3), ("GRU", 0), ("RNN", 0)])
def test_what_is_left_out_is_not_missed(name: str, projected: int, lengths: str) -> None:
    """In float64, so that nothing hides in rounding; two layers, both directions, resets, one thread and two."""
    require("cpu", Case("gru"))
    torch.manual_seed(0)
    options: dict[str, Any] = {"bidirectional": True, "dtype": torch.float64}
    options |= {"proj_size": projected} if projected else {}
    oracle = getattr(fused_rnn, name)(D, H, 2, backend="reference", **options)
    ours = getattr(fused_rnn, name)(D, H, 2, backend="cpu", **options)
    ours.load_state_dict(oracle.state_dict())
    ends = torch.tensor(LENGTHS[lengths])
    expected = outcome(oracle, ends, 0.0)
    for ours.save, threads in itertools.product(("gates", "recompute"), (1, 2)):
        torch.set_num_threads(threads)
        for a, b in zip(outcome(ours, ends, float("nan")), expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
