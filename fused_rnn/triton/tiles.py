"""Which way a loop runs, and in what tiles: a function of the cell, dtype, H and the architecture.

T has no say, so that a new length compiles nothing. B and R only say which of a few plans fits the device at once.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

LOOPS = ("a", "b", "c")
KIB = 1024
SPILLS = 64  # bytes of a thread that a kernel may spill: they cost less than to compile it again


@dataclass(frozen=True)
class Device:
    """What the planner must know of a device. shared: bytes of shared memory one program may take."""

    arch: str  # sm_90, gfx942; "interpreter"
    processors: int
    shared: int
    cooperative: bool = True

    @property
    def nvidia(self) -> bool:
        return self.arch.startswith("sm_")

    @property
    def amd(self) -> bool:
        return self.arch.startswith("gfx")


# Shared memory that a block can opt in to; processors of a usual card (a running device says its own).
ARCHITECTURES = {
    "sm_80": Device("sm_80", 108, 163 * KIB),
    "sm_86": Device("sm_86", 84, 99 * KIB),
    "sm_87": Device("sm_87", 16, 163 * KIB),
    "sm_89": Device("sm_89", 128, 99 * KIB),
    "sm_90": Device("sm_90", 132, 227 * KIB),
    "sm_100": Device("sm_100", 148, 227 * KIB),
    "sm_103": Device("sm_103", 148, 227 * KIB),
    "sm_120": Device("sm_120", 170, 99 * KIB),
    "sm_121": Device("sm_121", 48, 99 * KIB),
    "gfx90a": Device("gfx90a", 104, 64 * KIB),
    "gfx942": Device("gfx942", 304, 64 * KIB),
    "gfx950": Device("gfx950", 256, 160 * KIB),
}
INTERPRETER = Device("interpreter", 1 << 20, 1 << 40)


class Shape(NamedTuple):
    """What a plan is keyed on. kind: how products are taken, "half" (16-bit), "tf32" or "ieee"."""

    cell: str
    gates: int
    kind: str
    hidden: int
    backward: bool

    @property
    def size(self) -> int:
        return 2 if self.kind == "half" else 4


@dataclass(frozen=True)
class Tile:
    """batch x units of one program, products taken in steps of depth."""

    batch: int
    units: int
    depth: int
    warps: int
    stages: int = 1
    ahead: bool = True  # a step's input is asked for before the wait for the step's turn; costs registers


@dataclass(frozen=True)
class Plan:
    """loop: a one program a batch tile, b a team that waits for each other, c a launch a step.

    team: programs that share a recurrence and batch tile.  spread: unit tiles of each.
    registers: all of h and W_hh in one program.  hold: the program's part of W_hh resident.
    """

    loop: str
    tile: Tile
    team: int
    spread: int = 1
    registers: bool = False
    hold: bool = False

    @property
    def ahead(self) -> bool:
        return self.tile.ahead and self.spread == 1 and self.loop != "c"

    def tiles(self, batch: int) -> int:
        return -(-batch // self.tile.batch)

    def programs(self, batch: int, recurrences: int) -> int:
        return self.team * self.tiles(batch) * recurrences

    def __str__(self) -> str:
        how = "registers" if self.registers else "resident" if self.hold else "streamed"
        t = self.tile
        team = f"team of {self.team}" if self.team > 1 else "one program"
        return f"loop {self.loop}, {team}, W_hh {how}, tile {t.batch}x{t.units}x{t.depth}, {t.warps} warps"


# The tables. Chosen by what compiles into an architecture's shared memory (Triton 3.6 and 3.9): without spills worth a
# retry, with few products a warp, and with loads of h or dgates that do not wait for each other. Not by time, for want
# of a GPU: measured plans go into the table of `record`. Of several tiles the first that fits is taken.
HOLD = {
    "half": (Tile(16, 32, 128, 4), Tile(16, 16, 256, 4)),
    "tf32": (Tile(16, 32, 128, 4), Tile(16, 16, 128, 4)),
    "ieee": (),  # without tensor cores the operands of a resident product fill the registers
}
HOLD_BACKWARD = {
    "half": (Tile(16, 32, 256, 8), Tile(16, 32, 128, 8), Tile(16, 16, 128, 8)),
    "tf32": (Tile(16, 32, 128, 8, ahead=False), Tile(16, 16, 64, 8, ahead=False), Tile(16, 16, 32, 4, ahead=False)),
    "ieee": (),
}
HOLD_LARGE = {
    "half": (Tile(32, 64, 128, 8), Tile(32, 32, 128, 8), Tile(32, 16, 1024, 8)),
    "tf32": (),
    "ieee": (),
}
HOLD_LARGE_BACKWARD = {**HOLD_LARGE, "half": (Tile(32, 64, 128, 8), Tile(32, 16, 128, 8))}
STREAM = {"half": Tile(16, 32, 64, 4, 3), "tf32": Tile(16, 32, 32, 4, 3), "ieee": Tile(16, 32, 32, 8, 3, ahead=False)}
STREAM_LARGE = {
    "half": Tile(64, 32, 32, 8, 2, ahead=False),
    "tf32": Tile(32, 64, 32, 8, 2, ahead=False),
    "ieee": Tile(32, 32, 32, 8, 2, ahead=False),
}
# LSTM's backward has the most to hold in registers. A product of all four gates over 64 rows is too much for it.
STREAM_LARGE_BACKWARD = {
    **STREAM_LARGE,
    "half": Tile(32, 64, 32, 8, 2, ahead=False),
    "tf32": Tile(32, 64, 16, 8, 2, ahead=False),
    "ieee": Tile(32, 32, 16, 8, 2, ahead=False),
}
# For rows of H elements that 16 bytes do not divide: elements loaded one by one take the registers of a large tile.
STREAM_ODD = {
    "half": Tile(16, 32, 32, 4, 3, ahead=False),
    "tf32": Tile(16, 32, 32, 4, 3, ahead=False),
    "ieee": Tile(16, 32, 16, 8, 3, ahead=False),
}
# On AMD what is resident stays in registers, not in shared memory: this much of it leaves room for the rest, in
# backward half as much.
AMD_RESIDENT = 64 * KIB


def padded(hidden: int) -> int:
    """H as the side of a tile: a power of two, 16 at least. In memory H is never padded."""
    return max(16, 1 << (hidden - 1).bit_length())


def _depth(tile: Tile, hidden: int) -> Tile:
    """The tile with the deepest step that wastes at most a quarter of H to padding."""
    depth = tile.depth
    while depth > 16 and -(-hidden // depth) * depth * 4 > hidden * 5:
        depth //= 2
    return replace(tile, depth=depth)


def _fits(shape: Shape, device: Device, tile: Tile, units: int) -> bool:
    """Whether W_hh for `units` units can stay resident beside what the products stage."""
    depth = -(-shape.hidden // tile.depth) * tile.depth
    # Forward takes the gates of a team's member in one product, three of them as four.
    gates = 4 if shape.gates == 3 and not shape.backward and units < shape.hidden else shape.gates
    weights = gates * units * depth * shape.size
    if not device.nvidia:
        return weights <= (AMD_RESIDENT // 2 if shape.backward else AMD_RESIDENT)
    rows = 2 * shape.gates * tile.depth if shape.backward else depth
    return weights + tile.batch * rows * shape.size + 2 * KIB <= device.shared


def _registers(shape: Shape, device: Device) -> Plan | None:
    side = padded(shape.hidden)
    warps = 4 if shape.kind != "ieee" and side <= 64 else 8
    if not device.nvidia:
        warps = 4
    tile = Tile(16, side, side, min(warps, max(1, side // 8)))
    limit = {"half": 256, "tf32": 64, "ieee": 64}[shape.kind]
    return Plan("a", tile, 1, registers=True) if side <= limit and _fits(shape, device, tile, side) else None


def _odd(shape: Shape) -> bool:
    return shape.hidden * shape.size % 16 != 0


def _stream(shape: Shape, device: Device, large: bool) -> Tile:
    large_table = STREAM_LARGE_BACKWARD if shape.backward else STREAM_LARGE
    table = STREAM_ODD if _odd(shape) else large_table if large else STREAM
    tile = _depth(table[shape.kind], shape.hidden)
    if device.nvidia:
        return tile
    # AMD's warps have twice the threads, and more than four of them share registers: too few for LSTM's 64 units.
    most = 32 if shape.backward and shape.gates == 4 else tile.units
    return replace(tile, units=min(tile.units, most), warps=min(tile.warps, 4))


def _held(shape: Shape, device: Device, large: bool) -> Tile | None:
    """The first resident tile that fits."""
    forward, backward = (HOLD_LARGE, HOLD_LARGE_BACKWARD) if large else (HOLD, HOLD_BACKWARD)
    for tile in (backward if shape.backward else forward)[shape.kind]:
        tile = _held_as(shape, device, tile)
        if _fits(shape, device, tile, tile.units):
            return tile
    return None


def _held_as(shape: Shape, device: Device, tile: Tile) -> Tile:
    """A resident tile for this shape: in backward, what the registers leave room for."""
    if not device.nvidia:
        tile = replace(tile, depth=min(tile.depth, 128), warps=min(tile.warps, 4))
    side = padded(shape.hidden)
    if not shape.backward and tile.depth >= side:
        return replace(tile, depth=side)  # all of H in one step, padding and all: loads of one tile do not wait
    tile = _depth(tile, shape.hidden)
    if not shape.backward:
        return tile
    if device.arch.startswith("sm_8" if tile.units < 32 else "sm_10"):  # deeper steps spill there
        tile = replace(tile, depth=min(tile.depth, 64))
    return replace(tile, ahead=tile.ahead and tile.batch < 32 and not _odd(shape))


def _teams(shape: Shape, device: Device) -> list[Plan]:
    """Teams with a small batch tile and with a large one."""
    held = _held(shape, device, large=False)
    small = held or _stream(shape, device, large=False)
    plans = [Plan("b", small, -(-shape.hidden // small.units), hold=held is not None)]
    large = _held(shape, device, large=True) if device.nvidia else None
    if large is not None and shape.hidden % large.units == 0:
        return [*plans, Plan("b", large, shape.hidden // large.units, hold=True)]
    return [*plans, _wide(shape, device)]


def _wide(shape: Shape, device: Device) -> Plan:
    """The team of the fewest programs that have a tile each, W_hh streamed."""
    tile = _stream(shape, device, large=True)
    return Plan("b", tile, -(-shape.hidden // tile.units))


SPREADS = (2, 4)


def _spread(shape: Shape, device: Device, spread: int) -> Plan:
    """A team of fewer programs with more units each, W_hh streamed: where the units are too many for the device."""
    tile = _stream(shape, device, large=False)
    return Plan("b", tile, -(-shape.hidden // (tile.units * spread)), spread)


def _alone(shape: Shape, device: Device) -> Plan:
    """One program a batch tile with W_hh streamed: no exchange, but all of W_hh read by every program in every step."""
    tile = _stream(shape, device, large=True)
    return Plan("a", tile, 1, spread=-(-shape.hidden // tile.units))


def _stepwise(shape: Shape, device: Device) -> Plan:
    tile = _stream(shape, device, large=True)
    return Plan("c", tile, -(-shape.hidden // tile.units))


def shipped(shape: Shape, device: Device) -> list[Plan]:
    """Every plan that `choose` can come to without measurements: what is compiled ahead of time by `make cubin`."""
    registers = _registers(shape, device)
    if registers is not None:
        return [registers]
    teams = _teams(shape, device)
    if teams[-1].hold:
        teams.append(_wide(shape, device))
    if 2 * teams[0].team > device.processors:
        teams += [_spread(shape, device, spread) for spread in SPREADS]
    return [*teams, _alone(shape, device), _stepwise(shape, device)]


def choose(shape: Shape, device: Device, batch: int, recurrences: int) -> Plan:
    """The plan for a problem. `override` forces one, a measured table comes next, then the tables above."""
    if _forced:
        return _build(shape, device, **_forced)
    # Measured with R = 1, and perhaps on a part of the same architecture with more multiprocessors.
    measured = [
        (rows, plan)
        for rows, plan in _measured().get(_key(shape, device), ())
        if plan.loop != "b" or plan.team * recurrences <= device.processors
    ]
    if measured:
        within = [plan for rows, plan in measured if batch * recurrences <= rows]
        return within[0] if within else measured[-1][1]
    registers = _registers(shape, device)
    if registers is not None:
        return registers
    teams = _teams(shape, device) if device.cooperative else []
    for plan in teams:
        if plan.programs(batch, recurrences) <= device.processors:
            return plan
    alone = _alone(shape, device)
    if shape.hidden <= 512 and 2 * alone.programs(batch, recurrences) >= device.processors:
        return alone  # a batch that fills the device needs no team
    # A few waves of a team are still fewer launches than one a step.
    for plan in reversed(teams):
        if plan.team * recurrences <= device.processors and plan.programs(batch, recurrences) <= 3 * device.processors:
            return plan
    rest = [_wide(shape, device)] if teams and teams[-1].hold else []
    if teams and 2 * teams[0].team > device.processors:
        rest += [_spread(shape, device, spread) for spread in SPREADS]
    for plan in rest:
        if plan.programs(batch, recurrences) <= device.processors:
            return plan
    return _stepwise(shape, device)


def replay(hidden: int) -> Plan:
    """For making gates again: pointwise, every program for itself, no product."""
    tile = Tile(16, 32, 16, 4, ahead=False)
    return Plan("a", tile, -(-hidden // tile.units))


_forced: dict[str, Any] = {}


@contextmanager
def override(**fields: Any) -> Iterator[None]:
    """Force loop and, if given, tile, spread, registers, hold; in all threads: autograd has one for backward."""
    previous = dict(_forced)
    _forced.update(fields)
    try:
        yield
    finally:
        _forced.clear()
        _forced.update(previous)


def _build(
    shape: Shape,
    device: Device,
    loop: str,
    tile: Tile | None = None,
    spread: int = 1,
    registers: bool = False,
    hold: bool = False,
) -> Plan:
    if loop not in LOOPS:
        raise ValueError(f"loop: expected one of {', '.join(LOOPS)}, got {loop!r}")
    if registers:
        side = padded(shape.hidden)
        batch, warps = (16, 4) if tile is None else (tile.batch, tile.warps)
        return Plan("a", Tile(batch, side, side, warps), 1, registers=True)
    tile = _stream(shape, device, large=False) if tile is None else tile
    blocks = -(-shape.hidden // tile.units)
    if loop == "a":
        return Plan("a", tile, 1, blocks)
    return Plan(loop, tile, -(-blocks // spread), spread, hold=hold and spread == 1)


def measured_path() -> Path:
    """Where tune.py leaves what it measured: $FUSED_RNN_TRITON_TILES, or a file in the user's cache."""
    home = os.environ.get("XDG_CACHE_HOME", "~/.cache")
    default = Path(home).expanduser() / "fused_rnn" / "triton_tiles.json"
    return Path(os.environ.get("FUSED_RNN_TRITON_TILES", default))


