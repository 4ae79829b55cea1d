"""Cells that are programs by the Triton loops: every operation, every loop, the built-in cells as programs."""

from __future__ import annotations

import itertools
import os
import struct
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import program_cases
import pytest
import torch
from program_cases import ProgramCase, Results, by_loop, by_reference, call_of
from programs import GRU, LEAKY, LSTM, PROGRAMS
from tolerances import assert_as_good_as_torch
from torch import Tensor
from triton_cases import DEVICE, LOOPS, MARKS, planted, quicker_interpreter

pytest.importorskip("triton", reason="Triton is not installed")

import triton
import triton.language as tl

from fused_rnn.backends import triton as backend
from fused_rnn.call import BackwardCall, LayerCall
from fused_rnn.cells import CELLS
from fused_rnn.cells.program import ARITY, BINARY, PREFIX, TERNARY, UNARY, Instruction, parse
from fused_rnn.problem import Problem
from fused_rnn.triton import cells, launch, planner, printer
from fused_rnn.triton.compile import fewest_spills
from fused_rnn.triton.schedule import Schedule, Tile, shape_of
from fused_rnn.triton.target import ARCHITECTURES

pytestmark = MARKS


@pytest.fixture(autouse=True)
def _quick() -> None:
    quicker_interpreter()


def on_device(call: LayerCall) -> LayerCall:
    masks = [None if t is None else t.to(DEVICE) for t in (call.lengths, call.reset)]
    return program_cases.mapped(call, lambda t: t.to(DEVICE))._replace(lengths=masks[0], reset=masks[1])


def check(case: ProgramCase, **schedule: Any) -> None:
    """On a GPU over three draws: in one of them the loop's own roundings may cancel by luck."""
    found: list[list[Results]] = []
    for seed in range(3 if DEVICE == "cuda" else 1):
        call = on_device(call_of(case, seed))
        with planner.override(**schedule):
            ours = program_cases.by_backend(call, backend)
        found.append([ours, by_loop(call), by_reference(call)])
    assert_as_good_as_torch(*(
        {name: torch.stack([results[name] for results in each]) for name in each[0]}
        for each in zip(*found, strict=True)
    ))  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("cell", PROGRAMS)
