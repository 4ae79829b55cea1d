"""scripts/sass.py and step_cycles.py: machine code is read, run, and timed; a wait for the next step's input fails."""

from __future__ import annotations

import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fused_rnn

SCRIPTS = Path(__file__).parents[2] / "scripts"
sys.path.insert(0, str(SCRIPTS))

import cubin  # noqa: E402
import sass  # noqa: E402
import step_cycles  # noqa: E402

# As cuobjdump prints it.
RECORDED = """
        /*0650*/               @!P3 LDG.E.U16 R11, desc[UR4][R8.64+0x2] ;        /* 0x000002040808b981 */
                                                                              /* 0x000ea2000c1e1500 */
        /*0660*/                   FADD R164, R169.reuse, R164 ;                 /* 0x000000a4a9a47221 */
                                                                              /* 0x004fc80000000000 */
"""


def line(at: int, code: str, stall: int = 1, sets: int = 7, waits: int = 0) -> str:
    control = stall | sets << 5 | 7 << 8 | waits << 11
    return f"/*{at:04x}*/  {code} ; /* 0x{0:016x} */\n /* 0x{control << 41:016x} */\n"


def program(*lines: str | tuple[str, int, int, int]) -> str:
    return "".join(line(16 * i, *((it,) if isinstance(it, str) else it)) for i, it in enumerate(lines))


def run(text: str, constants: bytes = b"") -> sass.Thread:
    thread = sass.Thread(sass.listing(text), constants)
    list(thread.trace())
    return thread


def test_control_bits() -> None:
    load, add = sass.listing(RECORDED).values()
    assert (load.at, load.guard, load.name) == (0x650, "!P3", "LDG.E.U16")
    assert load.operands == ("R11", "desc[UR4][R8.64+0x2]")
    assert (load.stall, load.sets, load.reads, load.waits) == (1, 2, None, ())
    assert add.operands == ("R164", "R169", "R164")
    assert (add.stall, add.sets, add.reads, add.waits) == (4, None, None, (2,))


def test_carries() -> None:
    """64-bit: 0xffffffff + 1, then 2^32 - 1 less, by two halves each."""
    thread = run(
        program(
            "MOV R2, 0xffffffff",
            "MOV R4, 0x1",
            "IADD3 R6, P0, R2, R4, RZ",
            "IADD3.X R7, RZ, RZ, RZ, P0, !PT",
            "IADD3 R8, P0, R6, -R2, RZ",
            "IADD3.X R9, R7, ~RZ, RZ, P0, !PT",
            "EXIT",
        )
    )
    assert thread.pair("R6") == 1 << 32
    assert thread.pair("R8") == 1


def test_cycles() -> None:
    text = program(("LDS R2, [R1]", 2, 0, 0), ("IADD3 R3, R2, R2, RZ", 5, 7, 1), ("EXIT", 1, 7, 0))
    found = sass.issue(sass.Thread(sass.listing(text), b"").trace(), memory=500)
    assert [one.cycle for one in found] == [0, 30, 35]
    assert [one.waited for one in found] == [0, 28, 0]


SOURCE = """
extern "C" __global__ void count(int n, unsigned m, long long big, int* out) {
  int turns = n / int(m) + n % 7 + int(big >> 20) % 5 + int(m / 3u);
#pragma unroll 1
  for (int i = 0; i < turns; ++i) *(volatile int*)(out + (i & 15)) = i;
}
"""


