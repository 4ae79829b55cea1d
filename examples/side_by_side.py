"""What the six programs share: options, two trainings side by side, checkpoints, progress, tables, pictures, results.

A program says how its model is made with layers of one library or the other, and what the loss of a step is.
`train` makes the model twice from one seed, with torch.nn and with fused_rnn, trains both in turns on the same
batches for the first `--beside` steps, compares losses, times and memory, and then trains ours alone to the end.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import json
import math
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from types import ModuleType
from typing import Any

import torch
from material import needed, stop
from torch import Tensor, nn

import fused_rnn
from fused_rnn.commands.bench.memory import forget_peak, resident
from fused_rnn.commands.machine import describe, make_ignored

# Two trainings from one seed differ by rounding alone: by 1e-7 in the first step, and every later one amplifies it.
# Some do so that torch.nn in float32 ends as far from torch.nn in float64: these are trained in float64, too.
TOLERANCE = 1e-3
MEASURED = range(4, 7)  # the steps whose memory is measured, and not their time
SAVE_EVERY = 60  # seconds between two checkpoints
DEMO_OUT = Path("demo-out")
INK, FAINT, BACK, FRONT = "#22223b", "#6b6b7b", "#e9a03b", "#1b6ca8"
COLOURS = ["#1b6ca8", "#e9a03b", "#2a9d8f", "#b5446e", "#6b6b7b", "#7b5ea7"]
IN_TORCH = {"lstm": "LSTM", "gru": "GRU", "rnn": "RNN"}
CELLS = IN_TORCH | {name.lower(): name for name in fused_rnn.list_cells()}
_CELLS_HELP = f"{', '.join(IN_TORCH)}; or, with no counterpart in torch.nn, {', '.join([*CELLS][len(IN_TORCH) :])}"


@dataclass
class Options:
    """What the command line says. steps: of training, all told; beside: of these, how many with torch.nn, too.

    standard: nothing was asked for that changes what is trained.
    """

    program: str
    cell: str
    steps: int
    beside: int
    quick: bool = False
    device: str = "cpu"
    seed: int = 0
    out: Path = DEMO_OUT
    resume: bool = False
    standard: bool = False
    more: dict[str, Any] = field(default_factory=dict)

    @property
    def libraries(self) -> tuple[ModuleType, ...]:
        """Those that have the cell: torch.nn and fused_rnn, or fused_rnn alone."""
        return (nn, fused_rnn) if self.cell in IN_TORCH else (fused_rnn,)

    def layer(self, library: ModuleType) -> type[nn.Module]:
        """The class of the recurrent layer in a library: nn.LSTM, or fused_rnn.LSTM. That is the swap."""
        return getattr(library, CELLS[self.cell])


def parser(program: str, document: str, *, cell: str, steps: int, quick_steps: int) -> argparse.ArgumentParser:
    """The options that all programs have; a program may add some of its own."""
    made = argparse.ArgumentParser(program, description=document, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--quick", action="store_true", help=f"{quick_steps} steps on little data: under a minute")
    made.add_argument("--cell", default=cell, type=str.lower, choices=CELLS, metavar="CELL", help=_CELLS_HELP)
    made.add_argument("--steps", type=_positive, help=f"of training (default: {steps}, quick {quick_steps})")
    made.add_argument("--beside", type=_natural, default=200, help="steps with torch.nn side by side (default: 200)")
    made.add_argument("--device", default="cpu", help="cpu (default), cuda, cuda:1, …")
    made.add_argument("--threads", type=_positive, help="default: what torch uses")
    made.add_argument("--seed", type=_natural, default=0)
    made.add_argument("--out", type=Path, default=DEMO_OUT, help="where results go (default: demo-out)")
    made.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out")
    made.set_defaults(full_steps=steps, quick_steps=quick_steps)
    return made


def options(made: argparse.ArgumentParser, arguments: Sequence[str] | None = None) -> Options:
    """Parse, check the device, set the threads. Options that a program added are in `more`."""
    given = vars(made.parse_args(arguments))
    needed("matplotlib", "numpy", "rich")
    free = {"out", "resume", "threads", "device"}
    given["standard"] = all(value == made.get_default(name) for name, value in given.items() if name not in free)
    full, quick, steps = given.pop("full_steps"), given.pop("quick_steps"), given.pop("steps")
    given["steps"] = steps if steps is not None else quick if given["quick"] else full
    if threads := given.pop("threads"):
        torch.set_num_threads(threads)
    try:
        if torch.empty(1, device=given["device"]).is_cuda:
            torch.cuda.set_device(torch.device(given["device"]).index or 0)
        elif given["device"] != "cpu":
            raise RuntimeError("expected cpu or cuda")
    except (RuntimeError, AssertionError) as error:
        made.error(f"argument --device: got {given['device']!r}: {str(error).splitlines()[0]}")
    try:
        given["out"].mkdir(parents=True, exist_ok=True)
        if given["out"] == DEMO_OUT:
            make_ignored(DEMO_OUT)
    except FileExistsError:
        made.error(f"argument --out: got {given['out']}, which is no folder")
    except OSError as error:
        made.error(f"argument --out: got {given['out']}: {error.strerror}")
    own = {name: given.pop(name) for name in [*given] if name not in Options.__dataclass_fields__}
    return Options(program=made.prog, **given, more=own)


def _natural(text: str, least: int = 0) -> int:
    if not text.isdecimal() or len(text) > 9 or int(text) < least:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a whole number from {least} to 999999999")
    return int(text)


def _positive(text: str) -> int:
    return _natural(text, 1)


@dataclass
class Side:
    """One of the two trainings. seconds: of a step each; memory: what a step adds to the process at most, in bytes.

    whole: no step is half done.
    """

    model: nn.Module
    rate: float
    decay: float = 0.0
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    memory: list[int | None] = field(default_factory=list)
    carry: Any = None
    whole: bool = True

    def __post_init__(self) -> None:
        self.optimiser = torch.optim.AdamW(self.model.parameters(), lr=self.rate, weight_decay=self.decay)

    def step(
        self, loss_of: Loss, step: int, rate: float, clip: float = 1.0, seed: int = 0, device: str = "cpu"
    ) -> None:
        """One step of the optimiser. What the loss hands on reaches the next step without its gradient."""
        torch.manual_seed(seed * 1_000_003 + step)  # for dropout: both sides draw the same
        self.optimiser.param_groups[0]["lr"] = rate
        self.whole = False
        peak = _Peak(device) if step in MEASURED else None
        start = _now(device)
        loss, carry = loss_of(self.model, step, self.carry)
        self.optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), clip)
        self.optimiser.step()
        if peak is None:
            self.seconds.append(_now(device) - start)
        else:
            self.memory.append(peak.bytes())
        self.losses.append(loss.item())
        self.carry = _detached(carry)
        self.whole = True

    @property
    def mib(self) -> float | None:
        """Median of what was measured."""
        return None if not self.memory or None in self.memory else round(median(self.memory) / 2**20)

    def state(self) -> dict[str, Any]:
        kept = {name: getattr(self, name) for name in ("losses", "seconds", "memory", "carry")}
        return kept | {"model": self.model.state_dict(), "optimiser": self.optimiser.state_dict()}

    def load(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.optimiser.load_state_dict(state["optimiser"])
        for name in ("losses", "seconds", "memory", "carry"):
            setattr(self, name, state[name])


Loss = Callable[[nn.Module, int, Any], tuple[Tensor, Any]]


@dataclass
class Trained:
    """What came out. theirs is None for a cell that torch.nn has not, and with --beside 0.

    difference: the largest between the two loss curves, as far as both go. Where it had to be asked, in_float64: the
    same of trainings in float64, and by_rounding: between torch.nn's in float32 and in float64.
    """

    label: str
    model: nn.Module
    ours: Side
    theirs: Side | None
    scores: list[tuple[int, float]]
    difference: float = 0.0
    in_float64: float | None = None
    by_rounding: float | None = None
    began: dict[str, Any] = field(default_factory=dict)

    @property
    def apart(self) -> bool:
        """Whether the loss curves differ by more than rounding explains."""
        if self.in_float64 is None or self.by_rounding is None:
            return self.difference > TOLERANCE
        return self.in_float64 > TOLERANCE or self.difference > 3 * self.by_rounding

    @property
    def parameters(self) -> int:
        return sum(p.numel() for p in self.model.parameters())

    def step_seconds(self) -> tuple[float | None, float]:
        """Median of torch.nn's steps, of ours while it ran beside them; all of ours where there is none."""
        if self.theirs is None or not self.theirs.seconds:
            return None, median(self.ours.seconds)
        return median(self.theirs.seconds), median(self.ours.seconds[: len(self.theirs.seconds)])

    def as_json(self) -> dict[str, Any]:
        theirs, ours = self.step_seconds()
        every = max(1, len(self.ours.losses) // 100)
        return {
            "parameters": self.parameters,
            "steps": len(self.ours.losses),
            "beside": len(self.theirs.losses) if self.theirs else 0,
            "step_ms": {"torch": theirs and round(theirs * 1e3, 3), "ours": round(ours * 1e3, 3)},
            "step_memory_mib": {"torch": self.theirs and self.theirs.mib, "ours": self.ours.mib},
            "largest_difference": self.difference if self.theirs else None,
            "largest_difference_in_float64": self.in_float64,
            "torch_in_float32_from_float64": self.by_rounding,
            "losses": {"every": every, "ours": [round(loss, 5) for loss in self.ours.losses[::every]]},
            "scores": [[step, round(score, 5)] for step, score in self.scores],
        }


def train(
    given: Options,
    build: Callable[[ModuleType], nn.Module],
    loss_of: Loss,
    *,
    rate: float,
    label: str = "",
    steps: int | None = None,
    warmup: int = 0,
    clip: float = 1.0,
    decay: float = 0.0,
    score: Callable[[nn.Module], float] | None = None,
    score_every: int = 0,
) -> Trained:
    """Train `build(torch.nn)` and `build(fused_rnn)` side by side, then ours alone to the end.

    loss_of: (model, number of the step, what it handed on) → loss, what it hands on. It must depend on nothing else.
    rate: of AdamW, rising over `warmup` steps, falling to a tenth over the last third. label: of several trainings.
    score: of the model in eval mode on validation data, less is better, every `score_every` steps and at the end: the
    weights that had the least are those of the model that is returned. Never the test data's.
    """
    from rich.progress import MofNCompleteColumn, Progress, TextColumn

    steps = given.steps if steps is None else steps
    sides = {}
    for library in given.libraries if given.beside else (fused_rnn,):
        torch.manual_seed(given.seed)
        sides["ours" if library is fused_rnn else "theirs"] = Side(build(library).to(given.device), rate, decay)
    ours, theirs = sides["ours"], sides.get("theirs")
    checkpoint = _Checkpoint(given, label, {"steps": steps, "rate": rate, "warmup": warmup, "decay": decay})
    scores, best = checkpoint.load(sides) if given.resume else ([], None)

    def rate_at(step: int) -> float:
        return rate * min(1.0, 0.1 + 0.9 * 3 * (steps - step) / steps, (step + 1) / max(1, warmup))

    columns = (*Progress.get_default_columns(), MofNCompleteColumn(), TextColumn("{task.fields[status]}"))
    with Progress(*columns) as progress, checkpoint.kept(sides, lambda: (scores, best)):
        first = len(ours.losses)
        task = progress.add_task(label or given.program, total=steps, completed=first, status="")
        for step in range(first, steps + 1):
            due = step == steps or (score_every and step and step % score_every == 0)
            if score and due and step not in dict(scores):
                value = evaluated(score, ours.model)
                if best is None or value <= min(each for _, each in scores):
                    best = {name: weight.detach().clone() for name, weight in ours.model.state_dict().items()}
                scores.append((step, value))
            if step == steps:
                break
            turns = [ours] if theirs is None or step >= given.beside else [theirs, ours]
            # Who goes first changes, so that neither always finds what the other left in the caches.
            for side in turns if step % 2 else reversed(turns):
                side.step(loss_of, step, rate_at(step), clip, given.seed, given.device)
            progress.update(task, advance=1, status=_status(ours, theirs, scores))
            if time.monotonic() > checkpoint.saved + SAVE_EVERY:
                checkpoint.save(sides, scores, best)
    if best is not None:
        ours.model.load_state_dict(best)
    trained = Trained(label, ours.model.eval(), ours, theirs, scores, began=checkpoint.began)
    if theirs:
        trained.difference = _difference(theirs, ours)
        if trained.difference > TOLERANCE:
            print(f"{label or given.program}: losses differ by {trained.difference:.1e}: again, in float64", flush=True)
            exact = [Side(_in_float64(build, library, given), rate, decay) for library in given.libraries]
            for step in range(min(steps, given.beside)):
                for side in exact:
                    side.step(loss_of, step, rate_at(step), clip, given.seed, given.device)
            trained.in_float64, trained.by_rounding = _difference(*exact), _difference(theirs, exact[0])
    return trained


def _difference(theirs: Side, ours: Side) -> float:
    pairs = zip(theirs.losses, ours.losses, strict=False)
    return max((abs(a - b) if math.isfinite(a - b) else math.inf for a, b in pairs), default=0.0)


def _in_float64(build: Callable[[ModuleType], nn.Module], library: ModuleType, given: Options) -> nn.Module:
    """The model as it begins, in float64, and casting what it is given."""
    torch.manual_seed(given.seed)
    model = build(library).to(given.device, torch.float64)

    def cast(x: Any) -> Any:
        return x.double() if isinstance(x, Tensor) and x.is_floating_point() else x

    model.register_forward_pre_hook(lambda _, given: tuple(map(cast, given)))
    return model


@torch.no_grad()
def evaluated(function: Callable[[nn.Module], Any], model: nn.Module) -> Any:
    """What a function says of a model in eval mode; the mode comes back."""
    was = model.training
    try:
        return function(model.eval())
    finally:
        model.train(was)


def _status(ours: Side, theirs: Side | None, scores: list[tuple[int, float]]) -> str:
    parts = [f"loss {ours.losses[-1]:.4f}"]
    if theirs and theirs.seconds and len(theirs.losses) == len(ours.losses):
        parts[0] += f" | {theirs.losses[-1]:.4f}"
        parts.append(f"{median(theirs.seconds) / median(ours.seconds):.2f}×")
    if scores:
        parts.append(f"validation {scores[-1][1]:.4f}")
    return "  ".join(parts)


class _Checkpoint:
    """The file that a training goes on from: both sides, and which training it is."""

    def __init__(self, given: Options, label: str, of: dict[str, float]) -> None:
        self.path = given.out / ("-".join(filter(None, (given.program, label))) + ".pt")
        self.of = {"cell": given.cell, "seed": given.seed, "quick": given.quick, "beside": given.beside} | of
        self.device, self.began = given.device, _facts(given)
        self.of |= {name: str(value) for name, value in given.more.items()}
        self.saved = time.monotonic()

    def load(self, sides: dict[str, Side]) -> tuple[list[tuple[int, float]], dict[str, Tensor] | None]:
        if not self.path.exists():
            return [], None  # of several trainings the last ones had not begun
        try:
            found = torch.load(self.path, map_location=self.device, weights_only=True)
            of, states, self.began = found["of"], found["sides"], found["began"]
        except Exception as error:  # whatever torch says of a file that is none
            stop(f"argument --resume: {self.path} is no checkpoint of a demo: {type(error).__name__}")
        if of != self.of:
            other = ", ".join(f"{name} {of.get(name)}" for name in self.of if of.get(name) != self.of[name])
            stop(f"argument --resume: {self.path} is of another training: {other}; leave --resume out, or change --out")
        for name, side in sides.items():
            side.load(states[name])
        return [tuple(pair) for pair in found["scores"]], found["best"]

    def save(self, sides: dict[str, Side], scores: list[tuple[int, float]], best: Any) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        part = self.path.with_suffix(".part")
        states = {name: side.state() for name, side in sides.items()}
        torch.save({"of": self.of, "began": self.began, "sides": states, "scores": scores, "best": best}, part)
        part.replace(self.path)
        self.saved = time.monotonic()

    @contextlib.contextmanager
    def kept(self, sides: dict[str, Side], others: Callable[[], tuple[Any, Any]]) -> Iterator[None]:
        """Saved at the end; likewise when it is interrupted, if between two steps."""
        try:
            yield
        except KeyboardInterrupt:
            stop("interrupted; --resume goes on from the last checkpoint")
        finally:
            steps = {name: len(side.losses) for name, side in sides.items()}
            together = steps.get("theirs") in (None, min(steps["ours"], self.of["beside"]))
            if together and all(side.whole for side in sides.values()):
                self.save(sides, *others())


def _facts(given: Options) -> dict[str, Any]:
    """Which machine and versions, when, and with how many threads."""
    facts = describe("cuda" if given.device.startswith("cuda") else "cpu") | {"threads": torch.get_num_threads()}
    return facts | {"torch": str(facts["torch"])}


def _detached(carry: Any) -> Any:
    if isinstance(carry, Tensor):
        return carry.detach()
    return tuple(map(_detached, carry)) if isinstance(carry, (tuple, list)) else carry


def _now(device: str) -> float:
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter()


class _Peak:
    """The most memory from now on, beyond what there is now: of the process, or on a GPU of torch's allocator."""

    def __init__(self, device: str) -> None:
        self.cuda = device.startswith("cuda")
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()
            return
        gc.collect()
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)  # what is free would hide what is needed
        self.before = resident("VmRSS") if forget_peak() else None

    def bytes(self) -> int | None:
        if self.cuda:
            return torch.cuda.max_memory_allocated() - self.before
        return None if self.before is None else max(0, resident("VmHWM") - self.before)


