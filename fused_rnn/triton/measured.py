"""Schedules that tune.py measured on a GPU: a table on disk."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

from fused_rnn.triton.schedule import Schedule, Shape, Tile
from fused_rnn.triton.target import Target

Rows = list[tuple[int, Schedule]]  # (B·R up to which, schedule), ascending


def path() -> Path:
    """$FUSED_RNN_TRITON_TILES, or a file in the user's cache."""
    home = os.environ.get("XDG_CACHE_HOME", "~/.cache")
    default = Path(home).expanduser() / "fused_rnn" / "triton_tiles.json"
    return Path(os.environ.get("FUSED_RNN_TRITON_TILES", default))


def _key(shape: Shape, target: Target) -> str:
    way = "backward" if shape.backward else "forward"
    return f"{target.arch}/{shape.cell}/{shape.kind}/{shape.hidden}/{way}"


def find(shape: Shape, target: Target) -> Rows:
    return _table().get(_key(shape, target), [])


@cache
def _table() -> dict[str, Rows]:
    file = path()
    if not file.exists():
        return {}
    try:
        entries = json.loads(file.read_text())["schedules"]
        return {key: [(rows, _schedule(fields)) for rows, fields in entry] for key, entry in entries.items()}
    except (ValueError, KeyError, TypeError) as error:
        raise RuntimeError(f"{file}: not a table that this version's tune wrote ({error!r}); delete it") from error


def _schedule(fields: dict[str, Any]) -> Schedule:
    return Schedule(**{**fields, "tile": Tile(**fields["tile"])})


def record(shape: Shape, target: Target, rows: Rows, note: dict[str, str]) -> None:
    """Put measured schedules into the table. note: device, versions, date."""
    file = path()
    table = json.loads(file.read_text()) if file.exists() else {"notes": {}, "schedules": {}}
    table["schedules"][_key(shape, target)] = [(upto, asdict(schedule)) for upto, schedule in rows]
    table["notes"][_key(shape, target)] = note
    file.parent.mkdir(parents=True, exist_ok=True)
    whole = file.with_suffix(f".{os.getpid()}")  # so that nobody ever reads half a table
    whole.write_text(json.dumps(table, indent=1))
    whole.replace(file)
    _table.cache_clear()
