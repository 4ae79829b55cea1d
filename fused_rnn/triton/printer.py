"""A cell that is a program as a module of kernels like those in `cells`: printed as Triton source, then imported.

Triton reads a function's source from its file. A file's name is its content's, and never changes: so what Triton has
compiled is found again in its own cache. Imports no Triton.
"""

from __future__ import annotations

import hashlib
import importlib.util
import struct
import tempfile
from functools import lru_cache
from pathlib import Path
from types import ModuleType

from fused_rnn.cells.program import MATRIX_PRODUCTS, Graph, Program, parse
from fused_rnn.flex.scan import scan_of
from fused_rnn.gpu.files import cache_folder, replace
from fused_rnn.triton.published import published

_HEAD = '''\
"""A cell printed by fused_rnn.triton.printer."""

import triton
import triton.language as tl

from fused_rnn.triton.pointwise import expm1, log1p, power, sigmoid, softplus, tanh
{stages}
TITLE = {title!r}
AFTER, BEFORE = {after!r}, {before!r}


@triton.jit
def fwd(x, r, bias, states, params, {team}ACTIVATION: tl.constexpr):
{fwd}


@triton.jit
def bwd(dstates, kept, after, before, params, {team}ACTIVATION: tl.constexpr):
{bwd}
'''

# Of a cell that is linear in its states, for scan.py: each state's factor, and the rest.
_SCAN = """

@triton.jit
def scan_fwd(x, params, ACTIVATION: tl.constexpr):
{fwd}


@triton.jit
def scan_bwd(dstates, kept, after, before, params, ACTIVATION: tl.constexpr):
{bwd}
"""
_STAGES = "from fused_rnn.triton import stages\n"
_TEAM = "team, HOW: tl.constexpr, "

# How an operation is written, of the names of its arguments.
_OPS = {
    "neg": "-{0}",
    "abs": "tl.abs({0})",
    "sign": "tl.where({0} > 0.0, 1.0, tl.where({0} < 0.0, -1.0, 0.0))",
    "exp": "tl.exp({0})",
    "expm1": "expm1({0})",
    "log": "tl.log({0})",
    "log1p": "log1p({0})",
    "sqrt": "tl.sqrt({0})",
    "rsqrt": "tl.rsqrt({0})",
    "reciprocal": "1.0 / {0}",
    "sigmoid": "sigmoid({0}, ACTIVATION)",
    "tanh": "tanh({0}, ACTIVATION)",
    "relu": "tl.where({0} <= 0.0, 0.0, {0})",
    "erf": "tl.erf({0})",
    "sin": "tl.sin({0})",
    "cos": "tl.cos({0})",
    "softplus": "softplus({0})",
    "add": "{0} + {1}",
    "sub": "{0} - {1}",
    "mul": "{0} * {1}",
    "div": "{0} / {1}",
    "maximum": "tl.maximum({0}, {1}, propagate_nan=tl.PropagateNan.ALL)",
    "minimum": "tl.minimum({0}, {1}, propagate_nan=tl.PropagateNan.ALL)",
    "pow": "power({0}, {1})",
    "lt": "{0} < {1}",
    "le": "{0} <= {1}",
    "gt": "{0} > {1}",
    "ge": "{0} >= {1}",
    "eq": "{0} == {1}",
    "ne": "{0} != {1}",
    "and": "{0} & {1}",
    "or": "{0} | {1}",
    "sigmoid_backward": "{0} * ({1} * (1.0 - {1}))",
    "tanh_backward": "{0} * (1.0 - {1} * {1})",
    "relu_backward": "tl.where({1} <= 0.0, 0.0, {0})",
    "where": "tl.where({0}, {1}, {2})",
    "fma": "{0} * {1} + {2}",
}
# Those of Graph.rounded: no compiler takes a fused multiply-add apart. Of a zero the sign may change.
_ROUNDED = {
    "mul": "tl.fma({0}, {1}, 0.0)",
    "sigmoid_backward": "tl.fma({0}, {1} * (1.0 - {1}), 0.0)",
    "tanh_backward": "tl.fma({0}, 1.0 - {1} * {1}, 0.0)",
}
_COMPARISONS = ("lt", "le", "gt", "ge", "eq", "ne")
_LOGICAL = ("and", "or")
# Those of two arguments of which either may be a number in the text.
_TAKES_NUMBERS = ("add", "sub", "mul", "div", "maximum", "minimum", *_COMPARISONS)
_POWERS = {1.0: "{0}", 2.0: "{0} * {0}", 3.0: "{0} * {0} * {0}"}


