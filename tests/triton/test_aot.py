"""Kernels compiled ahead of time with no GPU, a sample of what `make cubin` compiles all of; the interpreter is off."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

from fused_rnn.triton.trips import trips

ROOT = Path(__file__).parents[2]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests" / "common")])
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    "chosen",
    [
        ["--arch", "sm_80", "sm_90", "sm_100", "sm_120", "gfx942", "--cell", "gru", "--kind", "half", "--hidden", "32"],
        ["--arch", "sm_90", "--cell", "rnn_tanh", "--kind", "tf32", "--hidden", "256"],
        ["--arch", "sm_90", "--cell", "literature:nas_cell", "literature:mgu", "--kind", "half", "--hidden", "512"],
    ],
    ids=["each_architecture", "teams", "users_cells"],
)
def test_kernels_compile_without_spills(chosen: list[str]) -> None:
    done = run("-m", "fused_rnn.triton.cubin", "--jobs", "1", *chosen)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 with a fault" in done.stdout
    assert "registers" in done.stdout
    assert "bytes shared" in done.stdout
    assert (", 1 trips to memory" in done.stdout) == ("gru" not in chosen)
    assert "spilled" not in done.stdout


@pytest.mark.parametrize("name", ["lstms", "literature:lstms", "literature:CELLS", "no_such_module:lstm", ":"])
def test_cells_that_are_none(name: str) -> None:
    done = run("-m", "fused_rnn.triton.cubin", "--cell", name)
    assert done.returncode == 2
    assert f"got {name!r}, expected one of lstm, " in done.stderr


# Of the LSTM as a program and by hand what the machine code takes, in the loops that training runs.
GENERATED = """
import sys
from fused_rnn.cells import CELLS
from fused_rnn.triton import aot, planner
from fused_rnn.triton.compile import SPILLS
from fused_rnn.triton.schedule import shape_of
from fused_rnn.triton.target import ARCHITECTURES
sys.path.insert(0, "tests/common")
from programs import LSTM

for hidden, backward in ((128, False), (512, True)):
    lengths = []
    for name in ("lstm", LSTM):
        cell = CELLS[name]
        schedule = planner.shipped(shape_of(cell, "half", hidden, backward), ARCHITECTURES["sm_90"])[0]
        variant = ("lengths", "reset") if backward else ("lengths", "reset", "save")
        kernel = aot.compile_kernel(cell, "bfloat16", "ieee", hidden, schedule, "sm_90", backward, variant, 255)
        assert aot.report(kernel, "sm_90", schedule.hold).spills <= SPILLS
        lengths.append((schedule, aot.instructions(kernel)))
    (by_hand, hand_written), (printed, generated) = lengths
    assert by_hand == printed
    assert generated <= 1.1 * hand_written, (hidden, backward, generated, hand_written)
"""


def test_a_generated_lstm_is_no_longer_than_the_one_by_hand() -> None:
    done = run("-c", GENERATED)
    assert done.returncode == 0, done.stdout + done.stderr


# Cells with stages, in registers and in a team: the first schedule of each, in both directions.
STAGED = """
import sys
from fused_rnn.cells import CELLS
from fused_rnn.triton import cubin, planner
from fused_rnn.triton.schedule import shape_of
from fused_rnn.triton.target import ARCHITECTURES
sys.path.insert(0, "tests/common")
from stage_cells import MASKED, STAGED

def compiled(text, kind, hidden, backward, *schedules):
    shape = shape_of(CELLS[text], kind, hidden, backward)
    shipped = planner.shipped(shape, ARCHITECTURES[arch])
    for k in schedules:
        variant = ("lengths", "reset", "masks", *["save"][backward:])
        outcome = cubin.compile_job(cubin.Job(arch, shape, *cubin.KINDS[kind], shipped[k], variant))
        assert not outcome.fault, str(outcome)
        assert shipped[k].registers == (hidden == 64)

(arch,) = sys.argv[1:]
for backward in (False, True):
    for kind in ("half", "tf32"):
        compiled(STAGED["layer_norm_lstm"].program.text, kind, 64, backward, 0)
        compiled(STAGED["reset_before"].program.text, kind, 512, backward, 0)
    compiled(MASKED["masked_product"], "half", 512, backward, 0, -1)