def test_every_cell(cell: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fused_rnn.call.CHECKPOINT_EVERY", 2)
    # A chain's states grow until their sums cancel: over five steps half an ulp of the inputs is 15 ulp of a result.
    more: dict[str, Any] = {"T": 3 if cell == "chain" else 5, "dtype": dtype}
    masked: dict[str, Any] = {"bidirectional": True, "lengths": True, "reset": True, "sequences": True}
    check(ProgramCase(cell, **masked, **more))
    check(ProgramCase(cell, H=40, save="recompute", **masked, **more))
    check(ProgramCase(cell, B=17, H=3, bias=False, hx=False, **more))


@pytest.mark.parametrize("save", ["gates", "recompute"])
@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("cell", ["lstm", "leaky"])
def test_every_loop(cell: str, loop: str, save: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fused_rnn.call.CHECKPOINT_EVERY", 2)
    check(ProgramCase(cell, lengths=True, reset=True, sequences=True, save=save, bidirectional=True), **LOOPS[loop])


# h' = tanh(x + r) / p, a NaN of the zeros that stand for units beyond H.
DIVIDED = (
    PREFIX + "divided|1 0 1|h|p|tanh 0,div 3 2>4;3|div 4 3,tanh_backward 5 0,const 0.0,mul 4 2,div 8 3,neg 9>6;7;10"
)


@pytest.mark.parametrize("loop", LOOPS)
def test_what_a_formula_makes_beyond_h_stays_there(loop: str) -> None:
    call = on_device(call_of(ProgramCase(DIVIDED)))
    call = call._replace(weights=[*call.weights[:-1], call.weights[-1].abs() + 1])
    with planner.override(**LOOPS[loop]):
        ours = program_cases.by_backend(call, backend)
    assert_as_good_as_torch(ours, by_loop(call), by_reference(call))


@pytest.mark.parametrize(("name", "program"), [("lstm", LSTM), ("gru", GRU)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_built_in_cells_as_programs(name: str, program: str, dtype: torch.dtype) -> None:
    """The same numbers as by the kernels that were written by hand, but for the order of a formula's factors."""
    call = on_device(call_of(ProgramCase(name, bidirectional=True, lengths=True, reset=True, dtype=dtype)))
    assert call.cell == program
    ours, theirs = (program_cases.by_backend(call._replace(cell=cell), backend) for cell in (program, name))
    assert ours.keys() == theirs.keys()
    for key, value in ours.items():
        torch.testing.assert_close(value, theirs[key], msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.parametrize("sequences", [False, True])
def test_forward_alone(sequences: bool) -> None:
    call = on_device(call_of(ProgramCase("sru", lengths=True, sequences=sequences, save="none")))
    kept = backend.forward(call._replace(save="gates"))
    for one, other in zip(backend.forward(call), kept, strict=False):
        assert torch.equal(one, other)


def test_what_is_not_asked_for() -> None:
    """Without the gradients of the weights dx is the same."""
    call = on_device(call_of(ProgramCase("leaky")))
    y, h_n, saved, _ = backend.forward(call)
    back = BackwardCall(y, (h_n,), *call[:5], y, saved, (), *call[5:8], True, True)
    every, few = backend.backward(back), backend.backward(back._replace(need_dw=False))
    assert len(every) == len(few) + len(call.weights)
    for one, other in zip(few, every, strict=False):
        assert torch.equal(one, other)


# h' = tanh(x + r) + p, whose p has a gradient wherever h has.
SHIFTED = PREFIX + "shifted|1 0 1|h|p|tanh 0,add 3 2>4;3|tanh_backward 4 0,const 0.0>5;6;4"
MASKED: dict[str, Any] = {"lengths": True, "reset": True, "bidirectional": True, "sequences": True}
# file, text in it, what to write instead, case, as in test_mutations.py
MUTATIONS: dict[str, tuple[str, str, str, ProgramCase]] = {
    "a sequence past its end": (
        "forward",
        "ended = where_each(valid, s, zero) if HAS_LENGTHS else s",
        "ended = s",
        ProgramCase("sru", **MASKED),
    ),
    "a sequence's gradient past its end": (
        "backward",
        "load_each(dsequences, t * width + at, here)",
        "load_each(dsequences, t * width + at, own)",
        ProgramCase("lstm", **MASKED),
    ),
    "a param's gradient past the end": (
        "backward",
        "dp = add_of_rows(dp, valid, d_params)",
        "dp = add_of_rows(dp, in_b, d_params)",
        ProgramCase(SHIFTED, **MASKED),
    ),
    "a param's gradient in the rows of another recurrence": (
        "backward",
        "dp = load_gates(dparams, row_rb, n, own, DP, H)\n    if REGISTERS",
        "dp = load_gates(dparams, row, n, own, DP, H)\n    if REGISTERS",
        ProgramCase("leaky", save="recompute", **MASKED),
    ),
    "another recurrence's params": (
        "forward",
        "p = load_vectors(vectors, r, n, NP, H)\n    if AHEAD",
        "p = load_vectors(vectors, r * 0, n, NP, H)\n    if AHEAD",
        ProgramCase("indrnn", **MASKED),
    ),
}


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("mutation", MUTATIONS)
def test_mistake_is_caught(mutation: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("fused_rnn.call.CHECKPOINT_EVERY", 2)
    name, old, new, case = MUTATIONS[mutation]
    check(case)
    kernel = {"forward": "fwd_kernel", "backward": "bwd_kernel"}[name]
    monkeypatch.setattr(launch, kernel, getattr(planted(name, old, new, tmp_path), kernel))
    with pytest.raises(AssertionError, match="error"):
        check(case)


# --- operations

NUMBERS = [0.0, -0.0, 1.0, -1.0, 0.5, -0.5, 1e-6, -1e-6, 2e-3, -0.37, 3.7, -7.25, 12.0, 30.0, -30.0, 100.0, -100.0]
NUMBERS += [float("inf"), float("-inf"), float("nan")]


@triton.jit
def run_cell(x, out, CELL: tl.constexpr, ARGS: tl.constexpr, N: tl.constexpr):
    """out[N] = the first state after a step with inputs x[ARGS, N]."""
    n = tl.arange(0, N)[None, :]
    inputs = ()
    for k in tl.static_range(ARGS):
        inputs = inputs + (tl.load(x + k * N + n),)  # noqa: RUF005
    zero = tl.full(n.shape, 0.0, tl.float32)
    after, _ = CELL(inputs, (), (), (zero,), (), "float32")
    tl.store(out + n, after[0])


def step_of(code: str, result: int, gates: int) -> str:
    """A cell without W_hh, whose h is a value of this code over its gates."""
    return f"{PREFIX}op|{gates} 0 0|h||{code}>{result};|const 0.0>{' '.join(['3'] * gates)};3;"


def by_kernel(text: str, x: Tensor) -> Tensor:
    count = 1 << (x.shape[1] - 1).bit_length()
    padded = torch.zeros(x.shape[0], count, device=DEVICE)
    padded[:, : x.shape[1]] = x
    out = torch.empty(count, device=DEVICE)
    run_cell[(1,)](padded, out, CELL=cells.kernels(text).fwd, ARGS=x.shape[0], N=count)
    return out[: x.shape[1]]


def assert_float32(ours: Tensor, exact: Tensor, name: str, growth: Tensor) -> None:
    """Equal where not finite; elsewhere 4 ulp, times `growth`, of the value or of the smallest normal number."""
    assert torch.equal(ours.isnan(), exact.isnan()), name
    finite = exact.float().isfinite() & ~exact.isnan()
    assert torch.equal(ours[~finite & ~exact.isnan()], exact[~finite & ~exact.isnan()].float()), name
    error = (ours.double() - exact)[finite].abs()
    single = torch.finfo(torch.float32)
    allowed = 4 * single.eps * growth[finite] * exact[finite].abs() + single.tiny
    worst = (error - allowed).argmax()
    assert bool((error <= allowed).all()), f"{name}: {ours[finite][worst]} for {exact[finite][worst]}"


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of the interpreter
@pytest.mark.parametrize("op", [*UNARY, *BINARY, *TERNARY])
def test_every_operation(op: str) -> None:
    arity = ARITY[op]
    rows = list(itertools.product(NUMBERS, repeat=min(arity, 2)))
    if arity == 3:
        rows = [(a, b, c) for (a, b), c in zip(rows, itertools.cycle(NUMBERS[1:-1]))]
    x = torch.tensor(rows, dtype=torch.float32).t().contiguous()
    text = step_of(f"{op} {' '.join(map(str, range(arity)))}", arity + 1, arity)
    function: Callable[..., Tensor] = {**UNARY, **BINARY, **TERNARY}[op]
    exact = function(*x.double())
    if op in ("sin", "cos", "erf", "fma"):  # whose result is small beside what it is made of
        ours, theirs = by_kernel(text, x.to(DEVICE)).cpu(), exact
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-6, atol=1e-6, equal_nan=True)
    else:
        # On a GPU Triton's exp is a power of two whose exponent is rounded: by an ulp of x / ln 2.
        by_power = DEVICE == "cuda" and op in ("exp", "expm1", "softplus", "sigmoid")
        growth = 1 + x[0].abs().nan_to_num(posinf=0) if by_power else torch.ones(x.shape[1])
        assert_float32(by_kernel(text, x.to(DEVICE)).cpu(), exact, op, growth)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_constants_are_exact() -> None:
    for value in (0.1, -2.5e-39, 1.0 / 3.0, 3.4e38, float("inf"), float("-inf"), -0.0):
        single = struct.unpack("f", struct.pack("f", value))[0]
        for code, result in ((f"const {value!r},add 2 0", 3), (f"const {value!r}", 2)):
            ours = by_kernel(step_of(code, result, 1), torch.zeros(1, 4, device=DEVICE))
            assert ours.tolist() == [single] * 4
    for code in ("const nan,mul 0 2", "const nan,maximum 2 0", "const nan,minimum 0 2"):
        assert bool(by_kernel(step_of(code, 3, 1), torch.zeros(1, 4, device=DEVICE)).isnan().all())


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_powers_by_a_constant() -> None:
    x = torch.tensor([[0.5, 2.0, 1.0, -3.0, 0.0]])
    for value in ("2.0", "3.0", "inf", "-inf", "nan", "1e60"):
        ours = by_kernel(step_of(f"const {value},pow 0 2", 3, 1), x.to(DEVICE)).cpu()
        torch.testing.assert_close(ours, (x[0].double() ** float(value)).float(), equal_nan=True)


def test_truths_and_constants_meet() -> None:
    """Comparisons as numbers, conditions that are numbers, constants in every place."""
    code = "const 1.0,gt 0 3,const 2.0,where 4 5 1,and 4 1,add 6 7,ne 8 3,where 9 3 8,where 1 4 9,sub 10 11,lt 3 5"
    code += ",mul 13 12"
    program = step_of(code, 14, 2)
    x = torch.tensor([[2.0, 0.5, -1.0, 1.0], [0.0, 3.0, -2.0, 0.0]])
    exact = parse(program).forward.run([*x, torch.zeros(4)])[0][0]
    torch.testing.assert_close(by_kernel(program, x.to(DEVICE)).cpu(), exact)


# --- modules on disk


def test_a_module_is_written_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FUSED_RNN_CACHE_DIR", str(tmp_path))
    text = printer.source(parse(LSTM))
    path = printer.written(text)
    assert path.parent == tmp_path / "triton" and path.read_text() == text
    before = path.stat()
    assert printer.written(text) == path
    assert path.stat().st_mtime_ns == before.st_mtime_ns
    path.write_text("half a file")
    assert printer.written(text).read_text() == text
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_a_failed_write_leaves_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FUSED_RNN_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr("fused_rnn.gpu.files.os.replace", refuse)
    with pytest.raises(PermissionError):
        printer.written(printer.source(parse(LEAKY)))
    assert [*(tmp_path / "triton").iterdir()] == []


def refuse(*_: object) -> None:
    raise PermissionError


def test_a_title_of_any_script(tmp_path: Path) -> None:
    """Where Python's own encoding is ASCII."""
    text = LSTM.replace("1|lstm|", "1|\xe9cran|")
    code = f"from fused_rnn.triton import printer; print(ascii(printer.module({text!a}).TITLE))"
    own = {"FUSED_RNN_CACHE_DIR": str(tmp_path), "LC_ALL": "POSIX", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    for _ in range(2):  # written, then found
        done = subprocess.run(
            [sys.executable, "-c", code], env=os.environ | own, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout == "'\\xe9cran'\n"


def test_a_cache_that_takes_no_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FUSED_RNN_CACHE_DIR", str(tmp_path / "file"))
    text = printer.source(parse(GRU))
    assert printer.written(text).read_text() == text


def test_supports_programs_alone_of_what_is_unknown() -> None:
    problem = Problem(LSTM, torch.float32, DEVICE, False, 3, 4, 17, 17, 1, 1, True, True, False, "gates", False, False)
    assert backend.supports(problem) is None
    assert "not 'another'" in str(backend.supports(problem._replace(cell="another")))
    assert "forward: loop solo, team of 5, W_hh streamed" in backend.describe(
        problem._replace(cell=PROGRAMS["indrnn"], hidden_size=130)
    )


# --- schedules


def test_tiles_are_smaller_for_a_cell_with_more_values() -> None:
    """Of an LSTM as a program the same schedules as by hand; of one whose units hold twice as much fewer rows."""
    target = ARCHITECTURES["sm_90"]
    wide = parse(LSTM)
    more = tuple(Instruction("mul", (8, i % 8)) for i in range(24))  # all alive until the last
    total = [Instruction("add", (wide.backward.inputs + 14 + i, 8)) for i in range(24)]
    code = (*wide.backward.code, *more, *total)
    outputs = (*wide.backward.outputs[:2], ())
    heavy = wide._replace(title="heavy", backward=wide.backward._replace(code=code, outputs=outputs))
    for kind in ("half", "tf32", "ieee"):
        for hidden in (128, 512, 2048):
            by_hand, printed, larger = (
                planner.shipped(shape_of(CELLS[name], kind, hidden, True), target)
                for name in ("lstm", LSTM, heavy.text)
            )
            assert by_hand == printed
            streamed = [s.tile.batch for s in larger if not s.hold and not s.registers]
            assert all(rows == 16 for rows in streamed)
            assert any(s.tile.batch > 16 for s in by_hand) or by_hand[0].registers


@pytest.mark.parametrize(
    ("cell", "hold", "tried"),
    [
        # Up to 64 bytes are good enough with a resident W_hh.
        (LSTM, True, [(True, 128, 255), (True, 128, None), (False, 128, 255), (False, 128, None), (False, 64, 255)]),
        ("lstm", True, [(True, 128, 255), (True, 128, None)]),  # its tile was chosen by what it spills
        ("lstm", False, [(True, 128, 255), (True, 128, None)]),
        (LSTM, False, [(True, 128, 255), (True, 128, None)]),
    ],
    ids=["program", "built-in", "built-in streamed", "program streamed"],
)
def test_a_kernel_that_spills_is_compiled_lighter(cell: str, hold: bool, tried: list[tuple[bool, int, int]]) -> None:
    schedule = Schedule("cooperative", Tile(16, 32, 128, 8), 16, hold=hold)
    seen: list[tuple[Schedule, int | None]] = []

    def compiled(candidate: Schedule, bound: int | None) -> tuple[int, int]:
        seen.append((candidate, bound))
        return max(8, candidate.tile.depth - 60) if bound or hold else 0, len(seen)

    best = fewest_spills(CELLS[cell], schedule, "sm_90", compiled)
    assert [(candidate.tile.ahead, candidate.tile.depth, bound) for candidate, bound in seen] == tried
    assert best == (1 if cell == "lstm" and hold else len(tried))
    for candidate, _ in seen:
        assert candidate == replace(schedule, tile=candidate.tile)
        assert (candidate.tile.batch, candidate.tile.units) == (16, 32)
    seen.clear()
    fewest_spills(CELLS[cell], schedule, "sm_90", lambda candidate, bound: (32, seen.append((candidate, bound))))
    assert len(seen) == (1 if hold else 2 if cell == "lstm" else 4)  # what no tile changes is not tried for ever


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_a_cell_without_w_hh_needs_no_team(arch: str) -> None:
    shape = shape_of(CELLS[PROGRAMS["sru"]], "half", 512, True)
    for batch in (1, 64, 4096):
        schedule = planner.choose(shape, ARCHITECTURES[arch], batch, 2)
        assert schedule.loop == "solo" and schedule in planner.shipped(shape, ARCHITECTURES[arch])
        assert schedule.team * schedule.tile.units == 512
