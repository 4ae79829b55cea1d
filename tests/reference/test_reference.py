"""The judge judged: the reference loop against torch.nn, values and gradients in float64."""

from __future__ import annotations

import pytest
import torch
from cases import Case, Inputs, inputs, option_cases
from oracle import by_reference, differentiate, forward
from tolerances import assert_same_formula
from torch import Tensor

from fused_rnn.call import LayerCall
from fused_rnn.cells import CELLS
from fused_rnn.reference.loop import run_layer

CASES = [case for case in option_cases((torch.float64,)) if not case.reset and case.save == "gates"]


def module(case: Case, weights: list[Tensor]) -> torch.nn.RNNBase:
    kinds = {"lstm": torch.nn.LSTM, "gru": torch.nn.GRU, "rnn_tanh": torch.nn.RNN, "rnn_relu": torch.nn.RNN}
    options = {"proj_size": case.proj} if case.proj else {}
    if case.cell.startswith("rnn"):
        options["nonlinearity"] = case.cell[4:]
    made = kinds[case.cell](
        case.D, case.H, case.layers, bias=case.bias, bidirectional=case.bidirectional, dtype=torch.float64, **options
    )
    with torch.no_grad():
        for own, given in zip(made._flat_weights, weights, strict=True):
            own.copy_(given)
    return made


def run_module(case: Case, given: Inputs) -> list[Tensor]:
    """torch.nn on a PackedSequence where there are lengths; it takes none of zero: they are left out and put back."""
    counterpart = module(case, [w.detach() for w in given.weights])
    parameters = dict(zip(counterpart._flat_weights_names, given.weights, strict=True))

    def call(x: object, hx: list[Tensor]) -> list[object]:
        packed_hx = tuple(hx) if case.cell == "lstm" else hx[0] if hx else None
        y, states = torch.func.functional_call(counterpart, parameters, (x, packed_hx if hx else None))
        return [y, *(states if isinstance(states, tuple) else (states,))]

    if given.lengths is None:
        return call(given.x, given.hx)
    some = given.lengths > 0
    packed = torch.nn.utils.rnn.pack_padded_sequence(given.x[:, some], given.lengths[some], enforce_sorted=False)
    y, *states = call(packed, [s[:, some] for s in given.hx])
    y, _ = torch.nn.utils.rnn.pad_packed_sequence(y, total_length=case.T)
    shapes = [given.x.new_zeros(case.T, case.B, y.shape[-1])]
    shapes += given.hx or [s.new_zeros(s.shape[0], case.B, s.shape[2]) for s in states]
    return [
        whole.index_copy(1, some.nonzero().squeeze(-1), part) for whole, part in zip(shapes, (y, *states), strict=True)
    ]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_loop_is_torch(case: Case) -> None:
    given = inputs(case)
    ours, torchs = by_reference(case, given), differentiate(given, lambda leaves: run_module(case, leaves))
    assert ours.keys() == torchs.keys()
    for name, value in ours.items():
        assert_same_formula(value, torchs[name])


@pytest.mark.parametrize("cell", CELLS)
def test_reset_is_a_sequence_cut_in_two(cell: str) -> None:
    """Forward: fresh from the reset on. Reverse: the loop meets step t after t+1, so the part up to t is fresh."""
    case = Case(cell, T=6, bidirectional=True, dtype=torch.float64)
    given, t = inputs(case), 3
    whole = forward(case, given._replace(reset=torch.arange(6).unsqueeze(1).expand(6, 3) == t), "reference")
    one_way, zero = Case(cell, dtype=torch.float64), []
    half = len(given.weights) // 2
    ahead = given._replace(weights=given.weights[:half], hx=[s[:1] for s in given.hx])
    first = forward(one_way, ahead._replace(x=given.x[:t]), "reference")
    second = forward(one_way, ahead._replace(x=given.x[t:], hx=zero), "reference")
    back = given._replace(weights=given.weights[half:], hx=[s[1:] for s in given.hx])
    late = forward(one_way, back._replace(x=given.x[t + 1 :].flip(0)), "reference")
    early = forward(one_way, back._replace(x=given.x[: t + 1].flip(0), hx=zero), "reference")
    forth_y, back_y = whole[0].chunk(2, -1)
    assert_same_formula(forth_y, torch.cat((first[0], second[0])))
    assert_same_formula(back_y, torch.cat((early[0].flip(0), late[0].flip(0))))
    for state, forth, backward in zip(whole[1:], second[1:], early[1:], strict=True):
        assert_same_formula(state, torch.cat((forth, backward)))


def test_resets_past_the_end_mean_nothing() -> None:
    case = Case("lstm", T=6, bidirectional=True, lengths=True, reset=True, dtype=torch.float64)
    given = inputs(case)
    past = torch.arange(6).unsqueeze(1) >= given.lengths
    for one, other in zip(
        forward(case, given._replace(reset=past), "reference"),
        forward(case, given._replace(reset=None), "reference"),
        strict=True,
    ):
        assert_same_formula(one, other)  # not bitwise: torch.mm's bits may go by where its operands lie in memory


@pytest.mark.parametrize("cell", CELLS)
def test_an_input_per_recurrence(cell: str) -> None:
    """x [T, B, R, D] runs each recurrence on its own input; R need not be two, directions may be any."""
    case = Case(cell, layers=3, D=17, dtype=torch.float64)
    given, directions = inputs(case), (1, -1, -1)
    x = torch.randn(5, 3, 3, 17, dtype=torch.float64)
    y, h_n, *others = run_layer(LayerCall(x, given.weights, given.hx, None, None, cell, directions))
    count = len(given.weights) // 3
    for r, direction in enumerate(directions):
        weights = given.weights[r * count : (r + 1) * count]
        states = [s[r : r + 1] for s in given.hx]
        alone = run_layer(LayerCall(x[:, :, r], weights, states, None, None, cell, (direction,)))
        assert_same_formula(y[..., r * 17 : (r + 1) * 17], alone[0])
        assert_same_formula(h_n[r], alone[1][0])
        assert len(alone) == 2 + len(others)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_types_compute_in_float32(dtype: torch.dtype) -> None:
    case = Case("gru", T=20, dtype=dtype)
    given = inputs(case)
    for half, single in zip(
        forward(case, given, "reference"), forward(case, given.to(torch.float32), "reference"), strict=True
    ):
        assert half.dtype == dtype
        assert torch.equal(half, single.to(dtype))
