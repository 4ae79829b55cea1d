"""torch.utils.flop_counter counts our ops as it counts the products of a network written as a loop."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import Case, Inputs, inputs
from counterparts import CELLS as CELL_MODULES
from counterparts import MODULES, flatten, make
from oracle import forward, require
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from fused_rnn import ops
from fused_rnn.cells import CELLS

pytestmark = pytest.mark.skipif(ops.MISSING is not None, reason=f"the cpu backend's ops are counted: {ops.MISSING}")

OPTIONS: list[dict[str, Any]] = [
    {},
    {"hx": False, "bias": False},
    {"bidirectional": True, "layers": 3},
    {"T": 1},
    {"lengths": True, "reset": True, "bidirectional": True},
]
CASES = [(cell, options) for cell in CELLS for options in OPTIONS]
CASES += [("lstm", {"proj": 4, "bidirectional": True, "layers": 2}), ("lstm", {"proj": 4, "bias": False, "hx": False})]


def count(function: Any) -> int:
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def differentiated(case: Case, given: Inputs, backend: str, asked: str) -> Any:
    """A function that runs forward and backward; asked: whether for x's gradient, the weights', or both."""
    tensors = [*given.hx]
    tensors += [given.x] if asked != "weights" else []
    tensors += given.weights if asked != "x" else []
    for t in (given.x, *given.weights, *given.hx):
        t.requires_grad_(any(t is other for other in tensors))

    def run() -> None:
        outputs = forward(case, given, backend)
        torch.autograd.grad(outputs, tensors, [torch.randn_like(o) for o in outputs], allow_unused=True)

    return run


@pytest.mark.parametrize(("cell", "options"), CASES, ids=str)
def test_as_a_loop_of_products(cell: str, options: dict[str, Any]) -> None:
    case = Case(cell, **options)
    require("cpu", case)
    given = inputs(case)
    with torch.no_grad():
        expected = count(lambda: forward(case, given, "reference"))
        assert count(lambda: forward(case, given, "cpu")) == expected > 0
    for asked in ("both", "weights", "x"):
        totals = [count(differentiated(case, given, backend, asked)) for backend in ("cpu", "reference")]
        assert totals[0] == totals[1] > expected, asked


@pytest.mark.parametrize("cell", CELLS)
def test_recompute_runs_forward_once_more(cell: str) -> None:
    kept, again = (Case(cell, save=save) for save in ("gates", "recompute"))
    require("cpu", kept)
    given = inputs(kept)
    once = count(lambda: forward(kept, given, "cpu"))
    totals = [count(differentiated(case, given, "cpu", "both")) for case in (kept, again)]
    assert totals[1] == totals[0] + once


def test_by_hand() -> None:
    """2·T·B·G·H·(D + H) a layer, of as many as torch's own GRU counts."""
    ours, counterpart = make("GRU", 4, 6)
    x = torch.randn(5, 3, 4)
    with torch.no_grad():
        assert count(lambda: ours(x)) == 2 * 5 * 3 * 3 * 6 * (4 + 6) == count(lambda: counterpart(x))


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("name", MODULES)
def test_no_call_goes_by_uncounted(name: str, grad: bool) -> None:
    """The short ways past the dispatcher are off, and each module has its share."""
    model = torch.nn.Sequential(make(name, 4, 6)[0])
    gates = next(model.parameters()).shape[0]
    x = torch.randn(3, 4) if name in CELL_MODULES else torch.randn(1, 3, 4)
    with torch.set_grad_enabled(grad), FlopCounterMode(display=False) as counter:
        model(x)
    assert counter.get_total_flops() == 2 * 3 * gates * (4 + 6)
    assert sum(counter.get_flop_counts()["Sequential.0"].values()) == counter.get_total_flops()


def test_an_ensemble() -> None:
    module, _ = make("LSTM", 4, 6)
    x, n = torch.randn(5, 3, 4), 7
    params = {key: torch.randn(n, *p.shape) for key, p in module.named_parameters()}

    def run(params: dict[str, Tensor], x: Tensor) -> Tensor:
        return flatten(torch.func.functional_call(module, params, (x,)))[0]

    with torch.no_grad():
        one = count(lambda: module(x))
        assert count(lambda: torch.func.vmap(run, (0, None))(params, x)) == n * one
        assert count(lambda: torch.func.vmap(run)(params, x.expand(n, 5, 3, 4))) == n * one


@pytest.mark.parametrize("first", ["torch.utils.flop_counter", "fused_rnn"])
def test_whichever_is_imported_first(first: str) -> None:
    """Ours alone imports neither torch's counter nor, with it, Triton; who only looks where it is changes nothing."""
    program = f"""
import importlib.util, sys, torch
import {first}
importlib.util.find_spec("torch.utils.flop_counter")
if "{first}" == "fused_rnn":
    assert "torch.utils.flop_counter" not in sys.modules
import fused_rnn
from torch.utils.flop_counter import FlopCounterMode, flop_registry
for name in ("forward", "backward", "step", "triton_forward", "triton_backward", "cuda_forward", "cuda_backward"):
    assert getattr(torch.ops.fused_rnn, name) in flop_registry, name
"""
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", program], cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
