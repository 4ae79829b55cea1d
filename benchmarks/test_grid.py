"""pytest-benchmark over the shared grid: `pytest benchmarks --benchmark-only [--grid cpu] [--rnn-dtype bf16]`.

For following one number from commit to commit (`--benchmark-autosave`, `--benchmark-compare`). Comparisons between
providers are better read from `python -m fused_rnn bench`, which interleaves them.
"""

from __future__ import annotations

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from fused_rnn.commands.bench.grid import GRIDS, Point
from fused_rnn.commands.bench.measure import TOLERANCE, difference
from fused_rnn.commands.bench.providers import baseline, build, supports

PROVIDERS = ("torch", "cell", "cpu", "auto")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    grid = GRIDS[metafunc.config.getoption("--grid")]
    points = grid.points(metafunc.config.getoption("--rnn-dtype"))
    cases = [(point, name) for point in points for name in PROVIDERS if supports(name, point) is None]
    ids = [f"{point}-{name}".replace(" ", "-").replace("=", "") for point, name in cases]
    metafunc.parametrize(("point", "provider"), cases, ids=ids)


def test_time(benchmark: BenchmarkFixture, point: Point, provider: str) -> None:
    call = build(provider, point)
    call.run()
    expected = build(baseline(point), point)
    expected.run()
    assert difference(call, expected.results()) <= TOLERANCE[point.dtype], "a wrong result is not timed"
    benchmark.group = str(point)
    rounds = max(5, min(100, int(2e9 / point.flops)))
    benchmark.pedantic(call.run, setup=call.prepare, rounds=rounds, warmup_rounds=2)
