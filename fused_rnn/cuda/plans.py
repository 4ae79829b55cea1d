"""Plans for a layer's loops, made by csrc/cuda/plan.cpp and remembered."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, NamedTuple

import torch

from fused_rnn.cuda import module
from fused_rnn.gpu.precision import tf32_allowed
from fused_rnn.plan import EXCHANGES, NUMBERS, Device, Plan, number_of, read


class Forced(NamedTuple):
    """Parts of every plan that are not left to the planner; exchange "stepwise" for no plan at all."""

    exchange: str | None = None
    members: int = 0
    rows: int = 0


_forced = Forced()


@contextmanager
def override(exchange: str | None = None, members: int = 0, rows: int = 0) -> Iterator[None]:
    """Loops run by plans with these parts: for tests and for tuning. A plan that there is not raises RuntimeError."""
    global _forced
    if exchange not in (None, "stepwise", *EXCHANGES):
        raise ValueError(f"exchange: got {exchange!r}, expected None, 'stepwise' or one of {', '.join(EXCHANGES)}")
    before, _forced = _forced, Forced(exchange, members, rows)
    try:
        yield
    finally:
        _forced = before


def precision(dtype: torch.dtype) -> int:
    """csrc/cuda's Precision: how products are taken."""
    return NUMBERS.index(number_of(dtype, tf32_allowed()))


def choose(device: int, kind: int, backward: bool, gates: int, batch: int, hidden: int, recurrences: int) -> Any | None:
    """The module's plan, or None where the loop runs a step at a time."""
    return _choose(module.loaded(), _forced, device, kind, backward, gates, batch, hidden, recurrences)


def ask(device: int, kind: int, backward: bool, gates: int, batch: int, hidden: int, recurrences: int) -> Plan:
    """Likewise, to be read."""
    loops, name = module.loaded(), NUMBERS[kind]
    found = _device(loops, device)
    facts = Device(found.arch, found.multiprocessors, found.shared, found.clusters)
    native = choose(device, kind, backward, gates, batch, hidden, recurrences)
    if native is not None or _forced.exchange == "stepwise":
        return Plan("stepwise", name, facts, reason="as asked for") if native is None else read(native, name, facts)
    return read(loops.make_plan(kind, backward, gates, batch, hidden, recurrences, found), name, facts)


@lru_cache(maxsize=4096)
def _choose(
    loops: Any,
    forced: Forced,
    device: int,
    kind: int,
    backward: bool,
    gates: int,
    batch: int,
    hidden: int,
    recurrences: int,
) -> Any | None:
    if forced.exchange == "stepwise" or NUMBERS[kind] == "f64":
        return None
    exchange = -1 if forced.exchange is None else EXCHANGES.index(forced.exchange)
    plan = loops.make_plan(
        kind, backward, gates, batch, hidden, recurrences, _device(loops, device), exchange, forced.members, forced.rows
    )
    if plan.refusal and forced != Forced():
        raise RuntimeError(f"no plan with {forced}: {plan.refusal}")
    return None if plan.refusal else plan


@lru_cache(maxsize=64)
def _device(loops: Any, index: int) -> Any:
    return loops.device(index)