def _key(shape: Shape, device: Device) -> str:
    return "/".join(
        (device.arch, shape.cell, shape.kind, str(shape.hidden), "backward" if shape.backward else "forward")
    )


@cache
def _measured() -> dict[str, list[tuple[int, Plan]]]:
    """Per key (B·R up to which, plan) in ascending order."""
    path = measured_path()
    if not path.exists():
        return {}
    try:
        entries = json.loads(path.read_text())["plans"]
        return {
            key: [(rows, Plan(**{**plan, "tile": Tile(**plan["tile"])})) for rows, plan in plans]
            for key, plans in entries.items()
        }
    except (ValueError, KeyError, TypeError) as error:
        raise RuntimeError(f"{path}: not a table that this version's tune wrote ({error!r}); delete it") from error


def record(shape: Shape, device: Device, plans: list[tuple[int, Plan]], note: dict[str, str]) -> None:
    """Put measured plans into the table on disk: (B·R up to which, plan), ascending. note: device, versions, date."""
    path = measured_path()
    table = json.loads(path.read_text()) if path.exists() else {"notes": {}, "plans": {}}
    table["plans"][_key(shape, device)] = [(rows, asdict(plan)) for rows, plan in plans]
    table["notes"][_key(shape, device)] = note
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = path.with_suffix(f".{os.getpid()}")  # so that nobody ever reads half a table
    whole.write_text(json.dumps(table, indent=1))
    whole.replace(path)
    _measured.cache_clear()
