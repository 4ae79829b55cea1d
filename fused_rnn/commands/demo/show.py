"""What the demo puts on the screen and into its plot."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes
from rich.console import Console
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.syntax import Syntax
from rich.table import Table

from fused_rnn.commands.bench.measure import percentiles
from fused_rnn.commands.demo.char_lm import (
    BATCH,
    HIDDEN,
    LAYERS,
    LENGTH,
    Characters,
    CharLM,
    corpus,
    generate,
    train_both,
)
from fused_rnn.commands.machine import cpu_model

# Two trainings from one seed differ by rounding alone, which a step of training amplifies: from 1e-7 in the first step
# to this much, in nats, at the end. A wrong gradient shows up as more than that within the first steps.
TOLERANCE = 0.05
INK, BACK, FRONT = "#22223b", "#e9a03b", "#1b6ca8"


@dataclass
class Outcome:
    """Both trainings of one cell: losses per step, medians of the seconds of a step, whether either was disturbed."""

    cell: str
    theirs: list[float]
    ours: list[float]
    their_seconds: float
    our_seconds: float
    model: CharLM
    disturbed: bool = False

    @property
    def speedup(self) -> float:
        return self.their_seconds / self.our_seconds

    @property
    def difference(self) -> float:
        return max(abs(a - b) for a, b in zip(self.theirs, self.ours, strict=True))


def run(cells: Sequence[str], *, steps: int, seconds: float, seed: int, out: Path, console: Console) -> bool:
    """Train, compare, generate, plot. True if for every cell the two loss curves agree within TOLERANCE.

    seconds: for all cells together; where a machine is too slow for `steps`, training stops earlier.
    """
    text = corpus()
    characters = Characters(text)
    console.print(
        f"A character model on Python's standard library: {len(text):,} characters, {len(characters)} symbols.\n"
        f"{_setting()}.\n"
        "Trained with torch.nn and, from the same seed, with fused_rnn; they take turns, step by step.",
        highlight=False,
    )
    outcomes = [_train(cell, text, steps, seconds / len(cells), seed, console) for cell in cells]
    for outcome in outcomes:
        sample = generate(outcome.model, characters, "def ", 400, seed)
        code = Syntax(sample, "python", theme="ansi_dark", word_wrap=True, background_color="default")
        console.print(Panel(code, title=f"written by the {outcome.cell} of fused_rnn", title_align="left"))
    console.print(_table(outcomes))
    if any(outcome.disturbed for outcome in outcomes):
        console.print("~ Other work on this machine made the steps differ much: DEMO_ARGS='--threads 1' suffers less.")
    picture = out / "char_lm.png"
    plot(outcomes, picture)
    console.print(f"Loss curves: {picture}")
    return all(outcome.difference <= TOLERANCE for outcome in outcomes)


def _train(cell: str, text: str, steps: int, seconds: float, seed: int, console: Console) -> Outcome:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[status]}"),
    )
    end = time.perf_counter() + seconds
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(f"{cell:>4}", total=steps, status="")
        for theirs, ours in train_both(cell, text, steps, seed):
            speedup = median(theirs.seconds) / median(ours.seconds)
            status = f"loss {theirs.losses[-1]:.4f} | {ours.losses[-1]:.4f}   {speedup:.2f}×"
            progress.update(task, advance=1, status=status)
            if time.perf_counter() > end:
                progress.update(task, status=f"{status}   (time is up)")
                break
    few = len(ours.seconds) < 5  # which tell nothing
    disturbed = few or any(percentiles(seconds).disturbed for seconds in (theirs.seconds, ours.seconds))
    medians = median(theirs.seconds), median(ours.seconds)
    return Outcome(cell, theirs.losses, ours.losses, *medians, ours.model, disturbed)


def _setting() -> str:
    threads = torch.get_num_threads()
    plural = "s" * (threads > 1)
    return f"{LAYERS} layers, H={HIDDEN}, B={BATCH}, T={LENGTH}, float32, {threads} thread{plural}"


def _table(outcomes: Sequence[Outcome]) -> Table:
    table = Table(
        title="Median of a whole step (embedding, loss and optimiser included), and the loss", title_justify="left"
    )
    columns = ("cell", "torch.nn", "fused_rnn", "speed-up", "loss, ours", "largest difference")
    for column in columns:
        table.add_column(column, justify="left" if column == "cell" else "right")
    for o in outcomes:
        speedup = f"[bold {'green' if o.speedup >= 1 else 'red'}]{'~' * o.disturbed}{o.speedup:.2f}×[/]"
        times = (f"{seconds * 1e3:.1f} ms" for seconds in (o.their_seconds, o.our_seconds))
        losses = f"{o.ours[0]:.3f} → {o.ours[-1]:.3f}"
        agrees = "green" if o.difference <= TOLERANCE else "bold red"
        table.add_row(o.cell, *times, speedup, losses, f"[{agrees}]{o.difference:.1e}[/]")
    return table


def plot(outcomes: Sequence[Outcome], path: Path) -> None:
    """Write a PNG: per cell both loss curves above, the times of a step below."""
    figure, axes = plt.subplots(
        2, len(outcomes), figsize=(5.4 * len(outcomes), 5.6), height_ratios=(4, 1), squeeze=False, sharey="row"
    )
    for (curves, bars), outcome in zip(axes.T, outcomes, strict=True):
        _curves(curves, outcome)
        _bars(bars, outcome)
    axes[0, 0].set_ylabel("loss, nats per character", color=INK)
    axes[0, 0].legend(frameon=False, fontsize=9)
    slowest = max(outcome.their_seconds for outcome in outcomes) * 1e3
    for bars in axes[1]:
        bars.set_xlim(0, 1.75 * slowest)
    title = "The same training with torch.nn and with fused_rnn"
    figure.suptitle(title, x=0.02, ha="left", color=INK, fontweight="bold", fontsize=13)
    caption = f"{cpu_model()} · torch {torch.__version__} · {_setting()}"
    figure.text(0.02, 0.012, caption, fontsize=8, color="#6b6b7b")
    figure.tight_layout(rect=(0, 0.03, 1, 0.97))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=140)
    plt.close(figure)


def _curves(axis: Axes, outcome: Outcome) -> None:
    axis.plot(outcome.theirs, color=BACK, linewidth=5, alpha=0.55, solid_capstyle="round", label="torch.nn")
    axis.plot(outcome.ours, color=FRONT, linewidth=1.3, label="fused_rnn")
    axis.set_title(f"{outcome.cell}: largest difference {outcome.difference:.1e}", loc="left", fontsize=10.5, color=INK)
    axis.set_xlabel("step", color=INK)
    axis.grid(color="#e5e5ec")
    axis.spines[:].set_visible(False)
    axis.tick_params(colors=INK, length=0)
    axis.margins(x=0.01)


def _bars(axis: Axes, outcome: Outcome) -> None:
    times = [outcome.our_seconds * 1e3, outcome.their_seconds * 1e3]
    axis.barh(["fused_rnn", "torch.nn"], times, color=[FRONT, BACK], height=0.62)
    for row, value in enumerate(times):
        factor = f"   {outcome.speedup:.2f}× as fast" if row == 0 else ""
        axis.text(value, row, f" {value:.0f} ms a step{factor}", va="center", fontsize=9, color=INK)
    axis.set_xticks([])
    axis.spines[:].set_visible(False)
    axis.tick_params(colors=INK, length=0)
