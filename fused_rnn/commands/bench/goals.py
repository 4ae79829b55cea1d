"""What the library promises on a GPU, beside what a result file holds: met or not, and what is still to be measured."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from rich.table import Table
from rich.text import Text

from fused_rnn.commands.bench.cudnn import PERSISTENT, algorithm, gpu_of
from fused_rnn.commands.bench.grid import REGIONS, Point
from fused_rnn.commands.bench.limits import Limits
from fused_rnn.commands.bench.providers import OTHERS
from fused_rnn.commands.bench.results import TIME, Results, geometric_mean
from fused_rnn.commands.bench.tables import against_plain


@dataclass(frozen=True)
class Goal:
    """bar: what `value` must reach, or with at_most stay below. value: of a result file and one of our backends; None
    where nothing of it was measured."""

    name: str
    dtypes: tuple[str, ...]
    bar: float
    value: Callable[[Results, str], float | None]
    at_most: bool = False

    def met(self, value: float) -> bool:
        return value <= self.bar if self.at_most else value >= self.bar


def _speedup(
    cells: tuple[str, ...], mode: str, where: Callable[[Results, Point], bool]
) -> Callable[[Results, str], float | None]:
    def value(results: Results, provider: str) -> float | None:
        found = results.speedups(provider)
        wanted = [
            s
            for p, s in found.items()
            if p.cell in cells and p.mode == mode and p.variant == "plain" and where(results, p)
        ]
        return geometric_mean(wanted) if wanted else None

    return value


def _in_reach(results: Results, point: Point) -> bool:
    return REGIONS["cuda"]["T≥128, B≤128, H≤1024"](point)


def _persistent(results: Results, point: Point) -> bool:
    return point.T > 1 and PERSISTENT in algorithm(point, gpu_of(results.runs[-1]))


def _over_plain(variant: str) -> Callable[[Results, str], float | None]:
    def value(results: Results, provider: str) -> float | None:
        return max(against_plain(results, provider, variant).values(), default=None)

    return value


def _best_of_all(results: Results, provider: str) -> float | None:
    """How much of the best provider's speed the automatic choice has, at the worst point."""
    shares = []
    providers = results.providers()
    for point in results.speedups("auto"):
        if point.mode == "step":
            continue
        run = results.rows[point, "auto", TIME].run
        times = [results.value(point, name, run=run) for name in providers]
        own = results.value(point, "auto", run=run)
        shares += [min(time for time in times if time) / own] if own else []
    return min(shares, default=None)


def _milliseconds(point: Point) -> Callable[[Results, str], float | None]:
    def value(results: Results, provider: str) -> float | None:
        micros = results.value(point, provider)
        return None if micros is None else micros * 1e-3

    return value


def _step_over_exchange(results: Results, provider: str) -> float | None:
    """Time of a step over that of the exchange it cannot do without: at the longest T measured, at the worst point."""
    longest, ratios = max((point.T for point, _, _ in results.rows), default=0), []
    for (point, name, metric), row in results.rows.items():
        mine = (name, metric, point.mode, point.variant) == (provider, TIME, "inference", "plain")
        if not mine or not row.p50 or point.H > 512 or point.B > 64 or longest != point.T:
            continue
        run = results.runs[row.run]["limits"]
        exchange = Limits(run["flops"], (), tuple(map(tuple, run.get("exchanges", ())))).exchange(point)
        ratios += [row.p50 * 1e-6 / point.T / exchange] if exchange else []
    return max(ratios, default=None)


_TENSOR = ("bf16", "tf32")
GOALS = (
    Goal(
        "LSTM and GRU, T≥128, B≤128, H≤1024, inference: × torch.nn",
        _TENSOR,
        3.0,
        _speedup(("LSTM", "GRU"), "inference", _in_reach),
    ),
    Goal(
        "LSTM and GRU, T≥128, B≤128, H≤1024, training: × torch.nn",
        _TENSOR,
        2.5,
        _speedup(("LSTM", "GRU"), "training", _in_reach),
    ),
    Goal(
        "LSTM where cuDNN is persistent, inference: × torch.nn",
        ("fp16",),
        1.2,
        _speedup(("LSTM",), "inference", _persistent),
    ),
    Goal(
        "LSTM where cuDNN is persistent, training: × torch.nn",
        ("fp16",),
        1.2,
        _speedup(("LSTM",), "training", _persistent),
    ),
    Goal(
        "LSTM, T=1024, B=16, H=768, inference: ms",
        ("fp16",),
        1.5,
        _milliseconds(Point("LSTM", "inference", "fp16", 1024, 16, 768)),
        True,
    ),
    Goal("a padded batch with lengths over one without, worst point", (), 1.1, _over_plain("lengths"), True),
    Goal("1 % resets over none, worst point", (), 1.1, _over_plain("resets"), True),
    Goal("the automatic choice, of the best of all, worst point", (), 0.95, _best_of_all),
    Goal("inference, H≤512, B≤64: a step over the exchange, worst point", ("bf16",), 2.0, _step_over_exchange, True),
)


def judged(results: Results, provider: str) -> Iterator[tuple[Goal, float | None]]:
    """The goals of a file's dtype, with what was measured."""
    dtype = results.runs[-1]["dtype"]
    yield from ((goal, goal.value(results, provider)) for goal in GOALS if not goal.dtypes or dtype in goal.dtypes)


def goal_table(results: Results) -> Table | None:
    """Every goal of a file that was measured on a GPU, for each of our backends alone."""
    providers = [provider for provider in results.providers() if provider not in OTHERS]
    if not results.runs or results.runs[-1]["device"] != "cuda" or not providers:
        return None
    table = Table(title=f"Goals, {results.runs[-1]['dtype']}", title_justify="left")
    table.add_column("goal")
    table.add_column("bar", justify="right")
    for provider in providers:
        table.add_column(provider, justify="right")
    columns = [list(judged(results, provider)) for provider in providers]
    for row in zip(*columns, strict=True):
        goal = row[0][0]
        table.add_row(
            goal.name, f"{'≤' if goal.at_most else '≥'} {goal.bar:g}", *(_verdict(goal, value) for _, value in row)
        )
    return table


def _verdict(goal: Goal, value: float | None) -> Text:
    if value is None:
        return Text("–", style="dim")
    return Text(
        f"{value:.3g} {'met' if goal.met(value) else 'not met'}", style="green" if goal.met(value) else "bold red"
    )
