"""A user's cell as a program: pointwise operations in single assignment, forward and backward, and as a line of text.

The text is the cell's name wherever a name goes (ops, exported programs): whoever reads it knows the whole cell, and
needs no registry. The loops of every backend are printed from it, or interpret it.

    fused_rnn.cell 1|title|G apart recurrent|states|params|forward|backward

A graph is instructions and groups of outputs, `sigmoid 0,mul 4 1,const 2.0>4 5;6`. Values are numbered: first the
inputs, then each instruction's result.

    forward   inputs: G + apart pre-activations, the states before, the params
              outputs: the states after; the saved values
    backward  inputs: the saved values, the states before, the states after, the params, the gradients of the states
              after
              outputs: G + apart gradients of the pre-activations; of the states before; of the params

Of pre-activations the last `apart` ones of G hold the gate's input side alone, and their recurrent sides follow.
Gradients have the order of all loops: the input sides of the gates apart, then the recurrent sides of all G.
Numbers alone: a comparison is 1 or 0, and a condition is true where it is not 0.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

PREFIX = "fused_rnn.cell 1|"
MOST_STATES, MOST_PARAMS = 4, 8  # that the compiled loops take: csrc/cells/cell.h


def _number(condition: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def number(a: Tensor, b: Tensor) -> Tensor:
        return condition(a, b).to(torch.promote_types(a.dtype, b.dtype))

    return number


def _true(a: Tensor) -> Tensor:
    return a != 0


# What each operation is, by its number of arguments; all but `const`, a number in the code.
UNARY: dict[str, Callable[[Tensor], Tensor]] = {
    "neg": torch.neg,
    "abs": torch.abs,
    "sign": torch.sign,
    "exp": torch.exp,
    "expm1": torch.expm1,
    "log": torch.log,
    "log1p": torch.log1p,
    "sqrt": torch.sqrt,
    "rsqrt": torch.rsqrt,
    "reciprocal": torch.reciprocal,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "relu": torch.relu,
    "erf": torch.erf,
    "sin": torch.sin,
    "cos": torch.cos,
    "softplus": lambda x: F.softplus(x, threshold=40.0),  # log(1 + exp(x))
}
BINARY: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "add": torch.add,
    "sub": torch.sub,
    "mul": torch.mul,
    "div": torch.div,
    "maximum": torch.maximum,  # NaN where either is
    "minimum": torch.minimum,
    "pow": torch.pow,
    "lt": _number(torch.lt),
    "le": _number(torch.le),
    "gt": _number(torch.gt),
    "ge": _number(torch.ge),
    "eq": _number(torch.eq),
    "ne": _number(torch.ne),
    "and": _number(lambda a, b: _true(a) & _true(b)),
    "or": _number(lambda a, b: _true(a) | _true(b)),
    "sigmoid_backward": lambda d, s: d * (s * (1 - s)),  # s: the sigmoid
    "tanh_backward": lambda d, t: d * (1 - t * t),  # t: the tanh
    "relu_backward": lambda d, h: torch.where(h <= 0, torch.zeros_like(d), d),  # h: the relu; NaN passes d
}
TERNARY: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "where": lambda c, a, b: torch.where(_true(c), a, b),
    "fma": lambda a, b, c: a * b + c,
}
PRODUCTS = ("mul", "sigmoid_backward", "tanh_backward")  # a multiplication comes last in them
ARITY = {"const": 0} | dict.fromkeys(UNARY, 1) | dict.fromkeys(BINARY, 2) | dict.fromkeys(TERNARY, 3)
_FUNCTIONS: dict[str, Callable[..., Tensor]] = {**UNARY, **BINARY, **TERNARY}


class Instruction(NamedTuple):
    """op: a key of ARITY.  args: numbers of values.  value: of a const."""

    op: str
    args: tuple[int, ...] = ()
    value: float = 0.0


class Graph(NamedTuple):
    """inputs: how many.  code: value inputs + i is what code[i] makes.  outputs: groups of values."""

    inputs: int
    code: tuple[Instruction, ...]
    outputs: tuple[tuple[int, ...], ...]

    def uses(self) -> set[int]:
        """The values that an instruction or an output reads."""
        read = {i for group in self.outputs for i in group}
        return read.union(*(instruction.args for instruction in self.code))

    def rounded(self) -> set[int]:
        """Products that one sum or difference reads together with another: each is to be rounded by itself. a·a - b·b
        is 0 where a = b, and no compiler has two products to choose from."""
        made: set[int] = set()
        for op, args, _ in self.code:
            if op in ("add", "sub", "fma"):
                products = {self._product(i) for i in (args if op != "fma" else args[2:])}
                if None not in products and (op == "fma" or len(products) > 1):
                    made |= products  # type: ignore[arg-type]
        return made

    def _product(self, i: int) -> int | None:
        """The product that a value is, or of which it is the negative."""
        while i >= self.inputs:
            op, args, _ = self.code[i - self.inputs]
            if op in PRODUCTS:
                return i
            if op != "neg":
                break
            i = args[0]
        return None

    def run(self, inputs: Sequence[Tensor]) -> list[list[Tensor]]:
        """The groups of outputs, in plain PyTorch."""
        values = list(inputs)
        for op, args, value in self.code:
            one = torch.full((), value, dtype=inputs[0].dtype, device=inputs[0].device) if op == "const" else None
            values.append(_FUNCTIONS[op](*(values[i] for i in args)) if one is None else one)
        return [[values[i] for i in group] for group in self.outputs]


class Program(NamedTuple):
    """A cell. title: its name for people.  gates, apart, states, params: as in Cell.  recurrent: there is a W_hh."""

    title: str
    gates: int
    apart: int
    recurrent: bool
    states: tuple[str, ...]
    params: tuple[str, ...]
    forward: Graph
    backward: Graph

    @property
    def saved(self) -> int:
        """S, the values that forward keeps for backward."""
        return len(self.forward.outputs[1])

    @property
    def reads_h(self) -> bool:
        """Whether forward reads h itself."""
        return self.gates + self.apart in self.forward.uses()

    def backward_reads(self) -> tuple[tuple[bool, ...], tuple[bool, ...]]:
        """Of each state whether backward reads it before the step, and after it."""
        used, states = self.backward.uses(), len(self.states)
        flags = [self.saved + i in used for i in range(2 * states)]
        return tuple(flags[:states]), tuple(flags[states:])

    @property
    def text(self) -> str:
        """The program as a line, which `parse` reads."""
        counts = f"{self.gates} {self.apart} {int(self.recurrent)}"
        names = (" ".join(self.states), " ".join(self.params))
        return PREFIX + "|".join((self.title, counts, *names, _written(self.forward), _written(self.backward)))

    def step(
        self, x: Sequence[Tensor], r: Sequence[Tensor], s: Sequence[Tensor], p: Sequence[Tensor]
    ) -> tuple[Tensor, ...]:
        """A step in plain PyTorch, as Cell.step."""
        joined = self.gates - self.apart if self.recurrent else 0
        a = [own + other for own, other in zip(x[:joined], r[:joined], strict=True)] if joined else []
        a += [*x[joined:], *r[joined:]] if self.recurrent else list(x)
        shape = s[0].shape
        return tuple(state.expand(shape) for state in self.forward.run([*a, *s, *p])[0])


def _written(graph: Graph) -> str:
    code = [f"const {i.value!r}" if i.op == "const" else " ".join((i.op, *map(str, i.args))) for i in graph.code]
    return ",".join(code) + ">" + ";".join(" ".join(map(str, group)) for group in graph.outputs)


def _read(text: str, inputs: int) -> Graph:
    code, _, outputs = text.partition(">")
    instructions = []
    for words in (line.split() for line in code.split(",") if line):
        if words[0] == "const":
            instructions.append(Instruction("const", (), float(words[1])))
        else:
            instructions.append(Instruction(words[0], tuple(map(int, words[1:]))))
    return Graph(inputs, tuple(instructions), tuple(tuple(map(int, group.split())) for group in outputs.split(";")))


def _is_sound(graph: Graph) -> bool:
    """Whether every operation has its arguments, and every value is made before it is read."""
    made = graph.inputs + len(graph.code)
    for k, (op, args, _) in enumerate(graph.code, graph.inputs):
        if len(args) != ARITY[op] or not all(0 <= i < k for i in args):
            return False
    return all(0 <= i < made for group in graph.outputs for i in group)


@lru_cache(maxsize=4096)
def parse(text: str) -> Program:
    """The program of a text; raises ValueError for a text that is none."""
    try:
        title, counts, states, params, forward, backward = text.removeprefix(PREFIX).split("|")
        gates, apart, recurrent = map(int, counts.split())
        names, vectors = tuple(states.split()), tuple(params.split())
        first = _read(forward, gates + apart + len(names) + len(vectors))
        second = _read(backward, len(first.outputs[1]) + 3 * len(names) + len(vectors))
        sizes = [len(group) for group in (*first.outputs[:1], *second.outputs)]
        fits = text.startswith(PREFIX) and sizes == [len(names), gates + apart, len(names), len(vectors)]
        if not (fits and len(first.outputs) == 2 and _is_sound(first) and _is_sound(second)):
            raise ValueError("counts do not fit together, or a value is read before it is made")
    except (KeyError, ValueError) as error:
        raise ValueError(f"cell: got {text[:80]!r}, expected a cell as fused_rnn.cell writes it") from error
    return Program(title, gates, apart, bool(recurrent), names, vectors, first, second)


def is_program(name: Any) -> bool:
    """Whether a cell's name is a program."""
    return isinstance(name, str) and name.startswith(PREFIX)
