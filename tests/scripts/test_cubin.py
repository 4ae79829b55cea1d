"""What `make cubin-cuda` says of kernels, read from what ptxas and cuobjdump print; one file compiled for real."""

from __future__ import annotations

import importlib.util
import re
import shutil
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

import fused_rnn

SCRIPT = Path(__file__).parents[2] / "scripts" / "cubin.py"
PTXAS = """ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_ZN9fused_rnn4cuda21persistent_fwd_kernelINS_4LstmELi2EEEvNS0_11ForwardLoopE' for 'sm_90a'
ptxas info    : Function properties for _ZN9fused_rnn4cuda21persistent_fwd_kernelINS_4LstmELi2EEEvNS0_11ForwardLoopE
    16 bytes stack frame, 4 bytes spill stores, 8 bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers, 16 bytes smem
ptxas info    : Compiling entry function '_ZN9fused_rnn4cuda20pointwise_bwd_kernelI4LstmEEv' for 'sm_90a'
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 40 registers
"""  # noqa: E501
SASS = """
        /*0000*/                   HMMA.16816.F32 R4, R8, R12, R4 ;
        /*0010*/                   FFMA R1, R2, R3, R4 ;
        /*0020*/                   HMMA.16816.F32 R4, R8, R12, R4 ;
        /*0030*/                   LDSM.16.M88.4 R8, [R2] ;
        /*0040*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*0050*/              @!P0 STAS.128 [R2], R4 ;
        /*0060*/               @P1 BRA 0x30 ;
        /*0070*/               @P1 BRA 0x10 ;
        /*0080*/                   EXIT ;
"""


