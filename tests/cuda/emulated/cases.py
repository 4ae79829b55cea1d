"""The cases of the CUDA loops: every kernel meets every option in pairs, drawn by a fixed seed."""

from __future__ import annotations

import itertools
import pickle
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from cuda_cases import PRECISIONS
from emulated_build import CELLS as BUILT_IN
from emulated_printed import SHAPES
from tolerances import TIMES_TORCH, ULPS, error
from torch import Tensor

from fused_rnn.call import NARROW
from fused_rnn.cells import CELLS
from fused_rnn.cuda.stepwise import runs
from fused_rnn.gpu.narrow import narrowed, widened
from fused_rnn.plan import stages_of

from . import reference

EPS = {name: torch.finfo(dtype).eps for name, dtype in PRECISIONS.items()} | {"tf32": 2.0**-10}


class Exchange(NamedTuple):
    """kind: ExchangeKind.  widths: hidden sizes that such a team can have: units of a member are a multiple of 16.
    known: by the kernels that are compiled for the team."""

    kind: int
    members: int
    widths: tuple[int, ...]
    known: bool = False


EXCHANGES = {
    "cta": Exchange(0, 1, (1, 3, 17, 48)),
    "cluster 2": Exchange(1, 2, (17, 33, 64)),
    "cluster 3": Exchange(1, 3, (48,)),
    "cluster 4": Exchange(1, 4, (50, 64)),
    "cluster 8": Exchange(1, 8, (117, 128)),
    "cluster 16": Exchange(1, 16, (245, 256)),
    "grid": Exchange(2, 0, (17, 33, 48, 130)),
    "stepwise": Exchange(-1, 0, (1, 3, 17, 130)),
    # Backward by scatter, forward by a known cluster.
    "scatter 4": Exchange(3, 4, (64, 128), known=True),
    "scatter 8": Exchange(3, 8, (128, 256), known=True),
    "scatter 16": Exchange(3, 16, (256, 512), known=True),
    # Teams that the emulator alone has kernels for. Backward directly, forward by the grid in 8 rows; forward by the
    # grid with a part of the weights in shared memory, backward in 8 rows.
    "direct 2": Exchange(4, 2, (64,), known=True),
    "direct 4": Exchange(4, 4, (128,), known=True),
    "direct 8": Exchange(4, 8, (128,), known=True),
    "known grid": Exchange(2, 10, (320,), known=True),
}


class Case(NamedTuple):
    cell: str
    precision: str
    exchange: str
    T: int
    B: int
    H: int
    directions: str = "f"  # of each recurrence: forwards, reverse
    lengths: bool = False
    reset: bool = False
    save: str = "saved"  # none, saved, recompute (by windows of `every` steps)
    every: int = 2
    rows: int = 8
    sequences: bool = False  # states over time are returned, and have gradients
    narrow: str = ""  # what W_hh is kept in, without backward
    chunk: int = 0  # of a cell that is linear in its states: steps of each of the chunks that run side by side

    @property
    def name(self) -> str:
        options = ("lengths" * self.lengths, "reset" * self.reset, "sequences" * self.sequences, self.save, self.narrow)
        options += (f"chunks of {self.chunk}" * (self.chunk > 0),)
        shape = f"T{self.T} B{self.B} H{self.H} {self.directions} rows{self.rows}"
        return " ".join([self.cell, self.precision, self.exchange, shape, *filter(None, options)])


CHOICES: dict[str, tuple[Any, ...]] = {
    "exchange": tuple(EXCHANGES),
    "T": (1, 2, 7),
    "B": (1, 3, 33),
    "H": (1, 3, 17, 33, 48, 50, 64, 117, 128, 130, 245, 256, 320, 512),
    "directions": ("f", "r", "fr", "frf"),
    "lengths": (False, True),
    "reset": (False, True),
    "save": ("saved", "none", "recompute"),
    "every": (2, 3),
    "rows": (8, 16, 32),
    "sequences": (False, True),
}


# The race detector's time grows with the square of the threads that run together.
SMALL: dict[str, tuple[Any, ...]] = {
    "exchange": ("cta", *(f"cluster {n}" for n in (2, 4, 8)), "grid", "stepwise", "scatter 4", "scatter 8", "direct 2"),
    "T": (1, 2, 4),
    "B": (1, 3, 9),
    "rows": (8, 16),
}


# Of the exchanges with known teams, by how their names begin: what those teams' are called, forward and backward.
KNOWN = {"scatter": ("cluster", "scatter"), "direct": ("direct",), "known": ("grid",)}


