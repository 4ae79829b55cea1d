"""The modules for cells of the literature beside the closest built-in one, and beside a plain loop over their steps;
and the built-in ones with what regularises them in the loop, beside themselves without.

As FlexRNN is measured (flex.py): by one thread on one core, and what counts is the time that they had this core. The
input's product stands before the loop, as whoever writes one puts it, and a layer norm over gates is one call there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn.functional import layer_norm, linear

import fused_rnn
from fused_rnn.call import kinds
from fused_rnn.cells import CELLS
from fused_rnn.cells.diagonal import by_block, of_blocks
from fused_rnn.commands.bench.calls import Call
from fused_rnn.commands.bench.flex import beside, on_one_core, record, report
from fused_rnn.commands.bench.grid import SEQUENCES, Point
from fused_rnn.commands.bench.measure import BLOCK_S, TOLERANCE, clock, difference, interleave
from fused_rnn.commands.bench.results import Results, geometric_mean, setting
from fused_rnn.commands.bench.tables import ratio
from fused_rnn.commands.machine import describe
from fused_rnn.nn.field import FIELD, block_gru
from fused_rnn.nn.field import layer_norm as normed

PREFIX = "field-"  # of the result files' names
BUILT_IN, OURS, LOOP = "auto", "field", "plain loop"
TITLES = {BUILT_IN: "closest built-in", OURS: "ours", LOOP: "plain loop"}
CLOSEST = {cls.__name__: "GRU" if "GRU" in cls.__name__ else "LSTM" for cls in FIELD} | {"IndRNN": "RNN", "MGU": "GRU"}
# Named by the class and what it is given.
MORE: dict[str, tuple[str, dict[str, Any]]] = {"BlockGRU, blocks=8": ("BlockGRU", {"blocks": 8})}
REGULARISED: dict[str, tuple[str, dict[str, Any]]] = {
    f"{kind}, {name}": (kind, {name: value})
    for kind in ("LSTM", "GRU", "RNN")
    for name, value in (("recurrent_dropout", 0.2), ("zoneout", 0.1), ("weight_dropout", 0.2), ("return_gates", True))
}
SIZES = tuple((B, H) for B in (1, 8) for H in (64, 256))
STEPS = 128


def closest(cell: str) -> str:
    """The built-in module that a cell stands beside."""
    return REGULARISED[cell][0] if cell in REGULARISED else CLOSEST.get(MORE.get(cell, (cell,))[0], "")


def _norm(gates: Sequence[Tensor], epsilon: float) -> Tensor:
    whole = torch.cat(tuple(gates), -1)
    return layer_norm(whole, whole.shape[-1:], eps=epsilon)


def _layer_norm_lstm(x: Any, r: Any, s: Any, p: Any) -> Any:
    gain, other, bias = p[0:4], p[4:8], p[8:12]
    made = _norm(x, normed.EPSILON) * torch.cat(gain) + _norm(r, normed.EPSILON) * torch.cat(other) + torch.cat(bias)
    i, f, g, o = made.chunk(4, -1)
    c = torch.sigmoid(f) * s[1] + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(layer_norm(c, c.shape[-1:], p[12], p[13], normed.EPSILON)), c


def _layer_norm_gru(x: Any, r: Any, s: Any, p: Any) -> Any:
    own = _norm(x, normed.EPSILON) * torch.cat(p[0:3]) + torch.cat(p[6:9])
    other = _norm(r, normed.EPSILON) * torch.cat(p[3:6]) + torch.cat(p[9:12])
    (x_r, x_z, x_n), (h_r, h_z, h_n) = own.chunk(3, -1), other.chunk(3, -1)
    n = torch.tanh(x_n + torch.sigmoid(x_r + h_r) * h_n)
    return (n + torch.sigmoid(x_z + h_z) * (s[0] - n),)


def _block_gru(x: Any, r: Any, s: Any, p: Any) -> Any:
    whole = _norm([a + b for a, b in zip(x, r, strict=True)], block_gru.EPSILON)
    reset, n, z = (whole * torch.cat(p[0:3]) + torch.cat(p[3:6])).chunk(3, -1)
    return (s[0] + torch.sigmoid(z + block_gru.UPDATE) * (torch.tanh(torch.sigmoid(reset) * n) - s[0]),)


# Where torch has less to do than the step says: a norm over several gates is one call.
SHORTER = {"LayerNormLSTM": _layer_norm_lstm, "LayerNormGRU": _layer_norm_gru, "BlockGRU": _block_gru}


class PlainLoop(nn.Module):
    """A module of one layer by a Python loop over its cell's step, on the module's own parameters."""

    def __init__(self, module: fused_rnn.FlexRNN) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        module = self.module
        weights: Sequence[Tensor] = module._fused_weights()
        if module._fused_by_layer:
            x, weights = module._fused_of_layer(x, weights, None)
        cell, spec = module.cell, CELLS[module._fused_cell]
        found = kinds(spec, len(weights))
        assert found is not None
        (w,) = found.split(weights)
        step = SHORTER.get(type(module).__name__, lambda *given: cell(*given, w.matrices))
        sides = linear(x, w.w_ih, w.b_ih)
        state: Sequence[Tensor] = (x.new_zeros(x.shape[1], module.hidden_size),) * len(cell.states)
        each = by_block(w.w_hh, cell.gates, spec.diagonal) if spec.diagonal > 1 else None
        outputs = []
        for own in sides.unbind(0):
            r = None
            if cell.recurrent:
                side = linear(state[0], w.w_hh, w.b_hh) if each is None else of_blocks(state[0], each, w.b_hh)
                r = side.chunk(cell.gates, -1)
            state = step(own.chunk(cell.gates, -1), r, state, w.params)
            outputs.append(state[0])
        return torch.stack(outputs)


def call_of(provider: str, point: Point) -> Call:
    """A provider's call, on numbers that all who compute the same have in common."""
    torch.manual_seed(0)
    name, options = {**MORE, **REGULARISED}.get(point.cell, (point.cell, {}))
    if provider == BUILT_IN:
        name, options = closest(point.cell), {}
    module = getattr(fused_rnn, name)(point.width, point.H, **options)
    x = torch.randn(point.T, point.B, point.width, device="cpu", requires_grad=point.mode == "training")
    dy = torch.randn(point.T, point.B, point.H, device="cpu")
    forward: Callable[[], Tensor] = lambda: module(x)[0]  # noqa: E731 - one of two
    if provider == LOOP:
        module = PlainLoop(module)
        forward = lambda: module(x)  # noqa: E731
    return Call(point, module, forward, x, dy)


