"""Programs under construction: equal values are one value, constants are folded, what does nothing is left out."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch

from fused_rnn.cells.program import (
    ARITY,
    BINARY,
    MATRIX_PRODUCTS,
    PUBLISHING,
    REDUCTIONS,
    TERNARY,
    UNARY,
    Graph,
    Instruction,
)

COMMUTES = {"add", "mul", "maximum", "minimum", "eq", "ne", "and", "or"}
_FOLDED: dict[str, Callable[..., torch.Tensor]] = {**UNARY, **BINARY, **TERNARY}

# Operations of a program under construction alone, whose gradient is not that of what they become; and one that becomes
# its argument, past which no gradient goes.
LOWERED = {"clamp_min": "maximum", "clamp_max": "minimum"}
DETACH = "detach"
# Their value is their first argument's; the others say to whom their gradient goes (gradient.py).
STANDS = (DETACH, "normal", "entry", "centre", "spread")


class Builder:
    """Values by number, the first `inputs` of them the program's."""

    def __init__(self, inputs: int) -> None:
        self.nodes: list[Instruction] = [Instruction("input", (i,)) for i in range(inputs)]
        self._known: dict[Instruction, int] = {}
        self._rows: set[int] = set()

    def const(self, value: float) -> int:
        return self._node(Instruction("const", (), float(value)))

    def units(self) -> int:
        """H, as a number."""
        return self._node(Instruction("units"))

    def product(self, op: str, block: int, x: int) -> int:
        """A matrix product of a value. op: "product" or "transposed"."""
        return self._node(Instruction(op, (x,), float(block)))

    def again(self, node: Instruction, args: Sequence[int]) -> int:
        """What an instruction of another graph makes of values of this one."""
        if node.op == "const":
            return self.const(node.value)
        if node.op == "units":
            return self.units()
        if node.op in MATRIX_PRODUCTS:
            return self.product(node.op, int(node.value), *args)
        return self.add(node.op, *args)

    def is_number(self, i: int) -> bool:
        """Whether a value is the same for all rows and units."""
        return self.nodes[i].op in ("const", "units")

    def is_row(self, i: int) -> bool:
        """Whether a value is one number for all units of a row."""
        return i in self._rows

    def value(self, i: int) -> float | None:
        """Of a constant its value."""
        return self.nodes[i].value if self.nodes[i].op == "const" else None

    def add(self, op: str, *args: int) -> int:
        """The value of an operation on values."""
        if op in COMMUTES:
            args = tuple(sorted(args))
        return self._simpler(op, args) if (folded := self._fold(op, args)) is None else folded

    def _node(self, node: Instruction) -> int:
        # NaN is no key, for it is not equal to itself; and -0.0 equals 0.0.
        key = node._replace(value=node.value.hex()) if node.op == "const" else node  # type: ignore[arg-type]
        if key not in self._known:
            self._known[key] = len(self.nodes)
            others = [a for a in made_of(node) if not self.is_number(a)]
            if node.op in REDUCTIONS or (node.op not in MATRIX_PRODUCTS and others and self._rows.issuperset(others)):
                self._rows.add(len(self.nodes))
            self.nodes.append(node)
        return self._known[key]

    def _fold(self, op: str, args: tuple[int, ...]) -> int | None:
        if op == DETACH and self.value(args[0]) is not None:
            return args[0]
        if op in STANDS:
            return None
        values = [self.value(i) for i in args]
        if op == "where" and values[0] is not None:
            return args[1] if values[0] != 0 else args[2]
        if op in REDUCTIONS:
            return self._reduced(op, args[0])
        if any(value is None for value in values):
            return None
        tensors = [torch.tensor(value, dtype=torch.float64, device="cpu") for value in values]
        return self.const(float(_FOLDED[LOWERED.get(op, op)](*tensors)))

    def _reduced(self, op: str, x: int) -> int | None:
        """A reduction of what is the same for all units, of a negative, or a sum of what has a number of the row for a
        factor."""
        if self.is_number(x) or self.is_row(x):
            return self.add("mul", x, self.units()) if op == "sum" else self.const(0)
        if self.nodes[x].op == "neg":
            inner = self.add(op, self.nodes[x].args[0])
            return self.add("neg", inner) if op == "sum" else inner
        if op == "sum" and self.nodes[x].op == "mul":
            for row, other in (self.nodes[x].args, self.nodes[x].args[::-1]):
                if self.is_row(row):
                    return self.add("mul", row, self.add("sum", other))
        return None

    def _simpler(self, op: str, args: tuple[int, ...]) -> int:
        """Without what is the same to the last bit, but for the sign of a zero."""
        first = self.value(args[0])
        last = self.value(args[-1])
        if op in ("add", "mul") and first is not None:  # the constant last
            args, first, last = (args[1], args[0]), last, first
        if (op in ("add", "sub") and last == 0) or (op in ("mul", "div") and last == 1):
            return args[0]
        if op in ("mul", "div") and last == -1:
            return self.add("neg", args[0])
        if op == "sub" and first == 0:
            return self.add("neg", args[1])
        if op == "sub" and self.nodes[args[0]].op == "neg":
            return self.add("neg", self.add("add", self.nodes[args[0]].args[0], args[1]))
        if op == "neg" and self.nodes[args[0]].op == "neg":
            return self.nodes[args[0]].args[0]
        if op in ("add", "sub") and self.nodes[args[1]].op == "neg":
            return self.add("sub" if op == "add" else "add", args[0], self.nodes[args[1]].args[0])
        if op == "add" and self.nodes[args[0]].op == "neg":
            return self.add("sub", args[1], self.nodes[args[0]].args[0])
        if op in ("add", "sub") and all(self.nodes[i].op == "sum" for i in args):  # one sum to be shared for two
            return self.add("sum", self.add(op, *(self.nodes[i].args[0] for i in args)))
        if (
            op == "div"
            and last is not None
            and last != 0
            and math.isfinite(last)
            and math.frexp(last)[0] in (0.5, -0.5)
        ):
            return self.add("mul", args[0], self.const(1 / last))  # exact
        if op == "where" and args[1] == args[2]:
            return args[1]
        if op in COMMUTES:
            args = tuple(sorted(args))
        return self._node(Instruction(op, args))

    def reachable(self, roots: list[int]) -> set[int]:
        """The values that these are made of, with them."""
        seen: set[int] = set()
        todo = list(roots)
        while todo:
            i = todo.pop()
            if i not in seen:
                seen.add(i)
                if self.nodes[i].op != "input":
                    todo += self.nodes[i].args
        return seen


