"""diagnose: its norms are autograd's own, it names what was planted, and it leaves no trace."""

from __future__ import annotations

import copy
import math
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

import fused_rnn
from fused_rnn.cells import CELLS
from fused_rnn.diagnose import Report, tables
from fused_rnn.nn import extras

T, B, D, H = 7, 3, 4, 6
LENGTHS = [7, 4, 6]


def made(kind: str, **options: Any) -> Any:
    torch.manual_seed(1)
    options = {"dtype": torch.float64, **options}
    if kind == "rnn_relu":
        return fused_rnn.RNN(D, H, nonlinearity="relu", **options)
    if kind in user_cells.USER_CELLS:
        init = dict.fromkeys(user_cells.USER_CELLS[kind].params, 0.4)
        return fused_rnn.FlexRNN(user_cells.USER_CELLS[kind], D, H, init=init, **options)
    return getattr(fused_rnn, kind)(D, H, **options)


def given() -> tuple[Tensor, Tensor]:
    """x and reset."""
    torch.manual_seed(2)
    return torch.randn(T, B, D, dtype=torch.float64), torch.rand(T, B) < 0.2


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


def planted(factor: float, nonlinearity: str = "tanh") -> fused_rnn.RNN:
    """An RNN in which a step back multiplies a gradient by the factor, for its states are near 0."""
    torch.manual_seed(4)
    rnn = fused_rnn.RNN(D, H, nonlinearity=nonlinearity, bias=False, dtype=torch.float64)
    with torch.no_grad():
        nn.init.orthogonal_(rnn.weight_hh_l0).mul_(factor)
    return rnn


@pytest.mark.parametrize("every", [False, True], ids=["last", "every"])
@pytest.mark.parametrize(("factor", "verdict"), [(0.5, "vanishes"), (1.0, "flows"), (1.5, "explodes")])
def test_what_was_planted_is_found(factor: float, verdict: str, every: bool) -> None:
    rnn, x = planted(factor), torch.randn(60, B, D, dtype=torch.float64) * 1e-30
    with fused_rnn.diagnose(rnn) as report:
        y, _ = rnn(x)
        (y if every else y[-1]).sum().backward()
    found = report.flows["l0"]
    assert found.factor == pytest.approx(factor, rel=1e-9)
    assert (found.verdict, found.span) == (verdict, 59)
    assert found.reach == (59 if factor >= 1 else int(math.log(1e3) / math.log(2)))
    assert report.spectral_radius["h_l0"] == pytest.approx(factor)
    summary = report.summary()
    assert f"l0 (rnn_tanh): the gradient {verdict}: a step back in time multiplies it by {factor:.3g}" in summary
    helps = {"vanishes": "orthogonal", "flows": "", "explodes": "clip_grad_norm_"}[verdict]
    assert helps in summary and ("What helps" in summary) == (verdict != "flows")


def test_a_layer_below_is_judged_by_its_own_recurrence() -> None:
    """Gradients of the layer above enter it mostly at the last steps: in the other direction that looks like growth."""
    torch.manual_seed(5)
    rnn = fused_rnn.RNN(D, H, num_layers=2, bidirectional=True)
    with torch.no_grad():
        for name, p in rnn.named_parameters():
            p.zero_() if "bias" in name else nn.init.orthogonal_(p).mul_(0.5) if "hh" in name else None
    with fused_rnn.diagnose(rnn) as report:
        rnn(torch.zeros(40, B, D))[0][-1].sum().backward()
    norms = report.gradients["h_l0_reverse"]
    assert norms[-1] > 1e3 * norms[0]
    for name in ("l0", "l0_reverse", "l1"):
        assert report.flows[name].factor == pytest.approx(0.5, rel=1e-4)
    assert report.flows["l1_reverse"].verdict == "short"


def test_an_lstm_that_remembers_flows() -> None:
    lstm = made("LSTM")
    with torch.no_grad():
        lstm.bias_ih_l0[H : 2 * H] = 12
    x = torch.randn(100, B, D, dtype=torch.float64)
    with fused_rnn.diagnose(lstm) as report:
        lstm(x)[0][-1].sum().backward()
    assert report.flows["l0"].verdict == "flows"
    assert 0.99 < report.flows["l0"].factor < 1.01
    low, high = report.gates["f_l0"]
    assert not low.any() and bool((high == 1).all())
    assert "Gate f is saturated" in report.summary()


def test_an_overflow_is_an_explosion() -> None:
    rnn = planted(30.0, "relu").float()
    with fused_rnn.diagnose(rnn) as report:
        rnn(torch.randn(60, B, D).abs())[0][-1].square().sum().backward()
    assert report.flows["l0"].verdict == "explodes"
    assert "inf or NaN" in report.summary()


