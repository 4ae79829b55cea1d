"""The CUDA backend's test cases: every cell, precision and exchange; odd shapes and options meet in pairs.

They run in the emulator, by plans for its device, which is as large as an H100.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
from cases import Case, Inputs
from oracle import Results, differentiate, forward
from torch import Tensor
from torch.overrides import TorchFunctionMode

import fused_rnn

DEVICE = (90, 132, 227 * 1024, tuple(132 // size for size in range(1, 17)))  # csrc/emulated/launch.cpp
PRECISIONS = {
    "bf16": torch.bfloat16,
    "f16": torch.float16,
    "tf32": torch.float32,
    "ieee": torch.float32,
    "f64": torch.float64,
}
# Forced plans. A cluster of 4 takes H from 49 on, of 8 from 113, of 16 from 241: each member has 16 units at least.
EXCHANGES: dict[str, dict[str, Any]] = {
    "cta": {"exchange": "cta"},
    **{f"cluster{members}": {"exchange": "cluster", "members": members} for members in (2, 4, 8, 16)},
    "grid": {"exchange": "grid"},
    "stepwise": {"exchange": "stepwise"},
    # Backward; forward by a cluster of as many. Both by kernels that are compiled for the team: H is 16 or 32 a member.
    **{f"scatter{members}": {"exchange": "scatter", "members": members} for members in (4, 8, 16)},
}
CHOICES: dict[str, tuple[Any, ...]] = {
    "cell": ("lstm", "gru", "rnn_tanh", "rnn_relu"),
    "precision": tuple(PRECISIONS),
    "exchange": tuple(EXCHANGES),
    "T": (1, 2, 7, 65),
    "B": (1, 3, 33),
    "H": (1, 3, 17, 33, 50, 64, 115, 128, 130, 250, 256),
    "D": (1, 5),
    "bidirectional": (False, True),
    "lengths": (False, True),
    "reset": (False, True),
    "save": ("gates", "recompute"),
    "bias": (True, False),
    "hx": (True, False),
}
Row = dict[str, Any]


@cache
def _has_plan(cell: str, precision: str, exchange: str, batch: int, hidden: int, recurrences: int) -> bool:
    if exchange == "stepwise" or precision == "f64":
        return exchange == "stepwise"
    return all(
        fused_rnn.plan(
            cell, batch, hidden, dtype=PRECISIONS[precision], tf32=precision == "tf32", recurrences=recurrences,
            backward=backward, device=DEVICE, **EXCHANGES[exchange],
        ).reason is None
        for backward in (False, True)
    )  # fmt: skip


def _possible(row: Row) -> bool:
    if row["T"] * row["H"] * row["B"] > 65 * 3 * 130:  # seconds in the emulator
        return False
    rounds = row["precision"] in ("bf16", "f16", "tf32")
    if row["cell"] == "rnn_relu" and rounds and (row["T"] > 7 or row["H"] > 33):
        return False  # at its kink rounding alone decides for a relu; of many such, torch's one result says little
    if row["H"] == 1 and (row["precision"] == "tf32" or row["T"] * row["B"] == 1):
        return False  # of so few products, each rounded to 10 bits, it is luck which implementation's error is larger
    return _has_plan(*(row[name] for name in ("cell", "precision", "exchange", "B", "H")), 1 + row["bidirectional"])


def _pairs(row: Row) -> Iterator[tuple[Any, ...]]:
    return itertools.combinations(row.items(), 2)


def _rows() -> list[Row]:
    """Every cell with every precision by every exchange, each with those choices of many whose pairs have met least."""
    dice, met, rows = random.Random(0), set(), []
    for cell, precision, exchange in itertools.product(*(CHOICES[name] for name in ("cell", "precision", "exchange"))):
        found = []
        for _ in range(300):
            row = {name: dice.choice(values) for name, values in CHOICES.items()}
            row |= {"cell": cell, "precision": precision, "exchange": exchange}
            if _possible(row):
                found.append(row)
        if found:
            rows.append(max(found, key=lambda row: sum(pair not in met for pair in _pairs(row))))
            met.update(_pairs(rows[-1]))
    return rows


def rows() -> list[Row]:
    """None where the compiled extension, which has the planner, is missing."""
    return _rows() if fused_rnn.ops._C is not None else []


def case_of(row: Row) -> Case:
    options = {name: value for name, value in row.items() if name not in ("precision", "exchange")}
    return Case(**options, dtype=PRECISIONS[row["precision"]])


# --- torch in TF32: see tolerances.py


@cache
def truncates() -> bool:
    """Whether torch.mm on this GPU takes the first 10 bits of its operands in TF32, as tensor cores do, unrounded."""
    ulp, matmul = 2.0**-10, torch.backends.cuda.matmul
    x, before = torch.full((256, 256), 1 + 0.75 * ulp, device="cuda"), matmul.fp32_precision
    matmul.fp32_precision = "tf32"
    try:
        return float(torch.mm(x, torch.eye(256, device="cuda"))[0, 0]) == 1.0
    finally:
        matmul.fp32_precision = before


def rounded(t: Tensor, truncate: bool = False) -> Tensor:
    """A float32 tensor to TF32's 10 bits: to nearest, ties away from zero, as cvt.rna.tf32 has it; or the first 10."""
    return ((t.contiguous().view(torch.int32) + (0 if truncate else 0x1000)) & -0x2000).view(torch.float32)


def _as_operand(t: Tensor) -> Tensor:
    """As torch.mm on t's device has it; where there is no GPU, to nearest."""
    return rounded(t, t.is_cuda and truncates())


class _Tf32Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return _as_operand(x) @ _as_operand(w).t()

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:
        x, w, dy = (_as_operand(t) for t in (*ctx.saved_tensors, dy))
        return dy @ w, dy.flatten(0, -2).t() @ x.flatten(0, -2)


class _Tf32Products(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not torch.nn.functional.linear:
            return func(*args, **(kwargs or {}))
        x, w, b = (*args, None)[:3]
        product = _Tf32Linear.apply(x, w)
        return product if b is None else product + b


def by_torch_in_tf32(case: Case, given: Inputs) -> Results:
    """The plain loop by torch's float32 operations, the operands of every product in TF32 as on a GPU.

    On a GPU as well: of the small products of a case, torch's own kernels there run some in float32 after all.
    """

    def run(leaves: Inputs) -> list[Tensor]:
        with _Tf32Products():
            return forward(case, leaves, "reference", save="gates")

    return differentiate(given, run)
