"""A character language model on the source of Python's standard library, which every Python brings along.

The model takes the class of its recurrent layer as an argument: `torch.nn.LSTM` or `fused_rnn.LSTM`, and nothing else
changes. See examples/char_lm.py for the shortest use.
"""

from __future__ import annotations

import sysconfig
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fused_rnn

HIDDEN, LAYERS = 256, 2
BATCH, LENGTH = 32, 128
RATE = 3e-3


def corpus(characters: int = 2_000_000) -> str:
    """The standard library's modules one after another in alphabetical order, as far as they are ASCII.

    Raises FileNotFoundError where the standard library has no source files (a zipped or frozen Python).
    """
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    texts, total = [], 0
    for file in files:
        text = file.read_text(encoding="utf-8", errors="replace")
        if text.isascii():
            texts.append(text)
            total += len(text)
        if total >= characters:
            break
    if not texts:
        raise FileNotFoundError("this Python has no standard-library source to train on")
    return "".join(texts)[:characters]


class Characters:
    """The alphabet of a text. encode: str → int64 [N]; decode is its inverse."""

    def __init__(self, text: str) -> None:
        self.symbols = sorted(set(text))
        self.index = {symbol: i for i, symbol in enumerate(self.symbols)}

    def __len__(self) -> int:
        return len(self.symbols)

    def encode(self, text: str) -> Tensor:
        return torch.tensor([self.index[symbol] for symbol in text], device="cpu")

    def decode(self, codes: Tensor) -> str:
        return "".join(self.symbols[code] for code in codes.tolist())


class CharLM(nn.Module):
    """Embedding → recurrent layers → next character's logits.

    rnn: a class with the signature of torch.nn.LSTM or torch.nn.GRU.
    forward: text int64 [T, B], state as the layer's → logits [T, B, symbols], state after the last step.
    """

    def __init__(self, rnn: type[nn.Module], symbols: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(symbols, HIDDEN, device="cpu")
        self.rnn = rnn(HIDDEN, HIDDEN, num_layers=LAYERS, device="cpu")
        self.head = nn.Linear(HIDDEN, symbols, device="cpu")

    def forward(self, text: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        y, state = self.rnn(self.embed(text), state)
        return self.head(y), state


def windows(codes: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless (input, target) pairs, each int64 [LENGTH, BATCH]: BATCH places in the text are read on side by side."""
    streams = codes[: len(codes) // BATCH * BATCH].view(BATCH, -1).t().contiguous()
    while True:
        for start in range(0, len(streams) - LENGTH - 1, LENGTH):
            yield streams[start : start + LENGTH], streams[start + 1 : start + LENGTH + 1]


@dataclass
class Trainee:
    """A model, its optimiser, and the record of its training. losses in nats per character, seconds per step."""

    model: CharLM
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    state: Any = None

    def __post_init__(self) -> None:
        self.optimiser = torch.optim.Adam(self.model.parameters(), lr=RATE)

    def step(self, text: Tensor, target: Tensor) -> None:
        """One optimiser step; the state is carried from window to window, its gradient is not."""
        start = time.perf_counter()
        logits, state = self.model(text, self.state)
        loss = F.cross_entropy(logits.flatten(0, 1), target.flatten())
        self.optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimiser.step()
        self.seconds.append(time.perf_counter() - start)
        self.losses.append(loss.item())
        self.state = tuple(s.detach() for s in state) if isinstance(state, tuple) else state.detach()


def train_both(cell: str, text: str, steps: int, seed: int = 0) -> Iterator[tuple[Trainee, Trainee]]:
    """Train torch.nn's and our layer from one seed, turn by turn on the same windows; yields both after every step.

    cell: "LSTM" or "GRU". Taking turns makes the two times comparable on a machine that does other things, too.
    """
    characters = Characters(text)
    pair = []
    for library in (nn, fused_rnn):
        torch.manual_seed(seed)
        pair.append(Trainee(CharLM(getattr(library, cell), len(characters))))
    theirs, ours = pair
    for number, window in enumerate(islice(windows(characters.encode(text)), steps)):
        # Who goes first changes, so that neither always finds what the other left in the caches.
        for trainee in (theirs, ours) if number % 2 == 0 else (ours, theirs):
            trainee.step(*window)
        yield theirs, ours


@torch.no_grad()
def generate(model: CharLM, characters: Characters, prompt: str, length: int, seed: int = 0) -> str:
    """Continue the prompt by `length` characters, one step of the model at a time, at temperature 0.7."""
    generator = torch.Generator().manual_seed(seed)
    logits, state = model(characters.encode(prompt)[:, None])
    codes = []
    for _ in range(length):
        chances = torch.softmax(logits[-1, 0] / 0.7, dim=0)
        codes.append(torch.multinomial(chances, 1, generator=generator))
        logits, state = model(codes[-1][:, None], state)
    return prompt + characters.decode(torch.cat(codes))
