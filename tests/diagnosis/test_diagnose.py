"""diagnose: its norms are autograd's own, it names what was planted, and it leaves no trace."""

from __future__ import annotations

import copy
import pickle
import sys
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import user_cells
from stage_cells import STAGED
from tolerances import assert_same_formula
from torch import Tensor, nn
from torch.nn.functional import linear
from watched import LENGTHS, B, D, H, T, given, made

import fused_rnn
from fused_rnn.cells import CELLS
from fused_rnn.diagnosis import Report, tables
from fused_rnn.nn import extras
from fused_rnn.nn.field.xlstm import XLSTMCell


def plain_loop(module: Any, x: Tensor, lengths: Sequence[int] | None, reset: Tensor | None) -> tuple[Tensor, Any]:
    """The last layer's output, and every step's states by name, with their gradients retained."""
    spec, kept = CELLS[module._fused_cell], {}
    for layer in range(module.num_layers):
        sides = []
        for suffix in ("", "_reverse")[: 1 + module.bidirectional]:
            weight = {
                name.removesuffix(f"_l{layer}{suffix}"): value
                for name, value in module.named_parameters()
                if name.endswith(f"_l{layer}{suffix}")
            }
            states = [
                x.new_zeros(B, weight["weight_hr"].shape[0] if k == 0 and "weight_hr" in weight else H)
                for k in range(len(spec.states))
            ]
            steps: list[Any] = [None] * T
            for t in range(T - 1, -1, -1) if suffix else range(T):
                if reset is not None:
                    states = [s.masked_fill(reset[t].unsqueeze(-1), 0) for s in states]
                r: Any = ()
                if spec.recurrent:
                    w_hh = user_cells.dense(weight["weight_hh"], spec.gates)
                    r = linear(states[0], w_hh, weight["bias_hh"]).chunk(spec.gates, -1)
                sides_x = linear(x[t], weight["weight_ih"], weight["bias_ih"]).chunk(spec.gates, -1)
                step = module.cell if isinstance(module, fused_rnn.FlexRNN) else spec.step
                after = list(step(sides_x, r or None, states, [weight[name] for name in spec.params]))
                if "weight_hr" in weight:
                    after[0] = linear(after[0], weight["weight_hr"])
                for s in after:
                    s.retain_grad()
                steps[t] = after
                over = torch.zeros(B, 1, dtype=torch.bool) if lengths is None else (t >= torch.tensor(lengths))[:, None]
                states = [torch.where(over, old, new) for old, new in zip(states, after, strict=True)]
            for k, name in enumerate(spec.states):
                kept[f"{name}_l{layer}{suffix}"] = [s[k] for s in steps]
            y = torch.stack([s[0] for s in steps])
            if lengths is not None:
                y = y.masked_fill((torch.arange(T)[:, None] >= torch.tensor(lengths))[..., None], 0)
            sides.append(y)
        x = torch.cat(sides, -1)
    return x, kept


CASES = {
    "lstm": ("LSTM", {"num_layers": 2, "bidirectional": True}),
    "projected": ("LSTM", {"proj_size": 2, "num_layers": 2}),
    "gru": ("GRU", {"num_layers": 2, "bidirectional": True}),
    "rnn": ("RNN", {}),
    "relu": ("rnn_relu", {"bidirectional": True}),
    "heads": ("lstm", {"heads": 2, "bidirectional": True}),
    "no matrix": ("indrnn", {"num_layers": 2}),
    "three states": ("chain", {}),
}


@pytest.mark.parametrize("ragged", [False, True], ids=["plain", "lengths and reset"])
@pytest.mark.parametrize("loss", ["last", "all", "middle"])
@pytest.mark.parametrize("case", CASES)
def test_norms_are_those_of_autograd(case: str, loss: str, ragged: bool) -> None:
    module, (x, reset) = made(CASES[case][0], **CASES[case][1]), given()
    extras = {"lengths": LENGTHS, "reset": reset} if ragged else {}
    steps = {"last": slice(T - 1, T), "all": slice(None), "middle": slice(3, 4)}[loss]
    with fused_rnn.diagnose(module) as report:
        y, _ = module(x, **extras)
        y[steps].square().sum().backward()
    expected, kept = plain_loop(module, x, *((LENGTHS, reset) if ragged else (None, None)))
    expected[steps].square().sum().backward()
    assert_same_formula(y, expected)
    assert report.gradients.keys() == kept.keys()
    for name, states in kept.items():
        norms = torch.stack([torch.zeros_like(s).norm() if s.grad is None else s.grad.norm() for s in states])
        assert_same_formula(report.gradients[name], norms)


