"""Models of other packages, as examples/packages.py trains them: ours are what runs, and the losses are torch.nn's."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch

from fused_rnn.nn.sequence import Recurrent

MODULES = {
    "sb3-contrib": "sb3_contrib",
    "gluonts": "gluonts.torch",
    "pytorch-forecasting": "pytorch_forecasting",
}


@pytest.fixture(scope="module")
def example() -> ModuleType:
    path = Path(__file__).parent.parent / "examples" / "packages.py"
    spec = importlib.util.spec_from_file_location("packages_example", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.filterwarnings("ignore")  # the packages' own
@pytest.mark.parametrize("name", MODULES)
def test_trains_as_it_is(name: str, example: ModuleType) -> None:
    pytest.importorskip(MODULES[name], reason=f"{name} is not installed: pip install 'fused_rnn[integrations]'")
    torch.use_deterministic_algorithms(False)  # they call what has no deterministic form
    train, _ = example.PACKAGES[name]
    calls = {fused: example.Calls() for fused in (False, True)}
    curves = {}
    for fused, seen in calls.items():
        with seen.recorded():
            curves[fused], _ = train(2, fused)
    assert curves[True] == pytest.approx(curves[False], rel=1e-4)
    assert len(curves[True]) == 2
    assert calls[True].counts.total() == calls[False].counts.total() > 0
    kinds = {fused: {isinstance(module, Recurrent) for module, *_ in calls[fused].first.values()} for fused in calls}
    assert kinds == {False: {False}, True: {True}}
    theirs, ours = calls[False].seconds(repeats=3)
    assert theirs > 0 and ours > 0
