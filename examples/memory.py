"""Memory: how far back an RNN, an LSTM and a GRU remember, and where their gradients vanish.

    python examples/memory.py [--quick] [--cell lstm]

Three tasks whose answer lies in the past. The adding problem (Hochreiter and Schmidhuber 1997): of T numbers two are
marked, what is their sum? Saying 1 always errs by 0.167 in the mean square. The copying problem (same source, as in
Arjovsky et al. 2016): eight symbols are to be said again after T steps of nothing. Both are made here, batch by batch.
Sequential digits: scikit-learn's handwritten digits (UCI, CC BY 4.0), read pixel by pixel: a fifth is for tests, a
tenth for validation.
By `fused_rnn.diagnose` each cell's gradient is followed back in time, before training and after it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import torch
from material import Shuffled, needed
from side_by_side import CELLS, COLOURS, FAINT, Options, Trained, evaluated, finish, options, parser, train
from torch import Tensor, nn
from torch.nn import functional as F

import fused_rnn

BATCH, HIDDEN = 50, 64
# Rate and steps until it is reached, by validation. Digits are chaotic where the rate rises sooner: by step 200 even
# float64 has lost its digits, whichever library.
RATES = {"rnn": (3e-3, 400), "digits": (2e-3, 1000)}
RATE, WARMUP = 8e-3, 400
SYMBOLS, REPEATED = 8, 8  # of the copying problem: how many there are, how many are to be said again


class Reader(nn.Module):
    """A recurrent layer and a linear one on its last `read` steps: [T, B, D] → [read, B, outputs]."""

    def __init__(self, rnn: type[nn.Module], inputs: int, outputs: int, read: int = 1) -> None:
        super().__init__()
        self.rnn = rnn(inputs, HIDDEN)
        self.head = nn.Linear(HIDDEN, outputs)
        self.read = read
        if isinstance(self.rnn, (nn.LSTM, fused_rnn.LSTM)):  # Gers et al. 2000: an open forget gate to begin with
            with torch.no_grad():
                self.rnn.bias_hh_l0[HIDDEN : 2 * HIDDEN] = 1

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0][-self.read :])


@dataclass
class Task:
    """A task at one length. batch: number → x [T, B, D], target. loss and score: of an output and a target.

    validation: what the best of the weights on the way are chosen by; tests: what the score is taken on in the end.
    Neither is trained on. guess: the score of who remembers nothing.
    """

    name: str
    length: int
    steps: int
    inputs: int
    outputs: int
    read: int
    batch: Callable[[int], tuple[Tensor, Tensor]]
    validation: list[tuple[Tensor, Tensor]]
    tests: list[tuple[Tensor, Tensor]]
    loss: Callable[[Tensor, Tensor], Tensor]
    score: Callable[[Tensor, Tensor], float]
    guess: float

    @property
    def label(self) -> str:
        return f"{self.name}-{self.length}"


def adding(length: int, steps: int, seed: int) -> Task:
    """Numbers in [0, 1) and a mark on one in each half → the sum of the two marked. Score: the mean square error."""

    def batch(number: int, size: int = BATCH) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(seed * 1_000_003 + number)
        x = torch.zeros(length, size, 2)
        x[:, :, 0] = torch.rand(length, size, generator=generator)
        first = torch.randint(0, length // 2, (size,), generator=generator)
        second = torch.randint(length // 2, length, (size,), generator=generator)
        rows = torch.arange(size)
        x[first, rows, 1] = x[second, rows, 1] = 1
        return x, (x[first, rows, 0] + x[second, rows, 0])[None, :, None]

    held_out = [[batch(first + i) for i in range(20)] for first in (800_000, 900_000)]
    score = lambda y, target: F.mse_loss(y, target).item()  # noqa: E731
    return Task("adding", length, steps, 2, 1, 1, batch, *held_out, F.mse_loss, score, 1 / 6)


def copying(length: int, steps: int, seed: int) -> Task:
    """Symbols, T blanks, a sign to speak and blanks → the symbols. Score: the share of wrong ones."""
    total = REPEATED + length + REPEATED

    def batch(number: int, size: int = BATCH) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(seed * 1_000_003 + number)
        symbols = torch.randint(0, SYMBOLS, (REPEATED, size), generator=generator)
        codes = torch.full((total, size), SYMBOLS)  # a blank
        codes[:REPEATED] = symbols
        codes[REPEATED + length] = SYMBOLS + 1  # now speak
        return F.one_hot(codes, SYMBOLS + 2).float(), symbols

    def loss(y: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(y.flatten(0, 1), target.flatten())

    held_out = [[batch(first + i) for i in range(10)] for first in (800_000, 900_000)]
    wrong = 1 - 1 / SYMBOLS
    score = lambda y, target: (y.argmax(-1) != target).float().mean().item()  # noqa: E731
    return Task("copying", length, steps, SYMBOLS + 2, SYMBOLS, REPEATED, batch, *held_out, loss, score, wrong)


def digits(steps: int, seed: int) -> Task:
    """Images of 8·8 pixels, one pixel a step → which digit. Score: the share of wrong ones."""
    (datasets,) = needed("sklearn.datasets")
    images, targets = datasets.load_digits(return_X_y=True)
    x, t = torch.tensor(images.T[:, :, None] / 16).float(), torch.tensor(targets)
    order = torch.randperm(len(t), generator=torch.Generator().manual_seed(0))
    fifth, tenth = len(t) // 5, len(t) // 10
    held_out, chosen_by, kept = order[:fifth], order[fifth : fifth + tenth], order[fifth + tenth :]
    chosen = Shuffled(len(kept), BATCH, seed)

    def batch(number: int) -> tuple[Tensor, Tensor]:
        rows = kept[chosen(number)]
        return x[:, rows], t[rows]

    validation, tests = ([(x[:, rows], t[rows])] for rows in (chosen_by, held_out))
    loss = lambda y, target: F.cross_entropy(y[0], target)  # noqa: E731
    score = lambda y, target: (y[0].argmax(-1) != target).float().mean().item()  # noqa: E731
    return Task("digits", 64, steps, 1, 10, 1, batch, validation, tests, loss, score, 0.9)


def trained_on(task: Task, given: Options) -> tuple[Trained, float]:
    """A training of the options' cell, and its score on the task's tests."""

    def build(library: ModuleType) -> Reader:  # library: torch.nn or fused_rnn, the swap
        return Reader(given.layer(library), task.inputs, task.outputs, task.read)

    def loss(model: nn.Module, step: int, _: Any) -> tuple[Tensor, None]:
        x, target = (each.to(given.device) for each in task.batch(step))
        return task.loss(model(x), target), None

    def score(model: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> float:
        scores = [task.score(model(x.to(given.device)), target.to(given.device)) for x, target in batches]
        return sum(scores) / len(scores)

    rate, warmup = RATES.get(task.name) or RATES.get(given.cell) or (RATE, WARMUP)
    trained = train(
        given,
        build,
        loss,
        rate=rate,
        warmup=warmup,
        label=f"{task.label}-{given.cell}",
        steps=task.steps,
        score=lambda model: score(model, task.validation),
        score_every=250,
    )
    return trained, evaluated(lambda model: score(model, task.tests), trained.model)


def gradients(task: Task, given: Options, model: nn.Module) -> Tensor:
    """[T]: the norm of the loss's gradient by h of every step, over that by the last step's, which alone is read."""
    x, target = (each.to(given.device) for each in task.batch(0))
    with fused_rnn.diagnose(model) as report:
        task.loss(model(x), target).backward()
    norms = report.gradients["rnn.h_l0"].cpu()
    return norms / norms[-1]


def untrained(task: Task, given: Options) -> nn.Module:
    torch.manual_seed(given.seed)
    return Reader(given.layer(fused_rnn), task.inputs, task.outputs, task.read).to(given.device)


def main(arguments: Sequence[str] | None = None) -> int:
    made = parser("memory", __doc__, cell="rnn", steps=3000, quick_steps=60)
    made.set_defaults(cell=None)  # all three
    given = options(made, arguments)
    cells = [given.cell] if given.cell else ["rnn", "lstm", "gru"]
    lengths = (20, 40) if given.quick else (10, 25, 50, 100, 200)
    delays = (5, 10) if given.quick else (10, 20, 40)
    tasks = [adding(length, given.steps, given.seed) for length in lengths]
    tasks += [copying(delay, given.steps, given.seed) for delay in delays]
    tasks += [digits(given.steps, given.seed)]
    ways = [replace(given, cell=cell) for cell in cells]
    trained, scores, norms = [], {}, {}
    for way in ways:
        norms[way.cell, "before"] = gradients(tasks[len(lengths) - 1], way, untrained(tasks[len(lengths) - 1], way))
        for task in tasks:
            each, scores[task.label, way.cell] = trained_on(task, way)
            trained.append(each)
            if task is tasks[len(lengths) - 1]:
                norms[way.cell, "after"] = gradients(task, way, each.model)

    def draw(figure: Any) -> None:
        errors, wrong, back = figure.subplots(1, 3, width_ratios=(1, 1, 1.3))
        for number, cell in enumerate(cells):
            colour, name = COLOURS[number], CELLS[cell]
            errors.plot(lengths, [scores[f"adding-{n}", cell] for n in lengths], "o-", color=colour, label=name)
            wrong.plot(delays, [scores[f"copying-{n}", cell] for n in delays], "o-", color=colour, label=name)
            for when, line in (("before", ":"), ("after", "-")):
                curve = norms[cell, when].clamp(min=1e-12)
                steps = range(1 - len(curve), 1)
                back.semilogy(steps, curve, line, color=colour, label=f"{name}, {when} training")
        for axis, task in ((errors, tasks[0]), (wrong, tasks[len(lengths)])):
            axis.axhline(task.guess, color=FAINT, linestyle="--", linewidth=1)
            axis.text(
                0.02,
                task.guess,
                "remembers nothing",
                transform=axis.get_yaxis_transform(),
                va="bottom",
                fontsize=8,
                color=FAINT,
            )
            axis.set_ylim(0, 1.25 * task.guess)
        errors.set_xscale("log")
        errors.minorticks_off()
        errors.set(title="Adding: mean square error", xlabel="length, steps")
        errors.set_xticks(lengths, map(str, lengths))
        wrong.set(title="Copying: share of wrong symbols", xlabel="steps to wait", xticks=delays)
        errors.legend(loc="center left")
        back.set(title=f"Gradient by h (last step: 1), adding, T = {lengths[-1]}", xlabel="steps back")
        back.set_ylim(1e-9, None)
        back.legend(loc="lower left", fontsize=8)

    kinds = {
        "adding": "mean square error, {} steps",
        "copying": "wrong symbols, {} steps to wait",
        "digits": "wrong digits",
    }
    far = tasks[len(lengths) - 1]
    told = ", ".join(f"{CELLS[cell]} {scores[far.label, cell]:.2g}" for cell in cells)
    short = f"adding over {far.length} steps, mean square error: {told}; who remembers nothing {far.guess:.2g}"
    quality: dict[str, Any] = {"in short": short}
    for task in tasks:
        what = f"{task.name}: {kinds[task.name].format(task.length)}"
        quality |= {f"{what}, {CELLS[cell]}": scores[task.label, cell] for cell in cells}
        quality[f"{what}, who remembers nothing"] = task.guess
    for (cell, when), curve in norms.items():
        reached = len(curve) - 1 - int((curve > 1e-3).nonzero()[0])
        quality[f"steps back that a thousandth of the gradient reaches, {CELLS[cell]}, {when} training"] = reached
    data = {task.label: f"{sum(x.shape[1] for x, _ in task.tests):,} sequences held out" for task in tasks}
    return finish(given, trained, quality, data, draw)


if __name__ == "__main__":
    sys.exit(main())