def finish(
    given: Options,
    trained: Sequence[Trained],
    quality: dict[str, float | int | str],
    data: dict[str, float | int | str],
    draw: Callable[[Any], None],
) -> int:
    """Print the tables, write NAME.json and NAME.png into --out; the exit code: 1 if two loss curves part.

    quality: what was reached, units in the names, "in short" first. data: what it was reached on, the splits' sizes.
    draw: gets an empty figure of matplotlib.
    """
    from rich.console import Console

    console = Console()
    _print(console, trained, quality)
    facts = trained[0].began
    record = {
        "program": given.program,
        "machine": facts,
        "options": {"cell": given.cell, "seed": given.seed, "quick": given.quick, **given.more},
        "standard": given.standard,
        "data": data,
        "quality": quality,
        "trainings": {each.label or given.program: each.as_json() for each in trained},
    }
    path = given.out / f"{given.program}.json"
    text = json.dumps(record, indent=1, default=str, ensure_ascii=False)
    path.write_text(re.sub(r"(?<=[\[\d,.])\n +(?=[-\d\[\]])", "", text) + "\n", encoding="utf-8")  # lists in lines
    _picture(given, facts, draw)
    console.print(f"Results: {path}   picture: {path.with_suffix('.png')}", highlight=False)
    for each in (apart := [each for each in trained if each.apart]):
        told = f"{each.label or given.program}: the losses of torch.nn and fused_rnn differ by {each.difference:.1e}"
        print(f"{told}, more than rounding explains ({TOLERANCE})", file=sys.stderr)
    return 1 if apart else 0


