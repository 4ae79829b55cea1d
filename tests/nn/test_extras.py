"""Regularisers in the loop, and gates and states over time: against loops written from the papers' formulas."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from tolerances import GRADCHECK, assert_as_good_as_torch
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.utils.checkpoint import checkpoint

import fused_rnn
from fused_rnn.nn import extras

MODULES: dict[str, Any] = {
    "lstm": fused_rnn.LSTM,
    "gru": fused_rnn.GRU,
    "rnn": fused_rnn.RNN,
    "flex": lambda *args, **kwargs: fused_rnn.FlexRNN(user_gru, *args, **kwargs),
}
KINDS: dict[str, dict[str, Any]] = {
    "recurrent_dropout": {"recurrent_dropout": 0.4},
    "on_g": {"recurrent_dropout": 0.4, "recurrent_dropout_on": "g"},
    "zoneout": {"zoneout": 0.3},
    "weight_dropout": {"weight_dropout": 0.5},
    "all": {"recurrent_dropout": 0.2, "zoneout": 0.3, "weight_dropout": 0.2, "return_sequences": "states",
            "return_gates": True},
}  # fmt: skip


@fused_rnn.cell(gates=("reset", "update", "new"))
def user_gru(x: Any, r: Any, s: Any, p: Any) -> Any:
    reset, z = torch.sigmoid(x[0] + r[0]), torch.sigmoid(x[1] + r[1])
    n = torch.tanh(x[2] + reset * r[2])
    return (1 - z) * n + z * s.h


def pairs() -> list[tuple[str, str]]:
    return [(m, k) for m in MODULES for k in KINDS if k != "on_g" or m in ("lstm", "gru")]


def options(module: str, kind: str) -> dict[str, Any]:
    return {k: v for k, v in KINDS[kind].items() if module != "flex" or k != "recurrent_dropout_on"}


@pytest.fixture
def masks(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The masks that a call draws: of a recurrence that of h, g or W_hh, then of each state."""
    drawn: list[Tensor] = []

    class Recording(extras._Draw):
        def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
            drawn.append(super().__call__(*args, **kwargs))
            return drawn[-1]

    monkeypatch.setattr(extras, "_Draw", Recording)
    return drawn


def formula(name: str, a: list[Tensor], b: list[Tensor], s: list[Tensor], g_mask: Any) -> tuple[Any, dict[str, Tensor]]:
    """The states after and the gates, as the papers have them. a, b: the input and the recurrent sides."""
    if name == "lstm":
        i, f, o = (torch.sigmoid(a[k] + b[k]) for k in (0, 1, 3))
        g = torch.tanh(a[2] + b[2]) * g_mask
        c = f * s[1] + i * g
        return [o * torch.tanh(c), c], {"i": i, "f": f, "g": g, "o": o}
    if name == "rnn":
        return [torch.tanh(a[0] + b[0])], {"0": a[0] + b[0]}
    reset, z = torch.sigmoid(a[0] + b[0]), torch.sigmoid(a[1] + b[1])
    n = torch.tanh(a[2] + reset * b[2]) * g_mask
    if name == "flex":
        gates = {key: x + y for key, x, y in zip(("reset", "update", "new"), a, b, strict=True)}
    else:
        gates = {"r": reset, "z": z, "n": n}
    return [(1 - z) * n + z * s[0]], gates