def results(module: Any, x: Any, watched: bool, **extras: Any) -> dict[str, Tensor]:
    module.zero_grad()
    torch.manual_seed(3)
    data = x.data if isinstance(x, nn.utils.rnn.PackedSequence) else x
    data.requires_grad_()
    data.grad = None
    if watched:
        with fused_rnn.diagnose(module):
            y, hx = module(x, **extras)
            loss(y, hx).backward()
    else:
        y, hx = module(x, **extras)
        loss(y, hx).backward()
    found = {"y": y.data if isinstance(y, nn.utils.rnn.PackedSequence) else y, "dx": data.grad.clone()}
    found |= {f"h{k}": s for k, s in enumerate(hx if isinstance(hx, tuple) else (hx,))}
    return found | {name: p.grad.clone() for name, p in module.named_parameters()}


def loss(y: Any, hx: Any) -> Tensor:
    y = y.data if isinstance(y, nn.utils.rnn.PackedSequence) else y
    return y.square().sum() + sum(s.sin().sum() for s in (hx if isinstance(hx, tuple) else (hx,)))


WAYS: dict[str, dict[str, Any]] = {
    "batch_first": {"batch_first": True},
    "dropout": {"num_layers": 3, "dropout": 0.4},
    "recompute": {"save": "recompute"},
    "torch": {"backend": "torch"},
    "bidirectional": {"bidirectional": True, "num_layers": 2},
    "packed": {"num_layers": 3, "bidirectional": True},
    "packed dropout": {"num_layers": 3, "dropout": 0.4},
    "unbatched": {},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN", "lstm"])
def test_results_are_those_without(kind: str, way: str) -> None:
    if (kind, way) == ("lstm", "torch"):
        pytest.skip("torch has no kernel of a user's cell")
    module, (x, reset) = made(kind, **WAYS[way]), given()
    extras: dict[str, Any] = {}
    if "packed" in way:
        given_x: Any = nn.utils.rnn.pack_padded_sequence(x, torch.tensor(LENGTHS), enforce_sorted=False)
    else:
        given_x = x[:, 0] if way == "unbatched" else x
        if way != "torch":
            extras = {
                "lengths": 5 if way == "unbatched" else LENGTHS,
                "reset": reset[:, 0] if way == "unbatched" else reset,
            }
        if way == "batch_first":
            given_x, extras["reset"] = x.transpose(0, 1).contiguous(), reset.T
    plain, watched = (results(module, given_x, on, **extras) for on in (False, True))
    for name, value in plain.items():
        assert_same_formula(watched[name], value)


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "lstm"])
def test_regularisers_draw_the_same(kind: str) -> None:
    more = {"recurrent_dropout": 0.3, "zoneout": 0.2, "weight_dropout": 0.3, "num_layers": 2, "bidirectional": True}
    module, (x, reset) = made(kind, **more), given()
    plain, watched = (results(module, x, on, lengths=LENGTHS, reset=reset) for on in (False, True))
    for name, value in plain.items():
        assert_same_formula(watched[name], value)


def test_norms_where_the_recurrence_drops(monkeypatch: pytest.MonkeyPatch) -> None:
    """h's gradient is that of all that it goes into, of what W_hh gets of it, too."""
    gru, (x, _) = made("GRU", recurrent_dropout=0.5), given()
    drawn: list[Tensor] = []
    draw = extras._Draw.__call__

    def watched(*args: Any) -> Tensor:
        drawn.append(draw(*args))
        return drawn[-1]

    monkeypatch.setattr(extras._Draw, "__call__", watched)
    with fused_rnn.diagnose(gru) as report:
        y, _ = gru(x)
        y.square().sum().backward()
    ((mask,),) = drawn
    h, states = x.new_zeros(B, H), []
    for t in range(T):
        r = linear(h * mask, gru.weight_hh_l0, gru.bias_hh_l0).chunk(3, -1)
        (h,) = CELLS["gru"].step(linear(x[t], gru.weight_ih_l0, gru.bias_ih_l0).chunk(3, -1), r, [h], [])
        h.retain_grad()
        states.append(h)
    torch.stack(states).square().sum().backward()
    assert list(report.gradients) == ["h_l0"]
    assert_same_formula(report.gradients["h_l0"], torch.stack([s.grad.norm() for s in states]))


