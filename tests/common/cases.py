"""The problems that correctness tests run over: cells × odd shapes × options × dtypes, thinned so that pairs meet."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fused_rnn import functional
from fused_rnn.cells import CELLS
from fused_rnn.problem import Problem

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


# The function of a user's for each cell.
FUNCTIONS: dict[str, Any] = {
    "lstm": functional.lstm,
    "gru": functional.gru,
    "rnn_tanh": functional.rnn,
    "rnn_relu": partial(functional.rnn, nonlinearity="relu"),
}


class Case(NamedTuple):
    """A stack of layers to run; `lengths`, `reset` and `hx` say whether it has them."""

    cell: str
    T: int = 5
    B: int = 3
    D: int = 4
    H: int = 17
    layers: int = 1
    bidirectional: bool = False
    bias: bool = True
    proj: int = 0
    lengths: bool = False
    reset: bool = False
    hx: bool = True
    save: str = "gates"
    dtype: torch.dtype = torch.float32

    def __str__(self) -> str:
        """What differs from a plain case, as a test's name."""
        options = [f"{self.cell}-T{self.T}-B{self.B}-D{self.D}-H{self.H}", str(self.dtype).removeprefix("torch.")]
        options += [f"{name}{getattr(self, name)}" for name in ("layers", "proj") if getattr(self, name) > 1]
        options += [name for name in ("bidirectional", "lengths", "reset") if getattr(self, name)]
        options += [f"no_{name}" for name in ("bias", "hx") if not getattr(self, name)]
        return "-".join(options + (["recompute"] if self.save == "recompute" else []))

    @property
    def R(self) -> int:
        return 2 if self.bidirectional else 1

    @property
    def has_c(self) -> bool:
        return len(CELLS[self.cell].states) > 1

    @property
    def P(self) -> int:
        return self.proj or self.H

    def problem(self, needs_grad: bool = True) -> Problem:
        """What dispatch would be asked."""
        return Problem(
            self.cell, self.dtype, "cpu", self.T == 1, self.B, self.D, self.H, self.P, self.layers, self.R, self.bias,
            needs_grad, False, self.save if needs_grad else "none", self.lengths, self.reset,
        )  # fmt: skip


class Inputs(NamedTuple):
    """The tensors of a case. hx holds h0 and, for an LSTM, c0; dout the gradients of y, h_n and, for an LSTM, c_n."""

    x: Tensor
    weights: list[Tensor]
    hx: list[Tensor]
    lengths: Tensor | None
    reset: Tensor | None
    dout: list[Tensor]

    def to(self, dtype: torch.dtype) -> Inputs:
        def cast(tensors: list[Tensor]) -> list[Tensor]:
            return [t.to(dtype) for t in tensors]

        return Inputs(self.x.to(dtype), cast(self.weights), cast(self.hx), self.lengths, self.reset, cast(self.dout))


def inputs(case: Case, seed: int = 0) -> Inputs:
    """Random tensors in the case's dtype, weights as torch initialises them. lengths hold 0 and T where B allows it."""
    random = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random, dtype=torch.float64)

    rows, weights = CELLS[case.cell].gates * case.H, []
    for layer in range(case.layers):
        for _ in range(case.R):
            shapes = [(rows, case.D if layer == 0 else case.R * case.P), (rows, case.P)]
            shapes += [(rows,), (rows,)] if case.bias else []
            shapes += [(case.P, case.H)] if case.proj else []
            weights += [(torch.rand(*s, generator=random, dtype=torch.float64) * 2 - 1) * case.H**-0.5 for s in shapes]
    states = [(case.layers * case.R, case.B, case.P), (case.layers * case.R, case.B, case.H)][: 1 + case.has_c]
    lengths = torch.randint(0, case.T + 1, (case.B,), generator=random)
    if case.B > 2:
        lengths[0], lengths[-1] = 0, case.T
    reset = torch.rand(case.T, case.B, generator=random) < 0.2
    made = Inputs(
        normal(case.T, case.B, case.D),
        weights,
        [normal(*s) for s in states] if case.hx else [],
        lengths if case.lengths else None,
        reset if case.reset else None,
        [normal(*s) for s in [(case.T, case.B, case.R * case.P), *states]],
    )
    return made.to(case.dtype)


OPTIONS: list[dict[str, Any]] = [
    {},
    {"bias": False},
    {"hx": False},
    {"bidirectional": True},
    {"layers": 2},
    {"lengths": True},
    {"reset": True},
    {"save": "recompute"},
    {"layers": 2, "bidirectional": True, "lengths": True, "reset": True},
    {"bidirectional": True, "lengths": True, "hx": False, "bias": False},
    {"save": "recompute", "layers": 2, "bidirectional": True, "lengths": True, "reset": True, "bias": False},
]
PROJECTIONS: list[dict[str, Any]] = [
    {"proj": 5},
    {"proj": 1, "bias": False, "reset": True},
    {"proj": 5, "layers": 2, "bidirectional": True, "lengths": True, "reset": True},
    {"proj": 5, "save": "recompute", "bidirectional": True, "lengths": True},
]
# Every H meets every B, every T meets every one of both.
SHAPES = [
    ((1, 2, 257)[(i + j + 1) % 3], batch, (1, 5, 33)[(i + 2 * j) % 3], hidden)
    for i, hidden in enumerate((1, 3, 17, 130))
    for j, batch in enumerate((1, 3, 33))
]


def _with_options(cell: str) -> list[dict[str, Any]]:
    return OPTIONS + (PROJECTIONS if cell == "lstm" else [])


def option_cases(dtypes: tuple[torch.dtype, ...] = DTYPES[:3]) -> list[Case]:
    """Every option for every cell, on one small odd shape."""
    return [
        Case(cell, T=6, dtype=dtype, **options) for cell in CELLS for dtype in dtypes for options in _with_options(cell)
    ]


def shape_cases() -> list[Case]:
    """Every shape for every cell and dtype, the options taking turns."""
    cases = []
    for c, cell in enumerate(CELLS):
        choices = _with_options(cell)
        for i, (steps, batch, input_size, hidden) in enumerate(SHAPES):
            for d, dtype in enumerate(DTYPES):
                options = dict(choices[(i + 5 * d + 3 * c) % len(choices)])
                if options.get("proj", 0) >= hidden:
                    del options["proj"]
                cases.append(Case(cell, steps, batch, input_size, hidden, dtype=dtype, **options))
    return cases
