"""A W_hh of blocks on its diagonal by the CPU's loops: whole matrices judge it, and a block keeps to itself."""

from __future__ import annotations

from typing import Any, Literal

import pytest
import torch
from program_calls import Results, assert_same_by_any_threads, by_ops, by_reference, by_steps, gradients_of, make_call
from programs import PROGRAMS, program_of
from stage_cells import MASKED, STAGED
from tolerances import assert_as_good_as_torch

import fused_rnn
from fused_rnn import ops
from fused_rnn.call import LayerCall
from fused_rnn.cells import CELLS, diagonal
from fused_rnn.cells.program import parse
from fused_rnn.gpu.narrow import narrowed, widened

pytestmark = pytest.mark.skipif(ops.MISSING is not None, reason=str(ops.MISSING))
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
BOTH = (1, -1)
TEXTS = {
    "gru": PROGRAMS["gru"],  # a gate apart
    "lstm": PROGRAMS["lstm"],
    "1 gate": program_of(1, states=1),  # four vectors of units in a panel
    "2 gates": program_of(2, states=2, params=1),
    "7 gates": program_of(7, states=2),  # more than a panel has vectors
    "deep": STAGED["deep"].program.text,
    "layer_norm_lstm": STAGED["layer_norm_lstm"].program.text,
    "masked_product": MASKED["masked_product"],
}
BLOCKS = [(2, 5), (3, 7), (8, 12), (4, 16), (3, 33), (8, 3), (2, 64), (65, 1)]  # N, H/N
VARIANTS: list[dict[str, Any]] = [
    {"T": 4, "B": 1},  # weights as they stand
    {"T": 7, "B": 5, "directions": BOTH, "lengths": True, "reset": True, "save": "recompute"},
    {"T": 5, "B": 21, "lengths": True, "hx": False},
    {"T": 67, "B": 2, "bias": False, "reset": True, "save": "recompute", "directions": (-1,)},
]


def of_blocks(text: str, blocks: int) -> str:
    return parse(text)._replace(diagonal=blocks).text


def whole(call: LayerCall) -> LayerCall:
    """The same call, of a W_hh with its zeros."""
    spec, number = call.spec, call.kinds.number
    weights = [
        diagonal.dense(w, spec.gates, spec.diagonal) if k % number == 1 else w for k, w in enumerate(call.weights)
    ]
    return call._replace(weights=weights, cell=spec.whole.name)


def by_whole(call: LayerCall, run: Any) -> Results:
    """What `run` makes of the whole matrices."""
    results, spec, number = run(whole(call)), call.spec, call.kinds.number
    for k in range(1, len(call.weights), number):
        results[f"dweights[{k}]"] = diagonal.cut(results[f"dweights[{k}]"], spec.gates, spec.diagonal)
    return results


def by_cpu(call: LayerCall) -> Results:
    return by_ops(call, ops.forward, ops.backward)


@pytest.mark.parametrize("blocks", BLOCKS, ids=str)
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("name", TEXTS)
def test_whole_matrices_say_the_same(name: str, variant: dict[str, Any], blocks: tuple[int, int]) -> None:
    n, size = blocks
    for dtype in DTYPES if size in (7, 33, 12) else DTYPES[:2]:
        call = make_call(of_blocks(TEXTS[name], n), H=n * size, dtype=dtype, **variant)
        assert call.weights[1].shape == (call.spec.gates * n * size, size)
        assert_as_good_as_torch(by_cpu(call), by_whole(call, by_steps), by_whole(call, by_reference))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("blocks", [(2, 64), (4, 32), (8, 96), (5, 31)], ids=str)
@pytest.mark.parametrize("name", ["gru", "1 gate", "deep"])
def test_large_ones(name: str, blocks: tuple[int, int], dtype: torch.dtype) -> None:
    call = make_call(of_blocks(TEXTS[name], blocks[0]), T=6, B=19, H=blocks[0] * blocks[1], dtype=dtype)
    assert_as_good_as_torch(by_cpu(call), by_whole(call, by_steps), by_whole(call, by_reference))


@pytest.mark.parametrize("blocks", [(3, 7), (2, 64)], ids=str)
@pytest.mark.parametrize("name", TEXTS)
def test_the_plain_loop_is_that_of_whole_matrices(name: str, blocks: tuple[int, int]) -> None:
    n, size = blocks
    call = make_call(
        of_blocks(TEXTS[name], n), H=n * size, directions=BOTH, lengths=True, reset=True, dtype=torch.float64
    )
    assert_as_good_as_torch(by_reference(call), by_whole(call, by_reference), by_whole(call, by_reference))


@pytest.mark.parametrize("name", TEXTS)
def test_one_block_is_a_whole_matrix(name: str) -> None:
    assert of_blocks(TEXTS[name], 1) == TEXTS[name]
    assert CELLS[of_blocks(TEXTS[name], 3)].whole is CELLS[TEXTS[name]]


@pytest.mark.parametrize("B", [33, 5, 1])
@pytest.mark.parametrize("blocks", [(5, 26), (8, 32), (40, 5)], ids=str)
@pytest.mark.parametrize("name", ["gru", "1 gate", "deep"])
def test_same_bits_whoever_does_them(name: str, blocks: tuple[int, int], B: int) -> None:
    n, size = blocks
    text, options = of_blocks(TEXTS[name], n), {"directions": BOTH, "lengths": True, "reset": True}
    call = make_call(text, T=66, B=B, H=n * size, **options)
    assert_same_by_any_threads(call)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("B", [1, 3, 17])