def test_saturation_counts_what_is_near_the_ends() -> None:
    """Against counting by hand, over the steps that sequences have."""
    gru, (x, _) = made("GRU"), given()
    with torch.no_grad():
        for p in gru.parameters():
            p.mul_(6)
    with fused_rnn.diagnose(gru) as report:
        y, _ = gru(x, lengths=LENGTHS)
        y.sum().backward()
    h = torch.cat([torch.zeros(1, B, H, dtype=torch.float64), y[:-1].detach()])
    gates_x = linear(x, gru.weight_ih_l0, gru.bias_ih_l0).chunk(3, -1)
    gates_h = linear(h, gru.weight_hh_l0, gru.bias_hh_l0).chunk(3, -1)
    r, z = (torch.sigmoid(gates_x[k] + gates_h[k]) for k in range(2))
    n = torch.tanh(gates_x[2] + r * gates_h[2])
    valid = (torch.arange(T)[:, None] < torch.tensor(LENGTHS)).double()
    for name, a, (low, high) in (("r", r, (0.05, 0.95)), ("z", z, (0.05, 0.95)), ("n", n, (-0.9, 0.9))):
        near = torch.stack([(a < low).double().mean(-1), (a > high).double().mean(-1)])
        expected = (near * valid).sum(-1) / valid.sum(-1)
        assert 0 < expected.sum() < 2 * T
        torch.testing.assert_close(report.gates[f"{name}_l0"], expected)


def test_relu_is_saturated_where_it_is_0() -> None:
    rnn, (x, _) = made("rnn_relu"), given()
    with fused_rnn.diagnose(rnn) as report:
        y, _ = rnn(x)
        y.sum().backward()
    torch.testing.assert_close(report.gates["h_l0"][0], (y == 0).double().mean((1, 2)))
    assert not report.gates["h_l0"][1].any()


@pytest.mark.parametrize(("kind", "gates"), [("lstm", 4), ("gru", 3), ("leaky", 1), ("indrnn", 1), ("chain", 1)])
def test_gates_of_a_users_cell(kind: str, gates: int) -> None:
    """Where the built-in cells have names, a user's have numbers; what nothing squashes is left out."""
    module, (x, _) = made(kind), given()
    with fused_rnn.diagnose(module) as report:
        module(x)[0].sum().backward()
    assert list(report.gates) == [f"gate{k}_l0" for k in range(gates)]
    if kind in ("lstm", "gru"):
        theirs = made(kind.upper())
        theirs.load_state_dict(module.state_dict())
        with fused_rnn.diagnose(theirs) as other:
            theirs(x)[0].sum().backward()
        for ours, named in zip(report.gates.values(), other.gates.values(), strict=True):
            torch.testing.assert_close(ours, named)


def test_a_gate_that_nothing_squashes_is_left_out() -> None:
    @fused_rnn.cell(gates=2, recurrent=False)
    def linear_cell(x: Any, r: Any, s: Any, p: Any) -> Any:
        return torch.sigmoid(x[1]) * s.h + x[0]

    module = fused_rnn.FlexRNN(linear_cell, D, H)
    with fused_rnn.diagnose(module) as report:
        module(torch.randn(T, B, D))[0].sum().backward()
    assert list(report.gates) == ["gate1_l0"] and not report.spectral_radius
    assert report.gradients["h_l0"].all() and report.flows["l0"].factor is not None


def test_spectral_radius() -> None:
    lstm = made("LSTM", proj_size=2, bidirectional=True)
    heads = made("lstm", heads=2)
    model = nn.ModuleDict({"a": lstm, "b": heads, "c": made("indrnn")})
    with fused_rnn.diagnose(model) as report:
        sum(m(given()[0])[0].sum() for m in model.values()).backward()
    for suffix in ("", "_reverse"):
        w_hh, w_hr = (getattr(lstm, f"weight_{k}_l0{suffix}").detach() for k in ("hh", "hr"))
        for gate, block in zip("ifgo", w_hh.chunk(4), strict=True):
            expected = torch.linalg.eigvals(w_hr @ block).abs().max()  # the same but for zeros, and another matrix
            assert report.spectral_radius[f"a.{gate}_l0{suffix}"] == pytest.approx(float(expected))
    for k, block in enumerate(user_cells.dense(heads.weight_hh_l0.detach(), 4).chunk(4)):
        expected = torch.linalg.eigvals(block).abs().max()
        assert report.spectral_radius[f"b.gate{k}_l0"] == pytest.approx(float(expected))
    assert not any(name.startswith("c.") for name in report.spectral_radius)
    assert report.flows.keys() == {"a.l0", "a.l0_reverse", "b.l0", "c.l0"}


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


def test_plot_without_matplotlib_names_the_extra(report: Report, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.delitem(sys.modules, "fused_rnn.diagnose.picture", raising=False)
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
