"""Text: a character model learns Python from Python's own standard library, then writes some.

    python examples/text.py [--quick] [--cell gru]

Data: the modules of the standard library of the Python that runs this (PSF licence), as far as they are ASCII. Every
tenth is held out: what is reported is bits per character there, beside what xz makes of the same files.
It writes by a stream, a step at a time, and is timed against a loop over torch.nn's cells.
"""

from __future__ import annotations

import lzma
import math
import string
import sys
import sysconfig
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from material import stop
from side_by_side import COLOURS, IN_TORCH, INK, draw_losses, evaluated, finish, options, parser, train
from torch import Tensor, nn
from torch.nn import functional as F

BATCH, LENGTH = 32, 128
RATE, WARMUP = 3e-3, 500


def corpus() -> tuple[str, str]:
    """The standard library's ASCII modules: nine of ten one after another in alphabetical order, and every tenth.

    Raises FileNotFoundError where the standard library has no source files (a zipped or frozen Python).
    """
    paths = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    texts = [path.read_text(encoding="utf-8", errors="replace") for path in paths]
    texts = [text for text in texts if text.isascii()]
    if len(texts) < 10:
        raise FileNotFoundError("this Python has no standard-library source to train on")
    return "".join(text for i, text in enumerate(texts) if i % 10), "".join(texts[::10])


class Characters:
    """The printable characters of ASCII, and one for all others. encode: str → int64 [N]; decode is its inverse."""

    SYMBOLS = string.printable + "\0"

    def __init__(self) -> None:
        self.index = {symbol: i for i, symbol in enumerate(self.SYMBOLS)}

    def __len__(self) -> int:
        return len(self.SYMBOLS)

    def encode(self, text: str) -> Tensor:
        return torch.tensor([self.index.get(symbol, len(self) - 1) for symbol in text], device="cpu")

    def decode(self, codes: Tensor) -> str:
        return "".join(self.SYMBOLS[code] for code in codes.tolist())


