"""Programs of several stages by the CPU's loops: sums and variances over units, matrices of a cell's own, masks."""

from __future__ import annotations

from typing import Any, Literal

import pytest
import torch
from program_calls import (
    assert_same_by_any_threads,
    by_ops,
    by_reference,
    by_steps,
    gradients_of,
    make_call,
    run_changed,
)
from stage_cells import MASKED, STAGED
from tolerances import assert_as_good_as_torch

import fused_rnn
from fused_rnn import ops
from fused_rnn.cells import CELLS
from fused_rnn.cells.program import PREFIX
from fused_rnn.gpu.narrow import narrowed, widened
from fused_rnn.nn.field.block_gru import block_gru

pytestmark = pytest.mark.skipif(ops.MISSING is not None, reason=str(ops.MISSING))
PROGRAMS = {name: cell.program.text for name, cell in STAGED.items()} | MASKED


@fused_rnn.cell(gates=3)
def taken_apart(x: Any, r: Any, s: Any, p: Any) -> Any:
    """Sums of products, of squares of differences, of what has an array anyway, and of several of these."""
    a, b, c = (u + v for u, v in zip(x, r, strict=True))
    d, e = torch.tanh(a), a * b
    n = ((a - b).square() + (c - 0.5 * d).square() + d * b + e + c).mean(-1, keepdim=True)
    m = (d * d + (d - e) * c + s.h).mean(-1, keepdim=True)
    far = ((s.h - d).square() + e).sum(-1, keepdim=True) * 0.01
    return torch.tanh(n * d + m * e + 0.1 * far * c + 0.2 * (0.5 * d) * s.h)


PROGRAMS |= {cell.name: cell.program.text for cell in (taken_apart, block_gru)}
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
BOTH = (1, -1)
VARIANTS: list[dict[str, Any]] = [
    {},
    {"directions": BOTH, "lengths": True, "reset": True, "T": 7, "B": 5, "save": "recompute"},
    {"T": 66, "B": 2, "H": 16, "bias": False, "hx": False, "reset": True, "save": "recompute"},
    {"T": 3, "B": 21, "D": 3, "H": 65, "lengths": True, "directions": (-1,)},
    {"T": 4, "B": 1, "H": 64},
    {"T": 3, "B": 33, "H": 3, "lengths": True},
]
LARGE = {"T": 6, "B": 33, "H": 130, "directions": BOTH, "lengths": True, "reset": True}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("name", PROGRAMS)
def test_results_and_gradients(name: str, variant: dict[str, Any], dtype: torch.dtype) -> None:
    call = make_call(PROGRAMS[name], dtype=dtype, **variant)
    assert_as_good_as_torch(by_ops(call, ops.forward, ops.backward), by_steps(call), by_reference(call))


@pytest.mark.parametrize("variant", [LARGE, {"T": 2, "B": 1, "H": 1}], ids=str)
@pytest.mark.parametrize("name", PROGRAMS)
def test_other_sizes(name: str, variant: dict[str, Any]) -> None:
    call = make_call(PROGRAMS[name], dtype=torch.float64, **variant)
    assert_as_good_as_torch(by_ops(call, ops.forward, ops.backward), by_steps(call), by_reference(call))


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_batch_of_none(name: str) -> None:
    results = by_ops(make_call(PROGRAMS[name], B=0), ops.forward, ops.backward)
    for key, value in results.items():
        assert value.numel() == 0 or (key.startswith("dweights") and not value.any())


@pytest.mark.parametrize("shape", [(33, 130), (5, 130), (33, 17), (1, 300)], ids=str)
@pytest.mark.parametrize("save", ["gates", "recompute"])
@pytest.mark.parametrize("name", PROGRAMS)
def test_same_bits_whoever_does_them(name: str, save: str, shape: tuple[int, int]) -> None:
    """By rows, by units and alone: a row's sums have one order. Of the gradients that are products over all steps each
    number of threads has its own, which is the same from run to run."""
    call = make_call(PROGRAMS[name], T=66, B=shape[0], H=shape[1], directions=BOTH, lengths=True, reset=True, save=save)
    assert_same_by_any_threads(call)


