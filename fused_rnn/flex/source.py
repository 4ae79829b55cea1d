"""Where in a user's source something happened, and what a step calls a tensor: for errors."""

from __future__ import annotations

import inspect
import linecache
import os
from collections.abc import Callable
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import torch
from torch import Tensor

_OURS = tuple(str(path) + os.sep for path in (Path(torch.__file__).parent, Path(__file__).parent))


UNNAMED = "a tensor of the closure"


class StepError(ValueError):
    """A step that is not what a cell can run."""


def own_frame(frame: FrameType) -> FrameType:
    """The innermost frame that is neither torch's nor this room's."""
    while frame.f_code.co_filename.startswith(_OURS) and frame.f_back is not None:
        frame = frame.f_back
    return frame


def line_of(frame: FrameType) -> str:
    """A frame as a traceback has it."""
    return _written(frame.f_code.co_filename, frame.f_lineno, frame.f_code.co_name)


def line_of_traceback(traceback: TracebackType | None) -> str:
    """The innermost line of a traceback that is neither torch's nor this room's."""
    found = ""
    while traceback is not None:
        code = traceback.tb_frame.f_code
        if not code.co_filename.startswith(_OURS):
            found = _written(code.co_filename, traceback.tb_lineno, code.co_name)
        traceback = traceback.tb_next
    return found


def line_of_step(step: Callable[..., Any]) -> str:
    """Where a step is defined; nothing for what is no plain function."""
    code = getattr(inspect.unwrap(step), "__code__", None)
    return "" if code is None else _written(code.co_filename, code.co_firstlineno, code.co_name)


def _written(file: str, line: int, name: str) -> str:
    text = linecache.getline(file, line).strip()
    return f'\n  File "{file}", line {line}, in {name}' + (f"\n    {text}" if text else "")


def name_of(x: Tensor, step: Callable[..., Any]) -> str:
    """What a step calls a tensor of its closure."""
    try:
        found = inspect.getclosurevars(step)
    except TypeError:  # no plain function
        return UNNAMED
    for name, value in (*found.nonlocals.items(), *found.globals.items()):
        if value is x:
            return repr(name)
        if isinstance(value, torch.nn.Module):
            for own, tensor in (*value.named_parameters(), *value.named_buffers()):
                if tensor is x:
                    return repr(f"{name}.{own}")
        for own, tensor in getattr(value, "__dict__", {}).items():
            if tensor is x:
                return repr(f"{name}.{own}")
    return UNNAMED
