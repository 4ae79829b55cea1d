"""SRU beside its authors' package, in inference: with gradients that package wants a GPU."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch

import fused_rnn

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("sru") is None, reason="needs sru: pip install '.[peers]'"),
    pytest.mark.filterwarnings("ignore"),  # the package's own
]


@pytest.mark.parametrize("options", [{}, {"has_skip_term": False}, {"v1": True}], ids=str)
@pytest.mark.parametrize(("width", "layers"), [(4, 1), (6, 2)])
def test_sru_is_theirs(width: int, layers: int, options: dict[str, Any]) -> None:
    from sru import SRU

    theirs = SRU(width, 6, layers, rescale=True, **options).eval()
    skip = options.get("has_skip_term", True)
    ours = fused_rnn.SRU(width, 6, layers, skip=skip, recurrent_terms="v1" not in options)
    with torch.no_grad():
        for layer, own in enumerate(theirs.rnn_lst):
            own.bias.normal_()
            blocks = len(own.weight[0]) // 6
            assert ours.get_parameter(f"weight_ih_l{layer}").shape == (blocks * 6, len(own.weight))
            weight = own.weight.unflatten(1, (6, blocks)).permute(2, 1, 0).flatten(0, 1)
            ours.get_parameter(f"weight_ih_l{layer}").copy_(weight)
            ours.get_parameter(f"bias_ih_l{layer}").copy_(own.bias)
            for name, values in zip(("v_f", "v_r"), own.weight_c.chunk(2), strict=True):
                if "v1" not in options:
                    ours.get_parameter(f"{name}_l{layer}").copy_(values)
        x, c = torch.randn(7, 3, width), torch.randn(layers, 3, 6)
        y, last = theirs(x, c)
        y_ours, (_, c_n) = ours(x, (torch.zeros_like(c), c))
    torch.testing.assert_close(y_ours, y)
    torch.testing.assert_close(c_n, last)
