"""A program's operations as statements of C++, and functions of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from fused_rnn.cells.program import Graph

# Operations that are not functions of csrc/cells/math.h's policies. A comparison is a number, and so is a condition.
_OPERATORS = {
    "neg": "-{0}",
    "add": "{0} + {1}",
    "sub": "{0} - {1}",
    "mul": "{0} * {1}",
    "div": "{0} / {1}",
    "lt": "N({0} < {1})",
    "le": "N({0} <= {1})",
    "gt": "N({0} > {1})",
    "ge": "N({0} >= {1})",
    "eq": "N({0} == {1})",
    "ne": "N({0} != {1})",
    "and": "N({0} != 0 && {1} != 0)",
    "or": "N({0} != 0 || {1} != 0)",
    "sigmoid_backward": "{0} * ({1} * (M::one - {1}))",
    "tanh_backward": "{0} * (M::one - {1} * {1})",
    "relu_backward": "M::relu_gradient({1}, {0})",
    "where": "{0} != 0 ? {1} : {2}",
    "fma": "{0} * {1} + {2}",
}
# Those of Graph.rounded.
_ROUNDED = {
    "mul": "M::product({0}, {1})",
    "sigmoid_backward": "M::product({0}, {1} * (M::one - {1}))",
    "tanh_backward": "M::product({0}, M::one - {1} * {1})",
}
_FROM_DOUBLE = {"inf": "-M::log(N(0))", "-inf": "M::log(N(0))", "nan": "M::sqrt(N(-1))"}


def array(name: str, count: int, used: bool, const: bool = True) -> str:
    """A parameter; an array of nothing has one element, and one that nobody reads no name."""
    return f"{'const ' * const}N (&{name * used})[{max(count, 1)}]"


def value_of(op: str, args: Sequence[str], value: float, rounded: bool) -> str:
    if rounded:
        return _ROUNDED[op].format(*args)
    if op == "const":
        return _FROM_DOUBLE.get(repr(value), f"N({value!r})")
    return _OPERATORS[op].format(*args) if op in _OPERATORS else f"M::{op}({', '.join(args)})"


def body(graph: Graph, inputs: Sequence[str], targets: Sequence[Sequence[str]]) -> list[str]:
    """The statements of a graph. targets: where each group of outputs goes; none of them may be an input."""
    names, lines, rounded = list(inputs), list[str](), graph.rounded()
    for i, (op, args, value) in enumerate(graph.code):
        names.append(f"v{i}")
        text = value_of(op, [names[k] for k in args], value, graph.inputs + i in rounded)
        lines.append(f"const N v{i} = {text};")
    for group, places in zip(graph.outputs, targets, strict=True):
        lines += [f"{place} = {names[k]};" for k, place in zip(group, places, strict=True)]
    return lines


def each(name: str, count: int) -> list[str]:
    return [f"{name}[{i}]" for i in range(count)]


def function(name: str, arguments: Sequence[str], lines: Iterable[str], parameters: str = "class M") -> list[str]:
    head = f"  static FUSED_RNN_HD void {name}({', '.join(arguments)}) {{"
    return [f"  template <{parameters}, class N>", head, *(f"    {line}" for line in lines), "  }"]
