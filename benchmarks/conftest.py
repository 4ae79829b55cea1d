"""Options of the pytest-benchmark suites: which grid, which dtype, how many threads."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from fused_rnn.commands.bench.grid import DTYPES, GRIDS


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--grid", default="quick", choices=tuple(GRIDS), help="one of fused_rnn.commands.bench.grid")
    parser.addoption("--rnn-dtype", default="fp32", choices=tuple(DTYPES))
    parser.addoption("--rnn-threads", default=1, type=int)


@pytest.fixture(autouse=True)
def threads(request: pytest.FixtureRequest) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.config.getoption("--rnn-threads"))
    yield
    torch.set_num_threads(before)