def test_a_cell_that_hands_on_what_it_was_given() -> None:
    @fused_rnn.cell(gates=1, states=("h", "before", "same"))
    def remembers(x: Any, r: Any, s: Any, p: Any) -> Any:
        h = torch.tanh(x[0] + r[0] + s.before)
        return h, s.h, h

    module, (x, _) = fused_rnn.FlexRNN(remembers, D, H, dtype=torch.float64), given()
    h0, before0, same0 = (torch.randn(1, B, H, dtype=torch.float64, requires_grad=True) for _ in range(3))
    with fused_rnn.diagnose(module) as report:
        module(x, (h0, before0, same0))[0][-1].sum().backward()
    h, before, states = h0[0], before0[0], []
    for t in range(T):
        r = linear(h, module.weight_hh_l0, module.bias_hh_l0)
        h, before = torch.tanh(linear(x[t], module.weight_ih_l0, module.bias_ih_l0) + r + before), h.clone()
        h.retain_grad()
        before.retain_grad()
        states.append((h, before))
    h.sum().backward()
    for name, k in (("h", 0), ("before", 1)):
        norms = [torch.zeros_like(s[k]).norm() if s[k].grad is None else s[k].grad.norm() for s in states]
        assert_same_formula(report.gradients[f"{name}_l0"], torch.stack(norms))


@pytest.mark.parametrize("name", STAGED)
def test_cells_of_several_stages(name: str) -> None:
    module, (x, reset) = fused_rnn.FlexRNN(STAGED[name], D, H, dtype=torch.float64, backend="reference"), given()
    plain, watched = (results(module, x, on, lengths=LENGTHS, reset=reset) for on in (False, True))
    for key, value in plain.items():
        assert_same_formula(watched[key], value)


def test_several_calls_count_together() -> None:
    """As one call on all their sequences, of which some are shorter."""
    gru, (x, _) = made("GRU"), given()
    with fused_rnn.diagnose(gru) as report:
        gru(x)[0].square().sum().backward()
        gru(x[:4])[0].square().sum().backward()
    with fused_rnn.diagnose(gru) as whole:
        y, _ = gru(torch.cat([x, x], 1), lengths=[T] * B + [4] * B)
        y.square().sum().backward()
    assert_same_formula(report.gradients["h_l0"], whole.gradients["h_l0"])
    torch.testing.assert_close(report.gates["z_l0"], whole.gates["z_l0"])
    assert report.flows["l0"].factor == pytest.approx(whole.flows["l0"].factor)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = fused_rnn.GRU(D, H, 2)
        self.decoder = nn.Sequential(fused_rnn.LSTM(H, H))
        self.again = self.encoder
        self.never = fused_rnn.RNN(D, H)
        self.head = nn.Linear(H, 2)

    def forward(self, x: Tensor) -> Tensor:
        y, _ = self.decoder(self.encoder(x)[0])
        return self.head(y[-1])


def test_a_model_with_several_of_them() -> None:
    model = Model()
    with fused_rnn.diagnose(model) as report:
        model(torch.randn(T, B, D)).square().sum().backward()
    assert list(report.gradients) == ["encoder.h_l0", "encoder.h_l1", "decoder.0.h_l0", "decoder.0.c_l0"]
    assert list(report.flows) == ["encoder.l0", "encoder.l1", "decoder.0.l0"]
    assert all(norms[0] > 0 for norms in report.gradients.values())


