"""What the kernels cannot run on any device, in words."""

from __future__ import annotations

import torch

from fused_rnn import ops
from fused_rnn.cells import CELLS, is_program, unknown
from fused_rnn.cells.program import MOST_PARAMS, MOST_STATES
from fused_rnn.cuda import module, programs

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
LIMIT = 1 << 31  # offsets within a step, and numbers of steps, take 32 bits; a step's place takes 64


def refusal(dtype: torch.dtype, cell: str, batch: int, recurrences: int, hidden: int) -> str | None:
    """Why the kernels cannot run such a layer, or None."""
    if ops.MISSING is not None:  # it has what the loops call of torch's
        return ops.MISSING
    if recurrences == 0:
        return "it has no loop of no recurrences: directions is empty"
    if dtype not in DTYPES:
        return f"it knows float32, float64, bfloat16 and float16, not {dtype}"
    reason = programs.refusal() if is_program(cell) else unknown(cell, module.loaded().CELLS)
    if reason is not None:
        return reason
    spec = CELLS[cell]
    if len(spec.states) > MOST_STATES or len(spec.params) > MOST_PARAMS:
        return (
            f"it knows cells of up to {MOST_STATES} states and {MOST_PARAMS} params, "
            f"this one has {len(spec.states)} and {len(spec.params)}"
        )
    widest = max(spec.gradients, spec.saved, len(spec.params))  # vectors of H that are kept, or made, per step
    step = batch * recurrences * hidden * widest
    if step >= LIMIT:
        return f"B·R·H·{widest} = {step} is beyond the 2^31 that its kernels can address in a step"
    return None