@pytest.mark.parametrize("blocks", BLOCKS, ids=str)
@pytest.mark.parametrize("name", ["gru", "lstm", "1 gate", "2 gates", "7 gates"])
def test_a_block_that_is_not_finite_keeps_to_itself(
    name: str, blocks: tuple[int, int], B: int, dtype: torch.dtype
) -> None:
    """Of whole matrices every unit would be NaN: 0 · NaN is. Nor does a gradient come out of its block."""
    n, size = blocks
    call = make_call(of_blocks(TEXTS[name], n), T=3, B=B, H=n * size, dtype=dtype)
    states = [s.clone() for s in call.states]
    sick = slice(size, 2 * size)
    states[0][..., sick] = float("nan")
    healthy = torch.ones(n * size, dtype=torch.bool)
    healthy[sick] = False
    first, other = by_cpu(call), by_cpu(call._replace(states=states))
    for key in ("y", "h_n", "dh0"):
        assert torch.equal(first[key][..., healthy], other[key][..., healthy]), key
    assert other["y"][..., sick].isnan().all()
    rows = healthy.repeat(call.spec.gates)
    assert torch.equal(first["dweights[1]"][rows], other["dweights[1]"][rows])


def test_no_padding_is_read() -> None:
    """What lay in the loops' memory before, a block's neighbours among it."""
    calls = [
        make_call(of_blocks(TEXTS[name], n), T=5, B=B, H=n * size, dtype=dtype)
        for name in ("gru", "deep", "1 gate")
        for n, size in BLOCKS
        for B in (1, 9)
        for dtype in (torch.float32, torch.bfloat16)
    ]
    first = [by_cpu(call) for call in calls]
    for call, results in zip(calls, first, strict=True):
        sick = make_call(PROGRAMS["gru"], T=70, B=5, H=130, dtype=call.x.dtype)
        by_cpu(sick._replace(x=torch.full_like(sick.x, float("nan"))))
        for key, value in by_cpu(call).items():
            assert torch.equal(value, results[key]), key


@pytest.mark.parametrize("narrow", [None, "bf16", "int8"], ids=str)
@pytest.mark.parametrize("blocks", [(3, 7), (4, 16), (3, 33)], ids=str)
@pytest.mark.parametrize("name", ["gru", "1 gate", "7 gates", "deep"])
def test_a_stream_is_the_sequence(name: str, blocks: tuple[int, int], narrow: Literal["bf16", "int8"] | None) -> None:
    n, size = blocks
    call = make_call(of_blocks(TEXTS[name], n), T=6, H=n * size, hx=False)._replace(save="none", sequences=False)
    weights = [w.double().float() * 3 for w in call.weights]
    stream = fused_rnn.Stream(call.cell, lambda: weights, batch_size=3, weights=narrow)
    stands = [widened(*narrowed(w, narrow), w.dtype) if narrow and w.dim() == 2 else w for w in weights]
    y = ops.forward(*call._replace(weights=stands))[0]
    made = torch.stack([stream.step(call.x[t]).clone() for t in range(6)])
    if narrow is None:
        assert torch.equal(made, y)
    else:
        torch.testing.assert_close(made, y, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["gru", "2 gates"])
def test_single_steps_make_the_sequence(name: str) -> None:
    call = make_call(of_blocks(TEXTS[name], 3), T=6, H=21)._replace(save="none", sequences=False)
    y, *_ = ops.forward(*call)
    own = [s[0] for s in call.states]
    for t in range(6):
        own = ops.step(call.x[t], call.weights, own, call.cell)
        torch.testing.assert_close(own[0], y[t])


def test_a_batch_of_none() -> None:
    for key, value in by_cpu(make_call(of_blocks(TEXTS["deep"], 3), B=0, H=21)).items():
        assert value.numel() == 0 or (key.startswith("dweights") and not value.any())


def test_what_is_refused() -> None:
    text = of_blocks(TEXTS["gru"], 3)
    for flag, reason in {
        "diagonal=0": "it has 0 blocks of W_hh, expected 1 to",
        "diagonal=-1": "it has -1 blocks of W_hh",
        "diagonal=": "'' is no number",
        "diagonal=2.5": "'2.5' is no number",
        "diagonals=3": "its text has a flag 'diagonals', expected diagonal",
    }.items():
        assert reason in str(ops._C.refusal(text.replace("diagonal=3", flag))), flag
        with pytest.raises(ValueError, match="cell: got "):
            parse(text.replace("diagonal=3", flag))
    alone = program_of(2, states=2, recurrent=False)
    assert "it has blocks of W_hh, but no recurrent side" in str(ops._C.refusal(of_blocks(alone, 2)))
    call = make_call(text, H=21)
    for shape in ((63, 21), (63, 5), (60, 7), (30, 10)):
        weights = [call.weights[0], torch.zeros(shape), *call.weights[2:]]
        with pytest.raises(RuntimeError, match=r"w_.h has shape"):
            ops.forward(*call._replace(weights=weights))
    with pytest.raises(ValueError, match="H: expected a multiple of the blocks"):
        ops._C.Stream(text, 0, 0, 1, 4, 22, 22, 1, False, [0])


def test_gradients_keep_their_shapes() -> None:
    call = make_call(of_blocks(TEXTS["deep"], 3), H=21)._replace(save="gates")
    outputs, n = ops.forward(*call), len(call.spec.states)
    dy, dstates, dsequences = gradients_of(call)
    kept = (outputs[0], outputs[2 * n], outputs[n + 1 : 2 * n], call.cell, (1,), "gates", True, True)
    gradients = ops.backward(dy, dstates, *call[:5], *kept, dsequences)[1 + n :]
    assert [g.shape for g in gradients] == [w.shape for w in call.weights]