def test_off_means_off() -> None:
    model, x = Model(), torch.randn(T, B, D)
    before = [(m, dict(vars(m)), type(m).forward) for m in model.modules()]
    y = model(x)
    for fails in (False, True):
        try:
            with fused_rnn.diagnose(model):
                assert "diagnose" in repr(model.encoder)
                model(x).sum().backward()
                if fails:
                    raise KeyError("the user's")
        except KeyError:
            assert fails
        for module, attributes, forward in before:
            assert vars(module) == attributes and type(module).forward is forward
            assert not module._forward_hooks and not module._forward_pre_hooks and not module._backward_hooks
    assert torch.equal(model(x), y)
    before[1][0].backend = "reference"  # still the module's own
    with fused_rnn.diagnose(model):
        model(x).sum().backward()
    assert before[1][0].backend == "reference"


def test_a_copy_made_inside_is_not_diagnosed() -> None:
    rnn, x = fused_rnn.RNN(D, H, backend="cpu"), torch.randn(T, B, D)
    with fused_rnn.diagnose(rnn) as report:
        copies = [copy.deepcopy(rnn), pickle.loads(pickle.dumps(rnn))]
        rnn(x)[0].sum().backward()
    assert report.gradients
    for other in copies:
        assert other.backend == rnn.backend == "cpu"
        assert torch.equal(other(x)[0], rnn(x)[0])


def test_a_call_that_fails_leaves_the_next_one_right() -> None:
    gru, (x, _) = made("GRU", num_layers=2), given()
    with fused_rnn.diagnose(gru) as report:
        with pytest.raises(RuntimeError):
            gru(x[..., 1:])
        with torch.no_grad():
            torch.testing.assert_close(gru(x)[0], made("GRU", num_layers=2)(x)[0])
        gru(x)[0].sum().backward()
    assert report.gradients["h_l0"].shape == report.gradients["h_l1"].shape == (T,)


def test_errors() -> None:
    rnn, x = fused_rnn.RNN(D, H), torch.randn(T, B, D)
    with pytest.raises(TypeError, match=r"module: got 3, expected a torch.nn.Module"), fused_rnn.diagnose(3):
        pass
    with pytest.raises(ValueError, match=r"module: got Linear without a recurrent layer of ours"):
        fused_rnn.diagnose(nn.Linear(2, 2)).__enter__()
    xlstm = type("sLSTMCell_vanilla", (XLSTMCell,), {})()  # as convert leaves one of that package's
    with pytest.raises(ValueError, match=r"of fused_rnn in it; cells of the package xlstm, converted or not, are not"):
        fused_rnn.diagnose(nn.Sequential(xlstm)).__enter__()
    with pytest.raises(ValueError, match=r"fused_rnn.convert turns torch.nn's into ours"):
        fused_rnn.diagnose(nn.Sequential(nn.GRU(2, 2))).__enter__()
    expected = r"got no call of its layers, expected a forward and a loss.backward\(\)"
    with pytest.raises(RuntimeError, match=expected), fused_rnn.diagnose(rnn):
        pass
    with pytest.raises(RuntimeError, match=r"got calls but no backward through them"), fused_rnn.diagnose(rnn):
        rnn(x)
    with fused_rnn.diagnose(rnn) as report:
        with pytest.raises(RuntimeError, match=r"module: got 'RNN', which is being diagnosed already"):
            fused_rnn.diagnose(rnn).__enter__()
        with pytest.raises(RuntimeError, match=r"module: got '0', which is being diagnosed already"):
            fused_rnn.diagnose(nn.Sequential(rnn)).__enter__()
        with pytest.raises(AttributeError, match=r"report.gradients: asked inside the with block"):
            _ = report.gradients
        with pytest.raises(NotImplementedError, match=r"under a transform of torch.func, expected a plain call"):
            torch.func.vmap(lambda each: rnn(each)[0])(x.unsqueeze(0))
        rnn(x)[0].sum().backward()
    assert rnn._fused_backend is None and report.gradients
    with pytest.raises(AttributeError, match="no attribute 'gradient'"):
        _ = report.gradient


@pytest.fixture
def report() -> Report:
    model = Model()
    with fused_rnn.diagnose(model) as report:
        model(torch.randn(T, B, D)).square().sum().backward()
    return report


