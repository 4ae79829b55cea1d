"""A model of the user's before and after convert: how it is found, what is compared, what is timed, what is said."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from rich.console import Console
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

import fused_rnn
from fused_rnn.commands.bench import model
from fused_rnn.commands.bench.factory import ModelError, example, floating, load
from fused_rnn.commands.bench.measure import Timing
from fused_rnn.commands.bench.model import Gain, ModelCall, compare, verdict, visits
from fused_rnn.commands.cli import cli

PROGRAM = """
import torch
from torch import nn
from beside import WIDTH

class Tagger(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.LSTM(WIDTH, 8, num_layers=2, dropout=0.5, batch_first=True)
        self.head = nn.Sequential(nn.Linear(8, 3), nn.Dropout(0.5))
        self.unused = nn.GRU(3, 3)

    def forward(self, x):
        return self.head(self.encoder(x)[0])

def tagger():
    return Tagger(), torch.randn(4, 6, WIDTH)
"""


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "beside.py").write_text("WIDTH = 5\n")
    (tmp_path / "my_models.py").write_text(PROGRAM)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.chdir(tmp_path)
    yield tmp_path / "my_models.py"  # type: ignore[misc]
    for name in ("my_models", "beside"):
        sys.modules.pop(name, None)


class Decoder(nn.Module):
    """A cell in a loop beside a layer that gets named arguments and packed input."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.cell = nn.GRU(5, 6), nn.LSTMCell(6, 6)

    def forward(self, x: Tensor, h: Tensor) -> dict[str, Any]:
        packed, last = self.layer(pack_padded_sequence(x, [4, 2]), hx=h)
        state = None
        for _ in range(3):
            state = self.cell(last[0], state)
        return {"state": state, "outputs": packed}


def decoder() -> tuple[nn.Module, dict[str, Tensor]]:
    return Decoder(), {"x": torch.randn(4, 2, 5), "h": torch.randn(1, 2, 6, requires_grad=True)}


def run(*arguments: str, code: int = 0) -> str:
    result = CliRunner().invoke(cli, ["bench", "--model", *arguments], catch_exceptions=False)
    assert result.exit_code == code, result.output
    return " ".join(result.output.split()) if code else result.output


@pytest.mark.parametrize("name", ["my_models.py:tagger", "my_models:tagger"])
@pytest.mark.usefixtures("file")
def test_the_command_says_what_gained_what(name: str) -> None:
    """With dropout: both models draw the same masks."""
    before = torch.get_num_threads()
    text = run(name, "--minutes", "0", "--threads", "1")
    assert torch.get_num_threads() == before
    for mode in ("inference", "training"):
        assert f"{mode}: medians" in text
        assert f"{mode.capitalize()}: the model is " in text
    assert text.count("  encoder: LSTM") == 2
    assert "unused" not in text, "it is never called"
    assert "gradients by " in text
    assert max(map(len, text.splitlines())) <= 80


@pytest.mark.parametrize("mode", ["inference", "training"])
def test_a_layer_is_timed_on_what_the_model_gives_it(mode: str) -> None:
    gains, said = compare(decoder, mode, 0.0)
    assert [(gain.name, gain.kind, gain.visits) for gain in gains] == [
        ("the whole model", "Decoder", 0),
        ("layer", "GRU", 1),
        ("cell", "LSTMCell", 3),
    ]
    assert all(gain.before.p50 > 0 and gain.after.p50 > 0 for gain in gains)
    assert "Results coincide: outputs by " in said


def test_what_a_layer_got_is_what_it_gets_again() -> None:
    """Replayed, its outputs are the model's, and the gradients of its weights, too."""
    given = example(decoder)
    assert isinstance(given.module, Decoder)
    call = ModelCall(given, training=True)
    seen = visits(call, {"layer": given.module.layer, "cell": given.module.cell})
    expected = {name: p.grad.clone() for name, p in given.module.named_parameters() if p.grad is not None}
    assert len(seen["cell"]) == 3 and len(seen["layer"]) == 1
    assert seen["layer"][0].kwargs["hx"].requires_grad
    assert all(visit.gradients for visit in seen["cell"])
    for name in ("layer", "cell"):
        replay = model.LayerCall(getattr(given.module, name), seen[name], training=True)
        replay.prepare()
        assert all(p.grad is None for p in replay.module.parameters())
        replay.run()
        for own, p in replay.module.named_parameters():
            torch.testing.assert_close(p.grad, expected[f"{name}.{own}"])


@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: {"input": x}, lambda x: pack_padded_sequence(x, [4, 2])])
def test_inputs_that_carry_a_graph(wrap: Any) -> None:
    """What they were computed by is no part of the model; that they have a gradient is."""
    leaf = torch.randn(4, 2, 5, requires_grad=True)
    given = example(lambda: (nn.GRU(5, 6), wrap(leaf * 2)))
    found = floating((given.args, given.kwargs))
    assert found and all(tensor.is_leaf and tensor.requires_grad for tensor in found)
    _, said = compare(lambda: (nn.GRU(5, 6), wrap(leaf * 2)), "training", 0.0)
    assert "gradients by " in said
    assert leaf.grad is None
    kept = example(lambda: (nn.GRU(5, 6), leaf)).args[0]
    assert kept is leaf, "a leaf stays the one that the loss may know"