@pytest.mark.parametrize("lanes", [4, 8, 16])
@pytest.mark.parametrize("name", ["reset_before", "deep", "masked_product"])
def test_threads_of_which_one_has_more_rows(name: str, lanes: int) -> None:
    """14 of 40 rows, more than the 13 vectors of its units; the other two have as many."""
    call = make_call(PROGRAMS[name], T=20, B=40, H=13 * lanes, directions=BOTH)
    assert_same_by_any_threads(call)


@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
@pytest.mark.parametrize("name", PROGRAMS)
def test_threads_that_divide_the_units(name: str, dtype: torch.dtype) -> None:
    """One recurrence of few rows."""
    torch.set_num_threads(2)
    call = make_call(PROGRAMS[name], T=9, B=5, D=65, H=200, lengths=True, reset=True, dtype=dtype)
    assert_as_good_as_torch(by_ops(call, ops.forward, ops.backward), by_steps(call), by_reference(call))


def memory_of_nan() -> None:
    """Fills what the loops and the allocator have given back, to be found where nothing is written."""
    for size in (1 << 12, 1 << 16, 1 << 20):
        kept = [torch.full((size,), float("nan")) for _ in range(8)]
        del kept
    call = make_call(PROGRAMS["deep"], T=70, B=5, H=130)
    call = call._replace(x=torch.full_like(call.x, float("nan")), states=[s * float("nan") for s in call.states])
    by_ops(call, ops.forward, ops.backward)


@pytest.mark.parametrize("variant", [*VARIANTS, LARGE], ids=str)
@pytest.mark.parametrize("name", PROGRAMS)
def test_what_lay_there_before_does_not_matter(name: str, variant: dict[str, Any]) -> None:
    call = make_call(PROGRAMS[name], **variant)
    first = by_ops(call, ops.forward, ops.backward)
    memory_of_nan()
    for key, value in by_ops(call, ops.forward, ops.backward).items():
        assert torch.equal(value, first[key]), key


@pytest.mark.parametrize("H", [2, 3, 17, 33])
def test_lanes_past_the_last_unit(H: int) -> None:
    """There every value is 0, of which these make infinity and NaN: no sum, variance or product counts them."""

    @fused_rnn.cell(gates=1, states=("h", "c"), matrices={"u": (1, "H")})
    def poles(x: Any, r: Any, s: Any, p: Any, m: Any) -> Any:
        a = 1 / (x[0] + 2) ** 2 + torch.rsqrt(x[0] + 2) * 0.1
        c = torch.log(s.c) / s.c + a.mean(-1, keepdim=True)
        h = torch.tanh(m.u(a / (x[0] + 2)) + a.var(-1, correction=0, keepdim=True) + 0.1 * r[0])
        return h, torch.exp(0.1 * c - 0.1 * c.mean(-1, keepdim=True))

    call = make_call(poles.program.text, T=4, B=3, H=H, dtype=torch.float64, bias=False)
    weights = [call.weights[0].abs() + 0.1, *call.weights[1:]]
    call = call._replace(x=call.x.abs() - 2 / weights[0].sum(1).max() * 0, weights=weights)
    call = call._replace(states=[call.states[0], call.states[1].abs() + 1])
    made = by_ops(call, ops.forward, ops.backward)
    assert all(value.isfinite().all() for value in made.values())
    assert_as_good_as_torch(made, by_steps(call), by_reference(call))


def test_a_row_that_is_not_finite_keeps_to_itself() -> None:
    for name, text in PROGRAMS.items():
        call = make_call(text, T=5, B=18, H=65)
        x = call.x.clone()
        x[1, 3] = float("inf")
        first, other = by_ops(call, ops.forward, ops.backward), by_ops(call._replace(x=x), ops.forward, ops.backward)
        rows = [b for b in range(18) if b != 3]
        assert torch.equal(first["y"][:, rows], other["y"][:, rows]), name
        assert torch.equal(first["dx"][:, rows], other["dx"][:, rows]), name


