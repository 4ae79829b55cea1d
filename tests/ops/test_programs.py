"""The compiled ops where the cell is a program: schema, fakes, gradient, and the way past the dispatcher."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from program_calls import gradients_of, make_call
from programs import INDRNN, LEAKY, LSTM, PROGRAMS, program_of
from torch import Tensor

from fused_rnn import ops
from fused_rnn.call import LayerCall

pytestmark = pytest.mark.skipif(ops.MISSING is not None, reason=str(ops.MISSING))
QUICK = ("test_schema", "test_faketensor")
FULL = (*QUICK, "test_aot_dispatch_dynamic")
BOTH = (1, -1)
VARIANTS: list[dict[str, Any]] = [
    {},
    {"directions": BOTH, "lengths": True, "reset": True, "save": "recompute"},
    {"B": 0, "bias": False, "hx": False},
]
CELLS = {**PROGRAMS, "many": program_of(7, 2, 3, 4)}


def backward_arguments(call: LayerCall) -> tuple[Any, ...]:
    outputs = ops.forward(*call)
    n = len(call.spec.states)
    over_time, kept = outputs[1 + n : 2 * n] if call.sequences else [], outputs[1 + n + (n - 1) * call.sequences :]
    histories = over_time if call.sequences and call.save == "gates" else kept[1:-1]
    dy, dstates, dsequences = gradients_of(call)
    if not call.sequences:
        dsequences = []
    return dy, dstates, *call[:5], outputs[0], kept[0], histories, *call[5:8], True, True, dsequences


@pytest.mark.parametrize("sequences", [True, False])
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("name", CELLS)
def test_opcheck(name: str, variant: dict[str, Any], sequences: bool) -> None:
    checks = FULL if name == "many" else QUICK
    call = make_call(CELLS[name], **variant)._replace(sequences=sequences)
    torch.library.opcheck(ops.forward, tuple(call), test_utils=checks)
    torch.library.opcheck(ops.forward, tuple(call._replace(save="none")), test_utils=QUICK)
    torch.library.opcheck(ops.backward, backward_arguments(call), test_utils=checks)


@pytest.mark.parametrize("name", CELLS)
def test_a_step_passes_opcheck(name: str) -> None:
    call = make_call(CELLS[name], T=1)
    for states in ([s[0] for s in call.states], []):
        torch.library.opcheck(ops.step, (call.x[0], call.weights, states, call.cell), test_utils=QUICK)


@pytest.mark.parametrize("cell", ["lstm", *CELLS])
def test_sequences_are_there_whatever_is_saved(cell: str) -> None:
    call = make_call(CELLS.get(cell, cell), T=9, B=5, directions=BOTH, lengths=True, reset=True)
    n = len(call.spec.states)
    each = [ops.forward(*call._replace(save=save)) for save in ("gates", "recompute", "none")]
    for outputs in each:
        for one, other in zip(outputs[: 2 * n], each[0], strict=False):
            assert torch.equal(one, other)
    assert call.lengths is not None
    past = torch.arange(9).unsqueeze(1) >= call.lengths
    for sequence in each[0][1 + n : 2 * n]:
        assert not sequence[past].any()
        assert not sequence.isnan().any()


def error_of(call: LayerCall, **changes: Any) -> str:
    with pytest.raises(RuntimeError) as error:
        ops.forward(*call._replace(**changes))
    return str(error.value)


def test_weights_that_are_wrong() -> None:
    call = make_call(LEAKY)
    assert "expected 3 to 5 each" in error_of(call, weights=call.weights[:2])
    assert "expected 3 to 5 each" in error_of(call, weights=[*call.weights, call.weights[-1]])
    assert "a param has shape [16], expected [17]" in error_of(call, weights=[*call.weights[:-1], torch.zeros(16)])
    assert "a param differs from x in dtype" in error_of(call, weights=[*call.weights[:-1], torch.zeros(17).double()])
    alone = make_call(INDRNN)
    assert "expected 2 to 3 each" in error_of(alone, weights=alone.weights[:1])
    assert "w_ih has shape" in error_of(alone, weights=[alone.weights[-1], *alone.weights[1:]])
    arguments = backward_arguments(make_call(LSTM))
    with pytest.raises(RuntimeError, match="dsequences holds 2 tensors, expected none or 1"):
        ops.backward(*arguments[:-1], [*arguments[-1], *arguments[-1]])
    with pytest.raises(RuntimeError, match="a sequence's gradient has shape"):
        ops.backward(*arguments[:-1], [arguments[-1][0][:1]])


@pytest.mark.skipif(ops.fast_path is None, reason="this torch does not lend tensors")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CELLS)
def test_past_the_dispatcher(name: str, dtype: torch.dtype) -> None:
    call = make_call(CELLS[name], dtype=dtype)._replace(save="none", sequences=False)
    recurrent, vectors = call.spec.recurrent, call.spec.params
    keys = ["weight_ih", *["weight_hh"] * recurrent, "bias_ih", *["bias_hh"] * recurrent, *vectors]
    parameters: dict[str, Tensor] = {f"{key}_l0": w for key, w in zip(keys, call.weights, strict=True)}
    hx: Any = tuple(call.states) if len(call.states) > 1 else call.states[0]
    quick: Any = ops.fast_path
    with torch.no_grad():
        made, expected = quick(parameters, True, call.x, hx, call.cell, 0), ops.forward(*call)
        for a, b in zip(made, expected, strict=True):
            assert torch.equal(a, b)
        without = {key: value for key, value in parameters.items() if key != f"{([*vectors, 'bias_ih'])[0]}_l0"}
        assert quick(without, True, call.x, hx, call.cell, 0) is None
        assert quick(parameters, True, call.x, hx, call.cell + "|", 0) is None
