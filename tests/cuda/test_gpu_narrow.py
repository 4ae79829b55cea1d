"""Streams of narrow weights on a GPU: compiled there by NVRTC, every exchange, captured, at sizes that need them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from cuda_cases import EXCHANGES, PRECISIONS
from narrow_streams import assert_as_good_as_rounded, by_steps
from tolerances import tf32
from torch import Tensor

import fused_rnn
from fused_rnn.cuda import module as cuda_module
from fused_rnn.cuda import plans, programs

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(cuda_module.refusal("cuda") is not None, reason=str(cuda_module.refusal("cuda"))),
    pytest.mark.skipif(programs.refusal() is not None, reason=str(programs.refusal())),
]

NARROW = [("bf16", "int8"), ("f16", "int8"), ("tf32", "int8"), ("tf32", "bf16"), ("ieee", "int8"), ("ieee", "bf16")]


@pytest.fixture(params=["cta", "cluster4", "grid", "stepwise"])
def exchange(request: pytest.FixtureRequest) -> Iterator[str]:
    if request.param == "cluster4" and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("clusters begin with sm_90")
    with plans.override(**EXCHANGES[request.param]):
        yield request.param


def make(kind: str, hidden: int, dtype: torch.dtype, **options: Any) -> Any:
    return getattr(fused_rnn, kind)(24, hidden, backend="cuda", device="cuda", dtype=dtype, **options).eval()


def assert_accurate(module: Any, weights: str, precision: str, x: Tensor) -> None:
    with tf32(precision == "tf32"):
        stream = module.stream(x.shape[1], weights=weights)
        y = by_steps(stream, x)
    with tf32(False):
        assert_as_good_as_rounded(stream, y, module, weights, precision, x)


@pytest.mark.parametrize(("precision", "weights"), NARROW)
@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
def test_every_exchange(kind: str, precision: str, weights: str, exchange: str) -> None:
    """In a cluster of 4 by the kernels for known teams; else by general ones, with rows that are no whole vectors."""
    hidden = {"cta": 21, "cluster4": 64, "grid": 130, "stepwise": 35}[exchange]
    dtype = PRECISIONS[precision]
    module = make(kind, hidden, dtype, num_layers=2)
    assert_accurate(module, weights, precision, torch.randn(20, 9, 24, device="cuda").to(dtype))


@pytest.mark.parametrize(("hidden", "weights"), [(1024, "int8"), (1536, "bf16"), (2048, "int8")])
def test_large_sizes(hidden: int, weights: str) -> None:
    """float32 of H = 1536 and 2048 has no team on an H200 otherwise."""
    assert_accurate(make("LSTM", hidden, torch.float32), weights, "tf32", torch.randn(9, 8, 24, device="cuda"))


def test_a_captured_step_follows_refresh() -> None:
    module = make("LSTM", 64, torch.float32)
    stream, x = module.stream(8, weights="int8"), torch.randn(8, 24, device="cuda")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        stream.step(x)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = stream.step(x)
    for _ in range(2):
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.mul_(torch.rand_like(parameter) + 0.5)
        stream.refresh()
        stream.reset()
        eager, inputs = module.stream(8, weights="int8"), torch.randn(5, 8, 24, device="cuda")
        for x_t in inputs:
            x.copy_(x_t)
            graph.replay()
            assert torch.equal(captured, eager.step(x_t))
