"""SLSTM, and convert, beside the package xlstm's own cell: forward and gradients."""

from __future__ import annotations

import copy
import importlib.util
import pickle
from typing import Any

import pytest
import torch
from tolerances import assert_same_formula
from torch import Tensor, nn

import fused_rnn

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("xlstm") is None, reason="needs xlstm: pip install '.[peers]'"),
    pytest.mark.filterwarnings("ignore"),  # the package's own
]
F64 = torch.float64


def cell_of(hidden: int, heads: int, **options: Any) -> Any:
    from xlstm.blocks.slstm.cell import sLSTMCell, sLSTMCellConfig

    cell = sLSTMCell(sLSTMCellConfig(hidden_size=hidden, num_heads=heads, backend="vanilla", **options)).double()
    with torch.no_grad():
        for p in cell.parameters():
            p.copy_(torch.randn_like(p) * 0.5)
    return cell


def gradients(outputs: list[Tensor], inputs: list[Tensor]) -> list[Tensor]:
    torch.manual_seed(3)
    return list(torch.autograd.grad(sum((torch.randn_like(t) * t).sum() for t in outputs), inputs))


@pytest.mark.parametrize("start", [False, True])
@pytest.mark.parametrize(("hidden", "heads"), [(6, 1), (8, 2), (12, 4)])
def test_the_module_is_theirs(hidden: int, heads: int, start: bool) -> None:
    """Their cell takes the gates' pre-activations; the module has the products that make them."""
    theirs = cell_of(hidden, heads, input_shape="SBGNH", output_shape="SBH")
    ours = fused_rnn.SLSTM(5, hidden, heads=heads, dtype=F64)
    with torch.no_grad():
        ours.weight_ih_l0.normal_()
        ours.weight_hh_l0.copy_(theirs._recurrent_kernel_.view_as(ours.weight_hh_l0))
        ours.bias_ih_l0.copy_(theirs._bias_)
        ours.bias_hh_l0.zero_()
    x = torch.randn(7, 3, 5, dtype=F64, requires_grad=True)
    state = torch.rand(4, 3, hidden, dtype=F64, requires_grad=True) if start else None
    y, last = theirs(x @ ours.weight_ih_l0.T, state)
    own = [x, ours.weight_ih_l0] + ([state] if start else [])
    expected = gradients([y, last], [*own, theirs._recurrent_kernel_, theirs._bias_])
    hx = None if state is None else tuple(state.unsqueeze(1))
    y_ours, after = ours(x, hx)
    assert_same_formula(y_ours, y)
    assert_same_formula(torch.cat(after), last)
    got = gradients([y_ours, torch.cat(after)], [*own, ours.weight_hh_l0, ours.bias_ih_l0])
    for a, b in zip(got, expected, strict=True):
        assert_same_formula(a.view_as(b), b)


@pytest.mark.parametrize("shapes", [{}, {"input_shape": "SBGNH", "output_shape": "SBNH"}], ids=str)
def test_a_converted_cell(shapes: dict[str, str]) -> None:
    theirs = cell_of(8, 2, **shapes)
    ours = fused_rnn.convert(copy.deepcopy(theirs))
    assert isinstance(ours, type(theirs))
    assert type(ours) is not type(theirs)
    x, state = torch.randn(3, 5, 32, dtype=F64, requires_grad=True), torch.rand(4, 5 if shapes else 3, 8, dtype=F64)
    for given in (None, state):
        expected, got = theirs(x, given), ours(x, given)
        results = [
            [*outputs, *gradients(list(outputs), [x, *cell.parameters()])]
            for outputs, cell in ((expected, theirs), (got, ours))
        ]
        for a, b in zip(*results, strict=True):
            assert_same_formula(a, b)
    for other in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert type(other) is type(ours)
        assert_same_formula(other(x)[0], ours(x)[0])
    assert fused_rnn.convert(ours) is ours
    assert type(fused_rnn.to_torch(ours)) is type(theirs)
    assert ours.state_dict().keys() == theirs.state_dict().keys()


def test_a_model_of_theirs() -> None:
    """A stack of its blocks, converted whole."""
    from xlstm import FeedForwardConfig, sLSTMBlockConfig, sLSTMLayerConfig, xLSTMBlockStack, xLSTMBlockStackConfig

    layer = sLSTMLayerConfig(backend="vanilla", num_heads=2, conv1d_kernel_size=4)
    block = sLSTMBlockConfig(slstm=layer, feedforward=FeedForwardConfig(proj_factor=1.3))
    theirs = xLSTMBlockStack(
        xLSTMBlockStackConfig(slstm_block=block, context_length=9, num_blocks=2, embedding_dim=16, slstm_at="all")
    ).double()
    for p in theirs.parameters():
        nn.init.normal_(p, std=0.3)
    ours = fused_rnn.convert(copy.deepcopy(theirs))
    x = torch.randn(3, 9, 16, dtype=F64, requires_grad=True)
    for a, b in zip(*([m(x), *gradients([m(x)], [x, *m.parameters()])] for m in (theirs, ours)), strict=True):
        assert_same_formula(b, a)


def test_what_is_left() -> None:
    theirs = cell_of(8, 2, function="lstm")
    kind = type(theirs)
    with pytest.warns(UserWarning, match="the model, a xlstm.*sLSTMCell_vanilla, computes 'lstm' and not 'slstm'"):
        assert type(fused_rnn.convert(theirs)) is kind