"""


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100"])
def test_cells_with_stages_compile_without_spills(arch: str) -> None:
    done = run("-c", STAGED, arch)
    assert done.returncode == 0, done.stdout + done.stderr


def test_what_counts_as_a_fault() -> None:
    from fused_rnn.triton import planner
    from fused_rnn.triton.compile import SPILLS
    from fused_rnn.triton.cubin import Job, Outcome
    from fused_rnn.triton.schedule import Shape
    from fused_rnn.triton.target import ARCHITECTURES

    shape = Shape("gru", 3, "half", 32, False)
    schedule = planner.shipped(shape, ARCHITECTURES["sm_80"])[0]
    outcome = Outcome(Job("sm_80", shape, "bfloat16", "ieee", schedule, ()), registers=64, shared=163 * 1024)
    assert outcome.fault == ""
    assert outcome._replace(shared=163 * 1024 + 1).fault.startswith("takes 166913 bytes of shared memory")
    assert outcome._replace(spills=SPILLS).fault == ""
    assert outcome._replace(spills=72).fault == "spills 72 bytes a thread"
    assert outcome._replace(error="PassManager failed").fault == "PassManager failed"
    team = replace(schedule, tile=replace(schedule.tile, depth=8))
    for backward, most in ((False, 1), (True, 3)):  # of four parts
        held = outcome._replace(job=outcome.job._replace(schedule=team, shape=shape._replace(backward=backward)))
        assert held._replace(trips=most).fault == ""
        assert held._replace(trips=most + 1).fault.startswith(f"takes {most + 1} trips to memory")


def listed(*instructions: tuple[str, int | None, tuple[int, ...]]) -> str:
    """As cuobjdump prints them: code, the scoreboard that it sets, those that it waits for."""
    lines = []
    for place, (code, sets, waits) in enumerate(instructions):
        control = 1 | (7 if sets is None else sets) << 5 | 7 << 8 | sum(1 << board for board in waits) << 11
        lines.append(f"/*{16 * place:04x}*/  {code} ;  /* 0x{0:016x} */\n  /* 0x{control << 41:016x} */\n")
    return "".join(lines)


POLL = [("LDG.E.STRONG.GPU R1, desc[UR4][R2.64]", 5, ()), ("CCTL.IVALL", None, (5,))]
ONE = ("@!P3 LDG.E.128.STRONG.GPU R8, desc[UR4][R2.64]", 0, ())
TWO = ("LDG.E.128.STRONG.GPU R12, desc[UR4][R2.64+0x200]", 1, ())
INPUT = ("LDG.E.128 R16, desc[UR4][R6.64]", 2, ())  # of the next step
STORES = [("STS.128 [R4], R8", None, (0,)), ("STS.128 [R4+0x200], R12", None, (1,))]
PRODUCT = ("HMMA.16816.F32.BF16 R20, R24, R28, R20", None, (3,))


def test_trips_to_memory() -> None:
    assert trips(listed(*POLL, ONE, TWO, INPUT, *STORES, PRODUCT, PRODUCT)) == 1
    assert trips(listed(*POLL, ONE, STORES[0], PRODUCT, TWO, STORES[1], PRODUCT)) == 2
    assert trips(listed(*POLL, ONE, INPUT, ("NOP", None, (2,)), TWO, *STORES, PRODUCT)) == 1
    # A scoreboard that two loads have set is released when both have come; DEPBAR says by an operand what it waits for.
    assert trips(listed(*POLL, ONE, (TWO[0], 0, ()), STORES[0], TWO, STORES[0], TWO, PRODUCT)) == 2
    assert trips(listed(*POLL, ONE, ("DEPBAR.LE SB0, 0x0", None, ()), TWO, PRODUCT)) == 2
    assert trips(listed(*POLL, ONE, PRODUCT, *STORES, TWO)) == 1  # behind the last product is another step
    with pytest.raises(ValueError, match="no team"):
        trips(listed(ONE, PRODUCT))


def test_a_fault_fails() -> None:
    """A tile that Triton cannot compile: sizes must be powers of two."""
    program = """
import sys
from dataclasses import replace
from fused_rnn.triton import cubin, planner
from fused_rnn.triton.schedule import Shape
from fused_rnn.triton.target import ARCHITECTURES
if __name__ == "__main__":
    shape = Shape("gru", 3, "half", 32, True)
    schedule = planner.shipped(shape, ARCHITECTURES["sm_90"])[0]
    odd = replace(schedule, tile=replace(schedule.tile, batch=24))
    outcome = cubin.compile_job(cubin.Job("sm_90", shape, "bfloat16", "ieee", odd, ()))
    sys.exit(3 if outcome.fault else 0)
