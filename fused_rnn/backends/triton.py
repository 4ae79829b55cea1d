"""The Triton loops (fused_rnn.triton): any NVIDIA or AMD GPU that Triton compiles for, no build."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fused_rnn.cells import CELLS, Cell, unknown
from fused_rnn.cells.program import is_program
from fused_rnn.gpu import chunks, op
from fused_rnn.transforms.op_gradient import without_gradient
from fused_rnn.triton import device as devices
from fused_rnn.triton import planner
from fused_rnn.triton.cells import MODULES
from fused_rnn.triton.schedule import shape_of
from fused_rnn.triton.target import INTERPRETER

if TYPE_CHECKING:
    from fused_rnn.call import BackwardCall, LayerCall
    from fused_rnn.gpu.loops import Layer, Loops
    from fused_rnn.problem import Problem

NAME = "triton"
DIFFERENTIABLE = False  # fused_rnn.autograd's Functions wrap the ops
stack = wavefront = None  # layers.run runs the layers one by one

_LIMIT = 1 << 31  # offsets within a step, and numbers of steps, take 32 bits; a step's place takes 64


# What torch.compiler.assume_constant_result does, without the import of all of Dynamo that it costs: an answer of the
# environment, which is not to be traced.
devices.refusal._dynamo_marked_constant = True  # type: ignore[attr-defined]


def supports(problem: Problem) -> str | None:
    """None if this backend can run the problem, else the reason it cannot."""
    reason = devices.refusal(problem.device)
    if reason is not None:
        return reason
    if problem.dtype not in devices.DTYPES:
        return f"it knows float32, bfloat16 and float16, not {problem.dtype}"
    if not is_program(problem.cell) and (reason := unknown(problem.cell, MODULES)) is not None:
        return reason
    if problem.hidden_size == 0:
        return "it has no loop over no hidden units"
    if problem.forward_ad:
        return "it has no forward-mode derivative"
    if problem.functionalized:
        return "torch.func.functionalize has no rule for its gradient"
    return _too_large(CELLS[problem.cell], problem.batch, problem.recurrences, problem.hidden_size)


def _too_large(cell: Cell, batch: int, recurrences: int, hidden: int) -> str | None:
    vectors = max(cell.gradients, cell.saved, len(cell.params))  # read, kept or made in a step
    step, gate = batch * recurrences * hidden * vectors, hidden * hidden
    if step >= _LIMIT:
        return f"B·R·H·{vectors} = {step} is beyond the 2^31 that its kernels can address in a step"
    if gate >= _LIMIT:
        return f"H·H = {gate} is beyond the 2^31 that its kernels can address in a gate's W_hh"
    return None


def describe(problem: Problem) -> str:
    """What would run, in a line."""
    if devices.refusal(problem.device) is not None:
        return "nothing here"
    target = INTERPRETER if problem.device == "cpu" else devices.target_at(torch.cuda.current_device())
    said = ["Triton's interpreter" if problem.device == "cpu" else f"Triton on {target.arch}"]
    cell, kind = CELLS[problem.cell], devices.kind_of(problem.dtype, target)
    for way in ("forward", "backward")[: 1 + problem.needs_grad]:
        shape = shape_of(cell, kind, problem.hidden_size, way == "backward")
        schedule = planner.choose(shape, target, problem.batch, problem.recurrences)
        said.append(f"{way}: {schedule}")
        least = chunks.fewest_steps()
        if planner.chunk_of(cell, schedule, target, least, problem.batch, problem.recurrences) < least:
            said[-1] += f", by chunks of time side by side from T = {least} on"
    return "; ".join(said)


def _loops(layer: Layer, x: Tensor, backward: bool) -> Loops:
    from fused_rnn.triton import launch, launches  # and Triton with it

    reason = devices.refusal(x.device.type)
    if reason is not None:
        raise RuntimeError(f"x: {reason}")
    if x.dtype not in devices.DTYPES:
        raise RuntimeError(f"x: got {x.dtype}, expected float32, bfloat16 or float16")
    if layer.steps >= _LIMIT:
        raise RuntimeError(f"x: got T = {layer.steps}, expected less than 2^31")
    if (reason := _too_large(layer.cell, layer.batch, layer.recurrences, layer.hidden)) is not None:
        raise RuntimeError(f"x: {reason}")  # B or R may have grown under vmap since dispatch asked
    target = devices.target_of(x)
    kind = devices.kind_of(x.dtype, target)
    shape = shape_of(layer.cell, kind, layer.hidden, backward)
    schedule = planner.choose(shape, target, layer.batch, layer.recurrences)
    precision, activation = devices.precision_of(kind, target), devices.activation_of(kind, target)
    again = None
    if shape.staged and backward:  # members of a team need each other there too
        forward_shape = shape_of(layer.cell, kind, layer.hidden, False)
        again = planner.choose(forward_shape, target, layer.batch, layer.recurrences)
    return launch.Loops(layer, launches.LaunchConfig(schedule, target, precision, activation, again))


forward_op, backward_op = op.define("triton", _loops, ("CPU", "CUDA"))  # CPU: in the interpreter


def forward(call: LayerCall) -> list[Tensor]:
    """One layer: the op fused_rnn::triton_forward, as fused_rnn::forward."""
    with without_gradient():
        result: list[Tensor] = forward_op(*call)
    return result


def backward(call: BackwardCall) -> list[Tensor]:
    """One layer's gradients: the op fused_rnn::triton_backward, as fused_rnn::backward."""
    with without_gradient():
        result: list[Tensor] = backward_op(*call)
    return result


def step(x: Tensor, weights: Sequence[Tensor], states: Sequence[Tensor], cell: str) -> list[Tensor]:
    """One step: x [B, D], states [B, ·] or () for zeros → the states after; no gradient."""
    return op.step(forward_op, x, weights, states, cell)
