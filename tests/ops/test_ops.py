"""The compiled ops by themselves: schema, fake kernels, aliasing, what they refuse, that they write all they return."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import Case, Inputs, inputs
from oracle import require
from torch import Tensor

from fused_rnn import ops
from fused_rnn.call import CHECKPOINT_EVERY
from fused_rnn.cells import CELLS

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
QUICK = ("test_schema", "test_faketensor")
FULL = (*QUICK, "test_aot_dispatch_dynamic")  # compiles, at a third of a second each
VARIANTS: list[dict[str, Any]] = [
    {},
    {"bidirectional": True, "lengths": True, "reset": True},
    {"T": 70, "bias": False, "hx": False},
    {"T": 1},
    {"B": 0},
]


def arguments(case: Case, given: Inputs, save: str, keep_hidden: bool = True) -> tuple[Any, ...]:
    """Those of fused_rnn::forward."""
    directions = [1, -1][: case.R]
    return given.x, given.weights, given.hx, given.lengths, given.reset, case.cell, directions, save, keep_hidden, False


def backward_arguments(case: Case, given: Inputs, save: str, keep_hidden: bool = True) -> tuple[Any, ...]:
    """Those of fused_rnn::backward, after a forward."""
    call = arguments(case, given, save, keep_hidden)
    outputs = ops.forward(*call)
    saved, *histories, hidden = outputs[1 + len(CELLS[case.cell].states) :]
    kept = (hidden if keep_hidden else outputs[0], saved, histories)
    return (given.dout[0], given.dout[1:], *call[:5], *kept, *call[5:8], True, True, ())


def checks_of(case: Case) -> tuple[str, ...]:
    """What symbolic shapes can find does not depend on the dtype."""
    return FULL if case.dtype == torch.float32 else QUICK


def cases() -> list[Case]:
    made = [Case(cell, **options) for cell in CELLS for options in VARIANTS]
    made += [Case("lstm", proj=5, bias=bias, bidirectional=True) for bias in (True, False)]
    return made + [Case(cell, dtype=dtype) for cell in CELLS for dtype in DTYPES[1:]]


@pytest.mark.parametrize("save", ["none", "gates", "recompute"])
@pytest.mark.parametrize("case", cases(), ids=str)
def test_forward_passes_opcheck(case: Case, save: str) -> None:
    require("cpu", case)
    given = inputs(case)
    torch.library.opcheck(ops.forward, arguments(case, given, save), test_utils=checks_of(case))
    torch.library.opcheck(ops.forward, arguments(case, given, save, keep_hidden=False), test_utils=QUICK)


@pytest.mark.parametrize("save", ["gates", "recompute"])
@pytest.mark.parametrize("case", cases(), ids=str)
def test_backward_passes_opcheck(case: Case, save: str) -> None:
    require("cpu", case)
    call = backward_arguments(case, inputs(case), save)
    torch.library.opcheck(ops.backward, call, test_utils=checks_of(case))
    torch.library.opcheck(ops.backward, (None, *call[1:-3], False, False, ()), test_utils=QUICK)


@pytest.mark.parametrize("cell", CELLS)
def test_an_input_per_recurrence_passes_opcheck(cell: str) -> None:
    case = Case(cell, bidirectional=True)
    require("cpu", case)
    given = inputs(case)
    given = given._replace(x=given.x.unsqueeze(2).repeat(1, 1, 2, 1))
    torch.library.opcheck(ops.forward, arguments(case, given, "gates"), test_utils=FULL)
    torch.library.opcheck(ops.backward, backward_arguments(case, given, "gates"), test_utils=FULL)


@pytest.mark.parametrize("with_state", [True, False])
@pytest.mark.parametrize("cell", CELLS)
def test_step_passes_opcheck(cell: str, with_state: bool) -> None:
    case = Case(cell, T=1)
    require("cpu", case)
    given = inputs(case)
    states = [s[0] for s in given.hx] if with_state else []
    torch.library.opcheck(ops.step, (given.x[0], given.weights, states, cell), test_utils=FULL)


def tensors_of(results: list[Tensor]) -> list[Tensor]:
    return [t for t in results if t.numel()]


@pytest.mark.parametrize("save", ["gates", "recompute"])
@pytest.mark.parametrize("case", [*cases(), Case("lstm", B=33, H=130, T=40), Case("gru", B=33, H=130, T=40)], ids=str)
def test_same_bits_every_time_and_all_of_them_written(case: Case, save: str, threads: int) -> None:
    """No atomics, no order that depends on timing. Uninitialised memory is NaN here: none may come out."""
    require("cpu", case)
    given = inputs(case)
    first, again = ops.forward(*arguments(case, given, save)), ops.forward(*arguments(case, given, save))
    call = backward_arguments(case, given, save)
    back, back_again = ops.backward(*call), ops.backward(*call)
    if save == "recompute":  # it has a row or two more than there are checkpoints
        used = -(-case.T // CHECKPOINT_EVERY)
        first[3:-1], again[3:-1] = ([t[:used] for t in kept] for kept in (first[3:-1], again[3:-1]))
    for one, other in zip([*first, *back], [*again, *back_again], strict=True):
        assert not one.isnan().any()
        assert torch.equal(one, other)


@pytest.mark.parametrize("case", cases(), ids=str)
def test_results_do_not_share_memory(case: Case) -> None:
    require("cpu", case)
    given = inputs(case)
    call = backward_arguments(case, given, "gates")
    results = tensors_of([*ops.forward(*arguments(case, given, "gates")), *ops.backward(*call)])
    arguments_ = tensors_of([given.x, *given.weights, *given.hx, *given.dout])
    storages = [t.untyped_storage().data_ptr() for t in (*results, *arguments_)]
    assert len(set(storages)) == len(storages)


@pytest.mark.parametrize("cell", CELLS)
def test_nan_in_one_sequence_stays_there(cell: str) -> None:
    """Tiles hold several sequences, masks compute both sides: nothing may leak between two, or from past an end."""
    case = Case(cell, B=7, T=6, dtype=torch.float64, lengths=True, bidirectional=True)
    require("cpu", case)
    given = inputs(case)
    given = given._replace(lengths=torch.tensor([6, 2, 6, 4, 6, 6, 1]))
    x = given.x.clone()
    x[:, 2] = float("nan")  # a whole sequence
    x[2:, 1] = float("nan")  # past the end of another
    clean, dirty = (
        ops.forward(*arguments(case, given, "gates")),
        ops.forward(*arguments(case, given._replace(x=x), "gates")),
    )
    others = [0, 1, 3, 4, 5, 6]
    assert torch.equal(clean[0][:, others], dirty[0][:, others])
    assert torch.equal(clean[1][:, others], dirty[1][:, others])
    assert dirty[0][:, 2].isnan().any()


def test_nothing_is_kept_without_save() -> None:
    case = Case("lstm")
    require("cpu", case)
    assert len(ops.forward(*arguments(case, inputs(case), "none"))) == 3
    saved, cells, hidden = ops.forward(*arguments(case, inputs(case), "recompute", False))[-3:]
    assert saved.shape == hidden.shape == (0,)
    assert cells.shape == (2, 1, 3, 17)


X, W = torch.ones(5, 3, 4), [torch.ones(21, 4), torch.ones(21, 7), torch.ones(21), torch.ones(21)]
REFUSED = {
    "x of one dimension": {0: torch.ones(5)},
    "x of a wrong width": {0: torch.ones(5, 3, 6)},
    "x of integers": {0: torch.ones(5, 3, 4, dtype=torch.int64)},
    "mixed dtypes": {0: X.double()},
    "no time": {0: torch.ones(0, 3, 4)},
    "no weights": {1: []},
    "too many weights": {1: W * 2},
    "a bias too long": {1: [*W[:3], torch.ones(22)]},
    "w_hh not square": {1: [W[0], torch.ones(21, 6), *W[2:]]},
    "h0 of another batch": {2: [torch.ones(1, 2, 7)]},
    "c0 for a gru": {2: [torch.ones(1, 3, 7)] * 2},
    "lengths of floats": {3: torch.ones(3)},
    "lengths of another batch": {3: torch.ones(2, dtype=torch.int64)},
    "reset transposed": {4: torch.ones(3, 5, dtype=torch.bool)},
    "an unknown cell": {5: "elman"},
    "no directions": {6: []},
    "a direction of zero": {6: [0]},
    "an unknown save": {7: "everything"},
}


@pytest.mark.parametrize("name", REFUSED)
def test_forward_refuses(name: str) -> None:
    require("cpu", Case("gru"))
    call: list[Any] = [X, W, [], None, None, "gru", [1], "gates", True]
    for position, value in REFUSED[name].items():
        call[position] = value
    with pytest.raises(RuntimeError, match="fused_rnn"):
        ops.forward(*call)


def test_one_argument_on_the_meta_device_is_refused() -> None:
    """There the dispatcher takes the fake kernel, which would answer with memory that nobody wrote."""
    case = Case("gru")
    require("cpu", case)
    given = inputs(case)
    meta = given.hx[0].to("meta")
    forward, backward = arguments(case, given, "gates"), backward_arguments(case, given, "gates")
    for op, call in (
        (ops.forward, (*forward[:2], [meta], *forward[3:])),
        (ops.backward, (*backward[:4], [meta], *backward[5:])),
        (ops.step, (given.x[0], given.weights, [meta[0]], "gru")),
    ):
        with pytest.raises(RuntimeError, match=r"fused_rnn: got tensors on .*, expected all on one device"):
            op(*call)


@pytest.mark.parametrize("position", [0, 1, 2, 3, 4, 7, 8])
def test_backward_refuses_other_sizes(position: int) -> None:
    """A wrong saved tensor is refused as a wrong argument is, not read past its end."""
    case = Case("gru")
    require("cpu", case)
    call = list(backward_arguments(case, inputs(case), "gates"))
    wrong = {1: [torch.ones(1, 1, 1)], 3: [torch.ones(2, 2)] * 4, 4: [torch.ones(1, 1, 1)]}
    call[position] = wrong.get(position, torch.ones(1, 1, 1))
    with pytest.raises(RuntimeError, match="fused_rnn"):
        ops.backward(*call)


@pytest.mark.parametrize("position", [0, 1, 7, 8, 9])
def test_backward_refuses_other_dtypes(position: int) -> None:
    case = Case("lstm")
    require("cpu", case)
    call = list(backward_arguments(case, inputs(case), "gates"))
    given = call[position]
    call[position] = [t.double() for t in given] if isinstance(given, list) else given.double()
    with pytest.raises(RuntimeError, match="dtype"):
        ops.backward(*call)


def test_errors_name_the_states() -> None:
    case = Case("lstm")
    require("cpu", case)
    given = inputs(case)
    h0, c0 = given.hx
    with pytest.raises(RuntimeError, match=r"fused_rnn: c0 has shape \[1, 2, 17\], expected \[1, 3, 17\]"):
        ops.forward(*arguments(case, given._replace(hx=[h0, c0[:, :2]]), "none"))
    with pytest.raises(RuntimeError, match=r"fused_rnn: got 1 states, expected none or the 2 of a lstm"):
        ops.forward(*arguments(case, given._replace(hx=[h0]), "none"))


@pytest.mark.parametrize("lengths", [[-3, 2, 5], [9, 1, 2], [2**40, -(2**40), 3]], ids=str)
def test_lengths_out_of_range_are_harmless(lengths: list[int]) -> None:
    """Where Python cannot look (a trace, vmap), the op clamps or refuses; it never reads past an end."""
    case = Case("lstm", bidirectional=True)
    require("cpu", case)
    given = inputs(case)._replace(lengths=torch.tensor(lengths))
    clamped = given._replace(lengths=given.lengths.clamp(0, 5))
    for one, other in zip(
        ops.forward(*arguments(case, given, "none")), ops.forward(*arguments(case, clamped, "none")), strict=True
    ):
        assert torch.equal(one, other)


STRIDED = {
    "batch first": lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
    "part of a wider one": lambda t: torch.cat([t, t], -1)[..., : t.shape[-1]],
    "every other step": lambda t: torch.stack([t, t], 1).flatten(0, 1)[::2],
    "features apart": lambda t: torch.stack([t, t], -1)[..., 0],
    "the same at every step": lambda t: t[:1].expand_as(t),
}


@pytest.mark.parametrize("how", STRIDED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("batch", "size"), [(1, 5), (3, 32), (33, 5)])
@pytest.mark.parametrize("save", ["gates", "recompute"])
@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_an_input_of_any_strides(cell: str, save: str, batch: int, size: int, dtype: torch.dtype, how: str) -> None:
    case = Case(cell, T=70, B=batch, D=size, H=17, bidirectional=True, lengths=True, dtype=dtype)
    require("cpu", case)
    given = inputs(case)
    x = STRIDED[how](given.x)
    each = []
    for tensor in (x, x.contiguous()):
        now = given._replace(x=tensor)
        each.append([*ops.forward(*arguments(case, now, save)), *ops.backward(*backward_arguments(case, now, save))])
    for a, b in zip(*each, strict=True):
        assert torch.equal(a, b)