def shapes(told: Iterable[Case]) -> int:
    """The known teams that these cases run, as bits of their places."""
    found = 0
    for case in told:
        exchange = EXCHANGES[case.exchange]
        if exchange.known:
            team = (exchange.members, case.H // exchange.members)
            names = KNOWN[case.exchange.partition(" ")[0]]
            found |= sum(1 << i for i, (_, name, *own) in enumerate(SHAPES) if name in names and tuple(own) == team)
    return found


def exchanges(cell: str, precision: str) -> set[str]:
    """The names of those that a kernel can run."""
    if precision == "f64":
        return {"stepwise"}
    scatters = precision != "ieee" and CELLS[cell].gates > 1
    return {name for name, exchange in EXCHANGES.items() if scatters or not exchange.known}


def _possible(row: dict[str, Any], smallest: set[tuple[str, str]]) -> bool:
    kind, members, widths, known = EXCHANGES[row["exchange"]]
    if row["exchange"] not in exchanges(row["cell"], row["precision"]) or (
        known and row["rows"] != (16 if row["exchange"] in ("direct 2", "known grid") else 8)
    ):
        return False
    if kind == 3 and row["precision"] == "tf32" and row["H"] // members == 32 and members > 4:
        return False
    if row["H"] not in widths or (row["cell"].startswith("rnn") and row["save"] == "recompute"):
        return False
    if row["sequences"] and len(CELLS[row["cell"]].states) == 1:
        return False
    if row["precision"] == "ieee" and row["rows"] > (16 if row["H"] < 200 else 8):  # what fits
        return False
    units = 16 * -(-row["H"] // (16 * members)) if members else 16
    if units * row["rows"] > 512:  # two cells a thread
        return False
    if row["kernel"] in smallest and row["rows"] > 8 and kind >= 0 and not known:
        return False
    # What takes the emulator seconds.
    teams = len(row["directions"]) * -(-row["B"] // row["rows"])
    most = 1 if row["H"] > 256 else 2 if members >= 8 else 4 if row["H"] >= 117 else teams
    return teams <= most


def pairwise(
    kernels: list[tuple[str, str]], smallest: set[tuple[str, str]], seed: int, small: bool = False
) -> list[Case]:
    """Cases in which any two choices that can meet do, each kernel counting as one choice.

    smallest: kernels with 8 rows alone.
    """
    drawn = random.Random(seed)
    choices = {"kernel": tuple(kernels), **CHOICES, **(SMALL if small else {})}

    def draw() -> dict[str, Any]:
        while True:
            row: dict[str, Any] = {}
            row["kernel"] = drawn.choice(choices["kernel"])
            row["cell"], row["precision"] = row["kernel"]
            row["exchange"] = "stepwise" if row["precision"] == "f64" else drawn.choice(choices["exchange"])
            widths = EXCHANGES[row["exchange"]].widths
            row["H"] = drawn.choice(widths[:2] if small else widths)
            for name in choices:
                if name not in row:
                    row[name] = drawn.choice(choices[name])
            if _possible(row, smallest):
                return row

    def pairs(row: dict[str, Any]) -> set[Any]:
        return set(itertools.combinations([(name, row[name]) for name in choices], 2))

    pool = [draw() for _ in range(100 + 150 * len(kernels))]
    left = set().union(*map(pairs, pool))
    rows = []
    while left:
        best = max(pool, key=lambda row: len(pairs(row) & left))
        left -= pairs(best)
        rows.append(best)
    return [Case(**{name: row[name] for name in Case._fields if name in row}) for row in rows]


def _raw(t: Tensor, dtype: torch.dtype) -> np.ndarray[Any, Any]:
    """As it lies in memory; numpy has no bfloat16."""
    t = t.detach().to(dtype).contiguous()
    return (t.view(torch.int16) if dtype == torch.bfloat16 else t).numpy()


def job(case: Case) -> dict[str, Any]:
    """What drive.py needs: the case, its inputs, the results in float64 and the error that each may have."""
    generator = torch.Generator().manual_seed(hash_of(case))
    dtype, spec, recurrences = PRECISIONS[case.precision], CELLS[case.cell], len(case.directions)
    steps, batch, units = case.T, case.B, case.H

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        drawn = torch.randn(*shape, generator=generator, dtype=torch.float64) * scale
        return drawn.to(dtype).double()

    given = {
        "gx": normal(steps, batch, recurrences, spec.gates, units),
        "bias": normal(recurrences, spec.apart, units, scale=0.3),
        "dy": normal(steps, batch, recurrences, units),
        "lengths": torch.full((batch,), steps),
        "reset": torch.zeros(steps, batch, dtype=torch.int32),
    }
    if spec.recurrent:
        given["w"] = normal(recurrences, spec.gates, units, units, scale=units**-0.5)
    kept = {}
    if case.narrow:
        # Rows of several magnitudes, so that no scale is like another.
        rows = given["w"].float().flatten(0, 2) * torch.logspace(-1, 0, given["w"][..., 0].numel()).unsqueeze(1)
        values, scale = narrowed(rows, case.narrow)
        given["w"] = widened(values, None if scale is None else scale.double(), torch.float64).view(given["w"].shape)
        kept = {"w": values.numpy() if scale is not None else _raw(values, torch.bfloat16)}
        kept["scale"] = None if scale is None else scale.numpy()
    if spec.matrices:
        given["matrices"] = normal(recurrences, spec.blocks, units, units, scale=units**-0.5)
    for k in range(spec.masks):  # by turns the same at all times, and others at each
        given[f"mask{k}"] = normal(recurrences, 1 if k % 2 else steps, batch, units)
    if spec.params:
        given["params"] = normal(recurrences, len(spec.params), units)
    for i in range(len(spec.states)):
        given[f"s{i}"] = normal(recurrences, batch, units, scale=0.5)
        given[f"ds{i}"] = normal(recurrences, batch, units)
        if case.sequences and i:
            given[f"dq{i}"] = normal(steps, batch, recurrences, units)
    if case.lengths:  # one sequence at least is whole, and where there are several one is empty
        given["lengths"] = torch.randint(1, steps + 1, (batch,), generator=generator)
        given["lengths"][0], given["lengths"][batch // 2] = 0, steps
    if case.reset:
        given["reset"] = (torch.rand(steps, batch, generator=generator) < 0.3).to(torch.int32)
    backwards = [direction == "r" for direction in case.directions]
    if case.cell == "rnn_relu":
        reference.leave_the_kink(given, backwards, dtype)
    right = reference.run(case.cell, given, backwards, torch.float64)
    own = reference.run(case.cell, given, backwards, dtype, tf32=case.precision == "tf32")
    allowed = {}
    for name, t in right.items():
        # A gradient's rounding is that of the largest gradient: it may be what a cancellation has left.
        scale = max(1.0, float(t.abs().max()))
        allowed[name] = TIMES_TORCH * error(own[name], t) + ULPS * EPS[case.precision] * scale
    if case.precision == "f64":
        allowed = {name: 1e-11 * max(1.0, float(t.abs().max())) for name, t in right.items()}

    past = torch.arange(steps)[:, None] >= given["lengths"]
    for name in ("gx", "dy", *(name for name in given if name.startswith("dq"))):  # nobody may use these
        given[name] = given[name].clone()
        given[name][past] = float("nan")
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    arrays = {name: given[name].numpy() for name in ("lengths", "reset")}
    for name, t in given.items():
        if name not in arrays:
            arrays[name] = _raw(t, wide if name.startswith("ds") else dtype)
            arrays[f"wide {name}"] = _raw(t, wide)
    kind, members, _, known = EXCHANGES[case.exchange]
    told = {"kind": kind, "members": members, "known": known, "name": case.name, "narrow": NARROW[case.narrow or None]}
    return {
        "case": case._asdict() | told,
        "spec": {
            "gates": spec.gates,
            "states": len(spec.states),
            "saved": spec.saved,
            "apart": spec.apart,
            "reads_h": spec.reads_h,
            "params": len(spec.params),
            "recurrent": spec.recurrent,
            "blocks": spec.blocks,
            "masks": spec.masks,
            "stages": [tuple(stages_of(spec, backward)) for backward in (False, True)],
            "runs": [runs(spec.program.text, backward) for backward in (False, True)] if spec.staged else None,
            "persistent_sequences": case.cell not in BUILT_IN,
        },
        "given": arrays | kept,
        "right": {name: t.numpy() for name, t in right.items()},
        "allowed": allowed,
    }


def hash_of(case: Case) -> int:
    return sum(ord(c) * 31**i for i, c in enumerate(case.name)) % 2**31


def write(cases: list[Case], seeds: int, path: Path) -> None:
    path.write_bytes(pickle.dumps({"jobs": [job(case) for case in cases], "seeds": seeds}))