class CharLM(nn.Module):
    """Embedding → recurrent layers → next character's logits.

    rnn: torch.nn.LSTM or fused_rnn.LSTM, or any other class of that signature.
    forward: text int64 [T, B], state as the layer's → logits [T, B, symbols], state after the last step.
    """

    def __init__(self, rnn: type[nn.Module], symbols: int, hidden: int = 256, layers: int = 2) -> None:
        super().__init__()
        self.embed = nn.Embedding(symbols, hidden)
        self.rnn = rnn(hidden, hidden, num_layers=layers)
        self.head = nn.Linear(hidden, symbols)

    def forward(self, text: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        y, state = self.rnn(self.embed(text), state)
        return self.head(y), state


class Windows:
    """Step by step an input and its target, each int64 [length, batch]: `batch` places are read on side by side.

    After the last window they begin anew.
    """

    def __init__(self, codes: Tensor, length: int = LENGTH, batch: int = BATCH) -> None:
        self.length = length
        self.streams = codes[: len(codes) // batch * batch].view(batch, -1).t().contiguous()

    def __len__(self) -> int:
        return (len(self.streams) - 1) // self.length

    def __getitem__(self, step: int) -> tuple[Tensor, Tensor]:
        start = step % len(self) * self.length
        return self.streams[start : start + self.length], self.streams[start + 1 : start + self.length + 1]


def loss_of(model: nn.Module, text: Tensor, target: Tensor, state: Any) -> tuple[Tensor, Any]:
    """Nats per character, and the state that the next window goes on from."""
    logits, state = model(text, state)
    return F.cross_entropy(logits.flatten(0, 1), target.flatten()), state


def bits(model: nn.Module, windows: Windows) -> float:
    """Bits per character over all windows, the state carried from each to the next."""
    total, state = 0.0, None
    device = next(model.parameters()).device
    for i in range(len(windows)):
        loss, state = loss_of(model, *(each.to(device) for each in windows[i]), state)
        total += loss.item()
    return total / len(windows) / math.log(2)


def xz_bits(train: str, held_out: str) -> tuple[float, float]:
    """Bits per character that xz needs for the held-out text: alone, and when it has read the training text before."""

    def size(text: str) -> int:
        return 8 * len(lzma.compress(text.encode(), preset=9 | lzma.PRESET_EXTREME))

    return size(held_out) / len(held_out), (size(train + held_out) - size(train)) / len(held_out)


# ---------------------------------------------------------------------------------------------------------- writing

Steps = Callable[[Tensor], Tensor]  # here: a character int64 [1] → the logits of the next, [1, symbols]


def by_stream(model: CharLM) -> Steps:
    """A stream: weights packed once, the state kept inside."""
    stream = model.rnn.stream(batch_size=1)
    return lambda character: model.head(stream.step(model.embed(character)))


def looped(rnn: nn.Module, cell: str) -> Steps:
    """A loop over torch.nn's cells, a cell a layer, with the weights of a layer of ours: x [B, D] → y [B, H]."""
    cells = []
    for number in range(rnn.num_layers):
        made = getattr(nn, cell + "Cell")(rnn.hidden_size if number else rnn.input_size, rnn.hidden_size)
        names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
        made.load_state_dict({name: getattr(rnn, f"{name}_l{number}") for name in names})
        cells.append(made.to(rnn.weight_hh_l0.device))
    states: list[Any] = [None] * len(cells)

    def step(x: Tensor) -> Tensor:
        for number, each in enumerate(cells):
            states[number] = each(x, states[number])
            x = states[number][0] if isinstance(states[number], tuple) else states[number]
        return x

    return step


def by_cells(model: CharLM, cell: str) -> Steps:
    step = looped(model.rnn, cell)
    return lambda character: model.head(step(model.embed(character)))


@torch.no_grad()
def write(step: Steps, prompt: str, length: int, seed: int = 0, device: str = "cpu") -> tuple[str, float]:
    """The prompt and `length` characters after it, at temperature 0.7; characters a second."""
    characters, generator = Characters(), torch.Generator().manual_seed(seed)
    for code in characters.encode(prompt).to(device):
        logits = step(code[None])
    codes, start = [], time.perf_counter()
    for _ in range(length):
        chances = torch.softmax(logits[0] / 0.7, dim=0).cpu()
        codes.append(torch.multinomial(chances, 1, generator=generator))
        logits = step(codes[-1].to(device))
    return prompt + characters.decode(torch.cat(codes)), length / (time.perf_counter() - start)


def _shown(text: str) -> str:
    """Without the control characters that an untrained model writes."""
    return "".join(character for character in text.expandtabs(4) if character == "\n" or character.isprintable())


def main(arguments: Sequence[str] | None = None) -> int:
    given = options(parser("text", __doc__, cell="lstm", steps=2000, quick_steps=40), arguments)
    length, hidden = (64, 64) if given.quick else (LENGTH, 256)
    try:
        read, held_out = corpus()
    except FileNotFoundError as error:
        stop(str(error))
    if given.quick:
        read, held_out = read[:300_000], held_out[:20_000]
    characters = Characters()
    windows = Windows(characters.encode(read), length)
    tests = Windows(characters.encode(held_out), 512, 16)

    def build(library: ModuleType) -> CharLM:  # library: torch.nn or fused_rnn, the swap
        return CharLM(given.layer(library), len(characters), hidden)

    def loss(model: nn.Module, step: int, state: Any) -> tuple[Tensor, Any]:
        text, target = (each.to(given.device) for each in windows[step])
        return loss_of(model, text, target, None if step % len(windows) == 0 else state)

    trained = train(given, build, loss, rate=RATE, warmup=WARMUP)
    model = trained.model
    reached = evaluated(lambda model: bits(model, tests), model)
    alone, primed = xz_bits(read, held_out)
    beside_it = f"xz, with the training text at hand, {primed:.2f}"
    quality: dict[str, Any] = {
        "in short": f"{reached:.2f} bits per character of held-out modules; {beside_it}",
        "bits per character, held-out modules": reached,
        "bits per character, xz": alone,
        "bits per character, xz that has read the training text": primed,
    }
    count = 200 if given.quick else 2000
    with torch.no_grad():
        text, by_ours = write(by_stream(model), "def ", count, given.seed, given.device)
        quality["written by a stream, characters a second"] = round(by_ours)
        by_theirs = None
        if given.cell in IN_TORCH:
            same, by_theirs = write(by_cells(model, IN_TORCH[given.cell]), "def ", count, given.seed, given.device)
            quality["written by a loop over torch.nn's cells, characters a second"] = round(by_theirs)
            quality["both wrote the same"] = "yes" if same == text else "until rounding tipped a choice"
    print(f"\n{_shown(text[:600])}\n")

    def draw(figure: Any) -> None:
        curves, bars, sample = figure.subplots(1, 3, width_ratios=(1.2, 0.9, 1.3))
        draw_losses(curves, [trained], "nats per character")
        curves.set_title(
            f"The same training: largest difference {trained.difference:.0e}" if trained.theirs else "Training"
        )
        named = {"this model": reached, "xz, after the\ntraining text": primed, "xz": alone}
        bars.barh([*named], [*named.values()], color=[COLOURS[0], "#c8c8d4", "#c8c8d4"])
        bars.bar_label(bars.containers[0], fmt=" %.2f")
        bars.set(title="Bits per character, held out", xlim=(0, 1.25 * max(named.values())))
        bars.invert_yaxis()
        bars.grid(visible=False)
        faster = f",\n{by_ours / by_theirs:.1f}× a loop over torch.nn's cells" if by_theirs else ""
        sample.set_title(f"Written, {by_ours:,.0f} characters a second{faster}", fontsize=9.5)
        sample.axis("off")
        lines = [line[:52] for line in _shown(text[:1800]).splitlines()][:24]
        sample.text(0, 0.97, "\n".join(lines).replace("$", r"\$"), family="monospace", fontsize=7, va="top", color=INK)

    data = {"training, characters": len(read), "held out, characters": len(held_out), "symbols": len(characters)}
    return finish(given, [trained], quality, data, draw)


if __name__ == "__main__":
    sys.exit(main())
