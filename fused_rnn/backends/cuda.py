"""The CUDA loops (csrc/cuda): NVIDIA GPUs from sm_80 on, in a build with nvcc."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fused_rnn.cells import CELLS
from fused_rnn.cuda import lanes, launch, limits, module, plain, plans, programs
from fused_rnn.gpu import chunks, op
from fused_rnn.gpu.narrow import refusal_of_narrow
from fused_rnn.gpu.wavefront import Wavefront
from fused_rnn.plan import PRECISIONS, fewer_blocks, stages_of, without_product
from fused_rnn.transforms.op_gradient import without_gradient

if TYPE_CHECKING:
    from fused_rnn.call import BackwardCall, LayerCall
    from fused_rnn.gpu.loops import Layer, Loops
    from fused_rnn.gpu.narrow import Narrow
    from fused_rnn.problem import Problem

NAME = "cuda"
DIFFERENTIABLE = False  # fused_rnn.autograd's Functions wrap the ops
stack = None  # layers.run runs the layers one by one, or hands them to `wavefront`

_LONG = 1024  # steps by which a description says how a stack runs: a problem knows no T


def supports(problem: Problem) -> str | None:
    """None if this backend can run the problem, else the reason it cannot."""
    reason = module.refusal(problem.device)
    if reason is not None:
        return reason
    reason = limits.refusal(problem.dtype, problem.cell, problem.batch, problem.recurrences, problem.hidden_size)
    if reason is not None:
        return reason
    if problem.hidden_size == 0:
        return "it has no loop over no hidden units"
    if problem.forward_ad:
        return "it has no forward-mode derivative"
    if problem.functionalized:
        return "torch.func.functionalize has no rule for its gradient"
    return None


def describe(problem: Problem) -> str:
    """What would run, in a line."""
    if supports(problem) is not None:
        return "nothing here"
    device = module.device_index(torch.device(problem.device))
    number, cell = plans.precision(problem.dtype), CELLS[problem.cell].whole
    if not cell.recurrent:
        told, least = without_product(cell), chunks.fewest_steps()
        units = problem.recurrences * problem.batch * problem.hidden_size
        if plans.chunk_of_time(cell, device, least, units) < least:
            told += f", by chunks of time side by side from T = {least} on"
        return f"{module.where(device)}; {told}"
    loops = []
    for backward in (False, True)[: 1 + problem.needs_grad]:
        sizes = (number, backward, cell.gates, problem.batch, problem.hidden_size, problem.recurrences)
        fewer = fewer_blocks(cell, PRECISIONS[number], backward)
        told = str(plans.ask(device, *sizes, fewer=fewer, stages=stages_of(cell, backward)))
        if problem.layers > 1 and problem.recurrences == 1:
            count = plans.chunks(cell, device, sizes, problem.layers, _LONG)
            if count > 1:
                told += f", {problem.layers} layers as a wavefront ({_LONG} steps in {count} chunks)"
        loops.append(f"{'backward' if backward else 'forward'}: {told}")
    return f"{module.where(device)}; {'; '.join(loops)}"


def narrows(problem: Problem) -> str | None:
    """None if `forward_narrow` can run the problem's layers, else the reason it cannot."""
    return refusal_of_narrow(CELLS[problem.cell]) or supports(problem) or programs.refusal()


def _loops(layer: Layer, x: Tensor, backward: bool, narrow: Narrow | None = None) -> Loops:
    reason = module.refusal(x.device.type)
    if reason is None and x.is_cuda:
        reason = module.refusal_of_gpu(module.device_index(x.device))
    reason = reason or limits.refusal(x.dtype, layer.cell.name, layer.batch, layer.recurrences, layer.hidden)
    if reason is None and layer.steps >= limits.LIMIT:
        reason = f"got T = {layer.steps}, expected less than 2^31"
    if reason is not None:
        raise RuntimeError(f"x: {reason}")
    return launch.Loops(layer, x, backward, narrow)


forward_op, backward_op = op.define("cuda", _loops, ("CPU", "CUDA"), plain)  # CPU: in the emulator, where tests put it


def _chunks(x: Tensor, cell: str, hidden: int, layers: int, backward: bool) -> int:
    """In how many chunks of time a stack runs as a wavefront; 1: layer by layer."""
    (steps, batch), spec = x.shape[:2], CELLS[cell]
    sizes = (plans.precision(x.dtype), backward, spec.gates, batch, hidden, 1)
    return plans.chunks(spec, module.device_index(x.device), sizes, layers, steps)


wavefront = Wavefront(_loops, lanes.lanes, _chunks)


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