def loop(name: str, module: Any, x: Tensor, hx: list[Tensor], masks: list[list[Tensor]], kind: dict[str, Any],
         lengths: Tensor | None = None, reset: Tensor | None = None) -> dict[str, Tensor]:  # fmt: skip
    """All that a module may return, in x's dtype, with these masks."""
    layers, sides, H = module.num_layers, 1 + module.bidirectional, module.hidden_size
    own = {k: v.to(x.dtype) for k, v in module.named_parameters()}
    left, gates_number = iter(masks), {"lstm": 4, "rnn": 1}.get(name, 3)
    finals: list[list[Tensor]] = []
    for layer in range(layers):
        columns: list[dict[str, Tensor]] = []
        for r in range(sides):
            suffix = f"_l{layer}" + "_reverse" * r
            w_ih, w_hh, b_ih, b_hh = (own[f"{w}{suffix}"] for w in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"))
            drawn = [m.to(x.dtype) for m in next(left)]
            on = kind.get("recurrent_dropout_on", "h") if kind.get("recurrent_dropout") else ""
            drop = drawn.pop(0)[0] if on else x.new_ones(())
            state = [h[layer * sides + r] for h in hx]
            outputs: list[Any] = [None] * len(x)
            for t in range(len(x)) if r == 0 else reversed(range(len(x))):
                entering = state if reset is None else [s.masked_fill(reset[t][:, None], 0) for s in state]
                h = entering[0] * drop if on == "h" else entering[0]
                a = linear(x[t], w_ih, b_ih).split(H, -1)
                b = linear(h, w_hh, b_hh).split(H, -1)
                assert len(a) == gates_number
                after, gates = formula(name, list(a), list(b), entering, drop if on == "g" else 1)
                for k, zone in enumerate(drawn):
                    after[k] = zone[t] * entering[k] + (1 - zone[t]) * after[k]
                over = torch.zeros(x.shape[1], 1, dtype=torch.bool)
                if lengths is not None:
                    over = (t >= lengths)[:, None]
                state = [torch.where(over, s, n) for s, n in zip(state, after, strict=True)]
                step = {f"state {k}": n for k, n in enumerate(after)} | {f"gate {k}": g for k, g in gates.items()}
                outputs[t] = {k: v.masked_fill(over, 0) for k, v in step.items()}
            columns.append({k: torch.stack([o[k] for o in outputs]) for k in outputs[0]})
            finals.append(state)
        together = {k: torch.cat([column[k] for column in columns], -1) for k in columns[0]}
        x = together["state 0"]
    after = {f"state {k} after": torch.stack([f[k] for f in finals]) for k in range(len(hx))}
    return together | after


def named(module: Any, result: Any, count: int) -> dict[str, Tensor]:
    """What a module returned, by the names of `loop`."""
    y, hx, *gates = result
    made = {f"state {k}": s for k, s in enumerate(y if isinstance(y, tuple) else (y,))}
    made |= {f"state {k} after": s for k, s in enumerate(hx if count > 1 else (hx,))}
    return made | {f"gate {k}": g for k, g in (gates[0] if gates else {}).items()}


def call(name: str, kind: dict[str, Any], layers: int = 2, dtype: torch.dtype = torch.float64, **more: Any) -> Any:
    """A module in training mode, its input and states."""
    torch.manual_seed(5)
    module = MODULES[name](4, 6, layers, bidirectional=True, dtype=dtype, **kind, **more)
    x, count = torch.randn(5, 3, 4, dtype=dtype), module._fused_states
    hx = [torch.randn(2 * layers, 3, 6, dtype=dtype) for _ in range(count)]
    return module, x, hx


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("save", ["gates", "recompute"])
@pytest.mark.parametrize(("name", "kind"), [pair for pair in pairs() if pair[1] != "weight_dropout"])
def test_by_the_papers_formulas(name: str, kind: str, save: str, dtype: torch.dtype, masks: list[list[Tensor]]) -> None:
    """Outputs and gradients, with the masks that were drawn, with and without lengths and resets."""
    own = options(name, kind)
    own.pop("weight_dropout", None)  # its mask is another: below
    found: list[tuple[dict[str, Tensor], ...]] = []
    for draw in range(5):
        masks.clear()
        found.append(_one_draw(name, own, save, dtype, draw, masks))
    columns = [{k: torch.stack([r[k] for r in each]) for k in each[0]} for each in zip(*found, strict=True)]
    assert_as_good_as_torch(*columns)


def _one_draw(
    name: str, own: dict[str, Any], save: str, dtype: torch.dtype, draw: int, masks: list[Tensor]
) -> tuple[dict[str, Tensor], ...]:
    """What the module makes, the loop in its dtype, and in double."""
    module, x, hx = call(name, own, dtype=dtype, save=save)
    torch.manual_seed(draw)
    lengths = torch.tensor([5, 0, 3]) if draw % 2 else None
    reset = torch.rand(5, 3) < 0.3 if draw % 3 else None
    weights = dict(module.named_parameters())

    def differentiate(run: Any, dtype: torch.dtype) -> dict[str, Tensor]:
        leaves = [t.detach().to(dtype).requires_grad_() for t in (x, *hx, *weights.values())]
        first = 1 + len(hx)
        made = run(dict(zip(weights, leaves[first:], strict=True)), leaves[0], leaves[1:first])
        random = torch.Generator().manual_seed(1)
        grads = [torch.randn(v.shape, generator=random, dtype=torch.float64).to(dtype) for v in made.values()]
        pulled = torch.autograd.grad(list(made.values()), leaves, grads, allow_unused=True, materialize_grads=True)
        names = ["dx", *(f"dhx {k}" for k in range(len(hx))), *weights]
        return {k: v.detach() for k, v in made.items()} | dict(zip(names, pulled, strict=True))

    def by_module(weights: dict[str, Tensor], x: Tensor, hx: list[Tensor]) -> dict[str, Tensor]:
        given = (x, hx[0] if len(hx) == 1 else tuple(hx))
        result = torch.func.functional_call(module, weights, given, {"lengths": lengths, "reset": reset})
        return named(module, result, len(hx))

    mine = differentiate(by_module, dtype)
    wanted = [k for k in mine if k.startswith(("state", "gate"))]
    each = len(masks) // 4  # of a recurrence
    recorded = [masks[k * each : (k + 1) * each] for k in range(4)]
    assert len(masks) == 4 * each > 0

    def by_loop(weights: dict[str, Tensor], x: Tensor, hx: list[Tensor]) -> dict[str, Tensor]:
        made = loop(name, _With(module, weights), x, hx, recorded, own, lengths, reset)
        return {k: made[k] for k in wanted}

    return mine, differentiate(by_loop, dtype), differentiate(by_loop, torch.float64)


class _With:
    """A module's sizes with other weights."""

    def __init__(self, module: Any, weights: dict[str, Tensor]) -> None:
        self.num_layers, self.bidirectional = module.num_layers, module.bidirectional
        self.hidden_size, self.weights = module.hidden_size, weights

    def named_parameters(self) -> Any:
        return self.weights.items()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(("B", "H"), [(1, 64), (19, 16), (3, 70)])
@pytest.mark.parametrize("kind", ["recurrent_dropout", "on_g", "zoneout"])
def test_masks_where_they_lie(kind: str, B: int, H: int, dtype: torch.dtype) -> None:
    """Of whole vectors and of parts of one, of one row and of more than go together: as by the plain loop."""
    module, x = fused_rnn.LSTM(4, H, bidirectional=True, **KINDS[kind]), torch.randn(5, B, 4)
    found: list[list[dict[str, Tensor]]] = [[], [], []]
    for seed in range(3):
        for k, (backend, own) in enumerate((("cpu", dtype), ("reference", dtype), ("reference", torch.float64))):
            torch.manual_seed(seed)
            module.backend = backend
            given = x.to(dtype).to(own).requires_grad_()
            y = module.to(dtype).to(own)(given, lengths=torch.randint(0, 6, (B,)))[0]
            leaves = {"x": given, **dict(module.named_parameters())}
            pulled = torch.autograd.grad(y, list(leaves.values()), torch.linspace(-1, 1, y.numel()).view_as(y).to(own))
            found[k].append({"y": y.detach(), **dict(zip(leaves, pulled, strict=True))})
    assert_as_good_as_torch(*[{k: torch.stack([r[k] for r in each]) for k in each[0]} for each in found])


@pytest.mark.parametrize("name", MODULES)
def test_nothing_is_drawn_where_nothing_is_dropped(name: str) -> None:
    """Other random numbers stay what they are."""
    module = MODULES[name](4, 6, return_gates=True, return_sequences="states")
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    module(torch.zeros(2, 1, 4))
    assert torch.equal(torch.rand(2), expected)


@pytest.mark.parametrize("given", [(0.0, False), [0.2, True], (True, 0.1)])
def test_a_bool_is_no_probability_though_it_equals_one(given: Any) -> None:
    """What a call has found good is no leave for what is equal to it."""
    module, x = fused_rnn.LSTM(4, 6, zoneout=(0.0, 0.0)), torch.randn(2, 1, 4)
    for good in ((0.0, 0.0), (0.2, 0.9), 0.0):
        module.zoneout = good
        module(x)
    module.zoneout = given
    with pytest.raises(TypeError, match=r"zoneout: got (True|False), expected a probability"):
        module(x)
    module.zoneout, module.recurrent_dropout = 0.0, False
    with pytest.raises(TypeError, match="recurrent_dropout: got False, expected a probability"):
        module(x)


def test_a_list_that_changes() -> None:
    module, x = fused_rnn.LSTM(4, 6, zoneout=[0.5, 0.0]), torch.randn(5, 3, 4)
    assert not torch.equal(module(x)[0], module(x)[0])
    module.zoneout[0] = 0.0
    assert torch.equal(module(x)[0], module(x)[0])


@pytest.mark.parametrize("name", MODULES)
def test_weight_dropout(name: str, masks: list[Tensor]) -> None:
    """One mask on W_hh, the same at all steps, of each layer and direction."""
    module, x, hx = call(name, {"weight_dropout": 0.5})
    states = hx[0] if len(hx) == 1 else tuple(hx)
    y, _ = module(x, states)
    left = iter(masks)
    dropped = {k: w * next(left) if "weight_hh" in k else w for k, w in module.named_parameters()}
    assert next(left, None) is None and len(masks) == 4
    assert all(len(mask.unique()) == 2 for mask in masks)
    module.weight_dropout = 0.0
    torch.testing.assert_close(y, torch.func.functional_call(module, dropped, (x, states))[0], rtol=0, atol=0)


def test_what_the_masks_are(masks: list[Tensor]) -> None:
    """Of h one for a sequence, scaled; of zoneout one for each step, of h and c apart."""
    module = fused_rnn.LSTM(4, 400, recurrent_dropout=0.25, zoneout=(0.1, 0.6), weight_dropout=0.3)
    module(torch.randn(7, 9, 4))
    weights, dropped, h, c = masks
    assert dropped.shape == (1, 9, 400) and weights.shape == (1600, 400) and h.shape == c.shape == (7, 9, 400)
    for mask, high in ((dropped, 1 / 0.75), (weights, 1 / 0.7), (h, 1.0), (c, 1.0)):
        torch.testing.assert_close(mask.unique(), torch.tensor([0.0, high]))
    for mask, share in ((dropped == 0, 0.25), (weights == 0, 0.3), (h, 0.1), (c, 0.6)):
        spread = (share * (1 - share) / mask.numel()) ** 0.5
        assert abs(float(mask.float().mean()) - share) < 5 * spread


@pytest.mark.parametrize("name", MODULES)
def test_eval(name: str) -> None:
    """Dropout is off, to the last bit; of zoneout there is the expectation."""
    module, x, hx = call(name, {"recurrent_dropout": 0.5, "weight_dropout": 0.5})
    plain, states = MODULES[name](4, 6, 2, bidirectional=True, dtype=x.dtype), hx[0] if len(hx) == 1 else tuple(hx)
    plain.load_state_dict(module.state_dict())
    expected = plain(x, states)
    for own, other in zip(_flat(module.eval()(x, states)), _flat(expected), strict=True):
        assert torch.equal(own, other)
    zoned, x, hx = call(name, {"zoneout": 0.3})
    zones = [[torch.full((5, 3, 6), 0.3)] * len(hx)] * 4
    made = named(zoned, zoned.eval()(x, hx[0] if len(hx) == 1 else tuple(hx)), len(hx))
    expected = loop(name, zoned, x, hx, zones, {"zoneout": 0.3})
    for what, value in made.items():
        torch.testing.assert_close(value, expected[what], rtol=1e-6, atol=1e-6)  # 0.3 is one of float32 in the masks


def _flat(result: Any) -> list[Tensor]:
    return [t for each in result for t in (each if isinstance(each, tuple) else (each,))]


@pytest.mark.parametrize(("name", "kind"), pairs())
def test_seeds_and_checkpoints(name: str, kind: str) -> None:
    """The same seed gives the same masks; so does a checkpoint's second forward, and a second backward."""
    module, x, _ = call(name, options(name, kind))
    x.requires_grad_()

    def first(x: Tensor) -> Tensor:
        y = module(x)[0]
        return y if isinstance(y, Tensor) else y[0]

    def gradient(run: Any) -> Tensor:
        torch.manual_seed(9)
        (g,) = torch.autograd.grad(run(x).square().sum(), x)
        return g

    expected = gradient(first)
    assert torch.equal(gradient(first), expected)
    assert torch.equal(gradient(lambda x: checkpoint(first, x, use_reentrant=False)), expected)
    torch.manual_seed(10)
    assert not torch.equal(first(x), first(x))
    loss = first(x).square().sum()
    once = torch.autograd.grad(loss, x, retain_graph=True)[0]
    assert torch.equal(torch.autograd.grad(loss, x)[0], once)


@pytest.mark.parametrize(("name", "kind"), pairs())
def test_derivatives(name: str, kind: str) -> None:
    """First and second ones against differences."""
    module, x, _ = call(name, options(name, kind), layers=1)
    module, x = module.double(), x[:2, :2, :].double().requires_grad_()
    weights = dict(module.named_parameters())

    def run(x: Tensor, *leaves: Tensor) -> tuple[Tensor, ...]:
        torch.manual_seed(2)
        result = torch.func.functional_call(module, dict(zip(weights, leaves, strict=True)), (x,))
        return tuple(named(module, result, module._fused_states).values())

    leaves = [x, *(w.detach().clone().requires_grad_() for w in weights.values())]
    assert torch.autograd.gradcheck(run, leaves, fast_mode=True, **GRADCHECK)
    assert torch.autograd.gradgradcheck(run, leaves, fast_mode=True, **GRADCHECK)


@pytest.mark.parametrize("name", MODULES)
def test_layouts(name: str) -> None:
    """batch_first, packed and unbatched input give what lengths and [T, B, D] give."""
    kind = {"return_sequences": "states", "return_gates": True}
    module, x, _ = call(name, kind)
    lengths = torch.tensor([5, 2, 4])
    expected = named(module, module(x, lengths=lengths), module._fused_states)
    packed = pack_padded_sequence(x, lengths, enforce_sorted=False)
    made = named(module, module(packed), module._fused_states)
    for what, value in made.items():
        own = value if "after" in what else pad_packed_sequence(value, total_length=5)[0]
        torch.testing.assert_close(own, expected[what])
    module.batch_first = True
    for what, value in named(module, module(x.transpose(0, 1), lengths=lengths), module._fused_states).items():
        torch.testing.assert_close(value if "after" in what else value.transpose(0, 1), expected[what])
    module.batch_first = False
    alone = named(module, module(x[:, 0]), module._fused_states)
    for what, value in alone.items():
        torch.testing.assert_close(value, expected[what][:, 0])


def test_dropout_of_packed_layers() -> None:
    """Between the layers torch's masks of packed rows, within them ours."""
    module = fused_rnn.GRU(4, 6, 2, dropout=0.5, recurrent_dropout=0.3, return_gates=True)
    packed = pack_padded_sequence(torch.randn(5, 3, 4), torch.tensor([5, 4, 2]))
    y, h_n, gates = module(packed)
    assert y.data.shape == gates["z"].data.shape == (11, 6) and h_n.shape == (2, 3, 6)


def test_gates_of_a_trained_module_are_its_own() -> None:
    """What torch's GRU has inside, from its weights."""
    theirs = nn.GRU(4, 6)
    ours = fused_rnn.GRU(4, 6, return_gates=True)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(5, 3, 4)
    y, _, gates = ours(x)
    torch.testing.assert_close(y, theirs(x)[0])
    before = torch.cat([torch.zeros(1, 3, 6), y[:-1]])
    torch.testing.assert_close(y, (1 - gates["z"]) * gates["n"] + gates["z"] * before)


def test_copies() -> None:
    module = fused_rnn.LSTM(4, 6, recurrent_dropout=0.1, zoneout=(0.1, 0.2), return_gates=True)
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    for other in (copy.deepcopy(module), torch.load(file, weights_only=False)):
        assert repr(other) == repr(module) and "zoneout=(0.1, 0.2)" in repr(other)
        assert len(other(torch.randn(2, 1, 4))) == 3
    assert list(module.state_dict()) == list(nn.LSTM(4, 6).state_dict())
    with pytest.warns(UserWarning, match=r"with 4, 6, recurrent_dropout=0.1.* which torch.nn has not"):
        assert fused_rnn.to_torch(module) is module and type(module) is fused_rnn.LSTM
    with pytest.raises(NotImplementedError, match=r"recurrent_dropout=0\.1"):
        torch.jit.script(module)


def test_attributes_may_change() -> None:
    module, x = fused_rnn.GRU(4, 6, recurrent_dropout=0.5), torch.randn(5, 3, 4)
    module.recurrent_dropout = 0.0
    assert torch.equal(module(x)[0], module(x)[0])
    module.return_gates = True
    assert sorted(module(x)[2]) == ["n", "r", "z"]
    module.zoneout = 2.0
    with pytest.raises(ValueError, match=r"zoneout: got 2\.0, expected a probability"):
        module(x)


def test_attributes_set_later() -> None:
    """On a module that had none, too; but not where a class derived from ours may mean something else."""
    for module in (fused_rnn.LSTM(4, 6), fused_rnn.convert(nn.LSTM(4, 6)), fused_rnn.LayerNormLSTM(4, 6)):
        x = torch.randn(5, 3, 4)
        module.zoneout = 0.5
        assert not torch.equal(module(x)[0], module(x)[0])
        module.zoneout = 0.0
        module.return_gates = True
        assert torch.equal(module(x)[0], module(x)[0]) and len(module(x)[2]) == 4
        module.recurrent_dropout = 2
        with pytest.raises(ValueError, match="recurrent_dropout: got 2, expected a probability"):
            module(x)

    class Other(fused_rnn.GRU):
        def __init__(self) -> None:
            super().__init__(4, 6)
            self.zoneout = "mine"

    other = Other()
    assert torch.equal(other(x)[0], other(x)[0]) and other.zoneout == "mine"


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch.jit.script, of itself
def test_a_schedule_that_has_ended_leaves_a_module_as_torch_has_it() -> None:
    module, x = fused_rnn.LSTM(4, 6, zoneout=0.5), torch.randn(5, 3, 4)
    module.zoneout = (0, 0.0)
    y = torch.jit.script(nn.Sequential(module))(x)[0]
    assert torch.equal(y, fused_rnn.to_torch(module)(x)[0]) and type(module) is nn.LSTM
    assert "zoneout" not in vars(fused_rnn.convert(module)) and not module._fused_extras


@pytest.mark.parametrize("randomness", ["same", "different"])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "all"])
def test_vmap(kind: str, randomness: str) -> None:
    module, x = fused_rnn.LSTM(4, 6, **KINDS[kind]), torch.randn(2, 5, 3, 4)
    x[1] = x[0]
    y = torch.func.vmap(lambda x: module(x)[0], randomness=randomness)(x)
    assert torch.equal(y[0], y[1]) is (randomness == "same")