def test_a_model_that_is_ours_already_is_compared_with_torchs() -> None:
    gains, _ = compare(lambda: (fused_rnn.GRU(4, 6), torch.randn(3, 2, 4)), "training", 0.0)
    assert [(gain.name, gain.kind) for gain in gains] == [("the whole model", "GRU")]


def test_a_result_that_differs_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = fused_rnn.convert

    def wrong(module: nn.Module) -> nn.Module:
        with torch.no_grad():
            next(honest(module).parameters()).add_(0.1)
        return module

    monkeypatch.setattr(fused_rnn, "convert", wrong)
    with pytest.raises(ModelError, match=r"inference: the outputs differ by .* of their norm, expected 1e-03 at most"):
        compare(lambda: (nn.GRU(4, 6), torch.randn(3, 2, 4)), "inference", 0.0)


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        (lambda: nn.GRU(2, 2), r"the factory returned a GRU, expected \(module, inputs\) or"),
        (lambda: (nn.GRU(2, 2),), "the factory returned a tuple of 1, expected"),
        (lambda: (torch.ones(1), 1), "the factory returned a tuple of 2, expected"),
        (lambda: (nn.GRU(2, 2), torch.ones(1, 1, 2), 3), "loss: got a int, expected a function"),
        (lambda: (nn.Linear(2, 2), torch.ones(1, 2)), "convert finds no LSTM, GRU, RNN or cell .*it has Linear"),
        (
            lambda: (nn.GRU(2, int(torch.randint(2, 99, (1,), generator=GENERATOR))), torch.ones(1, 1, 2)),
            "must build the same model each time",
        ),
    ],
)
def test_what_cannot_be_measured_is_said(factory: Any, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        compare(factory, "training", 0.0)


GENERATOR = torch.Generator("cpu").manual_seed(1)


def test_outputs_without_a_gradient_need_a_loss() -> None:
    with pytest.raises(ModelError, match="no output of the model has a gradient: return a loss"):
        compare(lambda: (nn.GRU(2, 2).requires_grad_(False), torch.ones(1, 1, 2)), "training", 0.0)
    seen: list[Any] = []
    compare(lambda: (nn.GRU(2, 2), torch.ones(1, 1, 2), lambda out: seen.append(out) or out[1].sum()), "training", 0.0)
    assert seen


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["my_models.py:nobody"], "my_models.py has no function 'nobody'; it has: Tagger, tagger"),
        (["elsewhere.py:tagger"], "elsewhere.py: no such file"),
        (["elsewhere:tagger"], "no module of that name here or installed"),
        (["tagger"], "expected module:factory or file.py:factory"),
        (["my_models:tagger", "--mode", "step"], "expected inference or training"),
        (["my_models:tagger", "--dtype", "bf16"], "does not go with --model"),
        (["my_models:tagger", "--shape", "1,2,3,4"], "does not go with --model"),
    ],
)
@pytest.mark.usefixtures("file")
def test_bad_arguments_are_refused_in_words(arguments: list[str], message: str) -> None:
    assert message in run(*arguments, code=2).replace(" │ │ ", " ")