@pytest.fixture
def cubin() -> ModuleType:
    if str(SCRIPT.parent) not in sys.path:
        sys.path.insert(0, str(SCRIPT.parent))
    spec = importlib.util.spec_from_file_location("cubin", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["cubin"] = module
    spec.loader.exec_module(module)
    return module


def test_what_ptxas_says(cubin: ModuleType) -> None:
    (_, bad), (_, good) = cubin.read_ptxas(PTXAS, "lstm", "bf16", "sm_90a")
    assert bad == cubin.Kernel("lstm bf16 persistent_fwd NT=2", "sm_90a", 255, 16, 12, 16)
    assert bad.fault == "spills 12 bytes, has a stack frame of 16 bytes"
    assert good == cubin.Kernel("lstm bf16 pointwise_bwd", "sm_90a", 40, 0, 0, 0)
    assert good.fault == ""


MANGLED = (
    "_ZN9fused_rnn4cuda21persistent_{}_kernelINS_4LstmENS0_13TensorProductINS0_4bf16ELNS0_9PrecisionE0ENS0_4FastEEELi{}E"
    "NS0_9KnownTeamILi{}ELS5_0ELi4EEEEEvNS0_14BackwardLoopOfILi0EEE"
)


def test_a_kernel_for_a_known_team_is_called_by_it(cubin: ModuleType) -> None:
    for known, name in (
        (cubin.Known("scatter", 8, 16, 8), "persistent_bwd known scatter of 8 x 16 units"),
        (cubin.Known("cluster", 16, 32, 8), "persistent_fwd known cluster of 16 x 32 units"),
    ):
        mangled = MANGLED.format(name[11:14], 1, cubin.KNOWN.index(known))
        assert cubin.kernel_name(mangled, "lstm", "bf16") == f"lstm bf16 {name}"
    general = MANGLED.format("fwd", 4, 0).replace("9KnownTeamILi0ELS5_0ELi4EEE", "7AnyTeamE")
    assert cubin.kernel_name(general, "lstm", "bf16") == "lstm bf16 persistent_fwd NT=4"


def test_the_time_loop_is_the_one_with_product_barrier_and_exchange(cubin: ModuleType) -> None:
    """The inner loop has no product; the outer one is counted, its first HMMA outside it."""
    counts = cubin.time_loop(SASS)
    assert counts["in all"] == 7
    found = {kind: count for kind, count in counts.items() if count}
    assert found == {"in all": 7, "mma": 1, "fma": 1, "lds": 1, "st.async": 1, "barrier": 1, "branch": 2}
    assert cubin.time_loop(SASS.replace("HMMA", "IMAD")) is None
    assert cubin.time_loop(SASS.replace("STAS.128", "REDG.E.ADD.STRONG.GPU"))["in all"] == 7


@pytest.mark.parametrize("cell", ["lstm", "rnn_tanh"])
@pytest.mark.parametrize("backward", [False, True])
def test_steps_are_of_the_teams_that_the_planner_chooses(cubin: ModuleType, cell: str, backward: bool) -> None:
    """Also where they meet in global memory; a kernel without one is looked at with a team that is forced. A general
    kernel is never looked at with a known team."""
    teams = cubin.teams(cell, "bf16", cubin.Loop(backward, 8, None))
    assert {launch.plan.exchange for launch in teams.values()} == {"cluster", "grid"}
    for name, launch in teams.items():
        plan = launch.plan
        assert not plan.known
        assert f"H={launch.hidden}, {plan.exchange} of {plan.members}, " in name
        chosen = fused_rnn.plan(
            cell, launch.batch, launch.hidden, dtype=torch.bfloat16, backward=backward, device="sm_90"
        )
        assert chosen.known or plan == chosen
    for precision in ("bf16", "tf32"):
        for rows in (8, 16, 32):
            assert cubin.teams(cell, precision, cubin.Loop(backward, rows, None))


@pytest.mark.parametrize("cell", ["lstm", "gru"])
@pytest.mark.parametrize("precision", ["bf16", "f16", "tf32"])
def test_steps_of_a_known_team_are_its_own(cubin: ModuleType, cell: str, precision: str) -> None:
    """None for those that there are not in this precision."""
    assert len(cubin.KNOWN) == (cubin.CSRC / "cuda" / "known_teams.h").read_text().count(", ExchangeKind::")
    exchanges = set()
    for known in cubin.KNOWN:
        backward, hidden = known.exchange in ("scatter", "direct"), known.members * known.units
        teams = cubin.teams(cell, precision, cubin.Loop(backward, known.rows, known))
        exchanges |= {launch.plan.exchange for launch in teams.values()}
        for name, launch in teams.items():
            plan = launch.plan
            assert plan.known
            assert (plan.exchange, plan.members, plan.units, plan.rows) == known
            assert (launch.hidden, launch.backward) == (hidden, backward)
            assert name.startswith(f"H={hidden}, {known.exchange} of {known.members}, ")
    assert exchanges >= {"cluster", "scatter", "direct"}


def test_a_kernel_that_nobody_runs_is_a_fault(cubin: ModuleType) -> None:
    kernel = cubin.Kernel("lstm bf16 persistent_bwd known scatter of 3 x 16 units", "sm_90a", 255, 0, 0, 0)
    assert kernel._replace(loop={"in all": 7}).fault == "is run by no plan"
    assert kernel._replace(loop={"in all": 7}, steps={"H=48": {"wait": 1}}).fault == ""


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on the PATH")
def test_a_file_of_kernels_compiles(cubin: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert cubin.main(["--arch", "sm_80", "--cell", "rnn_tanh", "--precision", "f64", "--jobs", "1"]) == 0
    printed = capsys.readouterr().out
    assert "rnn_tanh f64 pointwise_fwd" in printed
    assert "2 kernels compiled for sm_80; 0 with a fault" in printed


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on the PATH")
def test_what_does_not_compile_fails(cubin: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert cubin.main(["--arch", "sm_1", "--cell", "rnn_tanh", "--precision", "f64", "--jobs", "1"]) == 1
    assert "FAULT sm_1 rnn_tanh f64: nvcc fatal" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on the PATH")
def test_a_step_is_timed(cubin: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    if cubin.find_cuobjdump() is None:
        pytest.skip("no cuobjdump")
    assert cubin.main(["--arch", "sm_90a", "--cell", "rnn_tanh", "--precision", "bf16", "--jobs", "1"]) == 0
    printed = capsys.readouterr().out
    for kernel, team in (
        ("fwd NT=1", "H=128, cluster"),
        ("fwd NT=1", "H=2048, grid"),
        ("bwd NT=4", "H=128, forced cluster"),
    ):
        line = rf"persistent_{kernel} .*(\n +H=.*)*\n +{team} of .*: \d+ cycles a step; wait \d+, product \d+, sums"
        assert re.search(line, printed), printed
    assert "8 kernels compiled for sm_90a; 0 with a fault" in printed