def _print(console: Any, trained: Sequence[Trained], quality: dict[str, Any]) -> None:
    from rich.table import Table

    from fused_rnn.commands.bench.measure import percentiles

    table = Table(title="What it reached", title_justify="left", show_header=False)
    for name, value in quality.items():
        table.add_row(
            name, f"{value:,.4g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else value
        )
    console.print(table)
    table = Table(title="A whole step of training, torch.nn → fused_rnn", title_justify="left")
    for column in ("", "ms", "times as fast", "memory, MiB", "losses differ by"):
        table.add_column(column, justify="left" if not column else "right")
    disturbed = False
    for each in trained:
        theirs, ours = each.step_seconds()
        if theirs is None:
            table.add_row(each.label, f"{ours * 1e3:.1f}", "–", f"{each.ours.mib}", "–")
            continue
        noisy = len(each.theirs.seconds) < 5 or any(percentiles(s.seconds).disturbed for s in (each.theirs, each.ours))
        disturbed |= noisy
        memory = " → ".join(str(side.mib) for side in (each.theirs, each.ours))
        table.add_row(
            each.label,
            f"{theirs * 1e3:.1f} → {ours * 1e3:.1f}",
            f"[bold {'green' if theirs >= ours else 'red'}]{'~' * noisy}{theirs / ours:.2f}×[/]",
            memory,
            f"[{'bold red' if each.apart else 'green'}]{each.difference:.1e}[/]"
            + (f"; {each.in_float64:.0e} in float64" if each.in_float64 is not None else ""),
        )
    console.print(table)
    if disturbed:
        console.print("~ Steps differ much: their batches do, or other work ran on this machine.")