def made_of(node: Instruction) -> Sequence[int]:
    """The arguments that an operation's value is made of."""
    return node.args[:1] if node.op in STANDS else node.args


def emit(builder: Builder, given: dict[int, int], inputs: int, outputs: list[list[int]]) -> Graph:
    """The graph that makes the outputs. given: which of its inputs is which of the builder's values."""
    nodes = builder.nodes

    def real(i: int) -> int:
        while i not in given and nodes[i].op in STANDS:
            i = nodes[i].args[0]
        return i

    outputs = [[real(i) for i in group] for group in outputs]
    needed: set[int] = set()
    todo = [i for group in outputs for i in group]
    while todo:
        i = todo.pop()
        if i in given or i in needed:
            continue
        assert nodes[i].op != "input", f"value {i} is not given"
        needed.add(i)
        todo += map(real, nodes[i].args)
    code = {}
    for i in sorted(needed):  # arguments come before what is made of them
        op, args, value = nodes[i]
        code[i] = Instruction(LOWERED.get(op, op), tuple(map(real, args)), value)
    _fuse(code, [i for group in outputs for i in group])
    numbers = dict(given)
    made: list[Instruction] = []
    for i, begins in _by_stage(code):
        op, args, value = code[i]
        if begins and op in PUBLISHING and made[-1].op in PUBLISHING:
            made.append(Instruction("const"))  # which nobody reads: it says that a stage is over
        assert len(args) == ARITY[op]
        numbers[i] = inputs + len(made)
        made.append(Instruction(op, tuple(numbers[a] for a in args), value))
    return Graph(inputs, tuple(made), tuple(tuple(numbers[i] for i in group) for group in outputs))


def _by_stage(code: dict[int, Instruction]) -> list[tuple[int, bool]]:
    """The values, and whether each is the first of a stage, in the order of their stages, in each what publishes last.
    All as soon as they can be made, but what only a later stage reads and what is made of no more than one value waits:
    that one can be handed on as well."""
    stage: dict[int, int] = {}
    for i in sorted(code):
        op, args, _ = code[i]
        made = [stage.get(a, 0) + (a in code and code[a].op in PUBLISHING) for a in args]
        stage[i] = max(made, default=0)
    readers: dict[int, list[int]] = {}
    for i in code:
        for a in code[i].args:
            readers.setdefault(a, []).append(i)
    for i in sorted(code, reverse=True):
        op, args, _ = code[i]
        if op not in PUBLISHING and i in readers and len({a for a in args if a in code}) <= 1:
            stage[i] = min(stage[k] for k in readers[i])
    order = sorted(code, key=lambda i: (stage[i], code[i].op in PUBLISHING, i))
    return [(i, k > 0 and stage[i] != stage[order[k - 1]]) for k, i in enumerate(order)]


def _fuse(code: dict[int, Instruction], outputs: list[int]) -> None:
    """Products that are only added to something become one operation with the sum; not to another product, which each
    backend rounds as its own rules say, for the two may cancel."""
    uses: dict[int, int] = dict.fromkeys(outputs, 2)
    for _, args, _ in code.values():
        for i in args:
            uses[i] = uses.get(i, 0) + 1
    for i, (op, args, _) in sorted(code.items()):
        if op != "add":
            continue
        if all(i in code and code[i].op == "mul" for i in args):
            continue
        for product, other in (args, args[::-1]):
            if product in code and code[product].op == "mul" and uses[product] == 1 and product != other:
                code[i] = Instruction("fma", (*code[product].args, other))
                del code[product]
                break