def test_what_the_users_code_raises_is_not_caught(file: Path) -> None:
    file.write_text("import no_such_package_of_theirs\n")
    for name in ("my_models:tagger", "my_models.py:tagger"):
        with pytest.raises(ModuleNotFoundError, match="no_such_package_of_theirs"):
            load(name)


def timing(micros: float, spread: float = 1.0) -> Timing:
    return Timing(micros * 1e-6, micros * 1e-6, micros * spread * 1e-6, 9)


def test_the_verdict_names_who_gains_and_who_loses() -> None:
    slow, fast = Gain("a.slow", "RNN", 1, timing(8), timing(10)), Gain("a.fast", "LSTM", 1, timing(90), timing(30))
    text = verdict([Gain("whole", "Net", 0, timing(100), timing(50)), slow, fast], "training").plain
    assert text.splitlines() == [
        "Training: the model is 2.00× as fast: take it.",
        "a.fast gains most: 60.0 µs of 90.0 µs, 3.00× as fast.",
        "a.slow is slower, 0.80×: fused_rnn.to_torch(...) of it takes it back.",
    ]
    disturbed = verdict([Gain("whole", "Net", 0, timing(100), timing(50, 3.0))], "training").plain.splitlines()
    assert disturbed[0].endswith("2.00× as fast: measure again (the machine was disturbed: 0.67× at least).")
    assert disturbed[1:] == ["~: the 80th percentile is more than 1.5× the 20th: the machine was disturbed."]


def test_a_layer_that_was_disturbed_is_marked_and_nothing_is_said_of_it() -> None:
    """By its spread, or by taking longer than the model that it is a layer of."""
    whole = Gain("whole", "Net", 0, timing(1000), timing(500))
    absurd, spread = (
        Gain("absurd", "GRU", 1, timing(9310), timing(270)),
        Gain("spread", "GRU", 1, timing(900), timing(9, 1.6)),
    )
    slower, fair = Gain("slower", "RNN", 1, timing(20), timing(600)), Gain("fair", "LSTM", 1, timing(100), timing(60))
    gains = [whole, absurd, spread, slower, fair]
    assert verdict(gains, "inference").plain.splitlines() == [
        "Inference: the model is 2.00× as fast: take it.",
        "fair gains most: 40.0 µs of 100 µs, 1.67× as fast.",
        "~: the 80th percentile is more than 1.5× the 20th, or a layer alone takes longer than the whole model: "
        "the machine was disturbed, and nothing is said of absurd, spread, slower.",
    ]
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(model.table(gains, "inference"))
    lines = {
        line.split(":")[0].strip(): line.split()[2:]
        for line in console.export_text().splitlines()
        if " µs" in line or " ms" in line
    }
    assert lines["absurd"] == ["~9.31", "ms", "270", "µs", "34.5×", "–"]
    assert lines["spread"] == ["900", "µs", "~9.00", "µs", "100×", "90%"]
    assert lines["slower"] == ["20.0", "µs", "~600", "µs", "0.03×", "2%"]
    assert lines["fair"] == ["100", "µs", "60.0", "µs", "1.67×", "10%"]
    assert "~" not in verdict([whole, fair], "inference").plain
    almost = Gain("almost", "GRU", 1, timing(1030), timing(510))
    assert "almost gains most" in verdict([whole, almost], "inference").plain, "within 5 % there is no difference"
