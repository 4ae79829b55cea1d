"""A plain layer by one op in C++: csrc/ops/plain_layer.cpp. What the host spends on a short call is mostly Python.

Each function takes an op's arguments and returns its outputs, or [] where the layer is not plain.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fused_rnn import ops
from fused_rnn.call import BackwardCall, LayerCall
from fused_rnn.cells import CELLS
from fused_rnn.cuda import limits, module, plans, programs
from fused_rnn.gpu.directions import direction_bits
from fused_rnn.gpu.weights import aligned


def forward(call: LayerCall) -> list[Tensor]:
    """fused_rnn::cuda_forward."""
    if call.save == "recompute" or call.sequences:
        return []
    given = (call.x.contiguous(), call.weights, call.states, call.lengths, call.reset)
    return _run(ops.plain_forward, call, False, *given, call.save == "gates", call.keep_hidden)


def backward(call: BackwardCall) -> list[Tensor]:
    """fused_rnn::cuda_backward."""
    if call.save != "gates" or call.dsequences:
        return []
    given = (None if call.dy is None else aligned(call.dy), call.dstates, call.x.contiguous(), *call[3:7])
    kept = (call.hidden, call.saved, call.histories)
    return _run(ops.plain_backward, call.layer, True, *given, *kept, call.directions, call.need_dx, call.need_dw)


def _run(op: Callable[..., list[Tensor]], call: LayerCall, backward: bool, *given: Any) -> list[Tensor]:
    x = call.x
    prepared = _loop_of(call, backward)
    if prepared is None:
        return []
    stream = torch._C._cuda_getCurrentRawStream(x.device.index) if x.is_cuda else 0
    try:  # prepared is held meanwhile: nobody else may hold it where two threads made it at once
        return op([*prepared.runner, stream, *prepared.facts], *given)
    except RuntimeError:  # of torch's errors the stable ABI hands on neither type nor words: Python meets them again
        return []


def _loop_of(call: LayerCall, backward: bool) -> _Prepared | None:
    """The loop that runs a layer, remembered; None where it cannot be run so."""
    x, weights = call.x, call.weights
    if x.dim() != 3 or x.dtype not in limits.DTYPES or not weights or weights[0].dim() != 2:
        return None
    now = (module.loaded(), programs.loader(), plans.forced(), plans.precision(x.dtype))
    sizes = (x.shape[1], weights[0].shape[0])
    return _prepared(now, call.cell, x.dtype, x.device, sizes, tuple(call.directions), backward)


class _Prepared(NamedTuple):
    """A loop with its plan and its kernels, without arrays; and what plain_layer.cpp reads of it, in its order."""

    loop: Any
    runner: tuple[int, int]  # addresses, while the loop is there
    facts: tuple[int, ...]


@lru_cache(maxsize=4096)
def _prepared(
    now: tuple[Any, ...],
    name: str,
    dtype: torch.dtype,
    device: torch.device,
    sizes: tuple[int, int],
    directions: tuple[int, ...],
    backward: bool,
) -> _Prepared | None:
    """now: module, loader, what plans are forced to, precision.  sizes: B, rows of the weights."""
    loops, *_, precision = now
    cell, recurrences, (batch, rows) = CELLS[name], len(directions), sizes
    hidden = rows // cell.gates
    if (
        not cell.recurrent
        or cell.params
        or cell.matrices
        or cell.masks
        or 0 in (batch, hidden)
        or module.refusal(device.type) is not None
    ):
        return None
    if limits.refusal(dtype, name, batch, recurrences, hidden) is not None:
        return None
    index = module.device_index(device)
    plan, loaded = programs.planned(cell, index, (precision, int(backward), cell.gates, batch, hidden, recurrences))
    if plan is None:
        return None
    bits, period = direction_bits(directions)
    none: list[int] = []
    given: dict[str, Any] = {"gx": 0, "h0": 0}
    if backward:
        given = {"states": none, "first": none, "dgates": 0, "dstates": none}
    own = {"loaded": loaded} if cell.program else {}
    steps = loops.Steps(T=1, B=batch, R=recurrences, H=hidden, reversed=bits, period=period)
    bind = loops.Backward if backward else loops.Forward
    loop = bind("" if own else name, precision, plan, steps, **given, **own)
    facts = (batch, hidden, recurrences, cell.gates, cell.apart, cell.saved, len(cell.states), cell.carried)
    return _Prepared(loop, loop.runner, (loops.COPY_ROWS, loop.workspace_bytes, *facts))
