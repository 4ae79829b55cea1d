"""Which backend measured fastest on a GPU: tables in `measured`, one for an architecture, written from result
files by `python -m fused_rnn bench --device cuda --choose`.

A table has for each cell, number, mode and shape ("lstm bf16 training sequence"; "step" where T = 1) its rows, each up
to a largest H, and in a row the backends, each up to a largest B; null is without end.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch

FOLDER = Path(__file__).parent / "measured"
Row = tuple[tuple[int | None, str], ...]
Rows = tuple[tuple[int | None, Row], ...]


def key_of(cell: str, number: str, training: bool, single_step: bool) -> str:
    """The rows' name. cell: "rnn" stands for both of its nonlinearities. number: fp32, tf32, bf16, fp16 or fp64."""
    mode, shape = "training" if training else "inference", "step" if single_step else "sequence"
    return f"{cell.partition('_')[0]} {number} {mode} {shape}"


def number_of(dtype: torch.dtype, tf32: bool) -> str:
    """As the benchmark calls it. tf32: whether float32 products may round to TF32."""
    names = {torch.float64: "fp64", torch.bfloat16: "bf16", torch.float16: "fp16"}
    return names.get(dtype, "tf32" if tf32 else "fp32")


def architecture() -> str:
    """sm_90 for the current GPU's; "" where torch finds none."""
    if not torch.cuda.is_available():
        return ""
    major, minor = torch.cuda.get_device_capability()
    return f"sm_{major}{minor}"


@cache
def table(architecture: str) -> dict[str, Rows]:
    """Every rows of an architecture; empty where nothing was measured."""
    path = FOLDER / f"{architecture}.json"
    if not architecture or not path.exists():
        return {}
    return {key: _tuples(rows) for key, rows in json.loads(path.read_text(encoding="utf-8"))["rows"].items()}


def rows_of(key: str) -> Rows:
    """The rows for the current GPU, () where there are none."""
    return table(architecture()).get(key, ())


# What torch.compiler.assume_constant_result does, without the import of all of Dynamo that it costs: an answer of the
# environment, which is not to be traced.
rows_of._dynamo_marked_constant = True  # type: ignore[attr-defined]


def pick(rows: Rows, hidden: int, batch: int) -> str | None:
    """The backend for these sizes. Asks of the batch only what differs, so that a compiled caller takes any other."""
    for most, row in rows:
        if most is None or hidden <= most:
            for largest, backend in row:
                if largest is None or batch <= largest:
                    return backend
    return None


def _tuples(rows: Sequence[Sequence[object]]) -> Rows:
    return tuple((most, tuple((largest, name) for largest, name in row)) for most, row in rows)  # type: ignore
