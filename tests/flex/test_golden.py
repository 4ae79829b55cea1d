"""The built-in cells as a user would write them: traced, they are what the hand-written files say, number by number."""

from __future__ import annotations

from itertools import permutations

import pytest
import torch
from torch import Tensor

from fused_rnn import UserCell, ops
from fused_rnn.call import LayerCall
from fused_rnn.cells import CELLS
from tests.common import literature
from tests.common.cases import Case
from tests.common.oracle import require
from tests.common.program_calls import by_ops, make_call
from tests.common.tolerances import assert_same_formula

GOLDEN: dict[str, UserCell] = {
    "lstm": literature.lstm, "gru": literature.gru, "rnn_tanh": literature.rnn_tanh, "rnn_relu": literature.rnn_relu,
}  # fmt: skip


@pytest.mark.parametrize("name", GOLDEN)
def test_the_descriptor(name: str) -> None:
    traced, written = GOLDEN[name].descriptor(), CELLS[name]
    for what in ("gates", "states", "saved", "params", "apart", "reads_h", "recurrent", "gradients", "carried"):
        assert getattr(traced, what) == getattr(written, what), what


def saved_of(call: LayerCall) -> Tensor:
    """[S, T, B, R, H]."""
    outputs = ops.forward(*call._replace(sequences=False))
    return outputs[1 + len(call.spec.states)].movedim(3, 0)


@pytest.mark.parametrize("name", GOLDEN)
def test_the_saved_values(name: str) -> None:
    """The same vectors, in whatever order the step makes them."""
    require("cpu", Case(name))
    call = make_call(GOLDEN[name].descriptor().name, dtype=torch.float64)
    made, expected = saved_of(call), saved_of(call._replace(cell=name))
    assert made.shape == expected.shape
    orders = permutations(range(len(made)))
    assert any(all(torch.allclose(made[i], expected[k], rtol=1e-12) for k, i in enumerate(order)) for order in orders)


@pytest.mark.parametrize("save", ["gates", "recompute"])
@pytest.mark.parametrize("name", GOLDEN)
def test_the_numbers(name: str, save: str) -> None:
    require("cpu", Case(name))
    call = make_call(
        GOLDEN[name].descriptor().name, T=70, H=33, directions=(1, -1), lengths=True, reset=True, dtype=torch.float64
    )._replace(save=save)
    traced, written = (by_ops(call._replace(cell=cell), ops.forward, ops.backward) for cell in (call.cell, name))
    for what, value in traced.items():
        assert_same_formula(value, written[what])
