"""A team of CPU threads by itself (team.cpp): whoever waits sleeps, sums are right however late one is, and a team
whose threads have no core becomes smaller."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

CSRC = Path(__file__).parents[2] / "csrc"
BUILDS = {"openmp": ("-fopenmp",), "plain": ("-pthread",), "sanitized": ("-pthread", "-fsanitize=thread", "-g")}
pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")

Run = Callable[..., None]


@pytest.fixture(scope="module", params=BUILDS)
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Run:
    program = tmp_path_factory.mktemp("team") / "program"
    sources = [Path(__file__).with_name("team.cpp"), CSRC / "cpu" / "team.cpp", CSRC / "cpu" / "quota.cpp"]
    flags = ["-std=c++17", "-O2", "-Wall", "-Wextra", f"-I{CSRC}", *BUILDS[request.param]]
    built = subprocess.run(["g++", *flags, *sources, "-o", program], capture_output=True, text=True, check=False)
    if request.param == "sanitized" and "libtsan" in built.stderr:
        pytest.skip("no ThreadSanitizer")
    assert built.returncode == 0, built.stderr

    def run(*arguments: object, fixed: bool = True, says: str = "ok") -> None:
        environment = {name: value for name, value in os.environ.items() if name != "FUSED_RNN_FIXED_TEAMS"}
        environment |= {"FUSED_RNN_FIXED_TEAMS": "1"} if fixed else {}
        command = [str(program), *map(str, arguments)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0 and done.stdout == f"{says}\n", done.stdout + done.stderr

    return run


def test_whoever_waits_sleeps(run: Run) -> None:
    run("sleeps")


def test_sums_are_right_however_late_one_is(run: Run) -> None:
    run("exchanges", 300)


def test_several_callers_at_once(run: Run) -> None:
    run("callers", 100)


def test_a_team_that_mostly_waits_becomes_smaller(run: Run) -> None:
    run("fewer", fixed=False)


UNLIMITED = 2**31 - 1
GROUPS: dict[str, tuple[int, dict[str, str]]] = {
    "none": (UNLIMITED, {}),
    "v2": (2, {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "150000 100000\n"}),
    "v2, no limit": (UNLIMITED, {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "max 100000\n"}),
    "v2, of a group above": (
        3,
        {
            "proc/self/cgroup": "0::/a/b\n",
            "sys/fs/cgroup/a/b/cpu.max": "max 100000\n",
            "sys/fs/cgroup/a/cpu.max": "300000 100000\n",
        },
    ),
    "v1": (
        1,
        {
            "proc/self/cgroup": "5:memory:/m\n4:cpu,cpuacct:/box\n0::/\n",
            "sys/fs/cgroup/cpu,cpuacct/box/cpu.cfs_quota_us": "50000\n",
            "sys/fs/cgroup/cpu,cpuacct/box/cpu.cfs_period_us": "100000\n",
        },
    ),
    "v1, whose mount is the group": (
        4,
        {
            "proc/self/cgroup": "4:cpuacct,cpu:/docker/0123\n",
            "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "400000\n",
            "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
        },
    ),
    "v1, no limit": (
        UNLIMITED,
        {
            "proc/self/cgroup": "4:cpu:/\n",
            "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
            "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
        },
    ),
    "not numbers": (UNLIMITED, {"proc/self/cgroup": "0::/\nfoo\n", "sys/fs/cgroup/cpu.max": "what\n"}),
}


@pytest.mark.parametrize("groups", GROUPS)
def test_a_containers_quota(run: Run, groups: str, tmp_path: Path) -> None:
    expected, files = GROUPS[groups]
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    run("quota", tmp_path, says=str(expected))