def test_five_masks() -> None:
    """Of a cell of four states, all zoned out, and h dropped: no loop is too small for that."""
    cell = fused_rnn.cell(gates=4, states=("a", "b", "c", "d"))(
        lambda x, r, s, p: tuple(torch.tanh(x[k] + r[k] + s[k]) for k in range(4))
    )
    module = fused_rnn.FlexRNN(cell, 4, 6, recurrent_dropout=0.2, zoneout=0.1, backend="cpu")
    module(torch.randn(5, 3, 4))[0].sum().backward()


def test_what_a_cell_cannot_zone_out() -> None:
    """Of sLSTM's states c, n and m mean something together alone."""
    module = fused_rnn.SLSTM(8, 32, zoneout=0.3)
    y, _ = module(20 * torch.randn(200, 3, 8))
    assert y.abs().max() < 1.001
    with pytest.raises(ValueError, match="zoneout: got a probability for 'c', expected 0"):
        fused_rnn.SLSTM(8, 32, zoneout=(0.1, 0.1, 0.1, 0.1))


@pytest.mark.parametrize("name", ["recurrent_dropout", "weight_dropout"])
def test_what_a_cell_cannot_drop(name: str) -> None:
    module = fused_rnn.MGU(4, 6)
    setattr(module, name, 0.1)
    with pytest.raises(ValueError, match=f"{name}: got 0.1, expected 0: a gate stands before"):
        module(torch.randn(5, 3, 4))


