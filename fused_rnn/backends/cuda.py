"""The CUDA loops (csrc/cuda): NVIDIA GPUs from sm_80 on, in a build with nvcc."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fused_rnn.cells import CELLS, is_program, unknown
from fused_rnn.cells.program import MOST_PARAMS, MOST_STATES
from fused_rnn.cuda import launch, module, plans, programs
from fused_rnn.gpu import op
from fused_rnn.plan import NO_PRODUCT, PRECISIONS, fewer_blocks
from fused_rnn.transforms.op_gradient import without_gradient

if TYPE_CHECKING:
    from fused_rnn.call import BackwardCall, LayerCall
    from fused_rnn.gpu.loops import Layer, Loops
    from fused_rnn.gpu.narrow import Narrow
    from fused_rnn.problem import Problem

NAME = "cuda"
DIFFERENTIABLE = False  # fused_rnn.autograd's Functions wrap the ops
stack = None  # layers.run runs the layers one by one

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_LIMIT = 1 << 31  # offsets within a step, and numbers of steps, take 32 bits; a step's place takes 64


def supports(problem: Problem) -> str | None:
    """None if this backend can run the problem, else the reason it cannot."""
    reason = module.refusal(problem.device)
    if reason is not None:
        return reason
    reason = _unable(problem.dtype, problem.cell, problem.batch, problem.recurrences, problem.hidden_size)
    if reason is not None:
        return reason
    if problem.hidden_size == 0:
        return "it has no loop over no hidden units"
    if problem.forward_ad:
        return "it has no forward-mode derivative"
    if problem.functionalized:
        return "torch.func.functionalize has no rule for its gradient"
    return None


def _unable(dtype: torch.dtype, cell: str, batch: int, recurrences: int, hidden: int) -> str | None:
    """Why the kernels cannot run such a layer on any device, or None."""
    if dtype not in _DTYPES:
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
    if step >= _LIMIT:
        return f"B·R·H·{widest} = {step} is beyond the 2^31 that its kernels can address in a step"
    return None


def describe(problem: Problem) -> str:
    """What would run, in a line."""
    if supports(problem) is not None:
        return "nothing here"
    device = module.device_index(torch.device(problem.device))
    precision, cell = plans.precision(problem.dtype), CELLS[problem.cell]
    if not cell.recurrent:
        return f"{module.where(device)}; {NO_PRODUCT}"
    loops = []
    for backward in (False, True)[: 1 + problem.needs_grad]:
        fewer = fewer_blocks(cell, PRECISIONS[precision], backward)
        sizes = (precision, backward, cell.gates, problem.batch, problem.hidden_size, problem.recurrences)
        plan = plans.ask(device, *sizes, fewer=fewer)
        loops.append(f"{'backward' if backward else 'forward'}: {plan}")
    return f"{module.where(device)}; {'; '.join(loops)}"


def narrows(problem: Problem) -> str | None:
    """None if `forward_narrow` can run the problem's layers, else the reason it cannot."""
    return supports(problem) or programs.refusal()


def _loops(layer: Layer, x: Tensor, backward: bool, narrow: Narrow | None = None) -> Loops:
    reason = module.refusal(x.device.type)
    if reason is None and x.is_cuda:
        reason = module.refusal_of_gpu(module.device_index(x.device))
    reason = reason or _unable(x.dtype, layer.cell.name, layer.batch, layer.recurrences, layer.hidden)
    if reason is None and layer.steps >= _LIMIT:
        reason = f"got T = {layer.steps}, expected less than 2^31"
    if reason is not None:
        raise RuntimeError(f"x: {reason}")
    return launch.Loops(layer, x, backward, narrow)


forward_op, backward_op = op.define("cuda", _loops, ("CPU", "CUDA"))  # CPU: in the emulator, where tests put it


def forward(call: LayerCall) -> list[Tensor]:
    """One layer: the op fused_rnn::cuda_forward, as fused_rnn::forward."""
    with without_gradient():
        result: list[Tensor] = forward_op(*call)
    return result


def forward_narrow(call: LayerCall, narrow: Narrow) -> list[Tensor]:
    """One layer whose W_hh are in fewer bytes; no gradient, and no operator of torch's."""
    return op.forward(call, partial(_loops, narrow=narrow), narrow.dtype)


def backward(call: BackwardCall) -> list[Tensor]:
    """One layer's gradients: the op fused_rnn::cuda_backward, as fused_rnn::backward."""
    with without_gradient():
        result: list[Tensor] = backward_op(*call)
    return result


def step(x: Tensor, weights: Sequence[Tensor], states: Sequence[Tensor], cell: str) -> list[Tensor]:
    """One step: x [B, D], states [B, ·] or () for zeros → the states after; no gradient."""
    return op.step(forward_op, x, weights, states, cell)