"""
    done = run("-c", program)
    assert done.returncode == 3, done.stdout + done.stderr


def test_sizes_are_never_compiled_for() -> None:
    """T, B and R are arguments that Triton does not specialise on: no 1, no multiple of 16 makes another kernel."""
    program = """
from collections import defaultdict
from fused_rnn.cells import CELLS
from fused_rnn.triton import aot
from fused_rnn.triton.backward import bwd_kernel
from fused_rnn.triton.forward import fwd_kernel
for kernel in (fwd_kernel, bwd_kernel):
    pointers = aot._pointers(kernel, CELLS["lstm"], "bfloat16", defaultdict(bool))
    for p in kernel.params:
        assert p.is_constexpr or p.name in pointers or p.do_not_specialize, p.name
"""
    done = run("-c", program)
    assert done.returncode == 0, done.stdout + done.stderr


# Of each operand of a product: whether it was rounded on its way there, and whether that was before the loop over time.
ROUNDED = r"""
import re, sys
from fused_rnn.cells import CELLS
from fused_rnn.triton.aot import compile_kernel
from fused_rnn.triton.schedule import Schedule, Tile

def rounded(made, operand):
    while operand in made:
        line, name, text = made[operand]
        if "cvt.rna.tf32" in text:
            return line
        operand = re.search(r"%\w+", text)[0]

for loop, team, how in (("solo", 1, {"registers": True}), ("cooperative", 2, {"hold": True}), ("cooperative", 2, {})):
    schedule = Schedule(loop, Tile(16, 32 // team, 32, 4, 1 if how else 2), team, **how)
    for backward in (False, True):
        kernel = compile_kernel(CELLS["gru"], "float32", "tf32", 32, schedule, "sm_90", backward, ("reset",))
        lines = kernel.asm["ttgir"].splitlines()
        made = {m[1]: (i, *m.groups()) for i, m in enumerate(re.match(r"\s*(%\w+) = (.*)", x) for x in lines) if m}
        begins = next(i for i, line in enumerate(lines) if "scf.for" in line)
        products = [re.search(r"tt.dot (%\w+), (%\w+)", line) for line in lines]
        for operands in filter(None, products):
            left, right = (rounded(made, name) for name in operands.groups())
            assert left > begins, operands[0]
            assert (right < begins) if how else (right > begins), operands[0]
        assert any(products)
"""


def test_tf32_operands_are_rounded() -> None:
    """To nearest, a resident W_hh once: tensor cores would cut the low bits off."""
    done = run("-c", ROUNDED)
    assert done.returncode == 0, done.stdout + done.stderr


# What joins the chunks of time of a linear cell: the cubin command compiles what runs before and after it.
JOIN = """
import triton
from triton.compiler import ASTSource
from fused_rnn.triton import aot
from fused_rnn.triton.scan import join_kernel

each = ("*fp32",) * 2
signature = {"sums": each, "products": each, "initial": each, "size": "i32", "chunks": "i32"}
for arch in ("sm_90", "gfx942"):
    for backward in (False, True):
        constants = {"FORGETS": (True, False), "BACKWARD": backward, "BLOCK": 512}
        kinds = signature | dict.fromkeys(constants, "constexpr")
        source = ASTSource(fn=join_kernel, signature=kinds, constexprs=constants)
        made = aot.report(triton.compile(source, target=aot.target(arch)), arch, False)
        assert made.spills == 0, made
"""


def test_chunks_of_time_compile() -> None:
    chosen = ("--arch", "sm_90", "gfx942", "--cell", "linear_cells:sru", "--kind", "half", "--hidden", "40")
    done = run("-m", "fused_rnn.triton.cubin", "--jobs", "1", *chosen)
    assert done.returncode == 0 and "0 with a fault" in done.stdout, done.stdout + done.stderr
    lines = [line for line in done.stdout.splitlines() if " sru " in line]
    for way in ("scan", "chunked"):
        kernels = {(line.split()[0], line.split()[1]) for line in lines if f" {way}+lengths+reset" in line}
        assert kernels == {(arch, loop) for arch in ("sm_90", "gfx942") for loop in ("fwd", "bwd")}
    done = run("-c", JOIN)
    assert done.returncode == 0, done.stdout + done.stderr