def test_states_that_do_not_fit() -> None:
    """In the words that a module without extras has."""
    plain, own, x = fused_rnn.LSTM(4, 6), fused_rnn.LSTM(4, 6, recurrent_dropout=0.1), torch.randn(5, 3, 4)
    for hx in ((torch.zeros(1, 2, 6),) * 2, (torch.zeros(1, 3, 5),) * 2, torch.zeros(1, 3, 6), (torch.zeros(1, 3, 6),)):
        said = []
        for module in (plain, own):
            with pytest.raises(Exception) as caught:
                module(x, hx)
            said.append((caught.type, str(caught.value)))
        assert said[0] == said[1]


def test_streams() -> None:
    """With zoneout a stream has its expectation; in training mode there is none."""
    module, x = fused_rnn.LSTM(4, 6, 2, zoneout=0.3), torch.randn(5, 1, 4)
    with pytest.raises(RuntimeError, match=r"zoneout: got 0\.3 in training mode"):
        module.stream()
    for own in (module.eval(), fused_rnn.GRU(4, 6, recurrent_dropout=0.3).eval()):
        stream, (expected, _) = own.stream(), own(x)
        torch.testing.assert_close(torch.stack([stream.step(x_t) for x_t in x]), expected)


def test_autocast_and_compile() -> None:
    module, x = fused_rnn.LSTM(4, 6, recurrent_dropout=0.5, zoneout=0.2, return_gates=True), torch.randn(5, 3, 4)
    with torch.autocast("cpu", torch.bfloat16):
        y, (h, c), gates = module(x)
    assert {t.dtype for t in (y, h, c, gates["f"])} == {torch.bfloat16}
    module.eval()
    torch._dynamo.reset()  # of how often it has compiled the same code before
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    for own, other in zip(_flat(compiled(x)[:2]), _flat(module(x)[:2]), strict=True):
        torch.testing.assert_close(own, other)
    module.train()
    assert compiled(x)[0].shape == (5, 3, 6)


