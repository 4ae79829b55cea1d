"""From a problem to the backend that runs it, or one error with every backend's reason."""

from __future__ import annotations

from functools import lru_cache
from types import ModuleType

import torch

from fused_rnn import missing, onnx, ops
from fused_rnn.backends import cpu, reference
from fused_rnn.backends import cuda as cuda_backend
from fused_rnn.backends import torch as torch_backend
from fused_rnn.backends import triton as triton_backend
from fused_rnn.cells import is_program, title
from fused_rnn.cuda import module as cuda_loops
from fused_rnn.dispatch import fastest
from fused_rnn.problem import Problem

BACKENDS: dict[str, ModuleType] = {
    module.NAME: module for module in (cpu, torch_backend, reference, cuda_backend, triton_backend)
}


# In bfloat16, where oneDNN has AMX too, training on a single step of a GRU or RNN from this size on is faster there:
# torch takes 0.66 to 0.97 of our time. One core of an Intel Xeon with AMX, 2026-11.
ONEDNN_HIDDEN = 512

# After what measured fastest, where that is not built: torch before what nobody has measured.
ON_A_GPU = ("torch", "cuda", "triton", "reference", "cpu")
# Of a user's cell torch has no kernel.
PROGRAMS = {"cuda": ("cuda", "triton", "reference", "torch", "cpu")}
PROGRAMS_ELSEWHERE = ("cpu", "reference", "triton", "cuda", "torch")


def _onednn_is_faster(problem: Problem) -> bool:
    if problem.dtype != torch.bfloat16 or ops.ISA != "amx" or problem.transformed:  # torch's kernels have no vmap rule
        return False
    large_step = problem.needs_grad and problem.single_step and problem.hidden_size >= ONEDNN_HIDDEN
    return large_step and problem.cell != "lstm"


def fastest_on_gpu(problem: Problem) -> str | None:
    """What measured fastest on the current GPU for a plain batch of this size; None where nothing was measured.

    cuDNN leaves the kernels that it does well with where there are lengths or a projection, and has none for a reset or
    a transform: ours are faster there, whatever they are on a plain batch.
    """
    number = fastest.number_of(problem.dtype, problem.tf32)
    rows = fastest.rows_of(fastest.key_of(problem.cell, number, problem.needs_grad, problem.single_step))
    first = fastest.pick(rows, problem.hidden_size, problem.batch)
    apart = problem.lengths or problem.reset or problem.transformed or problem.width != problem.hidden_size
    return "cuda" if first == "torch" and apart else first


def is_left_to_torch(problem: Problem) -> bool:
    """Whether torch's own runs the problem on a GPU: where nothing was measured, where it measured fastest, and where
    what did is not built."""
    return problem.device == "cuda" and _resolve(problem, None) is torch_backend


def preference(problem: Problem) -> tuple[str, ...]:
    """The backends in the order in which to try them for this problem, fastest first. Never by T, but for T = 1."""
    if is_program(problem.cell):
        return PROGRAMS.get(problem.device, PROGRAMS_ELSEWHERE)
    if problem.device == "cpu" and _onednn_is_faster(problem):
        return ("torch", "cpu", "reference", "triton", "cuda")
    if problem.device == "cuda":
        first = fastest_on_gpu(problem) or "torch"
        return (first, *(name for name in ON_A_GPU if name != first))
    return ("cpu", "torch", "reference", "triton", "cuda")  # triton here is its interpreter, cuda its emulator


def known_backend(backend: str | None) -> str | None:
    """backend, if there is one of this name, or it is None; raises ValueError."""
    if backend is not None and backend not in BACKENDS:
        raise ValueError(f"backend: got {backend!r}, expected None or one of {', '.join(map(repr, BACKENDS))}")
    return backend


def choose(problem: Problem, backend: str | ModuleType | None = None) -> ModuleType:
    """The backend to run the problem: the one named, or with None the one that measured fastest of those that can.

    backend: what is no name is a backend itself, as diagnose has one for each module.

    Raises ValueError for an unknown name; NotImplementedError, with every backend's reason, if the one named (or none
    at all) can run it.
    """
    if backend is None:
        names = preference(problem)
        for name in names:
            if BACKENDS[name].supports(problem) is None:
                if name in ("torch", "reference") and (reason := _falls_back(names[0], problem)) is not None:
                    missing.warn_once(reason)
                return BACKENDS[name]
    elif not isinstance(backend, str):
        return backend
    elif known_backend(backend) and BACKENDS[backend].supports(problem) is None:
        return BACKENDS[backend]
    raise NotImplementedError(_refusal(problem, backend))


def _falls_back(first: str, problem: Problem) -> str | None:
    """Why the backend preferred does not run a problem, where that is to be said: its compiled part is not there, or
    a user's cell is left to the loop in Python, which is many times slower. None where only the reference can."""
    missing = {"cpu": ops.MISSING, "cuda": cuda_loops.MISSING}.get(first)
    if missing is not None or not is_program(problem.cell) or problem.forward_ad or problem.functionalized:
        return missing
    refused = BACKENDS[first].supports(problem)
    return None if refused is None else f"cell {title(problem.cell)}: {refused}"


def _refusal(problem: Problem, backend: str | None) -> str:
    reasons = {name: module.supports(problem) for name, module in BACKENDS.items()}
    lines = [f"  {name}: {'can run this' if reason is None else reason}" for name, reason in reasons.items()]
    asked = "no backend can" if backend is None else f"backend {backend!r} cannot"
    return f"{asked} run this {title(problem.cell)} problem ({problem.dtype} on {problem.device}):\n" + "\n".join(lines)


_choose_cached = lru_cache(maxsize=4096)(choose)


def resolve(problem: Problem, backend: str | None) -> ModuleType:
    """`choose`, remembered, but for sizes that are traced or symbolic (make_fx), which no cache can hold.

    While torch.onnx exports, the ops of the chosen backend become ONNX's nodes.
    """
    chosen = _resolve(problem, backend)
    return onnx if onnx.is_exporting() and not chosen.DIFFERENTIABLE else chosen


def _resolve(problem: Problem, backend: str | None) -> ModuleType:
    if torch.compiler.is_compiling() or torch._C._is_tracing():
        return choose(problem, backend)
    try:
        return _choose_cached(problem, backend)
    except TypeError:
        return choose(problem, backend)
