"""examples/dreamer.py: TorchRL's recurrent core by a cell of one's own is that core, forward and gradients."""

from __future__ import annotations

import copy
import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn


@pytest.fixture(scope="module")
def example() -> ModuleType:
    pytest.importorskip("torchrl", reason="torchrl is not installed: pip install 'fused_rnn[integrations]'")
    path = Path(__file__).parents[2] / "examples" / "dreamer.py"
    spec = importlib.util.spec_from_file_location("dreamer_example", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.filterwarnings("ignore")  # the package's own
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_the_core_is_torchrls(example: ModuleType, backend: str) -> None:
    from torchrl.modules import DreamerV3BlockGRU

    theirs = DreamerV3BlockGRU(5, 12, projection_size=12, num_blocks=3)
    for p in theirs.parameters():
        nn.init.normal_(p, std=0.4)
    ours = example.FusedCore(copy.deepcopy(theirs))
    ours.rnn.backend = backend
    x, hidden, is_init = torch.randn(3, 7, 5), torch.randn(3, 12), torch.rand(3, 7, 1) < 0.3
    results = []
    for core in (theirs, ours):
        y, last = core(x, hidden, is_init)
        (y.square().sum() + last.sum()).backward()
        trained = theirs if core is theirs else ours.theirs
        results.append([y, last, *(p.grad for p in trained.parameters())])
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)
    assert all(p.grad is None for p in ours.rnn.parameters())


@pytest.mark.filterwarnings("ignore")
def test_what_it_does_not_take(example: ModuleType) -> None:
    from torchrl.modules import DreamerV3BlockGRU

    with pytest.raises(ValueError, match="expected projection_size = hidden_size"):
        example.FusedCore(DreamerV3BlockGRU(5, 12, projection_size=8, num_blocks=3))


@pytest.mark.filterwarnings("ignore")
def test_losses_coincide(example: ModuleType) -> None:
    from torchrl.modules import DreamerV3BlockGRU

    theirs = DreamerV3BlockGRU(example.INPUT, example.HIDDEN, projection_size=example.HIDDEN)
    ours = example.FusedCore(copy.deepcopy(theirs))
    (before, _), (after, _) = example.train(theirs, 2), example.train(ours, 2)
    assert after == pytest.approx(before, rel=1e-5)
