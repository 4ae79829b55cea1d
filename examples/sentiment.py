"""Sentiment: how favourable is a sentence of a film review?

    python examples/sentiment.py [--quick] [--cell gru] [--file FILE]

Data: 10,605 snippets of film reviews, each rated from -4 to 4 by about 15 people, of whom the mean counts. They are in
the source archive of vaderSentiment 3.3.2 (MIT licence), which asks to cite: C.J. Hutto and E.E. Gilbert (2014), VADER:
A Parsimonious Rule-based Model for Sentiment Analysis of Social Media Text, ICWSM-14. A snippet's number does not tell
which review it is from, so the split is by snippet: 75 % training, 10 % validation, 15 % test.

A bidirectional layer gives each word a share of the rating, all trained from scratch. Beside it: VADER's rules, a bag
of words and pairs of words (linear and logistic regression), and how well one person agrees with the others.
"""

from __future__ import annotations

import ast
import math
import re
import sys
import tarfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from material import Shuffled, needed, padded, ragged, source_archive, stop
from side_by_side import COLOURS, FAINT, INK, draw_losses, evaluated, finish, options, parser, train
from torch import Tensor, nn
from torch.nn import functional as F

BATCH, RATE = 32, 1e-3
UNKNOWN = 1  # the code of a word that the training data have less than twice; 0 is padding
POSITIVE, NEGATIVE, GREY = COLOURS[2], COLOURS[3], "#c8c8d4"


# ------------------------------------------------------------------------------------------------------------- data


def member(name: str) -> bytes:
    """A file of the rated snippets' archive, which lies inside the source archive."""
    inside = "hutto_ICWSM_2014"
    with tarfile.open(source_archive("vaderSentiment", "3.3.2")) as outer:
        found = outer.extractfile(f"vaderSentiment-3.3.2/additional_resources/{inside}.tar.gz")
        with tarfile.open(fileobj=found) as inner:
            return inner.extractfile(f"{inside}/{name}").read()


def snippets(raw: bytes, name: str) -> dict[str, tuple[float, str]]:
    """Lines of number, rating and text between tabs → number: (rating, text). A text that comes twice counts once."""
    found: dict[str, tuple[float, str]] = {}
    seen = set()
    for row, line in enumerate(raw.rstrip().split(b"\n"), 1):
        try:
            columns = line.decode("utf-8").strip("\r").split("\t")
        except UnicodeDecodeError as error:
            stop(f"{name}, line {row}: not UTF-8: {error.reason} at byte {error.start + 1}")
        if len(columns) != 3:
            stop(f"{name}, line {row}: got {len(columns)} columns, expected 3 between tabs: number, rating, text")
        number, rating, text = columns
        try:
            value = float(rating)
        except ValueError:
            value = math.nan
        if not -4 <= value <= 4:
            stop(f"{name}, line {row}: got the rating {rating!r}, expected a number from -4 to 4")
        if number in found:
            stop(f"{name}, line {row}: the number {number} comes twice")
        if text not in seen:
            seen.add(text)
            found[number] = value, text
    if len(found) < 200:
        stop(f"{name}: got {len(found)} snippets, expected at least 200")
    if not min(found.values())[0] < 0 < max(found.values())[0]:
        stop(f"{name}: expected ratings below and above zero")
    return found


