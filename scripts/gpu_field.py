"""Time of the cells of the literature on a GPU, beside the closest that torch.nn has: `make gpu-field`.

    python scripts/gpu_field.py --out FOLDER [--cell MinGRU] [--minutes 1]

Milliseconds of whole calls in bf16, inference and training, by each backend. Cells that are linear in their states also
without chunks of time side by side. Run by scripts/gpu.py; writes field.json as it goes.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).parent.parent))  # a checkout built in place, with nothing installed

import torch
from gpu_steps import milliseconds

import fused_rnn
from fused_rnn.commands.bench.field import closest
from fused_rnn.gpu import chunks

# T, B, H. The last leaves most of a GPU idle without chunks of time.
SHAPES = ((512, 8, 256), (512, 64, 512), (4096, 1, 256))
CELLS = ("LayerNormLSTM", "LayerNormGRU", "BlockGRU", "ResetBeforeGRU", "SLSTM", "PeepholeLSTM", "MinGRU", "MinLSTM")
LINEAR = ("MinGRU", "MinLSTM")
NEVER = 1 << 30


@contextmanager
def as_planned() -> Iterator[None]:
    yield


@contextmanager
def without_chunks() -> Iterator[None]:
    with patch.object(chunks, "FEWEST_CHUNKS", NEVER):
        yield


def ways(cell: str) -> Iterator[tuple[str, str, Callable[[], Any]]]:
    """How a cell is run: by whom, named how."""
    yield "torch", f"torch.nn.{closest(cell)}", as_planned
    for backend in ("cuda", "triton"):
        yield backend, backend, as_planned
        if cell in LINEAR:
            yield backend, f"{backend}, one chunk", without_chunks


def module_of(cell: str, backend: str, hidden: int, device: str) -> torch.nn.Module:
    if backend == "torch":
        return getattr(torch.nn, closest(cell))(hidden, hidden, device=device, dtype=torch.bfloat16)
    return getattr(fused_rnn, cell)(hidden, hidden, device=device, dtype=torch.bfloat16, backend=backend)


def calls(module: torch.nn.Module, x: torch.Tensor) -> dict[str, Callable[[], object]]:
    leaves, dy = [x.clone().requires_grad_(), *module.parameters()], torch.randn_like(x)

    def inference() -> object:
        with torch.no_grad():
            return module(x)[0]

    return {"inference": inference, "training": lambda: torch.autograd.grad(module(leaves[0])[0], leaves, dy)}


def measure(cells: tuple[str, ...], out: Path, end: float, device: str = "cuda") -> int:
    """Writes a row of each cell, shape, way and mode; how many were refused or failed."""
    rows: list[dict[str, Any]] = []
    failed = 0
    for (steps, batch, hidden), cell in ((shape, cell) for shape in SHAPES for cell in cells):
        x = torch.randn(steps, batch, hidden, device=device, dtype=torch.bfloat16)
        for backend, title, planned in ways(cell):
            case = {"cell": cell, "T": steps, "B": batch, "H": hidden, "way": title}
            if time.monotonic() > end:
                print("time is up")
                return failed
            try:
                with planned():
                    for mode, call in calls(module_of(cell, backend, hidden, device), x).items():
                        call()  # compiles
                        rows.append({**case, "mode": mode, "ms": round(milliseconds(call), 4)})
                        print(*rows[-1].values(), flush=True)
            except Exception as error:  # of this way; the others go on
                failed += 1
                rows.append({**case, "mode": "failed", "error": str(error)[:300]})
                print(*rows[-1].values(), flush=True)
            (out / "field.json").write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    return failed


def main() -> int:
    parser = argparse.ArgumentParser(prog="gpu_field", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--cell", choices=CELLS, action="append")
    parser.add_argument("--minutes", type=float, default=1.0)
    chosen = parser.parse_args()
    chosen.out.mkdir(parents=True, exist_ok=True)
    failed = measure(tuple(chosen.cell or CELLS), chosen.out, time.monotonic() + 60 * chosen.minutes)
    if failed:
        print(f"{failed} ways failed")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
