"""What a call of a module with regularisers, or with gates over time, says of input that it cannot take."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import fused_rnn


@pytest.mark.parametrize("given", [np.zeros((5, 3, 4)), [torch.zeros(5, 3, 4)], None])
def test_what_is_no_tensor(given: Any) -> None:
    for module in (fused_rnn.LSTM(4, 6, zoneout=0.1), fused_rnn.LayerNormGRU(4, 6, return_gates=True)):
        with pytest.raises(TypeError, match=r"input: got .*, expected a tensor"):
            module(given)


def test_a_dtype_that_no_mask_has() -> None:
    x = torch.ones(5, 3, 4, dtype=torch.long)
    for module in (fused_rnn.LSTM(4, 6, recurrent_dropout=0.1), fused_rnn.SLSTM(4, 6, zoneout=0.1)):
        with pytest.raises(ValueError, match=r"input dtype \(torch.int64\) does not match weight dtype"):
            module(x)


def test_a_backend_that_knows_the_plain_cell_alone() -> None:
    with pytest.raises(NotImplementedError, match="not this variant of 'lstm'"):
        fused_rnn.LSTM(4, 6, zoneout=0.1, backend="torch")(torch.randn(5, 3, 4))
