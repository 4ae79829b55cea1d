"""Plans for a layer's loops, made by csrc/cuda/plan.cpp and remembered."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch

from fused_rnn.cells import Cell
from fused_rnn.cuda import module, scan
from fused_rnn.cuda.chunks import paying_chunks
from fused_rnn.gpu.precision import tf32_allowed
from fused_rnn.plan import (
    EXCHANGES,
    PRECISIONS,
    Device,
    Forced,
    Plan,
    Stages,
    fewer_blocks,
    make,
    precision_of,
    read,
)

_forced = Forced()  # of every plan here; exchange "stepwise" for no plan at all
_chunks: int | None = None  # of every stack


@contextmanager
def override(
    exchange: str | None = None, members: int = 0, rows: int = 0, known: bool = True, chunks: int | None = None
) -> Iterator[None]:
    """Loops run by plans with these parts: for tests and for tuning. A plan that there is not raises RuntimeError.

    known: whether a kernel may be taken that is compiled for the team, and not for any.
    chunks: of time, in which a stack of layers runs as a wavefront; 1: layer by layer; None: as many as pay.
    """
    global _forced, _chunks
    if exchange not in (None, "stepwise", *EXCHANGES):
        raise ValueError(f"exchange: got {exchange!r}, expected None, 'stepwise' or one of {', '.join(EXCHANGES)}")
    if chunks is not None and chunks < 1:
        raise ValueError(f"chunks: got {chunks}, expected None or at least 1")
    before, _forced, _chunks = (_forced, _chunks), Forced(exchange, members, rows, known), chunks
    try:
        yield
    finally:
        _forced, _chunks = before


def precision(dtype: torch.dtype) -> int:
    """The place in PRECISIONS of how products are taken."""
    return PRECISIONS.index(precision_of(dtype, dtype == torch.float32 and tf32_allowed()))


def forced() -> Forced:
    """What plans are not left to the planner."""
    return _forced


def choose(
    device: int,
    *sizes: int,
    known: bool = True,
    fewer: int = 0,
    narrow: str | None = None,
    stages: Stages = Stages(),  # noqa: B008 (a named tuple)
) -> Any | None:
    """The module's plan, or None where the loop runs a step at a time. Arguments as fused_rnn.plan.make has them."""
    return _choose(module.loaded(), _forced, device, sizes, known, fewer, narrow, stages)


def ask(
    device: int,
    *sizes: int,
    known: bool = True,
    fewer: int = 0,
    stages: Stages = Stages(),  # noqa: B008 (a named tuple)
) -> Plan:
    """Likewise, to be read."""
    loops, name = module.loaded(), PRECISIONS[sizes[0]]
    found = _device(loops, device)
    native = choose(device, *sizes, known=known, fewer=fewer, stages=stages)
    if native is None and _forced.exchange == "stepwise":
        return Plan("stepwise", name, Device.of(found), reason="as asked for")
    return read(native or make(loops, sizes, found, Forced(), known, fewer, stages=stages), name, Device.of(found))


def chunks(cell: Cell, device: int, sizes: tuple[int, ...], layers: int, steps: int) -> int:
    """In how many chunks of time a stack's loop runs, 1 for layer by layer: as overridden, or as many as pay."""
    if cell.staged:  # teams of several layers would publish at once: that has not been looked at
        return 1
    if _chunks is not None or not cell.recurrent:
        return _chunks or 1
    fewer = fewer_blocks(cell, PRECISIONS[sizes[0]], bool(sizes[1]))
    return _paying_chunks(module.loaded(), _forced, device, sizes, fewer, layers, steps)


def chunk_of_time(cell: Cell, device: int, steps: int, units: int) -> int:
    """How many steps a chunk of time has, as fused_rnn.cuda.scan has it; all of them where there are no chunks."""
    return scan.chunk_of(cell, steps, units, _device(module.loaded(), device).multiprocessors)


@lru_cache(maxsize=4096)
def _paying_chunks(
    loops: Any, forced: Forced, device: int, sizes: tuple[int, ...], fewer: int, layers: int, steps: int
) -> int:
    return paying_chunks(ask(device, *sizes, fewer=fewer), layers, steps)


@lru_cache(maxsize=4096)
def _choose(
    loops: Any,
    forced: Forced,
    device: int,
    sizes: tuple[int, ...],
    known: bool,
    fewer: int,
    narrow: str | None,
    stages: Stages,
) -> Any | None:
    if forced.exchange == "stepwise" or PRECISIONS[sizes[0]] == "f64":
        return None
    plan = make(loops, sizes, _device(loops, device), forced, known, fewer, narrow, stages)
    if plan.refusal and forced._replace(known=True) != Forced():
        raise RuntimeError(f"no plan with {forced}: {plan.refusal}")
    return None if plan.refusal else plan


@lru_cache(maxsize=64)
def _device(loops: Any, index: int) -> Any:
    return loops.device(index)