def points(cells: Sequence[str]) -> list[Point]:
    """What is measured. A regulariser in training alone."""
    modes = {cell: ["training"] if cell in REGULARISED else SEQUENCES for cell in cells}
    return [Point(cell, mode, "fp32", STEPS, B, H) for cell in cells for mode in modes[cell] for B, H in SIZES]


def measure(point: Point, budget_s: float) -> dict[str, list[float]]:
    """Seconds of every run of each provider. Raises RuntimeError for a result that is not the loop's."""
    providers = [name for name in TITLES if name != LOOP or point.cell not in REGULARISED]
    calls = {provider: call_of(provider, point) for provider in providers}
    for call in calls.values():
        call.prepare()
        call.run()
    # Where rounding alone decides on which side of a kink a gate lies, one gradient among many is another.
    allowed = TOLERANCE[point.dtype] * (10 if point.mode == "training" else 1)
    if LOOP in calls and not (off := difference(calls[OURS], calls[LOOP].results())) <= allowed:
        raise RuntimeError(f"{point}: the module differs from the loop over its step by {off:.1e}")
    run = clock("cpu", core_time=True)
    cost = {provider: run(call, 2)[1] for provider, call in calls.items()}
    return interleave(calls, cost, run, BLOCK_S, budget_s)


def execute(budget_s: float, out: Path, console: Console) -> Path:
    """Measure every point, write the file and print its table; returns the file's path."""
    wanted = points([*(cls.__name__ for cls in FIELD), *MORE, *REGULARISED])
    with on_one_core():
        facts = describe("cpu") | {"dtype": "fp32", "threads": 1}
        path, shown = record(PREFIX, facts, wanted, measure, budget_s, out, console)
    return report(path, terminal(shown), table(shown), console)


def terminal(results: Results) -> Table:
    """Every point, each time with its ratio to ours."""
    return beside(results, "Cells of the literature: medians, × ours", TITLES, OURS)


def tables(directory: Path) -> str:
    """Markdown: the tables of every file of a folder; "" where there is none."""
    return "\n\n".join(table(Results.load(path)) for path in sorted(directory.glob(f"{PREFIX}*.json")))


def table(results: Results) -> str:
    """The README's table: of every cell the loop's time over ours, and ours over the closest built-in module's."""
    run = results.runs[-1]
    heads = [
        f"{what}, {mode}" for what in ("times as fast as a plain loop", "time, × the built-in's") for mode in SEQUENCES
    ]
    lines = [f"| {setting(run)} | built-in | " + " | ".join(heads) + " |", "|---" * 6 + "|"]
    faster = results.ratios(LOOP, OURS)
    slower = {point: 1 / value for point, value in results.ratios(BUILT_IN, OURS).items()}
    cells = dict.fromkeys(point.cell for point, _, _ in results.rows)
    for cell in sorted(cells, key=lambda cell: cell in REGULARISED):
        entries = []
        for found, worst in ((faster, min), (slower, max)):
            for mode in SEQUENCES:
                values = [value for point, value in found.items() if (point.cell, point.mode) == (cell, mode)]
                entries.append(f"**{ratio(geometric_mean(values))}×** ({ratio(worst(values))})" if values else "–")
        lines.append(f"| {cell} | {closest(cell)} | " + " | ".join(entries) + " |")
    sizes = {letter: sorted({getattr(point, letter) for point, _, _ in results.rows}) for letter in "TBH"}
    size = ", ".join(f"{letter} {', '.join(map(str, values))}" for letter, values in sizes.items())
    dates = "; ".join(f"commit {run['commit'] or 'unknown'}, {run['date']}" for run in results.runs)
    lines += ["", f"Geometric mean (worst) of {size}.", ""]
    lines += [f"<sub>{run['device_name']}, torch {run['torch']}, {dates}; `python -m fused_rnn bench --field`</sub>"]
    return "\n".join(lines)