ERRORS: list[tuple[Any, dict[str, Any], type[Exception], str]] = [
    (fused_rnn.LSTM, {"recurrent_dropout": 1.0}, ValueError, "recurrent_dropout: got 1.0, expected a probability"),
    (fused_rnn.LSTM, {"recurrent_dropout": "a"}, TypeError, "recurrent_dropout: got 'a', expected a probability"),
    (fused_rnn.LSTM, {"weight_dropout": -0.1}, ValueError, "weight_dropout: got -0.1"),
    (fused_rnn.LSTM, {"weight_dropout": True}, TypeError, "weight_dropout: got True"),
    (
        fused_rnn.LSTM,
        {"zoneout": (0.1,)},
        ValueError,
        "zoneout: got 1 probabilities, expected one, or one for each of 2",
    ),
    (fused_rnn.LSTM, {"zoneout": [0.1, {}]}, TypeError, "zoneout: got {}, expected a probability"),
    (fused_rnn.GRU, {"zoneout": (0.1, 0.2)}, ValueError, "zoneout: got 2 probabilities"),
    (fused_rnn.GRU, {"recurrent_dropout_on": "x"}, ValueError, "recurrent_dropout_on: got 'x', expected 'h' or 'g'"),
    (fused_rnn.RNN, {"recurrent_dropout_on": "g"}, ValueError, "recurrent_dropout_on: got 'g', expected 'h'"),
    (fused_rnn.GRU, {"return_gates": 1}, TypeError, "return_gates: got 1, expected True or False"),
    (fused_rnn.GRU, {"return_sequences": "all"}, ValueError, "return_sequences: got 'all', expected 'h' or 'states'"),
    (fused_rnn.LSTM, {"proj_size": 3, "zoneout": 0.1}, ValueError, "zoneout: got zoneout= of a module with proj_size"),
]