@pytest.mark.parametrize("narrow", [None, "bf16", "int8"], ids=str)
@pytest.mark.parametrize("name", STAGED)
def test_a_stream_is_the_sequence(name: str, narrow: Literal["bf16", "int8"] | None) -> None:
    """With narrow weights that of the matrices that they stand for."""
    rnn = fused_rnn.FlexRNN(STAGED[name], 5, 34, num_layers=2)
    for parameter in rnn.parameters():
        torch.nn.init.uniform_(parameter, -0.5, 0.5)
    x, stream = torch.randn(6, 3, 5), rnn.stream(3, weights=narrow)
    with torch.no_grad():
        for parameter in rnn.parameters():
            if narrow and parameter.dim() == 2:
                parameter.copy_(widened(*narrowed(parameter, narrow), parameter.dtype))
        expected, _ = rnn(x)
    made = torch.stack([stream.step(x[t]).clone() for t in range(6)])
    if narrow is None:
        assert torch.equal(made, expected)
    else:
        torch.testing.assert_close(made, expected, rtol=1e-4, atol=1e-4)


def test_a_stream_has_no_masks() -> None:
    for text in MASKED.values():
        states = len(CELLS[text].states)
        with pytest.raises(ValueError, match="it has masks, which a stream has no numbers for"):
            ops._C.Stream(text, 0, 0, 1, 4, 5, 5, 1, False, [0] * states)


@pytest.mark.parametrize("name", STAGED)
def test_past_the_dispatcher(name: str) -> None:
    """The fast path, and the op, are the same layer, and single steps make the sequence."""
    rnn = fused_rnn.FlexRNN(STAGED[name], 5, 34)
    x = torch.randn(6, 3, 5)
    with torch.no_grad():
        fast, after = rnn(x)
    slow, expected = rnn(x)
    assert torch.equal(fast, slow.detach())
    states = after if isinstance(after, tuple) else (after,)
    others = expected if isinstance(expected, tuple) else (expected,)
    assert all(torch.equal(a, b.detach()) for a, b in zip(states, others, strict=True))
    call = make_call(PROGRAMS[name], T=6)._replace(save="none", sequences=False)
    y, *_ = ops.forward(*call)
    own = [s[0] for s in call.states]
    for t in range(6):
        own = ops.step(call.x[t], call.weights, own, PROGRAMS[name])
        torch.testing.assert_close(own[0], y[t])


def test_weights_that_are_wrong() -> None:
    call = make_call(PROGRAMS["masked_product"], T=4, B=3, H=5)
    kinds = call.kinds
    matrix = 4
    wrong = {
        matrix: (torch.zeros(10, 5), "a matrix has shape [10, 5], expected [5, 5]"),
        matrix + 1: (torch.zeros(4), "a param has shape [4], expected [5]"),
        matrix + 2: (torch.zeros(1, 3, 4), "a mask has shape [1, 3, 4], expected [1, 3, 5]"),
        matrix + 3: (torch.zeros(2, 3, 5), "a mask has shape [2, 3, 5], expected [4, 3, 5]"),
        matrix + 4: (torch.zeros(1, 3, 5, dtype=torch.float64), "a mask differs from x in dtype"),
    }
    assert [kinds.is_mask(k) for k in range(len(call.weights))] == [False] * 6 + [True] * 3
    for k, (tensor, reason) in wrong.items():
        weights = [*call.weights[:k], tensor, *call.weights[k + 1 :]]
        with pytest.raises(RuntimeError) as error:
            ops.forward(*call._replace(weights=weights))
        assert reason in str(error.value)


def test_masks_get_no_gradient() -> None:
    for text in MASKED.values():
        call = make_call(text, T=3, H=4)._replace(save="gates")
        outputs = ops.forward(*call)
        n = len(call.spec.states)
        dy, dstates, dsequences = gradients_of(call)
        kept = (outputs[0], outputs[2 * n], outputs[n + 1 : 2 * n], text, (1,), "gates", True, True)
        gradients = ops.backward(dy, dstates, *call[:5], *kept, dsequences)[1 + n :]
        for k, (weight, gradient) in enumerate(zip(call.weights, gradients, strict=True)):
            assert gradient.shape == ((0,) if call.kinds.is_mask(k) else weight.shape)


def text_of(counts: str, vectors: str, forward: str, backward: str) -> str:
    return f"{PREFIX}x|{counts}|h|{vectors}|{forward}|{backward}"


