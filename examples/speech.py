"""Speech: spoken digits, recognised by a network that has heard synthetic voices alone, tested on real ones.

    python examples/speech.py [--quick] [--cell gru]

Training: utterances of one to seven digits by the voices of eSpeak NG (GPL-3.0, in the package espeakng_loader), made
on the spot, and distorted at random as other speakers and rooms would; a fifth of its voices and one accent are held
out for validation. It does not make every sound alike at each run, so --seed does not repeat a run to the last digit.
Test: 31 utterances of TIDIGITS by two real speakers and one by a third, in the source archive of PocketSphinx (BSD
licence), evaluated at the end of a run; weights are chosen by the voices held out.
A bidirectional network reads whole utterances; another one listens step by step, by a stream.
"""

from __future__ import annotations

import copy
import ctypes
import math
import sys
import tarfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from random import Random
from statistics import median
from types import ModuleType
from typing import Any

import numpy as np
import torch
from material import Shuffled, needed, padded, ragged, source_archive, stop
from side_by_side import BACK, COLOURS, FAINT, FRONT, IN_TORCH, Options, Trained, finish, options, parser, train
from text import Steps, looped
from torch import Tensor, nn
from torch.nn import functional as F

import fused_rnn

WORDS = ("oh", "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
SYMBOLS = "-oz123456789"  # of CTC: the blank, and a letter for each word, as TIDIGITS names its files
ACCENTS = ("en", "en-us", "en-us-nyc", "en-029", "en-gb-x-gbclan", "en-gb-x-gbcwmd", "en-gb-x-rp", "en-gb-scotland")
TOGETHER = 3  # frames of 10 ms that the networks read at once
BATCH, RATE = 32, 3e-3


# --------------------------------------------------------------------------------------------------------- features


def _mel(hertz: Tensor | list[float] | float) -> Tensor:
    return 2595 * torch.log10(1 + torch.as_tensor(hertz, dtype=torch.float64) / 700)


def _hertz(mel: Tensor) -> Tensor:
    return 700 * (10 ** (mel / 2595) - 1)


@dataclass(frozen=True)
class FrontEnd:
    """Sphinx's front end, with the parameters that PocketSphinx has for TIDIGITS."""

    rate: int = 16000
    frames: int = 100  # a second
    window: float = 0.025
    fft: int = 512
    filters: int = 20
    low: float = 1.0
    high: float = 4000.0
    round_filters: bool = False
    remove_dc: bool = True

    def filter_bank(self) -> Tensor:
        """Triangles of unit area, equally wide on the mel scale: [filters, fft / 2 + 1]."""
        ends = _mel([self.low, self.high]).tolist()
        edges = _hertz(torch.linspace(*ends, self.filters + 2, dtype=torch.float64))
        spacing = self.rate / self.fft
        if self.round_filters:
            edges = (edges / spacing + 0.5).floor() * spacing
        frequency = torch.arange(self.fft // 2 + 1) * spacing
        left, centre, right = edges[:-2, None], edges[1:-1, None], edges[2:, None]
        rising, falling = (frequency - left) / (centre - left), (right - frequency) / (right - centre)
        return (torch.minimum(rising, falling).clamp(min=0) * 2 / (right - left)).float()

    def log_mel(self, samples: Tensor) -> Tensor:
        """Samples of 16 bits [N], as floats → log energies in the filters [T, filters]."""
        size, shift = round(self.window * self.rate), round(self.rate / self.frames)
        emphasised = torch.cat([samples[:1], samples[1:] - 0.97 * samples[:-1]])
        frames = emphasised.unfold(0, size, shift)
        if self.remove_dc:
            frames = frames - frames.mean(1, keepdim=True)
        power = torch.fft.rfft(frames * torch.hamming_window(size, periodic=False), self.fft).abs().square()
        return (power @ self.filter_bank().t() + 1e-4).log()


def cosines(filters: int, coefficients: int = 13) -> Tensor:
    """The orthonormal DCT-II that turns log energies into cepstra: [coefficients, filters]."""
    order = torch.arange(coefficients)[:, None]
    scale = torch.where(order == 0, 1.0, 2.0).div(filters).sqrt()
    return scale * torch.cos(math.pi / filters * order * (torch.arange(filters) + 0.5))


def read_mfc(content: bytes) -> Tensor:
    """A feature file of Sphinx, of either byte order → cepstra [T, 13]."""
    for order in "<>":
        count, values = np.frombuffer(content[:4], order + "i4"), content[4:]
        if len(count) and 4 * int(count[0]) == len(values):
            return torch.from_numpy(np.frombuffer(values, order + "f4").astype(np.float32).reshape(-1, 13))
    raise ValueError(f"no feature file of Sphinx: {len(content)} bytes do not fit the count at their head")


@dataclass
class Normaliser:
    """Cepstra [B, T, 13], lengths [B] → what the networks read, [B, T / 3, 39], and lengths [B].

    The mean is taken away, and three frames come together. causal: the mean is that of the frames so far, which begins
    as that of the training data.
    """

    mean: Tensor
    scale: Tensor
    prior: int = 100  # frames

    def __call__(self, cepstra: Tensor, lengths: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
        lengths = lengths // TOGETHER
        cepstra = cepstra[:, : TOGETHER * int(lengths.max())]
        inside = (torch.arange(cepstra.shape[1]) < TOGETHER * lengths[:, None])[..., None]
        cepstra = cepstra * inside
        if causal:
            counts = torch.arange(1, cepstra.shape[1] + 1)[:, None] + self.prior
            mean = (cepstra.cumsum(1) + self.prior * self.mean) / counts
        else:
            mean = cepstra.sum(1, keepdim=True) / (TOGETHER * lengths[:, None, None])
        x = (cepstra - mean) / self.scale * inside
        return x.reshape(len(x), -1, TOGETHER * x.shape[2]), lengths


# ----------------------------------------------------------------------------------------------------------- voices


@dataclass
class Utterance:
    """text: what was said, in SYMBOLS. features: log energies [T, filters] of a synthetic voice, a real one's cepstra.

    sphinx: what PocketSphinx heard, with a model trained on TIDIGITS, where its authors say so.
    """

    speaker: str
    text: str
    features: Tensor
    sphinx: str | None = None


class Synthesiser:
    """eSpeak NG by its C interface: `say` gives samples."""

    SSML, UTF8, SYNCHRONOUS, DONT_EXIT = 0x10, 1, 2, 0x8000
    RATE, PITCH, RANGE = 1, 3, 4

    def __init__(self) -> None:
        (package,) = needed("espeakng_loader")
        try:
            self.library = ctypes.CDLL(package.get_library_path())
            data = package.get_data_path()
        except (OSError, RuntimeError) as error:
            stop(f"the library of eSpeak NG in espeakng_loader cannot be loaded: {error}")
        self.rate = self.library.espeak_Initialize(self.SYNCHRONOUS, 0, data.encode(), self.DONT_EXIT)
        if self.rate <= 0:
            stop(f"eSpeak NG does not start with the data in {data}")
        self.variants = sorted(path.name for path in Path(data, "voices", "!v").iterdir())
        self._parts: list[bytes] = []
        kind = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p)
        self._callback = kind(self._take)  # kept: the library holds its address alone
        self.library.espeak_SetSynthCallback(self._callback)

    def _take(self, samples: int | None, count: int, events: int | None) -> int:
        if samples and count:
            self._parts.append(ctypes.string_at(samples, 2 * count))
        return 0

    def say(self, voice: str, text: str, parameters: dict[int, int]) -> Tensor:
        """Samples [N], int16, of a text in SSML."""
        if self.library.espeak_SetVoiceByName(voice.encode()):
            stop(f"eSpeak NG has no voice {voice}")
        for number, value in parameters.items():
            self.library.espeak_SetParameter(number, value, 0)
        self._parts.clear()
        content = text.encode() + b"\0"
        if self.library.espeak_Synth(content, len(content), 0, 1, 0, self.SSML | self.UTF8, None, None):
            stop(f"eSpeak NG does not say {text!r} with the voice {voice}")
        return torch.frombuffer(bytearray(b"".join(self._parts)), dtype=torch.int16)


def voices(variants: Sequence[str]) -> tuple[list[str], list[str]]:
    """Every fifth variant is held out, and one accent. Half of the others are American, as TIDIGITS' speakers are."""
    accents = ACCENTS[:-1] + ("en-us",) * 5
    training = [f"{accent}+{name}" for i, name in enumerate(variants) if i % 5 for accent in accents]
    return training, [f"{accent}+{name}" for name in variants[::5] for accent in ACCENTS]


def synthetic(synthesiser: Synthesiser, names: Sequence[str], count: int, seed: int) -> list[Utterance]:
    """Utterances of one to seven digits: every one in another voice, at another pace and pitch, with other pauses."""
    (signal,) = needed("scipy.signal")
    front, random, made = FrontEnd(), Random(seed), []
    common = math.gcd(front.rate, synthesiser.rate)
    for _ in range(count):
        digits = [random.randrange(len(WORDS)) for _ in range(random.randint(1, 7))]
        pause = random.choice((0, 0, 0, 100, 300))
        spoken = [
            f'<prosody rate="{random.randint(80, 125)}%" pitch="{random.randint(-20, 20):+d}%">{WORDS[digit]}</prosody>'
            + (f'<break time="{random.randint(0, pause)}ms"/>' if pause else "")
            for digit in digits
        ]
        voice, text = random.choice(names), f"<speak>{' '.join(spoken)}{random.choice('.,?')}</speak>"
        manner = {Synthesiser.RATE: random.randint(100, 240), Synthesiser.PITCH: random.randint(5, 95)}
        sound = synthesiser.say(voice, text, manner | {Synthesiser.RANGE: random.randint(10, 90)})
        sound = signal.resample_poly(sound.float().numpy(), front.rate // common, synthesiser.rate // common)
        silence = [torch.zeros(random.randint(800, 8000)) for _ in range(2)]
        energies = front.log_mel(torch.cat([silence[0], torch.from_numpy(sound), silence[1]]))
        made.append(Utterance(voice, "".join(SYMBOLS[digit + 1] for digit in digits), energies))
    return made


def real() -> list[Utterance]:
    """The real utterances in PocketSphinx's source archive, the longest first."""
    files, heard, utterances = {}, {}, []
    with tarfile.open(source_archive("pocketsphinx", "5.1.1")) as archive:
        for member in archive.getmembers():
            folder, _, name = member.name.rpartition("/")
            if folder.endswith("test/data/tidigits") and member.isfile():
                files[name] = archive.extractfile(member).read()
    for line in files.get("test-tidigits-simple.match", b"").decode().splitlines():
        words, _, name = line.partition("(")
        heard[name.split()[0]] = "".join(SYMBOLS[WORDS.index(word) + 1] for word in words.split())
    for name, content in files.items():
        *speaker, text, kind = name.split(".")
        if kind == "mfc":
            sphinx = heard.get(name.removesuffix(".mfc"))
            utterances.append(Utterance(" ".join(speaker), text[:-1], read_mfc(content), sphinx))
        elif kind == "raw":
            samples = torch.frombuffer(bytearray(content), dtype=torch.int16).float()
            utterances.append(Utterance(" ".join(speaker), text, FrontEnd().log_mel(samples) @ cosines(20).t()))
    if not heard or not utterances:
        stop("the source archive of pocketsphinx 5.1.1 has no utterances of TIDIGITS")
    return sorted(utterances, key=lambda each: -len(each.features))


# ----------------------------------------------------------------------------------------------------- distortions


def distorted(energies: Tensor, lengths: Tensor, noise: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Log energies [B, T, filters] as other speakers, rooms and microphones might have made them: cepstra, lengths.

    noise: log energies of the faintest noise [N, filters].
    """
    batch, frames, filters = energies.shape

    def uniform(*shape: int, reach: float) -> Tensor:
        return reach * (2 * torch.rand(shape, generator=generator) - 1)

    def field(time_: int, bands: int, size: Sequence[int], reach: float) -> Tensor:
        """Random numbers at some places of the spectrogram, smooth in between: [B, *size]."""
        knots = uniform(batch, 1, time_, bands, reach=reach)
        return F.interpolate(knots, tuple(size), mode="bilinear", align_corners=True)[:, 0]

    # The pace of each utterance and of each of its stretches: from which place every frame comes.
    pace = (uniform(batch, 1, reach=0.33) + field(2 + frames // 20, 1, (2 * frames, 1), 0.33)[..., 0]).exp()
    place = pace.cumsum(1) - pace[:, :1]
    lengths = (place <= lengths[:, None] - 1).sum(1)
    place = place[:, : int(lengths.max())]
    size = place.shape[1], filters
    # A vocal tract of another length, and vowels of other places: from which frequency every band comes.
    stretch = (uniform(batch, 1, 1, reach=0.2) + field(2 + frames // 20, 4, size, 0.18)).exp()
    top = _mel(FrontEnd.high)
    frequency = _mel(_hertz(torch.linspace(0, float(top), filters)) * stretch) / top
    where = torch.broadcast_tensors(frequency.float(), place[:, :, None] / (frames - 1))
    grid = 2 * torch.stack(where, dim=-1) - 1
    energies = F.grid_sample(energies[:, None], grid, padding_mode="border", align_corners=True)[:, 0]

    # The microphone and the loudness, the sharpness of the spectrum, the stress of sounds.
    basis = cosines(filters, filters)
    order = torch.arange(filters)
    contrast = (uniform(batch, 1, filters, reach=0.45) * (order > 0)).exp()
    offset = uniform(batch, 1, filters, reach=1.0) * (1.5 + 14.5 / (1 + order) ** 1.5)
    energies = (energies @ basis.t() * contrast + offset) @ basis + field(2 + frames // 10, 5, size, 2.5)
    # The noise of a room, which falls with frequency.
    start = torch.randint(len(noise) - energies.shape[1], (batch, 1), generator=generator)
    slope = uniform(batch, 1, 1, reach=2.0) - 2.5
    level = 5 + uniform(batch, 1, 1, reach=4.0) + slope * torch.linspace(-1, 1, filters)
    energies = torch.logaddexp(energies, noise[start + torch.arange(energies.shape[1])] + level)
    cepstra = energies @ cosines(filters).t()

    # What another sound covers.
    begin = torch.rand(batch, 2, 1, generator=generator) * lengths[:, None, None]
    end = begin + 8 * torch.rand(batch, 2, 1, generator=generator)
    frame = torch.arange(cepstra.shape[1])
    silent = ((frame >= begin) & (frame < end)).any(1)
    return torch.where(silent[..., None], cepstra.mean(1, keepdim=True), cepstra), lengths


# -------------------------------------------------------------------------------------------------------- the model


class Recogniser(nn.Module):
    """Recurrent layers → log-probabilities of the symbols, frame by frame.

    rnn: torch.nn.GRU or fused_rnn.GRU, or any other class of that signature.
    forward: x [B, T, 39], lengths [B] → [B, T, symbols].
    """

    def __init__(self, rnn: type[nn.Module], hidden: int, layers: int, bidirectional: bool) -> None:
        super().__init__()
        self.rnn = rnn(39, hidden, num_layers=layers, batch_first=True, bidirectional=bidirectional)
        self.head = nn.Linear(hidden * (1 + bidirectional), len(SYMBOLS))

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        y, _ = ragged(self.rnn, x, lengths)
        return self.head(y).log_softmax(2)


Batch = tuple[Tensor, Tensor, list[str]]  # x [B, T, 39], lengths [B], texts


class Material:
    """Synthetic utterances as batches, and how the cepstra of any become what the networks read."""

    def __init__(self, training: list[Utterance], held_out: list[Utterance], given: Options) -> None:
        self.training, self.held_out, self.given = training, held_out, given
        generator = torch.Generator().manual_seed(given.seed)
        # Sphinx's dither, in digital silence: a bit of noise, one time in four.
        self.noise = FrontEnd().log_mel((torch.rand(3_000_000, generator=generator) < 0.25).float())
        self.order = Shuffled(len(training), BATCH, given.seed, [len(each.features) for each in training])
        cepstra, lengths = self.distorted(training[:BATCH], generator)
        each = [c[:length] for c, length in zip(cepstra, lengths, strict=True)]
        self.normaliser = Normaliser(torch.cat(each).mean(0), torch.cat([c - c.mean(0) for c in each]).std(0))

    def distorted(self, utterances: list[Utterance], generator: torch.Generator) -> tuple[Tensor, Tensor]:
        energies, lengths = padded([each.features for each in utterances])
        return distorted(energies, lengths, self.noise, generator)

    def batch(self, step: int, causal: bool) -> Batch:
        """The training data of a step."""
        generator = torch.Generator().manual_seed(self.given.seed * 1_000_003 + step)
        chosen = [self.training[i] for i in self.order(step)]
        return self.read(*self.distorted(chosen, generator), chosen, causal)

    def validation(self, causal: bool) -> list[Batch]:
        """The voices held out, distorted as in training, always the same way."""
        generator = torch.Generator().manual_seed(self.given.seed + 1)
        ordered = sorted(self.held_out, key=lambda each: len(each.features))
        parts = [ordered[i : i + BATCH] for i in range(0, len(ordered), BATCH)]
        return [self.read(*self.distorted(part, generator), part, causal) for part in parts]

    def read(self, cepstra: Tensor, lengths: Tensor, utterances: list[Utterance], causal: bool) -> Batch:
        """What the networks read of them; the longest first."""
        x, lengths = self.normaliser(cepstra, lengths, causal)
        order = lengths.argsort(descending=True, stable=True)
        return x[order].to(self.given.device), lengths[order], [utterances[i].text for i in order]


def ctc(model: nn.Module, x: Tensor, lengths: Tensor, texts: list[str]) -> Tensor:
    """Nats per frame."""
    targets = torch.tensor([SYMBOLS.index(letter) for text in texts for letter in text], device=x.device)
    log_probabilities = model(x, lengths).transpose(0, 1)
    counts = torch.tensor([len(text) for text in texts])
    total = F.ctc_loss(log_probabilities, targets, lengths, counts, reduction="sum", zero_infinity=True)
    return total / lengths.sum()


def digits(rows: Tensor) -> str:
    """Log-probabilities [T, symbols] → the best symbol of each step; what repeats counts once, blanks not at all."""
    best = rows.argmax(1).tolist()
    return "".join(SYMBOLS[b] for a, b in zip([0, *best], best, strict=False) if b != a and b)


def recognised(model: nn.Module, x: Tensor, lengths: Tensor) -> list[str]:
    return [digits(rows[:length]) for rows, length in zip(model(x, lengths).cpu(), lengths, strict=True)]


def edits(said: str, heard: str) -> int:
    """The fewest substitutions, deletions and insertions that make one of the other."""
    row = list(range(len(heard) + 1))
    for i, a in enumerate(said):
        left = [i + 1]
        for j, b in enumerate(heard):
            left.append(min(row[j] + (a != b), row[j + 1] + 1, left[j] + 1))
        row = left
    return row[-1]


def error_rate(pairs: Sequence[tuple[str, str]]) -> float:
    """Word errors in percent of the words said, from what was said and what was heard."""
    return 100 * sum(edits(said, heard) for said, heard in pairs) / sum(len(said) for said, _ in pairs)


# -------------------------------------------------------------------------------------------------------- listening


@torch.no_grad()
def listen(model: Recogniser, inputs: Sequence[Tensor], steps: Callable[[], Steps]) -> tuple[list[Tensor], float]:
    """Over the inputs [T, 39] by steps of [1, 39] → [1, H]: log-probabilities [T, symbols]; the median of µs a step."""
    results, seconds = [], []
    for x in inputs:
        step, rows = steps(), []
        for frame in x[:, None]:
            start = time.perf_counter()
            rows.append(model.head(step(frame)).log_softmax(1).cpu())
            seconds.append(time.perf_counter() - start)
        results.append(torch.cat(rows))
    return results, 1e6 * median(seconds)


def padding_cost(rnn: nn.Module, x: Tensor, lengths: Tensor, cell: str, rounds: int) -> dict[str, float]:
    """Milliseconds of a ragged batch, and of as many frames without padding, backward included: of the best round."""
    mixed = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    even = x[:, : int(lengths.sum()) // len(x)].contiguous()
    ours, theirs = (copy.deepcopy(rnn).train() for _ in range(2))
    runs: dict[str, Callable[[], Any]] = {
        "ours, no padding": lambda: ours(even),
        "ours, longest first": lambda: ragged(ours, x, lengths),
        "ours, in any order": lambda: ragged(ours, x[mixed], lengths[mixed]),
    }
    if cell in IN_TORCH:
        theirs = fused_rnn.to_torch(theirs)
        runs |= {
            "torch.nn, no padding": lambda: theirs(even),
            "torch.nn, packed": lambda: ragged(theirs, x, lengths),
            "torch.nn, padded": lambda: theirs(x),
        }
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            for _ in range(2):  # the first fills the caches, after another run's
                start = time.perf_counter()
                run()[0].sum().backward()
                if x.is_cuda:
                    torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - start)
    return {name: 1e3 * min(each) for name, each in seconds.items()}


# ------------------------------------------------------------------------------------------------------ the picture


def draw_utterance(axes: Sequence[Any], test: Utterance, curves: dict[str, Tensor]) -> None:
    """The energies of a real utterance, and under them what each network hears: a curve a digit, named at its peak."""
    spectrum, *below = axes
    energies = test.features @ cosines(FrontEnd.filters)
    seconds = len(energies) / FrontEnd.frames
    faint = energies.quantile(0.1).item()
    spectrum.imshow(energies.t(), origin="lower", aspect="auto", cmap="Blues", extent=(0, seconds, 0, 4), vmin=faint)
    words = " ".join(WORDS[SYMBOLS.index(letter) - 1] for letter in test.text)
    spectrum.set(title=f"A real voice, {test.speaker}, says: {words}", ylabel="mel bands", yticks=[])
    colours = {letter: COLOURS[i % len(COLOURS)] for i, letter in enumerate(dict.fromkeys(test.text))}
    for axis, (label, rows) in zip(below, curves.items(), strict=True):
        chances, best = rows.exp(), [0, *rows.argmax(1).tolist(), 0]
        time_ = (torch.arange(len(rows)) + 0.5) * TOGETHER / FrontEnd.frames
        axis.fill_between(time_, chances[:, 0], color="#ececf2", linewidth=0)
        for symbol in sorted(set(best) - {0}):
            axis.plot(time_, chances[:, symbol], color=colours.get(SYMBOLS[symbol], FAINT))
        changes = [i for i in range(len(rows) + 1) if best[i] != best[i + 1]]
        for start, end in pairwise(changes):
            if symbol := best[start + 1]:
                peak = start + int(chances[start:end, symbol].argmax())
                axis.text(time_[peak], 1.05, SYMBOLS[symbol], ha="center", weight="bold")
        axis.set(ylim=(0, 1.3), xlim=(0, seconds), yticks=(0, 1), title=f"{label}: chance of each digit; grey: of none")
    for axis in axes:
        axis.grid(visible=False)
        axis.tick_params(labelbottom=axis is axes[-1])
    axes[-1].set_xlabel("seconds")


def draw_bars(axis: Any, title: str, values: dict[str, float], form: str) -> None:
    colours = [BACK if "torch" in name else "#c8c8d4" if "Sphinx" in name else FRONT for name in values]
    axis.barh([*values], [*values.values()], color=colours)
    axis.bar_label(axis.containers[0], fmt=form)
    axis.set(title=title, xlim=(0, 1.25 * max(1e-9, *values.values())))
    axis.invert_yaxis()
    axis.grid(visible=False)


def main(arguments: Sequence[str] | None = None) -> int:
    given = options(parser("speech", __doc__, cell="gru", steps=3000, quick_steps=20), arguments)
    hidden, layers, count, held_out = (32, 1, 256, 32) if given.quick else (128, 2, 5000, 400)
    synthesiser = Synthesiser()
    tests = real()
    names, others = voices(synthesiser.variants)
    start = time.perf_counter()
    made = synthetic(synthesiser, names, count, given.seed), synthetic(synthesiser, others, held_out, given.seed + 1)
    print(f"{count + held_out} utterances by {len({*names, *others})} voices in {time.perf_counter() - start:.0f} s")
    material = Material(*made, given)

    def trained(label: str, causal: bool) -> Trained:
        def build(library: ModuleType) -> Recogniser:  # library: torch.nn or fused_rnn, the swap
            return Recogniser(given.layer(library), hidden, layers, bidirectional=not causal)

        def loss(model: nn.Module, step: int, state: Any) -> tuple[Tensor, None]:
            return ctc(model, *material.batch(step, causal)), None

        batches = material.validation(causal)

        def score(model: nn.Module) -> float:
            heard = [text for x, lengths, _ in batches for text in recognised(model, x, lengths)]
            return error_rate([*zip([text for *_, texts in batches for text in texts], heard, strict=True)])

        return train(given, build, loss, rate=RATE, label=label, score=score, score_every=200)

    whole, online = trained("bidirectional", causal=False), trained("streaming", causal=True)
    cepstra = padded([test.features for test in tests])
    x, lengths, _ = material.read(*cepstra, tests, causal=False)
    inputs = [each[:n] for each, n in zip(material.read(*cepstra, tests, causal=True)[0], lengths, strict=True)]
    micros, listener = {}, online.model
    streamed, micros["ours, a stream"] = listen(listener, inputs, lambda: listener.rnn.stream(batch_size=1).step)
    if cell := IN_TORCH.get(given.cell):
        _, micros["torch.nn, its cells"] = listen(listener, inputs, lambda: looped(listener.rnn, cell))
    with torch.no_grad():
        rows = {"bidirectional": [*whole.model(x, lengths).cpu()], "streaming": streamed}
    heard = {label: [digits(r[:n]) for r, n in zip(each, lengths, strict=True)] for label, each in rows.items()}
    for i, test in enumerate(tests):
        print(f"{test.speaker:8} said {test.text:8} heard {'  '.join(each[i] for each in heard.values())}")

    quality: dict[str, float | int | str] = {"in short": ""}
    errors: dict[str, float] = {}
    for label, each in (("bidirectional", whole), ("streaming", online)):
        pairs = [*zip(tests, heard[label], strict=True)]
        errors[f"synthetic, {label}"] = min(value for _, value in each.scores)
        errors[f"real, {label}"] = error_rate([(test.text, text) for test, text in pairs if test.sphinx is not None])
        quality[f"word errors, %, {label}: voices that chose the weights, synthetic"] = errors[f"synthetic, {label}"]
        quality[f"word errors, %, {label}: real voices of TIDIGITS"] = errors[f"real, {label}"]
        for speaker in sorted({test.speaker for test in tests}):
            own = [(test.text, text) for test, text in pairs if test.speaker == speaker]
            quality[f"word errors, %, {label}: {speaker} ({len(own)})"] = error_rate(own)
    real_whole, synthetic_whole, real_online = (
        f"{errors[name]:.0f} %" for name in ("real, bidirectional", "synthetic, bidirectional", "real, streaming")
    )
    quality["in short"] = (
        f"word errors: real voices {real_whole}, synthetic ones {synthetic_whole}; streaming {real_online}"
    )
    sphinx = error_rate([(test.text, test.sphinx) for test in tests if test.sphinx is not None])
    quality["word errors, %, PocketSphinx, trained on TIDIGITS: real voices of TIDIGITS"] = sphinx
    errors["real, PocketSphinx,\ntrained on real ones"] = sphinx
    milliseconds = 1000 * TOGETHER // FrontEnd.frames  # of speech a step
    for name, value in micros.items():
        quality[f"µs a step of {milliseconds} ms of speech, {name}"] = value
        quality[f"times as fast as speech, {name}"] = round(1e3 * milliseconds / value)
    costs = padding_cost(whole.model.rnn, x, lengths, given.cell, rounds=3 if given.quick else 9)
    quality |= {f"ms a ragged batch, forward and backward, {name}": value for name, value in costs.items()}

    def draw(figure: Any) -> None:
        figure.set_size_inches(12, 6.6)
        shown = next(i for i, test in enumerate(tests) if len(test.text) == 5)
        left, right = figure.subfigures(1, 2, width_ratios=(1.5, 1))
        curves = {label: each[shown][: lengths[shown]] for label, each in rows.items()}
        draw_utterance(left.subplots(3, 1), tests[shown], curves)
        bars = right.subplots(3, 1, height_ratios=(len(errors), len(costs), len(micros) + 1))
        draw_bars(bars[0], "Word errors, %", errors, " %.1f")
        draw_bars(bars[1], f"The layers on {len(tests)} utterances, ms", costs, " %.1f")
        draw_bars(bars[2], f"Listening to {milliseconds} ms of speech, µs", micros, " %.0f")

    data = {
        "synthetic voices, training": len({*names}),
        "synthetic voices held out": len(others),
        "utterances, training": count,
        "utterances held out": held_out,
        "real utterances": len(tests),
    }
    return finish(given, [whole, online], quality, data, draw)


if __name__ == "__main__":
    sys.exit(main())