@pytest.mark.skipif(shutil.which("nvcc") is None or cubin.find_cuobjdump() is None, reason="no CUDA toolkit")
@pytest.mark.parametrize(("n", "m", "big"), [(100, 7, 5), (12345, 1000, 9000027), (-100, 60, 12)])
def test_integers_are_computed_as_a_gpu_does(n: int, m: int, big: int, tmp_path: Path) -> None:
    source, binary = tmp_path / "count.cu", tmp_path / "count.cubin"
    source.write_text(SOURCE)
    subprocess.run(["nvcc", "-arch=sm_90a", "-cubin", source, "-o", binary], check=True, capture_output=True)
    tool = cubin.find_cuobjdump()
    code = subprocess.run([tool, "-sass", binary], check=True, capture_output=True, text=True).stdout
    arguments = b"".join(v.to_bytes(size, "little", signed=True) for v, size in ((n, 4), (m, 4), (big, 8), (4096, 8)))
    path = list(sass.Thread(sass.listing(code), bytes(step_cycles.PARAMETERS) + arguments).trace())
    stores = sum(executed for instruction, executed in path if instruction.name.startswith("STG"))
    quotient = abs(n) // m * (1 if n > 0 else -1)
    rest = abs(n) % 7 * (1 if n > 0 else -1)
    assert stores == max(0, quotient + rest + (big >> 20) % 5 + m // 3)


BARRIER = "BAR.SYNC.DEFER_BLOCKING 0x0"


def loop(*step: str | tuple[str, int, int, int]) -> str:
    return program(
        "MOV R1, RZ",
        *step,
        "VIADD R1, R1, 0x1",
        f"ISETP.LT.AND P1, PT, R1, c[0x0][{step_cycles.PARAMETERS:#x}], PT",
        "@P1 BRA 0x10",
        "EXIT",
    )


def cluster_step(consumer: str, waits: int) -> str:
    """As short as can be: its input is loaded after the send, and something waits for it."""
    return loop(
        ("SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [R2+URZ], R3", 2, 0, 0),
        ("LDS.128 R4, [R2]", 1, 1, 1),
        (BARRIER, 5, 7, 2),
        ("FADD R8, R8, R9", 4, 7, 32),
        "STS.U16 [R2], R8",
        "STAS.128 [R2.64], R4",
        BARRIER,
        ("LDG.E R9, desc[UR4][R10.64]", 1, 5, 0),
        (consumer, 4, 7, waits),
    )


def grid_step(consumer: str, waits: int, scoreboard: int = 5, fence: int | None = None) -> str:
    """Likewise. scoreboard: of its input. fence: what the fence waits for, if the input is asked for before it."""
    load = ("LDG.E R9, desc[UR4][R10.64]", 1, scoreboard, 0)
    return loop(
        ("LDG.E.STRONG.GPU R3, desc[UR4][R2.64]", 4, 2, 0),
        ("ISETP.GE.U32.AND P0, PT, R3, 0x40, PT", 13, 7, 4),
        "@!P0 BRA 0x10",
        BARRIER,
        "LDGSTS.E.BYPASS.128 [R4], desc[UR4][R6.64]",
        ("LDGDEPBAR", 1, 0, 0),
        "DEPBAR.LE SB0, 0x0",
        BARRIER,
        ("LDS.128 R4, [R2]", 1, 1, 0),
        (BARRIER, 5, 7, 2),
        ("FADD R8, R8, R9", 4, 7, 1 << scoreboard),
        "STG.E.U16 desc[UR4][R12.64], R8",
        "NOP" if fence is None else load,
        BARRIER,
        ("MEMBAR.ALL.GPU", 1, 7, fence or 0),
        "REDG.E.ADD.STRONG.GPU desc[UR4][R2.64], R14",
        load if fence is None else "NOP",
        (consumer, 4, 7, waits),
    )


def direct_step(consumer: str, waits: int, scoreboard: int = 5) -> str:
    """Likewise, its operand read from L2."""
    return loop(
        ("LDG.E.STRONG.GPU R3, desc[UR4][R2.64]", 4, 2, 0),
        ("ISETP.GE.U32.AND P0, PT, R3, 0x40, PT", 13, 7, 4),
        "@!P0 BRA 0x10",
        BARRIER,
        ("LDG.E.128.STRONG.GPU R4, desc[UR4][R6.64]", 1, 0, 0),
        ("HMMA.16816.F32.BF16 R24, R4, R32, RZ", 12, 7, 1),
        BARRIER,
        ("FADD R8, R8, R9", 4, 7, 1 << scoreboard),
        "STG.E.U16 desc[UR4][R12.64], R8",
        BARRIER,
        ("MEMBAR.ALL.GPU", 1, 7, 0),
        "REDG.E.ADD.STRONG.GPU desc[UR4][R2.64], R14",
        ("LDG.E R9, desc[UR4][R10.64]", 1, scoreboard, 0),
        (consumer, 4, 7, waits),
    )


def scatter_step(consumer: str, waits: int, early: int = 0) -> str:
    """Likewise, with two groups to wait for and two tiles to send; early: what the loads of partial sums wait for."""
    look = "SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [R2+URZ], R3"
    return loop(
        (look, 2, 0, 0),
        ("LDS R4, [R2]", 4, 1, 1),
        ("FADD R5, RZ, R4", 4, 7, 2),
        (look, 2, 0, 0),
        ("LDS R4, [R2+0x200]", 4, 1, 1 | early),
        ("FADD R5, R5, R4", 4, 7, 2),
        ("FADD R8, R5, R9", 4, 7, 32),
        "STS.U16 [R2], R8",
        BARRIER,
        ("LDS.128 R4, [R2]", 1, 1, 0),
        ("HMMA.16816.F32.BF16 R24, R4, R32, RZ", 12, 7, 2),
        "STAS.128 [R20.64], R24",
        ("HMMA.16816.F32.BF16 R24, R4, R32, RZ", 12, 7, 0),
        "STAS.128 [R22.64], R24",
        ("LDG.E R9, desc[UR4][R10.64]", 1, 5, 0),
        (consumer, 4, 7, waits),
    )


def launch(exchange: str, hidden: int = 512) -> step_cycles.Launch:
    backward = exchange in ("scatter", "direct")
    plan = fused_rnn.plan(
        "lstm", 64, hidden, dtype=torch.bfloat16, device="sm_90", exchange=exchange, backward=backward
    )
    return step_cycles.Launch("lstm", plan, 64, hidden, backward)


def test_a_wait_for_the_next_steps_input_is_found() -> None:
    good = step_cycles.replay(cluster_step("IADD3 R12, R12, R13, RZ", 0), launch("cluster"), memory=600)
    assert good.waits == []
    assert good.cycles["sums"] > 400  # what the cells wait for, and are meant to
    bad = step_cycles.replay(cluster_step("SEL R12, R9, RZ, P2", 32), launch("cluster"), memory=600)
    assert bad.waits == ["00090 SEL R12, R9, RZ, P2"]
    assert bad.cycles["tail"] > 600
    fence = step_cycles.replay(cluster_step("NOP", 63), launch("cluster"), memory=600)
    assert fence.waits == ["00090 NOP "]


def test_a_step_that_meets_its_peers_in_global_memory() -> None:
    good = step_cycles.replay(grid_step("IADD3 R12, R12, R13, RZ", 0), launch("grid"), memory=1000)
    assert good.waits == []
    assert 2 * sass.L2 < good.cycles["wait"] < 3 * sass.L2  # one look, one copy
    assert 200 < good.cycles["sums"] < 500  # for the rest of the input, which came beside these
    assert sass.L2 < good.cycles["send"] < 2 * sass.L2  # the fence
    bad = step_cycles.replay(grid_step("SEL R12, R9, RZ, P2", 32), launch("grid"), memory=1000)
    assert bad.waits == ["00120 SEL R12, R9, RZ, P2"]
    assert bad.cycles["tail"] > 1000
    for waits in (0, 32):  # asked for before the member is counted in
        step = step_cycles.replay(grid_step("NOP", 0, fence=waits), launch("grid"), memory=1000)
        assert step.waits == ["000f0 MEMBAR.ALL.GPU "] * bool(waits)


def test_a_wait_for_a_copy_that_waits_for_the_next_steps_input_is_found() -> None:
    """They share a scoreboard."""
    bad = step_cycles.replay(grid_step("IADD3 R12, R12, R13, RZ", 0, scoreboard=0), launch("grid"), memory=1000)
    assert bad.waits == ["00070 DEPBAR.LE SB0, 0x0"]
    assert bad.cycles["wait"] > 900


def test_a_step_that_scatters_sums() -> None:
    """It begins with the first of its looks."""
    good = step_cycles.replay(scatter_step("IADD3 R12, R12, R13, RZ", 0), launch("scatter"), memory=600)
    assert good.waits == []
    assert list(good.cycles) == ["wait", "sums", "cell", "product", "send", "tail"]
    assert 28 <= good.cycles["wait"] < 40  # one look
    assert 2 * 30 + 28 <= good.cycles["sums"] < 110  # two loads, another look
    assert good.cycles["cell"] > 400  # its input
    assert 25 + 36 + 12 <= good.cycles["product"] < 80  # the barrier, the operand, a tile
    assert good.cycles["send"] == 13  # the other tile
    for consumer, waits, early, found in (
        ("SEL R12, R9, RZ, P2", 32, 0, "00100 SEL R12, R9, RZ, P2"),
        ("NOP", 0, 32, "00050 LDS R4, [R2+0x200]"),
    ):
        bad = step_cycles.replay(scatter_step(consumer, waits, early), launch("scatter"), memory=600)
        assert bad.waits == [found]


def test_a_step_that_reads_its_operand_directly() -> None:
    """What it waits for in its product is no input of its cells."""
    direct = launch("direct", hidden=1024)
    good = step_cycles.replay(direct_step("IADD3 R12, R12, R13, RZ", 0), direct, memory=1000)
    assert good.waits == []
    assert sass.L2 < good.cycles["wait"] < 2 * sass.L2  # the look
    assert sass.L2 < good.cycles["product"] < 2 * sass.L2  # the operand
    bad = step_cycles.replay(direct_step("SEL R12, R9, RZ, P2", 32), direct, memory=1000)
    assert bad.waits == ["000e0 SEL R12, R9, RZ, P2"]
    bad = step_cycles.replay(direct_step("IADD3 R12, R12, R13, RZ", 0, scoreboard=0), direct, memory=1000)
    assert bad.waits == ["00060 HMMA.16816.F32.BF16 R24, R4, R32, RZ"]
    team = struct.unpack_from("<8i", direct.constants(rare=False), step_cycles.PARAMETERS + 80)
    assert team == (4, 32, 32, 16, 1, 8, 4 * 1024, 16)


def test_what_a_scattering_team_is_told() -> None:
    """As csrc/cuda/layout.h lays it out: exchange, members, units, rows, warps, depth and blocks of a warp."""
    one = launch("scatter")
    assert one.plan.known
    team = struct.unpack_from("<8i", one.constants(rare=False), step_cycles.PARAMETERS + 80)
    assert team == (3, 16, 32, 8, 8, 1, 4 * 32, 4)