NOTHING = "const 0.0>4;4;;4"
REFUSED = {
    text_of(
        "1 0 1", "", "sum 0,sum 2,mul 2 3>4;", "const 0.0>3;3;"
    ): "'sum 2' reads what is published together with it",
    text_of("1 0 1", "", "sum 0 1>2;", "const 0.0>3;3;"): "another number of arguments",
    text_of("1 0 1", "", "units 0>2;", "const 0.0>3;3;"): "another number of arguments",
    text_of("1 0 1", "", "variance 2>2;", "const 0.0>3;3;"): "it reads value 2 of 2",
    text_of("1 0 1", "", "product 0 1>2;", "const 0.0>3;3;"): "takes block 0 of 0",
    text_of("1 0 1 0 1", ";u;", "product 1 0>2;0", NOTHING): "takes block 1 of 1",
    text_of("1 0 1 0 1", ";u;", "product -1 0>2;0", NOTHING): "takes block -1 of 1",
    text_of("1 0 1 0 1", ";u;", "product 0.5 0>2;0", NOTHING): "'0.5' is no number",
    text_of("1 0 1 0 1", ";u;", "product 0>2;0", NOTHING): "another number of arguments",
    text_of("1 0 1 0 1", ";u;", "transposed 0 0>2;0", NOTHING): "there is no operation 'transposed'",
    text_of("1 0 1 0 1", ";u;", "product 0 0>2;0", "product 0 0>4;4;;4"): "there is no operation 'product'",
    text_of("1 0 1 0 1", ";u;", "product 0 0>2;1", NOTHING): "value 0 that it keeps is not what its matrix multiplies",
    text_of("1 0 1 0 1", ";u;", "product 0 0>2;", "const 0.0>3;3;;3"): "it keeps fewer values than it has matrices",
    text_of("1 0 1 0 1", ";u;", "product 0 0,product 0 1>2;0", NOTHING): "it takes block 0 twice",
    text_of(
        "1 0 1 0 1", ";u;", "sum 0,const 1.0,product 0 2>4;2", NOTHING
    ): "reads one number a row, expected a vector",
    text_of("1 0 1 0 1", ";u;", "product 0 0>2;0", "const 0.0>4;4;"): "a graph has 3 groups of outputs",
    text_of("1 0 1 0 1", ";u;", "product 0 0>2;0", "const 0.0>4;4;;"): "its backward has another number of gradients",
    text_of("1 0 1 0 5", ";u;", "product 0 0>2;0", NOTHING): "it has 5 blocks of a matrix, expected 1 to 4",
    text_of("1 0 1 0 3 2", ";u v;", "product 0 0>2;0", NOTHING): "it has 2 blocks of a matrix, expected 1 to 1",
    text_of("1 0 1 0 0", ";u;", "product 0 0>2;0", NOTHING): "it has 0 blocks of a matrix, expected 1 to 4",
    text_of("1 0 1 0 1", ";u v;", "product 0 0>2;0", NOTHING): "it has 2 names of matrices, expected 1 to 1",
    text_of(
        "1 0 1 0 1", "", "product 0 0>2;0", NOTHING
    ): "its text has 1 lists of names beside the states', expected 3",
    text_of(
        "1 0 1", ";;", "tanh 0>2;", "const 0.0>3;3;"
    ): "its text has 3 lists of names beside the states', expected 1",
    text_of("1 0 1 9", ";;a b c d e f g i j", "tanh 0>11;", "const 0.0>12;12;"): "it has 9 masks, expected 0 to 8",
    text_of("1 0 1 1", ";;a b", "tanh 0>3;", "const 0.0>4;4;"): "it has 2 names of masks, expected 1 to 1",
}


@pytest.mark.parametrize(("text", "reason"), REFUSED.items(), ids=REFUSED.values())
def test_what_is_refused(text: str, reason: str) -> None:
    assert reason in str(ops._C.refusal(text))


def test_any_text_is_a_program_or_an_error() -> None:
    """What has been changed at random runs, or is refused: nothing is read or written out of place."""
    assert run_changed((*PROGRAMS.values(),), 160, "0123456789 ,>;|.-hcu") > 100


def test_both_languages_read_the_same_of_a_program() -> None:
    for text in PROGRAMS.values():
        call = make_call(text, T=2)
        outputs = ops.forward(*call)
        assert outputs[2 * len(call.spec.states)].shape == (2, 3, 1, CELLS[text].saved, 17)
