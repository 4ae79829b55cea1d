"""A pytest plugin for scripts/gpu_tests.py: results on disk as they come, a share of the tests, no test twice.

FUSED_RNN_GPU_RESULTS: a file with a line of JSON for each event. A test has one when it begins, by which it died, and
one when it ends; the last of them counts. Tests that are in the file already are left out.
FUSED_RNN_GPU_SHARE: "1/4" for the second quarter of the tests.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

RESULTS = Path(os.environ["FUSED_RNN_GPU_RESULTS"])
SHARE, SHARES = map(int, os.environ.get("FUSED_RNN_GPU_SHARE", "0/1").split("/"))
FINISHED = (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED, pytest.ExitCode.NO_TESTS_COLLECTED)
DEAD = "died: a hang that the time limit ended, or a crash"

_ends: dict[str, dict[str, Any]] = {}


def _write(**event: Any) -> None:
    with RESULTS.open("a") as stream:
        stream.write(json.dumps(event) + "\n")


def _known() -> set[str]:
    if not RESULTS.exists():
        return set()
    return {event["test"] for line in RESULTS.read_text().splitlines() if "test" in (event := json.loads(line))}


@pytest.hookimpl(trylast=True)  # what other options leave out is not shared
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    known = _known()
    mine = [item for k, item in enumerate(items) if k % SHARES == SHARE and item.nodeid not in known]
    config.hook.pytest_deselected(items=[item for item in items if item not in mine])
    items[:] = mine


def pytest_runtest_logstart(nodeid: str) -> None:
    _write(test=nodeid, outcome="failed", seconds=0.0, text=DEAD)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    end = _ends.setdefault(report.nodeid, {"outcome": "passed", "seconds": 0.0, "text": ""})
    end["seconds"] += report.duration
    if report.outcome != "passed" and end["outcome"] != "failed":
        text = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longreprtext
        end |= {"outcome": report.outcome, "text": text[-6000:]}


def pytest_runtest_logfinish(nodeid: str) -> None:
    end = _ends.pop(nodeid)
    _write(test=nodeid, **end)
    if end["outcome"] == "failed" and (lost := _lost()):
        _write(lost=lost)
        os._exit(70)  # the tests after it, in this process, would all fail of it


def _lost() -> str:
    """Why nothing runs on the GPU from this process any more, or ""."""
    import torch

    if not torch.cuda.is_initialized():
        return ""
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        return str(error)
    return ""


def pytest_sessionfinish(exitstatus: int) -> None:
    _write(finished=exitstatus in FINISHED)
