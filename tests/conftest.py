"""Every test: fixed seeds, uninitialised memory full of NaN, torch's global settings put back afterwards."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator

import pytest
import torch
from tolerances import tf32

# Deterministic mode refuses cuBLAS without it; read when cuBLAS starts.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
# Tests share the cores, and mean the numbers of threads that they set; read when a team first starts.
os.environ.setdefault("FUSED_RNN_FIXED_TEAMS", "1")
# Read when Triton is first imported, by whichever test.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
# What make check leaves to make test: tests with these markers, and files that compile kernels or start processes.
SLOW = ("slow", "compile", "gpu")
SLOW_FILES = (
    *("cpu/test_aarch64", "cpu/test_faults", "cpu/test_isas", "cpu/test_scan_mistakes", "cuda/test_emulated"),
    *("docs/test_deploying", "docs/test_examples", "docs/test_packages", "emulator/test_emulator", "fuzz/test_fuzz"),
    *("nn/test_distributed", "package/test_first_hour", "scripts/test_gpu_rehearse", "triton/test_aot"),
    "triton/test_mutations",
)
# A minute and more each, on one core: they begin, so that no process is left with one while the others have none.
LONGEST_FILES = (
    *("cuda/test_emulated", "scripts/test_gpu_rehearse", "triton/test_stages", "flex/test_cells_on_triton"),
    *("cpu/test_isas", "flex/test_field_on_triton", "cpu/test_scan_mistakes", "cpu/test_trial_cell"),
)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--fast", action="store_true", help="two cases of each test, and no slow one: make check")


def _is_in(item: pytest.Item, files: tuple[str, ...]) -> bool:
    return str(item.path).removesuffix(".py").endswith(files)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Where several processes share the tests, the longest files first. Of a test with many cases, --fast leaves the
    first and the last."""
    if hasattr(config, "workerinput"):
        items.sort(key=lambda item: not _is_in(item, LONGEST_FILES))
    if not config.getoption("--fast"):
        return
    tests = [item.nodeid.partition("[")[0] for item in items]
    left = Counter(tests)
    seen: set[str] = set()
    chosen, others = [], []
    for test, item in zip(tests, items, strict=True):
        left[test] -= 1
        slow = any(map(item.get_closest_marker, SLOW)) or _is_in(item, SLOW_FILES)
        (others if slow or (test in seen and left[test]) else chosen).append(item)
        seen.add(test)
    config.hook.pytest_deselected(items=others)
    items[:] = chosen


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "compile: traces through torch.compile, which takes seconds to start")
    config.addinivalue_line("markers", "slow: takes more than three seconds; make test runs it, make check does not")
    # Dynamo makes an instance of every autograd.Function that it traces, and torch warns about that.
    config.addinivalue_line(
        "filterwarnings", "ignore:.*should not be instantiated. Methods on autograd:DeprecationWarning"
    )
    # torch's own, once per process, on the road that the torch backend is there to take.
    config.addinivalue_line("filterwarnings", "ignore:LSTM with projections is not supported with oneDNN:UserWarning")
    # torch's own, on GPUs: cuDNN gets weights that are functional's, and so in no one chunk; what torch thinks of the
    # mode in which it reports waits; what a test that refuses to be captured leaves behind.
    for text in (
        "RNN module weights are not part of single contiguous chunk",
        "Synchronization debug mode is a prototype",
        "The CUDA Graph is empty",
    ):
        config.addinivalue_line("filterwarnings", f"ignore:{text}:UserWarning")


@pytest.fixture(autouse=True)
def _clean_state() -> Iterator[None]:
    """What every test starts from.

    Seeds are fixed. torch.empty, called from C++ too, gives NaN (in deterministic mode torch fills what it allocates),
    so that a kernel that reads what nobody wrote, or leaves an output unwritten, cannot pass. One thread, unless a test
    asks for more: the reference loop's thousands of small products crawl where OpenMP spins on cores that others use.
    float32 means float32, on a GPU too, where torch lets recurrent layers round to TF32.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    with tf32(False):
        yield
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(threads)


@pytest.fixture(params=[1, 2], ids=lambda n: f"threads{n}")
def threads(request: pytest.FixtureRequest) -> int:
    """The test runs with one thread and with two; _clean_state puts the number back."""
    torch.set_num_threads(request.param)
    return int(request.param)