def _number(value: float) -> str:
    """A float32 as Triton's source has it, exactly."""
    try:
        value = struct.unpack("f", struct.pack("f", value))[0]
    except OverflowError:
        value = float("inf") if value > 0 else float("-inf")
    text = repr(value)
    return text if text[-1].isdigit() else f'float("{text}")'


class _Function:
    """The lines of a graph, each value a line: v<i> a tile of numbers, b<i> a tile of truths.

    inputs: how each is written.  narrow: those that are [1, BH].  like: what has the shape of a tile. What is one
    number for a row is [BB, 1].
    """

    def __init__(self, graph: Graph, inputs: list[str], narrow: set[int], like: str) -> None:
        self.graph, self.like = graph, like
        self.narrow, self.rows = set(narrow), graph.rows
        self.lines: list[str] = []
        self.made: set[str] = set()
        self.rounded = graph.rounded()
        used = graph.uses()
        for i, text in enumerate(inputs):
            if i in used:
                self._line(f"v{i}", text)
        self.published = published(graph)
        for stage, run in zip(graph.stages, [*self.published.runs, ()], strict=True):
            for k in stage:
                if graph.inputs + k not in run:
                    self._instruction(graph.inputs + k)
            if run:
                self._publish(run)

    def _line(self, name: str, text: str) -> str:
        if name not in self.made:
            self.made.add(name)
            self.lines.append(f"    {name} = {text}")
        return name

    def _op(self, i: int) -> str:
        return "" if i < self.graph.inputs else self.graph.code[i - self.graph.inputs].op

    def _value(self, i: int) -> float:
        return self.graph.code[i - self.graph.inputs].value

    def _constant(self, i: int) -> str:
        return self._line("units", "1.0 * HOW[0]") if self._op(i) == "units" else _number(self._value(i))

    def _is_number(self, i: int) -> bool:
        """Whether a value may stand in the text as a number."""
        return self._op(i) in ("const", "units")

    def tile(self, i: int) -> str:
        """A value as numbers."""
        if self._is_number(i):
            return self._line(f"v{i}", f"tl.full({self.like}.shape, {self._constant(i)}, tl.float32)")
        if self._op(i) in (*_COMPARISONS, *_LOGICAL):
            return self._line(f"v{i}", f"b{i}.to(tl.float32)")
        return f"v{i}"

    def truth(self, i: int) -> str:
        """Where a value is not 0."""
        if self._op(i) in (*_COMPARISONS, *_LOGICAL):
            return f"b{i}"
        return self._line(f"b{i}", f"{self.tile(i)} != 0.0")

    def _numbers(self, args: tuple[int, ...]) -> list[str]:
        """Arguments of which constants stay numbers, unless all are."""
        if all(map(self._is_number, args)):
            return [self.tile(i) for i in args]
        written = [self._constant(i) if self._is_number(i) else self.tile(i) for i in args]
        return [f"({text})" if text.startswith("-") else text for text in written]

    def _instruction(self, i: int) -> None:
        op, args, _ = self.graph.code[i - self.graph.inputs]
        if self._is_number(i):
            return
        tiles = [j for j in args if not self._is_number(j)]
        if tiles and all(j in self.narrow for j in tiles):
            self.narrow.add(i)
        form, name = _OPS[op], f"{'b' if op in (*_COMPARISONS, *_LOGICAL) else 'v'}{i}"
        if i in self.rounded:
            form, written = _ROUNDED[op], [self.tile(j) for j in args]
        elif op in _LOGICAL:
            written = [self.truth(j) for j in args]
        elif op == "where":
            written = [self.truth(args[0]), *self._numbers(args[1:])]
        elif op in _TAKES_NUMBERS:
            written = self._numbers(args)
        elif op == "pow" and self._op(args[1]) == "const" and self._value(args[1]) in _POWERS:
            form, written = _POWERS[self._value(args[1])], [self.tile(args[0])]
        else:
            written = [self.tile(j) for j in args]
        self._line(name, form.format(*written))

    def _publish(self, run: tuple[int, ...]) -> None:
        """The end of a stage: what it makes for all units of a row, then what they have of it."""
        end, puts, gets = self.published.runs.index(run), list[str](), list[tuple[str, str]]()
        for i in run:
            op, (read,), block = self.graph.code[i - self.graph.inputs]
            at = f"{self._whole(read)}, {self.published.place[i]}"
            more = f"{end}, team, HOW"
            if op in MATRIX_PRODUCTS:
                puts.append(f"    stages.put({at}, {more})")
                gets.append((f"v{i}", f"stages.{op}({at}, {int(block)}, {more})"))
            else:
                puts.append(f"    stages.put_{op}({at}, {more})")
                gets.append((f"v{i}", f"stages.{op}_of({at}, {more})"))
        self.lines += [*dict.fromkeys(puts), f"    stages.meet({end}, team, HOW)"]
        for name, text in gets:
            self._line(name, text)

    def _whole(self, i: int) -> str:
        """A value, of a tile's shape."""
        name = self.tile(i)
        if i in self.narrow or i in self.rows:
            name = self._line(f"w{i}", f"tl.broadcast_to({name}, {self.like}.shape)")
        return name

    def group(self, values: tuple[int, ...]) -> str:
        """Outputs as a tuple, all of a tile's shape."""
        written = [self._whole(i) for i in values]
        return f"({', '.join(written)}{',' if len(written) == 1 else ''})"


