"""Cells that are programs, by the CPU's loops: results, limits, and the same bits however the work is divided."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from program_calls import by_ops, by_reference, by_steps, make_call, run_changed
from programs import GRU, INDRNN, LEAKY, LSTM, PROGRAMS, program_of
from tolerances import assert_as_good_as_torch, assert_same_formula

from fused_rnn import ops
from fused_rnn.backends import cpu
from fused_rnn.cells import CELLS
from fused_rnn.cells.program import PREFIX
from fused_rnn.problem import Problem

pytestmark = pytest.mark.skipif(ops.MISSING is not None, reason=str(ops.MISSING))
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
BOTH = (1, -1)
VARIANTS: list[dict[str, Any]] = [
    {},
    {"directions": BOTH, "lengths": True, "reset": True, "T": 7, "B": 5, "save": "recompute"},
    {"T": 66, "B": 2, "H": 16, "bias": False, "hx": False, "reset": True, "save": "recompute"},
    {"T": 3, "B": 21, "D": 3, "H": 65, "lengths": True, "directions": (-1,)},
    {"T": 1, "B": 1, "H": 1},
]
LARGE = {"T": 12, "B": 33, "H": 130, "directions": BOTH}
# Every count at its limit, and products of more gates than a panel of weights has vectors.
COUNTS: dict[str, dict[str, Any]] = {
    "5 gates": {"gates": 5, "states": 2, "params": 1},
    "16 gates": {"gates": 16, "states": 12, "params": 16},
    "16 gates apart": {"gates": 16, "apart": 16, "states": 3, "params": 3},
    "3 of 6 apart": {"gates": 6, "apart": 3, "states": 2},
    "16 gates alone": {"gates": 16, "states": 4, "params": 5, "recurrent": False},
    "2 gates alone": {"gates": 2, "states": 2, "params": 2, "recurrent": False},
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("name", PROGRAMS)
def test_results_and_gradients(name: str, variant: dict[str, Any], dtype: torch.dtype) -> None:
    call = make_call(PROGRAMS[name], dtype=dtype, **variant)
    assert_as_good_as_torch(by_ops(call, ops.forward, ops.backward), by_steps(call), by_reference(call))


@pytest.mark.parametrize("variant", [VARIANTS[1], VARIANTS[3]], ids=str)
@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
def test_any_counts(counts: dict[str, Any], variant: dict[str, Any]) -> None:
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        call = make_call(program_of(**counts), dtype=dtype, **variant)
        assert_as_good_as_torch(by_ops(call, ops.forward, ops.backward), by_steps(call), by_reference(call))


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("variant", [*VARIANTS, LARGE], ids=str)
@pytest.mark.parametrize("name", ["lstm", "gru"])
def test_the_built_in_cell(name: str, variant: dict[str, Any], dtype: torch.dtype) -> None:
    """The same numbers, and the same saved values."""
    call = make_call(PROGRAMS[name], dtype=dtype, **variant)
    made, expected = (ops.forward(*call._replace(cell=cell)) for cell in (PROGRAMS[name], name))
    back, back_expected = (
        by_ops(call._replace(cell=cell), ops.forward, ops.backward) for cell in (PROGRAMS[name], name)
    )
    assert len(made) == len(expected)
    for a, b in [*zip(made, expected, strict=True), *zip(back.values(), back_expected.values(), strict=True)]:
        assert a.shape == b.shape
        if dtype == torch.float64:
            assert_same_formula(a, b)
        else:
            torch.testing.assert_close(a, b, rtol=1e-5, atol=2e-6 * max(1.0, float(b.abs().max()) if b.numel() else 0))


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_batch_of_none(name: str) -> None:
    results = by_ops(make_call(PROGRAMS[name], B=0), ops.forward, ops.backward)
    for key, value in results.items():
        assert value.numel() == 0 or (key.startswith("dweights") and not value.any())


@pytest.mark.parametrize("save", ["gates", "recompute"])
@pytest.mark.parametrize("name", PROGRAMS)
def test_same_bits_whoever_does_them(name: str, save: str) -> None:
    """Nothing but the sums of weights' gradients, which threads divide, knows how many there are; and none of a run's
    numbers depends on when."""
    call = make_call(PROGRAMS[name], T=12, B=33, H=130, directions=BOTH, lengths=True, reset=True, save=save)
    first = by_ops(call, ops.forward, ops.backward)
    for n in (2, 3, 2):
        torch.set_num_threads(n)
        again, once_more = by_ops(call, ops.forward, ops.backward), by_ops(call, ops.forward, ops.backward)
        for key, value in first.items():
            assert torch.equal(again[key], once_more[key])
            assert not value.isnan().any()
            if not key.startswith("d"):
                assert torch.equal(again[key], value), key


@pytest.mark.parametrize("options", [{}, {"reset": True}, {"lengths": True}, {"save": "recompute"}], ids=str)
def test_threads_that_need_not_wait(options: dict[str, Any]) -> None:
    """Without W_hh they meet where sequences end and at checkpoints; of few rows each has its units."""
    call = make_call(program_of(2, states=2, params=2, recurrent=False), T=140, B=5, D=24, H=600, **options)
    torch.set_num_threads(1)
    first = by_ops(call, ops.forward, ops.backward)
    for n in (2, 3, 2, 3):
        torch.set_num_threads(n)
        again = by_ops(call, ops.forward, ops.backward)
        for key, value in first.items():
            if key.startswith("dweights"):
                torch.testing.assert_close(again[key], value)
            else:
                assert torch.equal(again[key], value), key


def long_formula() -> str:
    """Operations of every kind on three gates, h and p, one after the other on; products in sums."""
    unary = ("sigmoid", "tanh", "exp", "neg", "softplus", "log1p", "sin", "cos", "erf", "expm1", "abs", "relu")
    code = [f"{op} {i % 5}" for i, op in enumerate(unary)]
    code += [
        f"{op} {5 + i} {6 + i}" for i, op in enumerate(("mul", "add", "sub", "minimum", "maximum", "sigmoid_backward"))
    ]
    total = 5
    for i in range(6, 5 + len(code)):
        product = 5 + len(code)
        code += [f"mul {i} {i % 5}", f"add {product} {total}", f"tanh {product + 1}"]
        total = product + 2
    return f"{PREFIX}long|3 0 0|h|p|{','.join(code)}>{total};|const 0.0>4;4;4"


def test_same_bits_however_many_go_together() -> None:
    """A row among others, whose vectors go through the operations in packs, and alone."""
    text = long_formula().replace("const 0.0>4;4;4", "const 0.0>4 4 4;4;4")
    call = make_call(text, T=24, B=37, H=130)._replace(save="none")  # of fewer rows W_ih is not packed
    whole = ops.forward(*call)
    for b in (0, 5, 36):
        alone = call._replace(x=call.x[:, b : b + 1].contiguous(), states=[s[:, b : b + 1] for s in call.states])
        made = ops.forward(*alone)[0]
        assert made.isfinite().any()
        torch.testing.assert_close(made, whole[0][:, b : b + 1], rtol=0, atol=0, equal_nan=True)


def test_memory_that_is_not_aligned() -> None:
    for text in (LSTM, LEAKY):
        call = make_call(text, H=33)

        def moved(t: torch.Tensor) -> torch.Tensor:
            return torch.empty(t.numel() + 1, dtype=t.dtype)[1:].view(t.shape).copy_(t)

        other = call._replace(
            x=moved(call.x), weights=[moved(w) for w in call.weights], states=[moved(s) for s in call.states]
        )
        one, two = (by_ops(c, ops.forward, ops.backward) for c in (call, other))
        assert all(torch.equal(two[key], value) for key, value in one.items())


def test_a_step_and_a_stream_are_the_sequence() -> None:
    for text in PROGRAMS.values():
        call = make_call(text, T=6)._replace(save="none", sequences=False)
        y, *after = ops.forward(*call)
        states = [s[0] for s in call.states]
        for t in range(6):
            states = ops.step(call.x[t], call.weights, states, text)
            torch.testing.assert_close(states[0], y[t])
        for a, b in zip(states, after, strict=True):
            torch.testing.assert_close(a, b[0])


def problem(text: str) -> Problem:
    return Problem(text, torch.float32, "cpu", False, 3, 4, 5, 5, 1, 1, True, True, False, "gates", False, False)


REFUSED = {
    program_of(17): "it has 17 gates, expected 1 to 16",
    program_of(2, params=17): "it has 17 params, expected 0 to 16",
    PREFIX
    + f"x|1 0 1|{'a ' * 13}||tanh 0>{'14 ' * 13};|const 0.0>39;{'39 ' * 13};": "it has 13 states, expected 1 to 12",
    PREFIX + f"x|1 0 1|h||tanh 0>2;{'2 ' * 49}|const 0.0>52;52;": "it keeps 49 values of a step, expected at most 48",
    INDRNN.replace("1 0 0", "1 1 0"): "it has gates apart, but no recurrent side",
    INDRNN.replace("relu 3", "relu 4"): "it reads value 4 of 4",
    INDRNN.replace("relu 3", "relu -1"): "it reads value -1 of 4",
    INDRNN.replace("relu 3", "prelu 3"): "there is no operation 'prelu'",
    INDRNN.replace("relu 3", "relu 3 3"): "another number of arguments",
    INDRNN.replace("relu 3", "relu x"): "'x' is no number",
    INDRNN.replace("relu 3", "relu 99999999999999"): "'99999999999999' is no number",
    INDRNN.replace(">4;5;6", ">4;5"): "a graph has 2 groups of outputs",
    INDRNN.replace(">4;5;6", ">4 4;5;6"): "its backward has another number of gradients",
    INDRNN.replace("|h|", "|h c|"): "another number of states",
    INDRNN + "|": "its text has 7 parts, expected 6",
    PREFIX + "x": "its text has 1 parts, expected 6",
    INDRNN.replace("relu 3>", "relu 3" + ",relu 4" * 1100 + ">"): "it has more than 1024 operations",
}


@pytest.mark.parametrize(("text", "reason"), REFUSED.items(), ids=REFUSED.values())
def test_what_is_refused(text: str, reason: str) -> None:
    assert reason in ops._C.refusal(text)
    given = make_call(GRU)
    with pytest.raises(RuntimeError, match="which the loops cannot run") as error:
        ops.forward(*given._replace(cell=text))
    assert reason in str(error.value)
    assert reason in str(cpu.supports(problem(text)))


@pytest.mark.parametrize("title", ["short", "\xe9" * 70, "x" + "\xe9" * 70], ids=ascii)
def test_what_an_error_shows_of_a_cell(title: str) -> None:
    """Its title, as far as 80 bytes go, and no part of a character."""
    call = make_call(INDRNN.replace("1|indrnn|", f"1|{title}|"))
    with pytest.raises(RuntimeError) as error:
        ops.forward(*call._replace(states=[*call.states] * 2))
    shown = title.encode()[:80].decode(errors="ignore")
    assert f"got 2 states, expected none or the 1 of a {shown}" in str(error.value)
    assert shown + "\xe9" not in str(error.value)
    with pytest.raises(RuntimeError, match=f"cell is '{shown}', which the loops cannot run"):
        ops.forward(*call._replace(cell=call.cell.replace("relu 3>", "relux 3>")))


def test_what_is_not() -> None:
    for text in (*PROGRAMS.values(), program_of(16, 16, 12, 16)):
        assert ops._C.refusal(text) is None
        assert cpu.supports(problem(text)) is None


def test_any_text_is_a_program_or_an_error() -> None:
    """What has been changed at random runs, or is refused: nothing is read or written out of place."""
    assert run_changed((LSTM, GRU, LEAKY, INDRNN), 300, "0123456789 ,>;|.-ehcx") > 100


def test_both_languages_read_the_same_of_a_program() -> None:
    for text in (*PROGRAMS.values(), *(program_of(**counts) for counts in COUNTS.values())):
        call = make_call(text, T=2)
        outputs = ops.forward(*call)
        assert outputs[2 * len(call.spec.states)].shape == (2, 3, 1, CELLS[text].saved, 17)
