"""A step, run once on tensors that stand for its arguments, as a program: the ATen operations it calls, in their order.

Nothing is computed: an operation's result is another such tensor. A step that reads a tensor's value is refused, or,
where it is not seen to do so, found out by running it again on other sizes and other numbers (compile.py).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fused_rnn.flex.aten import FACTORIES, OPERATIONS, Refused
from fused_rnn.flex.builder import DETACH, Builder
from fused_rnn.flex.kinds import ALIASES, INTEGERS, READS, TRUTHS, UNSET, VIEWS, WHY_NOT
from fused_rnn.flex.reductions import REDUCING
from fused_rnn.flex.source import UNNAMED, StepError, line_of, name_of, own_frame


class Trace(TorchDispatchMode):
    """While it is on, operations on tensors that it knows become values of the builder.

    sizes: B and H. Of what a step makes every tensor is [B, H], [B, 1], [H] or one number.
    fill, dtype: of the stand-ins, their numbers and the arguments' type.
    """

    def __init__(
        self,
        builder: Builder,
        name: str,
        step: Callable[..., Any],
        sizes: tuple[int, int],
        fill: float,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.builder, self.name, self.step, self.sizes, self.fill, self.dtype = builder, name, step, sizes, fill, dtype
        self.partners: dict[int, int] = {}  # of a gate's either side the other one
        self._known: dict[int, tuple[Tensor, int]] = {}  # with the tensor, so that no other one gets its id
        self._parts: dict[int, tuple[Tensor, tuple[int, ...]]] = {}  # likewise of several side by side
        self._inputs: set[int] = set()
        self._seen_twice: set[int] = set()  # tensors that share their memory with another one
        self._operands: dict[str, int] = {}  # of each matrix what it multiplies
        self._fresh: tuple[Any, ...] = ()  # what a factory made last, and where it was called

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """False, for torch would import all of Dynamo (a second) to keep it from looking in here."""
        return False

    def input(self, i: int, shape: tuple[int, ...]) -> Tensor:
        """The tensor that stands for the builder's input i."""
        made = self._stand_in(shape, self.dtype, i)
        self._inputs.add(id(made))
        return made

    def matrix(self, name: str, blocks: range) -> Callable[[Tensor], Any]:
        """What multiplies by a matrix of these blocks."""

        def multiply(v: Tensor) -> Any:
            if not isinstance(v, Tensor) or tuple(v.shape) != self.sizes:
                got = self._text(v.shape) if isinstance(v, Tensor) else type(v).__name__
                raise self.error(f"matrix {name!r} got {got}, expected a tensor [B, H]")
            operand = self.value(v)
            if self.builder.is_row(operand) or self.builder.is_number(operand):
                raise self.error(f"matrix {name!r} got the same number for all units, expected a tensor of others")
            if self._operands.setdefault(name, operand) != operand:
                raise self.error(f"matrix {name!r} multiplies two vectors in a step, expected one")
            numbers = [self.builder.product("product", k, operand) for k in blocks]
            if not torch.is_grad_enabled():
                self._refuse_function()
                numbers = [self.builder.add(DETACH, number) for number in numbers]
            made = [self._stand_in(v.shape, v.dtype, number) for number in numbers]
            return made[0] if len(made) == 1 else tuple(made)

        return multiply

    def error(self, what: str, line: str | None = None) -> StepError:
        """An error that names the cell, and the line of the user's that did it."""
        return StepError(f"cell {self.name!r}: {what}{line_of(own_frame(sys._getframe(1))) if line is None else line}")

    def value(self, x: Any) -> int:
        """What the builder knows a tensor or a number as."""
        if isinstance(x, Tensor):
            if id(x) in self._known:
                return self._known[id(x)][1]
            return self.builder.const(self._captured(x))
        if isinstance(x, (bool, int, float)):
            return self.builder.const(float(x))
        raise self.error(f"got {type(x).__name__} in an operation, expected a tensor or a number")

    def parts(self, x: Tensor) -> tuple[int, ...]:
        """The values of a tensor that has several side by side; of another one none."""
        return self._parts[id(x)][1] if id(x) in self._parts else ()

    def _captured(self, x: Tensor) -> float:
        """A tensor from outside of the step."""
        if parts := self.parts(x):
            raise self.error(f"it has {len(parts)} tensors side by side, for layer norm, split and chunk alone")
        name = name_of(x, self.step)
        if x.requires_grad:
            raise self.error(
                f"{name} requires a gradient, which a step does not give what it closes over; make it one of `params`"
            )
        if name == UNNAMED and tuple(x.shape) in (self.sizes, self.sizes[1:]):
            raise self.error("it makes a tensor by other means than torch's operations, as NumPy's")
        if x.numel() != 1:
            raise self.error(
                f"{name} has shape {list(x.shape)}; a step closes over single numbers; make it one of `params`"
            )
        if x.is_meta:
            raise self.error(f"{name} is on the meta device and has no value")
        return float(x.detach())

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        op, overload = func.name().partition("::")[2].partition(".")[::2]
        if not func.name().startswith("aten::"):
            raise self.error(f"{func.name()} is no operation that a cell can run")
        tensors = [a for a in tree_leaves((args, kwargs)) if isinstance(a, Tensor)]
        if op in FACTORIES:
            shape, dtype = _shape_of(op, args), kwargs.get("dtype")
            if dtype is None:
                dtype = args[0].dtype if tensors else torch.float32
            self._check(shape, op)
            made = self._stand_in(shape, dtype, FACTORIES[op](self, args, kwargs))
            self._fresh = (id(made), *_place())
            return made
        if not any(id(t) in self._known or id(t) in self._parts for t in tensors):
            return self._outside(func, tensors, args, kwargs)
        if op in READS:
            raise self.error("it branches on, or reads, the value of a tensor; use torch.where")
        if torch.Tag.nondeterministic_seeded in func.tags or op in UNSET:
            raise self.error(
                f"{op} is no operation that a cell can run; it draws random numbers, or leaves them to be set"
            )
        return self._operation(func, op, overload, args, kwargs)

    def _outside(self, func: Any, tensors: list[Tensor], args: Sequence[Any], kwargs: Any) -> Any:
        """An operation on tensors of the closure alone: its result is another one."""
        if torch.Tag.nondeterministic_seeded in func.tags:
            raise self.error("it draws random numbers, which a cell would draw once for ever")
        if func._schema.is_mutable:
            raise self.error(f"{func.name()} changes a tensor outside of the step")
        for t in tensors:
            if t.requires_grad or t.numel() != 1:
                self._captured(t)
        return func(*args, **kwargs)

    def _operation(self, func: Any, op: str, overload: str, args: Sequence[Any], kwargs: Any) -> Any:
        changes = op.endswith("_") and not op.startswith("_") and func._schema.is_mutable
        name = op[:-1] if changes else op
        if changes and (id(args[0]) not in self._known or id(args[0]) in self._inputs):
            raise self.error(f"{op} changes an argument of the step, or a tensor outside, in place")
        if changes and id(args[0]) in self._seen_twice:
            raise self.error(f"{op} changes in place a tensor that the step also has under another view")
        if name == "cat" and (joined := self._side_by_side(func, *args, **kwargs)) is not None:
            return joined
        if name == "split" and (self.parts(args[0]) or args[0].shape[-1] == args[1]):
            return self._apart(func, args)
        if name in ALIASES and not changes:
            return self._alias(func, op, args, kwargs)
        if name in REDUCING and not changes:
            return self._reduction(func, op, overload, args, kwargs)
        rule = OPERATIONS.get(name)
        if rule is None:
            raise self.error(f"{op} is no operation that a cell can run{WHY_NOT.get(name, '')}")
        tensors = [a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)]
        for t in tensors:
            if id(t) not in self._known:
                self._captured(t)
        shape = torch.broadcast_tensors(*tensors)[0].shape if len(tensors) > 1 else tensors[0].shape
        self._check(shape, op)
        try:
            dtype = _dtype_of(name, args, kwargs)
            if dtype == torch.bool and name == "add":
                rule = OPERATIONS["logical_or"]
            number = rule(self, overload, *args, **kwargs)
        except Refused as error:
            raise self.error(f"{op}.{overload}: {error}") from None
        except TypeError:
            text = f" by name {', '.join(kwargs)}" if kwargs else ""
            raise self.error(f"{op}.{overload}: arguments that a cell does not take{text}") from None
        if not torch.is_grad_enabled():
            self._refuse_function()
            number = self.builder.add(DETACH, number)
        if changes:
            if shape != args[0].shape:
                raise self.error(f"{op} would give a tensor {self._text(args[0].shape)} the shape {self._text(shape)}")
            return self._record(args[0], number)
        made = self._stand_in(shape, dtype, number)
        # torch's own factories detach what they have made before anybody sees it.
        if name in VIEWS and self._fresh != (id(args[0]), *_place()):
            self._seen_twice |= {id(made), id(args[0])}
        return (made, torch.zeros(0, device="cpu")) if len(func._schema.returns) > 1 else made

    def _reduction(self, func: Any, op: str, overload: str, args: Sequence[Any], kwargs: Any) -> Any:
        """An operation that sees all units of a row."""
        try:
            numbers = REDUCING[op](self, overload, *args, **kwargs)
        except Refused as error:
            raise self.error(f"{op}: {error}") from None
        except TypeError:
            raise self.error(f"{op}: arguments that a cell does not take") from None
        made = func(*args, **kwargs)  # for the shapes and types
        several = isinstance(made, tuple)
        known = []
        for tensor, number in zip(made if several else (made,), numbers if several else (numbers,), strict=True):
            numbers = number if isinstance(number, tuple) else (number,)
            if len(numbers) == 1:
                self._check(tensor.shape, op)
            if not torch.is_grad_enabled():
                self._refuse_function()
                numbers = tuple(self.builder.add(DETACH, number) for number in numbers)
            dtype = tensor.dtype if tensor.dtype.is_floating_point else torch.float32
            known.append(self._stand_in(tensor.shape, dtype, *numbers))
        return tuple(known) if several else known[0]

    def _side_by_side(self, func: Any, tensors: Sequence[Tensor], dim: int = 0) -> Tensor | None:
        """Several tensors of the units as one, for a norm over all of them; None of others."""
        whole = all(tuple(v.shape) in (self.sizes, self.sizes[1:]) for v in tensors)
        if not whole or dim not in (-1, tensors[0].dim() - 1):
            return None
        numbers = tuple(self.value(v) for v in tensors)
        if not torch.is_grad_enabled():
            numbers = tuple(self.builder.add(DETACH, number) for number in numbers)
        return self._stand_in(func(tensors, dim).shape, tensors[0].dtype, *numbers)

    def _apart(self, func: Any, args: Sequence[Any]) -> list[Tensor]:
        """They again, by a split into tensors of the units."""
        x, size, dim = (*args, 0)[:3]
        if size != self.sizes[1] or dim not in (-1, x.dim() - 1):
            raise self.error(f"split: got parts of {size} along {dim}, expected of H along -1")
        numbers = self.parts(x) or (self.value(x),)
        made = [self._stand_in(v.shape, v.dtype, n) for v, n in zip(func(*args), numbers, strict=True)]
        self._seen_twice |= {id(x), *map(id, made)}
        return made

    def _alias(self, func: Any, op: str, args: Sequence[Any], kwargs: Any) -> Tensor:
        """The first argument by another shape, or a copy of it."""
        made: Tensor = func(*args, **kwargs)
        self._check(made.shape, op)
        allowed = {args[0].dtype, torch.float32, self.dtype}
        if args[0].dtype in (torch.bool, torch.int32, torch.int64):  # what counts is exact in each of these
            allowed |= {torch.int32, torch.int64, torch.float64}
        if made.dtype not in allowed:
            raise self.error(f"{op} makes {made.dtype}; a cell computes in one dtype, its loop's own")
        number = self.value(args[0])
        if made is args[0]:
            made = made.clone()
        if op in VIEWS:
            self._seen_twice |= {id(made), id(args[0])}
        return self._record(made, number if torch.is_grad_enabled() else self.builder.add(DETACH, number))

    def _refuse_function(self) -> None:
        """A torch.autograd.Function runs its forward without gradients, and has a backward that nobody would run."""
        frame: Any = sys._getframe(1)
        while frame is not None:
            if frame.f_code.co_name == "apply" and frame.f_globals.get("__name__") == "torch.autograd.function":
                raise self.error("it calls a torch.autograd.Function, whose backward a cell does not see")
            frame = frame.f_back

    def _check(self, shape: Iterable[int], op: str) -> None:
        b, h = self.sizes
        if tuple(shape) not in ((b, h), (b, 1), (1, h), (h,), (1, 1), (1,), ()):
            raise self.error(
                f"{op} makes a tensor {self._text(shape)}, expected [B, H], [B, 1], [H] or a single number"
            )

    def _text(self, shape: Iterable[int]) -> str:
        return f"[{', '.join({self.sizes[0]: 'B', self.sizes[1]: 'H'}.get(n, str(n)) for n in shape)}]"

    def _stand_in(self, shape: Sequence[int], dtype: torch.dtype, *numbers: int) -> Tensor:
        """A new tensor for a value, or for several side by side."""
        if dtype.itemsize < 4 and not dtype.is_floating_point and dtype != torch.bool:
            raise self.error(f"it makes {dtype}, whose numbers a cell does not have")
        made = torch.full(shape, self.fill, dtype=dtype, device="cpu")
        if len(numbers) == 1:
            return self._record(made, *numbers)
        self._parts[id(made)] = (made, numbers)
        return made

    def _record(self, made: Tensor, number: int) -> Tensor:
        self._known[id(made)] = (made, number)
        return made


