"""Running a case by a backend, by the float64 reference loop, by torch's own kernels: named results and gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from cases import Case, Inputs, inputs
from torch import _VF, Tensor

from fused_rnn import functional
from fused_rnn.call import Kinds
from fused_rnn.dispatch import BACKENDS

Results = dict[str, Tensor]


def require(backend: str, case: Case, needs_grad: bool = True) -> None:
    """Skip with the backend's own reason where it does not support the case."""
    reason = BACKENDS[backend].supports(case.problem(needs_grad))
    if reason is not None:
        pytest.skip(f"{backend}: {reason}")


def forward(case: Case, given: Inputs, backend: str | None, save: str | None = None) -> list[Tensor]:
    """[y, h_n] or [y, h_n, c_n] by the functional interface."""
    options = {
        "num_layers": case.layers,
        "bidirectional": case.bidirectional,
        "lengths": given.lengths,
        "reset": given.reset,
        "save": save or case.save,
        "backend": backend,
    }
    if case.cell == "lstm":
        y, states = functional.lstm(given.x, given.weights, tuple(given.hx) or None, **options)
        return [y, *states]
    h0 = given.hx[0] if given.hx else None
    if case.cell == "gru":
        return list(functional.gru(given.x, given.weights, h0, **options))
    return list(functional.rnn(given.x, given.weights, h0, nonlinearity=case.cell[4:], **options))


def differentiate(given: Inputs, run: Callable[[Inputs], Sequence[Tensor]]) -> Results:
    """Named outputs of run, and the gradients of ⟨outputs, dout⟩ in x, the initial states and the weights."""
    leaves = [t.detach().clone().requires_grad_() for t in (given.x, *given.hx, *given.weights)]
    states = len(given.hx)
    outputs = run(given._replace(x=leaves[0], hx=leaves[1 : 1 + states], weights=leaves[1 + states :]))
    grads = torch.autograd.grad(outputs, leaves, given.dout, allow_unused=True, materialize_grads=True)
    names = ["dx", *("dh0", "dc0")[:states], *(f"dweights[{k}]" for k in range(len(given.weights)))]
    return dict(zip(("y", "h_n", "c_n"), (t.detach() for t in outputs), strict=False)) | dict(
        zip(names, grads, strict=True)
    )


def over_draws(case: Case, run: Callable[[Case, Inputs], Results]) -> Results:
    """run's results, each with a dimension in front: of one draw of inputs, and of eight where H = 1. There a gradient
    is a single sum, in one of which either implementation's roundings may cancel by luck."""
    each = [run(case, inputs(case, seed)) for seed in range(8 if case.H == 1 else 1)]
    return {name: torch.stack([results[name] for results in each]) for name in each[0]}


def by_backend(case: Case, given: Inputs, backend: str | None) -> Results:
    """The case by one of our backends."""
    return differentiate(given, lambda leaves: forward(case, leaves, backend))


def by_reference(case: Case, given: Inputs) -> Results:
    """The judge: the plain loop in float64 on the same inputs."""
    return differentiate(given.to(torch.float64), lambda leaves: forward(case, leaves, "reference", save="gates"))


def by_torch(case: Case, given: Inputs) -> Results:
    """torch's own kernels in the case's dtype: the whole stack if they know it, else a loop over torch's own cells."""
    if case.reset:
        return differentiate(given, lambda leaves: torch_cells(case, leaves))
    return differentiate(given, lambda leaves: forward(case, leaves, "torch", save="gates"))


def torch_cells(case: Case, given: Inputs) -> list[Tensor]:
    """The stack as a user without our kernels writes it when he needs resets: torch's cells in a Python loop."""
    cells = {"lstm": _VF.lstm_cell, "gru": _VF.gru_cell, "rnn_tanh": _VF.rnn_tanh_cell, "rnn_relu": _VF.rnn_relu_cell}
    x, (steps, batch), has_c = given.x, given.x.shape[:2], case.has_c
    finals: list[list[Tensor]] = []
    count = len(given.weights) // (case.layers * case.R)
    for layer, weights in enumerate(
        zip(*[iter(Kinds(count, case.bias, bool(case.proj)).split(given.weights))] * case.R, strict=True)
    ):
        ys = []
        for r, (w_ih, w_hh, b_ih, b_hh, w_hr, *_) in enumerate(weights):
            widths = (case.P, case.H)[: 1 + has_c]
            state = [s[layer * case.R + r] for s in given.hx] or [x.new_zeros(batch, width) for width in widths]
            outputs = [x.new_zeros(batch, case.P)] * steps
            for t in range(steps) if r == 0 else reversed(range(steps)):
                keep = x.new_ones(batch, 1) if given.reset is None else (~given.reset[t]).unsqueeze(-1)
                entering = [s * keep.to(x.dtype) for s in state]
                h_in = entering[0] if w_hr is None else torch.nn.functional.pad(entering[0], (0, case.H - case.P))
                w_in = w_hh if w_hr is None else torch.nn.functional.pad(w_hh, (0, case.H - case.P))
                after = cells[case.cell](x[t], (h_in, entering[1]) if has_c else h_in, w_ih, w_in, b_ih, b_hh)
                after = list(after) if has_c else [after]
                if w_hr is not None:
                    after[0] = after[0] @ w_hr.t()
                valid = (
                    torch.ones(batch, 1, dtype=torch.bool, device=x.device)
                    if given.lengths is None
                    else (t < given.lengths).unsqueeze(-1)
                )
                state = [torch.where(valid, new, old) for new, old in zip(after, state, strict=True)]
                outputs[t] = after[0].masked_fill(~valid, 0)
            ys.append(torch.stack(outputs))
            finals.append(state)
        x = torch.cat(ys, -1)
    return [x, *(torch.stack(states) for states in zip(*finals, strict=True))]