def _picture(given: Options, facts: dict[str, Any], draw: Callable[[Any], None]) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    style = {"axes.edgecolor": "#c8c8d4", "axes.grid": True, "grid.color": "#ececf2", "axes.axisbelow": True}
    style |= {"text.color": INK, "axes.labelcolor": INK, "xtick.color": INK, "ytick.color": INK, "font.size": 9.5}
    style |= {
        "axes.titlelocation": "left",
        "axes.titlesize": 10.5,
        "axes.spines.top": False,
        "axes.spines.right": False,
    }
    style |= {"legend.frameon": False, "axes.prop_cycle": mpl.cycler(color=COLOURS)}
    with mpl.rc_context(style):
        figure = plt.figure(figsize=(11, 4.6), layout="constrained")
        draw(figure)
        plural = "s" * (facts["threads"] > 1)
        setting = f"{facts['device_name']}, {facts['threads']} thread{plural} · torch {facts['torch']}"
        caption = f"examples/{given.program}.py · {setting}" + " · quick" * given.quick
        figure.supxlabel(caption, fontsize=7.5, color=FAINT, x=0.01, ha="left")
        figure.savefig(given.out / f"{given.program}.png", dpi=130)
        plt.close(figure)


def draw_losses(axis: Any, trained: Sequence[Trained], unit: str) -> None:
    """Loss curves: torch.nn's broad, ours thin over it."""
    for number, each in enumerate(trained):
        if each.theirs:
            axis.plot(each.theirs.losses, color=BACK, linewidth=5, alpha=0.5, label="" if number else "torch.nn")
        axis.plot(
            each.ours.losses,
            linewidth=0.9,
            color=COLOURS[0 if number == 0 else number + 1],
            label=each.label or "fused_rnn",
        )
    axis.set(xlabel="step", ylabel=f"loss, {unit}")
    axis.legend()