def _dtype_of(name: str, args: Sequence[Any], kwargs: Any) -> torch.dtype:
    """Of an operation's result. Conditions may add up, but are no numbers to torch, and so to nobody here."""
    operands = [a for a in (*args, *kwargs.values()) if isinstance(a, (Tensor, bool, int, float))]
    if name in ("where", "masked_fill"):
        operands = operands[1:] if name == "where" else [operands[0], operands[2]]
    if name in TRUTHS:
        return torch.bool
    tensors = [a for a in operands if isinstance(a, Tensor)]
    if not tensors:
        return torch.float32
    dtype = tensors[0].dtype
    for other in operands:
        dtype = torch.promote_types(dtype, torch.result_type(tensors[0], other))
    if dtype.is_floating_point:
        return dtype
    if name not in INTEGERS:
        return torch.float32
    if dtype == torch.bool and name in ("sub", "rsub", "neg"):
        raise Refused("expected numbers, got conditions; torch.where and logical operations take these")
    return dtype


def _place() -> tuple[Any, int]:
    """The instruction of the user's that is under way."""
    frame = own_frame(sys._getframe(1))
    return frame, frame.f_lasti


def _shape_of(op: str, args: Sequence[Any]) -> Sequence[int]:
    if op.endswith("_like"):
        return tuple(args[0].shape)
    size = args[1] if op.startswith("new_") else args[0]
    return size if isinstance(size, (list, tuple, torch.Size)) else ()