@pytest.mark.parametrize(("kind", "given", "error", "said"), ERRORS)
def test_errors(kind: Any, given: dict[str, Any], error: type[Exception], said: str) -> None:
    with pytest.raises(error) as caught:
        kind(4, 6, **given)
    assert said in str(caught.value)


@pytest.mark.parametrize("save", ["gates", "recompute"])
@pytest.mark.parametrize(("name", "kind"), pairs())
def test_output_may_be_changed_in_place(name: str, kind: str, save: str) -> None:
    """As torch.nn's: an activation, or dropout, with inplace=True follows it. Before backward, in training."""
    x = torch.randn(5, 3, 4)
    for batch_first in (False, True):
        module = MODULES[name](4, 6, 2, batch_first=batch_first, bidirectional=True, save=save, **options(name, kind))
        grads = []
        for in_place in (False, True):
            torch.manual_seed(1)
            y = module(x)[0]
            y = y[0] if isinstance(y, tuple) else y
            module.zero_grad()
            (y.mul_(2) if in_place else y * 2).square().sum().backward()
            grads.append([p.grad for p in module.parameters()])
        for own, other in zip(*grads, strict=True):
            torch.testing.assert_close(own, other)


def test_a_cell_without_a_matrix_has_none_to_drop() -> None:
    cell = fused_rnn.cell(gates=1, recurrent=False)(lambda x, r, s, p: torch.tanh(x[0]) + s.h)
    for name in ("recurrent_dropout", "weight_dropout"):
        with pytest.raises(ValueError, match=f"{name}: got 0.1, expected 0: the cell has no W_hh"):
            fused_rnn.FlexRNN(cell, 4, 6, **{name: 0.1})
    assert fused_rnn.FlexRNN(cell, 4, 6, zoneout=0.1)(torch.randn(3, 2, 4))[0].shape == (3, 2, 6)


def test_projections_may_drop_weights() -> None:
    module = fused_rnn.LSTM(4, 6, proj_size=3, weight_dropout=0.5, return_sequences="states")
    (y, c), _ = module(torch.randn(5, 2, 4))
    assert y.shape == (5, 2, 3) and c.shape == (5, 2, 6)


def test_the_mean_is_what_it_is_without() -> None:
    """Of many masks of a linear cell: dropped units are scaled."""
    cell = fused_rnn.cell(gates=1)(lambda x, r, s, p: x[0] + r[0])
    module = fused_rnn.FlexRNN(cell, 4, 6, recurrent_dropout=0.5, dtype=torch.float64)
    x = torch.randn(2, 1, 4, dtype=torch.float64)
    y, _ = module(x.expand(2, 20000, 4).contiguous())
    expected, _ = module.eval()(x)
    spread = y[1].std(0) / 20000**0.5
    assert ((y[1].mean(0) - expected[1, 0]).abs() < 5 * spread).all()