def people(numbers: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Each person's rating of these snippets, and the mean of the others' of the same snippet."""
    ratings = {}
    for line in member("movieReviewSnippets_anonDataRatings.txt").decode("cp1252").splitlines():
        number, _, _, given = line.split("\t")[:4]
        ratings[number] = ast.literal_eval(given)
    own, others = [], []
    for given in map(ratings.__getitem__, numbers):
        own += given
        others += [(sum(given) - one) / (len(given) - 1) for one in given]
    return torch.tensor(own, dtype=torch.float32), torch.tensor(others)


def words(text: str) -> list[str]:
    """Words and punctuation marks, in small letters."""
    return re.findall(r"[^\W_]+(?:['’][^\W_]+)*|[^\w\s]", text.lower())


class Vocabulary:
    """The words that come at least twice. encode: text → int64 [T]."""

    def __init__(self, texts: Sequence[str]) -> None:
        counts = Counter(word for text in texts for word in words(text))
        often = [word for word, count in counts.most_common() if count > 1]
        self.index = {word: code for code, word in enumerate(often, UNKNOWN + 1)}

    def __len__(self) -> int:
        return len(self.index) + UNKNOWN + 1

    def encode(self, text: str) -> Tensor:
        return torch.tensor([self.index.get(word, UNKNOWN) for word in words(text)] or [UNKNOWN])


# ------------------------------------------------------------------------------------------------------------ model


class Rater(nn.Module):
    """Embedding → bidirectional recurrent layer → each word's value and weight.

    rnn: torch.nn.LSTM or fused_rnn.LSTM, or any other class of that signature.
    forward: text int64 [B, T], lengths [B] → each word's share of the rating [B, T]. The rating is their sum: the mean
    of the words' values by their weights.
    """

    def __init__(self, rnn: type[nn.Module], vocabulary: int, hidden: int = 128) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, hidden, padding_idx=0)
        nn.init.normal_(self.embed.weight, std=0.1)
        self.rnn = rnn(hidden, hidden, bidirectional=True, batch_first=True)
        self.head = nn.Linear(2 * hidden, 2)

    def forward(self, text: Tensor, lengths: Tensor) -> Tensor:
        if self.training:  # word dropout: a fifth is unknown
            text = text.masked_fill((torch.rand(text.shape, device=text.device) < 0.2) & (text > 0), UNKNOWN)
        y, _ = ragged(self.rnn, F.dropout(self.embed(text), 0.5, self.training), lengths)
        value, weight = self.head(F.dropout(y, 0.5, self.training)).unbind(-1)
        return value * weight.masked_fill(text == 0, -torch.inf).softmax(dim=1)


def shares(model: nn.Module, codes: Sequence[Tensor], device: str) -> list[Tensor]:
    """Each word's share of the rating, [T] a text."""
    order = sorted(range(len(codes)), key=lambda i: -len(codes[i]))  # so that little is padded
    found: list[Tensor] = [torch.empty(0)] * len(codes)
    for start in range(0, len(order), 256):
        chosen = order[start : start + 256]
        for i, share in zip(chosen, model(*padded([codes[i] for i in chosen], device)).cpu(), strict=True):
            found[i] = share[: len(codes[i])]
    return found


def rate(model: nn.Module, codes: Sequence[Tensor], device: str) -> Tensor:
    """Ratings, [N]."""
    return torch.stack([share.sum() for share in shares(model, codes, device)])


# ---------------------------------------------------------------------------------------------------------- quality


def correlation(a: Tensor, b: Tensor) -> float:
    return torch.corrcoef(torch.stack([a.double(), b.double()]))[0, 1].item()


def right_sign(predicted: Tensor, ratings: Tensor) -> Tensor:
    """Where the rating is not zero: 1 if the sign is right, 0 if it is wrong, a half where none was predicted."""
    signed = ratings != 0
    return ((predicted * ratings).sign()[signed] + 1) / 2


def bag_of_words(texts: Sequence[Sequence[str]], ratings: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """What logistic regression on the sign and linear regression on the rating say of the test snippets.

    texts, ratings: training, validation, test. The strength of either is the one that serves the validation data best.
    """
    needed("sklearn")
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression, Ridge

    vectors = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True)
    training, validation, test = vectors.fit_transform(texts[0]), *map(vectors.transform, texts[1:])
    target, known = ratings[0].numpy(), ratings[1]
    signs = [LogisticRegression(C=c, max_iter=1000).fit(training, target > 0).decision_function for c in (1, 3, 10, 30)]
    linear = [Ridge(alpha=alpha).fit(training, target).predict for alpha in (0.1, 0.3, 1, 3)]
    by_sign = max(signs, key=lambda says: right_sign(torch.from_numpy(says(validation)), known).mean())
    by_rating = min(linear, key=lambda says: F.mse_loss(torch.from_numpy(says(validation)), known))
    return torch.from_numpy(by_sign(test)), torch.from_numpy(by_rating(test))


def by_rules(texts: Sequence[str]) -> Tensor:
    """VADER's compound score, -1 to 1; zero where it knows none of the words."""
    analyser = needed("vaderSentiment.vaderSentiment")[0].SentimentIntensityAnalyzer()
    return torch.tensor([analyser.polarity_scores(text)["compound"] for text in texts])


def telling(parts: Sequence[Tensor], ratings: Tensor) -> list[int]:
    """Of the texts of 8 to 16 words, one that people rate below zero and one above: those whose sum turns the most.

    Ones that the model is sure of, and rightly, come first.
    """
    chosen = []
    for sign in (-1, 1):
        turns = {
            i: (bool(sign * share.sum() > 0.75), (-sign * share.cumsum(0)).max().item())
            for i, share in enumerate(parts)
            if 8 <= len(share) <= 16 and sign * ratings[i] > 0.5
        }
        chosen += [max(turns, key=turns.__getitem__)] if turns else []
    return chosen


# ------------------------------------------------------------------------------------------------------------- main


def draw_shares(axis: Any, text: str, share: Tensor, rating: float, head: str) -> None:
    """Words from left to right, each with its share, and over them the sum so far."""
    told, sums = share.tolist(), share.cumsum(0).tolist()
    axis.bar(range(len(told)), told, color=[POSITIVE if each > 0 else NEGATIVE for each in told], width=0.7)
    axis.plot(sums, color=INK, marker=".", linewidth=1.2)
    axis.axhline(0, color=FAINT, linewidth=0.7)
    axis.axhline(rating, color=FAINT, linewidth=0.9, linestyle=":")
    axis.set_title(f"{head}rated {sums[-1]:+.1f}, by people {rating:+.1f} (dotted)")
    axis.set_xticks(range(len(told)), words(text), rotation=55, ha="right", rotation_mode="anchor", fontsize=8)
    axis.margins(y=0.15)
    axis.grid(visible=False, axis="x")


def main(arguments: Sequence[str] | None = None) -> int:
    made = parser("sentiment", __doc__, cell="lstm", steps=3000, quick_steps=60)
    made.add_argument(
        "--file", type=Path, help="other snippets: lines of number, rating from -4 to 4, text, between tabs"
    )
    given = options(made, arguments)
    needed("sklearn", "statsmodels", "vaderSentiment", "matplotlib")
    from statsmodels.stats.contingency_tables import mcnemar
    from statsmodels.stats.proportion import proportion_confint

    name = str(given.more["file"] or "movieReviewSnippets_GroundTruth.txt")
    try:
        raw = given.more["file"].read_bytes() if given.more["file"] else member(name)
    except OSError as error:
        stop(f"argument --file: {error}")
    rated = [(number, *each) for number, each in snippets(raw, name).items()]
    order = torch.randperm(len(rated), generator=torch.Generator().manual_seed(0)).tolist()
    order = order[:2000] if given.quick else order
    a, b = round(0.75 * len(order)), round(0.85 * len(order))
    parts = [[rated[i] for i in part] for part in (order[:a], order[a:b], order[b:])]
    texts = [[text for _, _, text in part] for part in parts]
    ratings = [torch.tensor([rating for _, rating, _ in part]) for part in parts]
    vocabulary = Vocabulary(texts[0])
    codes = [[vocabulary.encode(text) for text in part] for part in texts]
    batches = Shuffled(len(codes[0]), BATCH, given.seed, with_lengths=[*map(len, codes[0])])

    def build(library: ModuleType) -> Rater:  # library: torch.nn or fused_rnn, the swap
        return Rater(given.layer(library), len(vocabulary), 32 if given.quick else 128)

    def loss(model: nn.Module, step: int, _: Any) -> tuple[Tensor, Any]:
        chosen = sorted(batches(step), key=lambda i: -len(codes[0][i]))
        text, lengths = padded([codes[0][i] for i in chosen], given.device)
        return (model(text, lengths).sum(dim=1) - ratings[0][chosen].to(given.device)).square().mean(), None

    def score(model: nn.Module) -> float:
        return F.mse_loss(rate(model, codes[1], given.device), ratings[1]).item()

    trained = train(given, build, loss, rate=RATE, score=score, score_every=30 if given.quick else 200)

    known = ratings[2]
    share = evaluated(lambda model: shares(model, codes[2], given.device), trained.model)
    ours = torch.stack([each.sum() for each in share])
    by_sign, by_rating = bag_of_words(texts, ratings)
    rules = by_rules(texts[2])
    this = f"this {given.cell.upper()}"
    signs = {"VADER's rules": right_sign(rules, known), "bag of words": right_sign(by_sign, known)}
    signs[this] = right_sign(ours, known)
    correlations = {"VADER's rules": correlation(rules, known), "bag of words": correlation(by_rating, known)}
    correlations[this] = correlation(ours, known)
    if not given.more["file"]:
        own, others = people([number for number, _, _ in parts[2]])
        signs["one person"], correlations["one person"] = right_sign(own, others), correlation(own, others)
    count = len(signs[this])  # snippets, for one person, too
    intervals = {
        key: proportion_confint(right.mean().item() * count, count, method="wilson") for key, right in signs.items()
    }
    x, y = signs[this] > 0.5, signs["bag of words"] > 0.5
    table = [[(x & y).sum().item(), (x & ~y).sum().item()], [(~x & y).sum().item(), (~x & ~y).sum().item()]]
    chance = mcnemar(table).pvalue
    ahead = 100 * (signs[this].mean() - signs["bag of words"].mean()).item()
    verdict = "no better" if chance > 0.05 else "better" if ahead > 0 else "worse"

    told = ", ".join(f"{key} {100 * right.mean().item():.1f}" for key, right in signs.items())
    quality: dict[str, Any] = {
        "in short": f"right signs, %: {told}",
        "right signs, %": 100 * signs[this].mean().item(),
        "correlation of the rating": correlations[this],
    }
    for key, right in signs.items():
        low, high = (100 * end for end in intervals[key])
        told = f"{100 * right.mean().item():.1f} % right signs ({low:.1f} to {high:.1f})"
        quality[key] = f"{told}, correlation {correlations[key]:.3f}"
    quality["than the bag of words"] = f"{verdict}: {ahead:+.1f} points of right signs, p = {chance:.2g} (McNemar)"

    def draw(figure: Any) -> None:
        grid = figure.add_gridspec(2, 3, width_ratios=(1, 1.35, 0.9))
        bars, curve = figure.add_subplot(grid[:, 0]), figure.add_subplot(grid[:, 2])
        heights = [100 * right.mean().item() for right in signs.values()]
        errors = [
            [abs(100 * end - height) for end, height in zip(ends, heights, strict=True)]
            for ends in zip(*intervals.values(), strict=True)
        ]
        colours = [COLOURS[0] if key == this else GREY for key in signs]
        names = [key.replace(" ", "\n", 1) + f"\n{height:.1f}" for key, height in zip(signs, heights, strict=True)]
        bars.bar(names, heights, color=colours, yerr=errors, capsize=3, ecolor=FAINT)
        bars.set(ylim=(50, 100), ylabel="right sign, %, with 95 % interval (a coin: 50)")
        bars.set_title(f"Favourable or not?\n{this}: {verdict} than a bag of words", fontsize=9.5)
        bars.grid(visible=False, axis="x")
        for row, i in enumerate(telling(share, known)):
            axis = figure.add_subplot(grid[row, 1])
            draw_shares(
                axis, texts[2][i], share[i], known[i].item(), "" if row else "Each word's share, and the sum so far\n"
            )
        draw_losses(curve, [trained], "squared error of the rating")
        curve.plot(*zip(*trained.scores, strict=True), color=COLOURS[3], marker=".", label="validation")
        curve.legend()
        curve.set_title(
            f"The same training:\nlargest difference {trained.difference:.0e}" if trained.theirs else "Training"
        )

    data: dict[str, Any] = {
        f"{part}, snippets": len(each) for part, each in zip(("training", "validation", "test"), texts, strict=True)
    }
    data |= {"test, rated exactly zero, without a sign": (known == 0).sum().item(), "vocabulary": len(vocabulary)}
    return finish(given, [trained], quality, data, draw)


if __name__ == "__main__":
    sys.exit(main())