def test_repr(report: Report) -> None:
    names = ("encoder.l0", "encoder.l1", "decoder.0.l0")
    assert repr(report) == f"<Report: {', '.join(f'{name} {report.flows[name].verdict}' for name in names)}>"
    assert repr(Report()) == "<Report: not there before the end of the with block>"


@pytest.mark.parametrize("rich", [True, False])
def test_table(report: Report, rich: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if rich:
        pytest.importorskip("rich", reason="pip install '.[cli]'")
    else:
        monkeypatch.setitem(sys.modules, "rich.console", None)
    text = report.table()
    assert ("┃" in text) == rich
    for name, norms in report.gradients.items():
        line = next(line for line in text.splitlines() if f" {name} " in f" {line}")
        assert f"{norms[0]:.2e}" in line and f"{norms[-1]:.2e}" in line
    for name, radius in report.spectral_radius.items():
        assert any(f" {name} " in f" {line}" and f"{radius:.3f}" in line for line in text.splitlines())


def test_columns_of_a_plain_table_stand_below_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rich.console", None)
    assert tables.as_text("A", [("b", "cc"), ("ddd", "e")]) == "A\nb    cc\nddd   e\n"


@pytest.mark.parametrize("ending", ["png", "svg"])
def test_plot(report: Report, ending: str, tmp_path: Any) -> None:
    pytest.importorskip("matplotlib", reason="pip install '.[diagnose]'")
    report.plot(tmp_path / f"flow.{ending}")
    made = (tmp_path / f"flow.{ending}").read_bytes()
    assert made.startswith({"png": b"\x89PNG", "svg": b"<?xml"}[ending]) and len(made) > 10_000


def test_a_state_that_does_not_matter_has_no_curve(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    figures = pytest.importorskip("matplotlib.figure", reason="pip install '.[diagnose]'")

    @fused_rnn.cell(gates=1, states=("h", "m"))
    def hardly(x: Any, r: Any, s: Any, p: Any) -> Any:
        return torch.tanh(x[0] + r[0] + 1e-9 * s.m), x[0]

    module, drawn = fused_rnn.FlexRNN(hardly, D, H), []
    with fused_rnn.diagnose(module) as report:
        module(torch.randn(T, B, D))[0].sum().backward()
    assert 0 < report.gradients["m_l0"].max() < 1e-6 * report.gradients["h_l0"].max()
    monkeypatch.setattr(figures.Figure, "savefig", lambda self, *_, **__: drawn.append(self))
    report.plot(tmp_path / "flow.svg")
    left = drawn[0].axes[0]
    assert [len(line.get_xdata()) for line in left.lines] == [T, 0]
    assert left.get_ylim()[0] > 1e-6 and "∂L/∂m < " in left.get_legend().texts[1].get_text()


def test_plot_without_matplotlib_names_the_extra(report: Report, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.delitem(sys.modules, "fused_rnn.diagnosis.picture", raising=False)
    with pytest.raises(ModuleNotFoundError, match=r"report.plot: .*pip install '.\[diagnose\]'"):
        report.plot("flow.png")


@pytest.mark.compile
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # Dynamo's, where a graph goes on
def test_a_compiled_model() -> None:
    model, x = Model(), torch.randn(T, B, D)
    model(x).square().sum().backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    compiled = torch.compile(model)
    compiled(x)
    with fused_rnn.diagnose(compiled) as report:
        compiled(x).square().sum().backward()
    assert len(report.gradients) == 4
    for name, gradient in expected.items():
        torch.testing.assert_close(model.get_parameter(name).grad, gradient)


def test_sixteen_bits_and_autocast() -> None:
    """Norms are float64's: a float16 gradient's square may be 0."""
    gru, x = fused_rnn.GRU(D, H).bfloat16(), torch.randn(T, B, D)
    with fused_rnn.diagnose(gru) as report:
        (gru(x.bfloat16())[0][-1].sum() * 1e-30).backward()
    assert report.gradients["h_l0"].dtype == torch.float64 and bool((report.gradients["h_l0"] > 0).all())
    gru.float()
    with fused_rnn.diagnose(gru) as report, torch.autocast("cpu", torch.bfloat16):
        y, _ = gru(x)
        y.float().sum().backward()
    assert y.dtype == torch.bfloat16 and bool((report.gradients["h_l0"] > 0).all())
