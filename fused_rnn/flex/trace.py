"""A step, run once on tensors that stand for its arguments, as a program: the ATen operations it calls, in their order.

Nothing is computed: an operation's result is another such tensor. What a step decides by values is refused.
"""

from __future__ import annotations

import inspect
import linecache
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fused_rnn.flex.aten import ALIASES, FACTORIES, OPERATIONS, READS, REDUCES, TRUTHS, Refused
from fused_rnn.flex.builder import Builder

# Sizes that nobody has: what a step makes must be [B, H], [H] or one number.
B, H = 5, 7
_SHAPES = ((B, H), (1, H), (H,), (1, 1), (1,), ())
_OURS = (str(Path(torch.__file__).parent), str(Path(__file__).parent))


class StepError(ValueError):
    """A step that is not what a cell can run."""


class Trace(TorchDispatchMode):
    """While it is on, operations on tensors that it knows become values of the builder."""

    def __init__(self, builder: Builder, name: str, step: Callable[..., Any]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.builder, self.name, self.step = builder, name, step
        self.partners: dict[int, int] = {}  # of a gate's either side the other one
        self._known: dict[int, tuple[Tensor, int]] = {}  # with the tensor, so that no other one gets its id
        self._inputs: set[int] = set()

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """False, for torch would import all of Dynamo (a second) to keep it from looking in here."""
        return False

    def input(self, i: int, shape: tuple[int, ...]) -> Tensor:
        """The tensor that stands for the builder's input i."""
        made = torch.zeros(shape, device="cpu")
        self._known[id(made)] = (made, i)
        self._inputs.add(id(made))
        return made

    def error(self, what: str) -> StepError:
        """An error that names the cell and the line of the user's that did it."""
        return StepError(f"cell {self.name!r}: {what}{self._line()}")

    def value(self, x: Any) -> int:
        """What the builder knows a tensor or a number as."""
        if isinstance(x, Tensor):
            if id(x) in self._known:
                return self._known[id(x)][1]
            return self.builder.const(self._captured(x))
        if isinstance(x, (bool, int, float)):
            return self.builder.const(float(x))
        raise self.error(f"got {type(x).__name__} in an operation, expected a tensor or a number")

    def _captured(self, x: Tensor) -> float:
        """A tensor from outside of the step."""
        name = _name_of(x, self.step)
        if x.requires_grad:
            raise self.error(
                f"{name} requires a gradient, which a step does not give what it closes over; make it one of `params`"
            )
        if x.numel() != 1:
            raise self.error(
                f"{name} has shape {list(x.shape)}; a step closes over single numbers; make it one of `params`"
            )
        if x.is_meta:
            raise self.error(f"{name} is on the meta device and has no value")
        return float(x.detach())

    def _line(self) -> str:
        frame = sys._getframe(1)
        while frame.f_code.co_filename.startswith(_OURS) and frame.f_back is not None:
            frame = frame.f_back
        file, line = frame.f_code.co_filename, frame.f_lineno
        text = linecache.getline(file, line).strip()
        return f'\n  File "{file}", line {line}, in {frame.f_code.co_name}' + (f"\n    {text}" if text else "")

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        op, overload = func.name().partition("::")[2].partition(".")[::2]
        if not func.name().startswith("aten::"):
            raise self.error(f"{func.name()} is no operation that a cell can run")
        tensors = [a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)]
        if op in READS:
            raise self.error("it branches on, or reads, the value of a tensor; use torch.where")
        if op in FACTORIES:
            return self._record(torch.zeros(_shape_of(op, args), device="cpu"), FACTORIES[op](self, args, kwargs))
        if not any(id(t) in self._known for t in tensors):
            return self._outside(func, tensors, args, kwargs)
        return self._operation(func, op, overload, args, kwargs)

    def _outside(self, func: Any, tensors: list[Tensor], args: Sequence[Any], kwargs: Any) -> Any:
        """An operation on tensors of the closure alone: its result is another one."""
        for t in tensors:
            if t.requires_grad or t.numel() != 1:
                self._captured(t)
        return func(*args, **kwargs)

    def _operation(self, func: Any, op: str, overload: str, args: Sequence[Any], kwargs: Any) -> Any:
        changes = op.endswith("_") and not op.startswith("_") and func._schema.is_mutable
        target = args[0] if changes else None
        name = op[:-1] if changes else op
        if changes and (id(target) not in self._known or id(target) in self._inputs):
            raise self.error(f"{op} changes an argument of the step, or a tensor outside, in place")
        if name in ALIASES and not changes:
            made = func(*args, **kwargs)
            self._check(made.shape, op)
            if made.dtype not in (args[0].dtype, torch.float32):
                raise self.error(f"{op} makes {made.dtype}; a cell computes in one dtype, its loop's own")
            return self._record(made if made is not args[0] else made.clone(), self.value(args[0]))
        rule = OPERATIONS.get(name)
        if rule is None:
            more = "; it sees more than one unit" if name in REDUCES else ""
            raise self.error(f"{op} is no operation that a cell can run{more}")
        try:
            number = rule(self, overload, *args, **kwargs)
        except (Refused, TypeError) as error:
            raise self.error(f"{op}.{overload}: {error}") from None
        tensors = [a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)]
        shape = torch.broadcast_tensors(*tensors)[0].shape if len(tensors) > 1 else tensors[0].shape
        self._check(shape, op)
        if changes:
            return self._record(args[0], number)
        truth = name in TRUTHS or all(t.dtype == torch.bool for t in tensors)
        made = self._record(torch.zeros(shape, dtype=torch.bool if truth else torch.float32, device="cpu"), number)
        return (made, torch.zeros(0, device="cpu")) if len(func._schema.returns) > 1 else made

    def _check(self, shape: Sequence[int], op: str) -> None:
        if tuple(shape) not in _SHAPES:
            text = ", ".join({B: "B", H: "H"}.get(n, str(n)) for n in shape)
            raise self.error(f"{op} makes a tensor [{text}], expected [B, H], [H] or a single number")

    def _record(self, made: Tensor, number: int) -> Tensor:
        self._known[id(made)] = (made, number)
        return made


def _shape_of(op: str, args: Sequence[Any]) -> Sequence[int]:
    if op.endswith("_like"):
        return tuple(args[0].shape)
    size = args[1] if op.startswith("new_") else args[0]
    return size if isinstance(size, (list, tuple, torch.Size)) else ()


def _name_of(x: Tensor, step: Callable[..., Any]) -> str:
    """What a step calls a tensor of its closure."""
    try:
        found = inspect.getclosurevars(step)
    except TypeError:  # no plain function
        return "a tensor of the closure"
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
    return "a tensor of the closure"
