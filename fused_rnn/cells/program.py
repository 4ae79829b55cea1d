"""A user's cell as a program: pointwise operations in single assignment, forward and backward, and as a line of text.

The text is the cell's name wherever a name goes (ops, exported programs): whoever reads it knows the whole cell, and
needs no registry. The loops of every backend are printed from it, or interpret it.

    fused_rnn.cell 1|title|G apart recurrent|states|params|forward|backward
    fused_rnn.cell 1|title|G apart recurrent M n ..|states|params;matrices;masks|forward|backward

The second with M masks or with matrices, of n blocks of H rows each. Flags may end the counts: `diagonal=8`, a W_hh of
so many blocks on its diagonal. A graph is instructions and groups of outputs,
`sigmoid 0,mul 4 1,const 2.0>4 5;6`. Values are numbered: first the inputs, then each instruction's result.

    forward   inputs: G + apart pre-activations, the states before, the params, the masks
              outputs: the states after; the saved values, of which the first are what each matrix multiplies
    backward  inputs: the saved values, the states before, the states after, the params, the masks, the gradients of the
              states after
              outputs: G + apart gradients of the pre-activations; of the states before; of the params; with matrices:
              of each block's product

Of pre-activations the last `apart` ones of G hold the gate's input side alone, and their recurrent sides follow.
Gradients have the order of all loops: the input sides of the gates apart, then the recurrent sides of all G.
Numbers alone: a comparison is 1 or 0, and a condition is true where it is not 0.

All operations see one unit of one row, but for those that publish: sum and variance over all units of a row, `product k
x` by block k of the matrices, [H, H], and `transposed k x` by its transpose. What these make is there for all of the
row's units. A run of them ends a stage, and none of a run reads what another one of it makes: instructions are in the
order of stages. What is made of numbers of rows alone is one too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

PREFIX = "fused_rnn.cell 1|"
MOST_STATES, MOST_PARAMS, MOST_MASKS, MOST_BLOCKS = 12, 16, 8, 4  # that the loops take: csrc/cells/cell.h


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
# Over the units of a row; the variance is the biased one.
REDUCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "sum": lambda x: x.sum(-1, keepdim=True),
    "variance": lambda x: x.var(-1, correction=0, keepdim=True),
}
MATRIX_PRODUCTS = ("product", "transposed")
PUBLISHING = (*REDUCTIONS, *MATRIX_PRODUCTS)
NUMBERED = ("const", *MATRIX_PRODUCTS)  # they have a number in the text: the constant, the block
ARITY = {"const": 0, "units": 0} | dict.fromkeys(UNARY, 1) | dict.fromkeys(BINARY, 2) | dict.fromkeys(TERNARY, 3)
ARITY |= dict.fromkeys(PUBLISHING, 1)
_FUNCTIONS: dict[str, Callable[..., Tensor]] = {**UNARY, **BINARY, **TERNARY, **REDUCTIONS}


class Instruction(NamedTuple):
    """op: a key of ARITY.  args: numbers of values.  value: of a const its number, of a matrix product its block."""

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

    @property
    def stages(self) -> list[range]:
        """The instructions of each stage, with those that publish at its end; the last stage may be empty."""
        publishes = [instruction.op in PUBLISHING for instruction in self.code]
        ends = [k + 1 for k, (own, then) in enumerate(pairwise([*publishes, False])) if own and not then]
        return [range(first, last) for first, last in pairwise([0, *ends, len(publishes)])]

    @property
    def rows(self) -> set[int]:
        """The values that are one number for all units of a row. Constants are none of them."""
        found: set[int] = set()
        for i, (op, args, _) in enumerate(self.code, self.inputs):
            others = [k for k in args if k < self.inputs or self.code[k - self.inputs].op not in ("const", "units")]
            if op in REDUCTIONS or (op not in PUBLISHING and others and all(k in found for k in others)):
                found.add(i)
        return found

    def run(
        self, inputs: Sequence[Tensor], blocks: Sequence[Tensor] = (), units: int | None = None
    ) -> list[list[Tensor]]:
        """The groups of outputs, in plain PyTorch. blocks: of the matrices, [H, H] each.  units: H, if not what the
        first input has."""
        values, first = list(inputs), inputs[0]
        for op, args, value in self.code:
            own = [values[i] for i in args]
            if ARITY[op] == 0:
                number = value if op == "const" else units or first.shape[-1]
                values.append(torch.full((), number, dtype=first.dtype, device=first.device))
            elif op in MATRIX_PRODUCTS:
                w = blocks[int(value)]
                values.append(F.linear(own[0], w if op == "product" else w.t()))
            else:
                values.append(_FUNCTIONS[op](*own))
        return [[values[i] for i in group] for group in self.outputs]


class Program(NamedTuple):
    """A cell. title: its name for people.  gates, apart, states, params: as in Cell.  recurrent: there is a W_hh.
    matrices: names, each with how many blocks of H rows it has.  masks: names.  diagonal: the blocks of W_hh."""

    title: str
    gates: int
    apart: int
    recurrent: bool
    states: tuple[str, ...]
    params: tuple[str, ...]
    forward: Graph
    backward: Graph
    matrices: tuple[tuple[str, int], ...] = ()
    masks: tuple[str, ...] = ()
    diagonal: int = 1

    @property
    def blocks(self) -> int:
        """N, the blocks of H rows of all matrices."""
        return sum(count for _, count in self.matrices)

    @property
    def sees_units(self) -> bool:
        """Whether a step must know of more than a unit of its own: of the others, or how many there are."""
        return any(i.op in ("units", *PUBLISHING) for i in (*self.forward.code, *self.backward.code))

    @property
    def stages(self) -> int:
        """Of both directions the larger number of stages; 1 where nothing is published."""
        return max(len(self.forward.stages), len(self.backward.stages))

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
        counts, params = f"{self.gates} {self.apart} {int(self.recurrent)}", " ".join(self.params)
        if self.matrices or self.masks:
            counts = " ".join([counts, str(len(self.masks)), *(str(count) for _, count in self.matrices)])
            params = ";".join([params, " ".join(name for name, _ in self.matrices), " ".join(self.masks)])
        counts += f" diagonal={self.diagonal}" if self.diagonal > 1 else ""
        names = (" ".join(self.states), params)
        return PREFIX + "|".join((self.title, counts, *names, _written(self.forward), _written(self.backward)))

    def step(
        self,
        x: Sequence[Tensor],
        r: Sequence[Tensor],
        s: Sequence[Tensor],
        p: Sequence[Tensor],
        matrices: Sequence[Tensor] = (),
        masks: Sequence[Tensor] = (),
    ) -> tuple[Tensor, ...]:
        """A step in plain PyTorch, as Cell.step."""
        joined = self.gates - self.apart if self.recurrent else 0
        a = [own + other for own, other in zip(x[:joined], r[:joined], strict=True)] if joined else []
        a += [*x[joined:], *r[joined:]] if self.recurrent else list(x)
        shape = s[0].shape
        blocks = [w for matrix in matrices for w in matrix.split(shape[-1])]
        after = self.forward.run([*a, *s, *p, *masks], blocks, shape[-1])[0]
        return tuple(state.expand(shape) for state in after)


def _written(graph: Graph) -> str:
    code = []
    for op, args, value in graph.code:
        number = [repr(value) if op == "const" else str(int(value))] if op in NUMBERED else []
        code.append(" ".join((op, *number, *map(str, args))))
    return ",".join(code) + ">" + ";".join(" ".join(map(str, group)) for group in graph.outputs)


def _read(text: str, inputs: int) -> Graph:
    code, _, outputs = text.partition(">")
    instructions = []
    for words in (line.split() for line in code.split(",") if line):
        first = 1 + (words[0] in NUMBERED)
        value = 0.0 if first == 1 else float(words[1]) if words[0] == "const" else float(int(words[1]))
        instructions.append(Instruction(words[0], tuple(map(int, words[first:])), value))
    return Graph(inputs, tuple(instructions), tuple(tuple(map(int, group.split())) for group in outputs.split(";")))


def _is_sound(graph: Graph, blocks: int, product: str) -> bool:
    """Whether every operation has its arguments, and every value is made before it is read, by those that publish in a
    stage before. product: the only matrix product that there may be."""
    made = graph.inputs + len(graph.code)
    run = graph.inputs  # where the run of publishing operations began
    for k, (op, args, value) in enumerate(graph.code, graph.inputs):
        run = run if op in PUBLISHING else k + 1
        if len(args) != ARITY[op] or not all(0 <= i < (run if op in PUBLISHING else k) for i in args):
            return False
        if op in MATRIX_PRODUCTS and (op != product or not 0 <= value < blocks):
            return False
    return all(0 <= i < made for group in graph.outputs for i in group)


@lru_cache(maxsize=4096)
def parse(text: str) -> Program:
    """The program of a text; raises ValueError for a text that is none."""
    try:
        title, counts, states, params, forward, backward = text.removeprefix(PREFIX).split("|")
        flags = dict(word.split("=") for word in counts.split() if "=" in word)
        gates, apart, recurrent, *more = map(int, counts.split()[: len(counts.split()) - len(flags)])
        diagonal = int(flags.pop("diagonal", "1"))
        if flags or diagonal < 1 or (diagonal > 1 and not recurrent):
            raise ValueError("a flag that there is not")
        of_matrices, of_masks = params.split(";")[1:] if more else ("", "")
        names, vectors, masks = tuple(states.split()), tuple(params.split(";")[0].split()), tuple(of_masks.split())
        matrices = tuple(zip(of_matrices.split(), more[1:], strict=True))
        given, blocks = len(vectors) + len(masks), sum(more[1:])
        first = _read(forward, gates + apart + len(names) + given)
        second = _read(backward, len(first.outputs[1]) + 3 * len(names) + given)
        sizes = [len(group) for group in (*first.outputs[:1], *second.outputs)]
        expected = [len(names), gates + apart, len(names), len(vectors), *[blocks][: len(matrices)]]
        fits = text.startswith(PREFIX) and sizes == expected and len(first.outputs) == 2
        fits = fits and [len(masks), *more[1:]] == (more or [0]) and min(more[1:], default=1) > 0
        if not (fits and len(first.outputs[1]) >= len(matrices)):
            raise ValueError("counts do not fit together")
        if not (_is_sound(first, blocks, "product") and _is_sound(second, blocks, "transposed")):
            raise ValueError("a value is read before it is made")
    except (KeyError, IndexError, ValueError) as error:
        raise ValueError(f"cell: got {text[:80]!r}, expected a cell as fused_rnn.cell writes it") from error
    return Program(title, gates, apart, bool(recurrent), names, vectors, first, second, matrices, masks, diagonal)


def is_program(name: Any) -> bool:
    """Whether a cell's name is a program."""
    return isinstance(name, str) and name.startswith(PREFIX)