def _forward(program: Program) -> str:
    joined = program.gates - program.apart
    inputs = [f"x[{g}] + r[{g}]" if program.recurrent and g < joined else f"x[{g}]" for g in range(program.gates)]
    inputs += [f"r[{joined + k}] + bias[{k}]" for k in range(program.apart)]
    inputs += [f"states[{j}]" for j in range(len(program.states))]
    first = len(inputs)
    inputs += [f"params[{j}]" for j in range(len(program.params) + len(program.masks))]
    narrow = set(range(first, first + len(program.params)))
    function = _Function(program.forward, inputs, narrow, "states[0]")
    after, kept = map(function.group, program.forward.outputs)
    return "\n".join([*function.lines, f"    return {after}, {kept}"])


def _backward(program: Program) -> str:
    states = range(len(program.states))
    inputs = [f"kept[{j}]" for j in range(program.saved)]
    inputs += [f"before[{j}]" for j in states] + [f"after[{j}]" for j in states]
    first = len(inputs)
    inputs += [f"params[{j}]" for j in range(len(program.params) + len(program.masks))]
    narrow = set(range(first, first + len(program.params)))
    inputs += [f"dstates[{j}]" for j in states]
    function = _Function(program.backward, inputs, narrow, "dstates[0]")
    gates, before, vectors, *products = program.backward.outputs
    groups = ", ".join(map(function.group, (sum(products, gates), before, vectors)))
    return "\n".join([*function.lines, f"    return {groups}"])


def _scan(program: Program) -> str:
    """The functions of a scan, if it is one."""
    scan = scan_of(program.text)
    if scan is None:
        return ""
    states, params = range(len(program.states)), [f"params[{j}]" for j in range(len(program.params))]
    inputs = [f"x[{g}]" for g in range(program.gates)] + ["" for _ in states] + params
    narrow = set(range(len(inputs) - len(params), len(inputs)))
    forward = _Function(scan.forward, inputs, narrow, "x[0]")
    inputs = [f"kept[{j}]" for j in range(program.saved)]
    inputs += [f"before[{j}]" for j in states] + [f"after[{j}]" for j in states] + params
    narrow = set(range(len(inputs) - len(params), len(inputs)))
    backward = _Function(scan.backward, inputs + [f"dstates[{j}]" for j in states], narrow, "dstates[0]")
    bodies = []
    for function in (forward, backward):
        factors, rests = map(function.group, function.graph.outputs)
        bodies.append("\n".join([*function.lines, f"    return {factors}, {rests}"]))
    return _SCAN.format(fwd=bodies[0], bwd=bodies[1])


def source(program: Program) -> str:
    """The module's text."""
    before, after = (
        tuple(name for name, read in zip(program.states, reads, strict=True) if read)
        for reads in program.backward_reads()
    )
    stages, team = (_STAGES, _TEAM) if program.sees_units else ("", "")
    functions = {"fwd": _forward(program), "bwd": _backward(program), "stages": stages, "team": team}
    return _HEAD.format(title=program.title, after=after, before=before, **functions) + _scan(program)


def folder() -> Path:
    """Where printed modules are."""
    return cache_folder() / "triton"


def written(text: str) -> Path:
    """A file with this text, whose name is of the text. Where the cache takes none, in a folder of the process."""
    name = f"cell_{hashlib.sha256(text.encode()).hexdigest()[:32]}.py"
    for place in (folder, _own_folder):
        path = place() / name
        try:
            if not path.exists() or path.read_bytes() != text.encode():
                path.parent.mkdir(parents=True, exist_ok=True)
                replace(path, text.encode())
            return path
        except OSError:
            if place is _own_folder:
                raise
    raise AssertionError


@lru_cache(maxsize=1)
def _own_folder() -> Path:
    return Path(tempfile.mkdtemp(prefix="fused_rnn_"))


@lru_cache(maxsize=4096)
def module(cell: str) -> ModuleType:
    """The kernels of a program's text."""
    path = written(source(parse(cell)))
    spec = importlib.util.spec_from_file_location(f"fused_rnn_printed.{path.stem}", path)
    assert spec is not None and spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made
