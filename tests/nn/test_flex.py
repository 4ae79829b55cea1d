"""FlexRNN: its API, and its numbers beside the plain loop over the user's step, and beside LSTM and GRU."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from tolerances import GRADCHECK, assert_same_formula
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence, unpack_sequence
from user_cells import USER_CELLS, chain, gru, indrnn, leaky, lstm, plain_loop

import fused_rnn
from fused_rnn import FlexRNN

F64 = torch.float64
BACKENDS = (None, "reference")
OPTIONS: list[dict[str, Any]] = [
    {},
    {"num_layers": 2, "bidirectional": True},
    {"bias": False, "heads": 3},
    {"num_layers": 2, "bidirectional": True, "heads": 2},
]
INITS = {"a": 0.3, "b": nn.init.ones_, "u": torch.linspace(-1, 1, 6)}


def make(cell: Any, *sizes: int, **options: Any) -> FlexRNN:
    """A module in float64, its params other than zero."""
    init = {name: INITS[name] for name in cell.params}
    return FlexRNN(cell, *(sizes or (4, 6)), dtype=F64, **{"init": init, **options})


def flat(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, PackedSequence):
        return [value.data]
    return [t for part in value for t in flat(part)]


def states_of(module: FlexRNN, batch: int | None = 3) -> Any:
    """Random initial states, as the module takes them."""
    rows = module.num_layers * (1 + module.bidirectional)
    shape = (rows, module.hidden_size) if batch is None else (rows, batch, module.hidden_size)
    states = tuple(torch.randn(shape, dtype=F64) for _ in module.cell.states)
    return states if len(states) > 1 else states[0]


def assert_alike(got: Any, expected: Any) -> None:
    for a, b in zip(flat(got), flat(expected), strict=True):
        assert_same_formula(a, b)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("cell", USER_CELLS.values(), ids=lambda cell: cell.name)
def test_the_plain_loop(cell: Any, options: dict[str, Any], backend: str | None) -> None:
    """All states over time, lengths, resets, initial states; and the gradients of everything."""
    module = make(cell, return_sequences="states", backend=backend, **options)
    x, hx = torch.randn(5, 3, 4, dtype=F64, requires_grad=True), states_of(module)
    lengths, reset = [5, 0, 3], torch.rand(5, 3) < 0.3
    inputs = [x, *(s.requires_grad_() for s in flat(hx)), *module.parameters()]

    def gradients(outputs: Any) -> list[Tensor]:
        torch.manual_seed(1)
        loss = sum((torch.randn_like(t) * t).sum() for t in flat(outputs))
        return list(torch.autograd.grad(loss, inputs))

    expected = plain_loop(module, x, flat(hx), lengths, reset)
    got = module(x, hx, lengths=lengths, reset=reset)
    assert isinstance(got[0], tuple)
    assert len(got[0]) == len(cell.states)
    assert isinstance(got[1], tuple) == (len(cell.states) > 1)
    assert_alike(got, expected)
    assert_alike(gradients(got), gradients(expected))
    y, after = plain_loop(module, x)
    assert_alike(module(x), (y, after))
    module._fused_options = (module.heads, False)
    assert_alike(module(x), (y[0], after))


@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True, "bias": False, "dropout": 0.5}])
@pytest.mark.parametrize(("cell", "theirs"), [(lstm, nn.LSTM), (gru, nn.GRU)])
def test_a_step_of_torchs_is_torchs_module(cell: Any, theirs: type[nn.Module], options: dict[str, Any]) -> None:
    """Parameters, their names and order, initial values, results, dropout's masks."""
    torch.manual_seed(0)
    expected = theirs(4, 6, dtype=F64, **options)
    torch.manual_seed(0)
    module = make(cell, **options)
    assert list(module.state_dict()) == list(expected.state_dict())
    assert module._flat_weights_names == expected._flat_weights_names
    assert [len(w) for w in module.all_weights] == [len(w) for w in expected.all_weights]
    for a, b in zip(module.parameters(), expected.parameters(), strict=True):
        assert torch.equal(a, b)
    module.load_state_dict(expected.state_dict())
    x, hx = torch.randn(5, 3, 4, dtype=F64), states_of(module)
    results = []
    for rnn in (module, expected):
        torch.manual_seed(2)
        results.append(rnn(x, hx))
    assert_alike(*results)
    packed = pack_padded_sequence(x, torch.tensor([2, 5, 1]), enforce_sorted=False)
    results = []
    for rnn in (module, expected):
        torch.manual_seed(2)
        results.append(rnn(packed, hx))
    assert_alike(*results)
    assert torch.equal(results[0][0].batch_sizes, results[1][0].batch_sizes)


@pytest.mark.parametrize("sequences", ["h", "states"])
@pytest.mark.parametrize("cell", [lstm, leaky, chain], ids=lambda cell: cell.name)
def test_every_layout_is_the_padded_one(cell: Any, sequences: str) -> None:
    module = make(cell, num_layers=2, bidirectional=True, heads=2, return_sequences=sequences)
    x, hx, lengths = torch.randn(5, 3, 4, dtype=F64), states_of(module), torch.tensor([2, 5, 3])
    reset = torch.rand(5, 3) < 0.3
    y, after = module(x, hx, lengths=lengths, reset=reset)
    wrapped = y if sequences == "states" else (y,)

    first = make(cell, num_layers=2, bidirectional=True, heads=2, return_sequences=sequences, batch_first=True)
    first.load_state_dict(module.state_dict())
    of_first = first(x.transpose(0, 1), hx, lengths=lengths, reset=reset.transpose(0, 1))
    assert_alike([t.transpose(0, 1) for t in flat(of_first[0])], wrapped)
    assert_alike(of_first[1], after)

    packed = pack_padded_sequence(x, lengths, enforce_sorted=False)
    of_packed = module(packed, hx, reset=reset)
    given = of_packed[0] if sequences == "states" else (of_packed[0],)
    for one, padded in zip(given, wrapped, strict=True):
        assert_alike(pad_packed_sequence(one)[0], padded)
    assert_alike(of_packed[1], after)

    for b in range(3):
        own = [s[:, b] for s in flat(hx)]
        alone = module(x[:, b], own[0] if len(own) == 1 else own, lengths=lengths[b], reset=reset[:, b])
        assert_alike(alone[0], [t[:, b] for t in wrapped])
        assert_alike(alone[1], [s[:, b] for s in flat(after)])


def test_packed_with_dropout_draws_masks_of_packed_rows() -> None:
    module = make(chain, num_layers=2, dropout=1.0, return_sequences="states")
    packed = pack_padded_sequence(torch.randn(5, 3, 4, dtype=F64), torch.tensor([5, 3, 1]))
    y, _ = module(packed)
    assert [len(sequence) for sequence in unpack_sequence(y[0])] == [5, 3, 1]
    nothing = module(pack_padded_sequence(torch.zeros(5, 3, 4, dtype=F64), torch.tensor([5, 3, 1])))
    assert_alike(y[1:], nothing[0][1:])  # of the first layer nothing comes through


@pytest.mark.parametrize("cell", [lstm, indrnn, chain], ids=lambda cell: cell.name)
def test_an_empty_batch(cell: Any) -> None:
    module = make(cell, num_layers=2, bidirectional=True, return_sequences="states")
    y, after = module(torch.randn(5, 0, 4, dtype=F64))
    assert {tuple(t.shape) for t in y} == {(5, 0, 12)}
    assert {tuple(t.shape) for t in flat(after)} == {(4, 0, 6)}
    with pytest.raises(RuntimeError, match="Expected sequence length to be larger than 0"):
        module(torch.randn(0, 3, 4, dtype=F64))


@pytest.mark.parametrize("cell", [lstm, gru, chain], ids=lambda cell: cell.name)
def test_heads_are_modules_of_their_own(cell: Any) -> None:
    """A layer of N heads is N modules of H/N units on the same input."""
    module = make(cell, 4, 6, heads=3, bidirectional=True)
    x, hx = torch.randn(5, 2, 4, dtype=F64), flat(states_of(module, 2))
    y, after = module(x, hx if len(hx) > 1 else hx[0])
    for n in range(3):
        own = make(cell, 4, 2, bidirectional=True)
        for name, weight in own.named_parameters():
            whole = module.get_parameter(name).detach()
            if "weight_hh" in name:
                part = whole[n]
            elif name.startswith(("weight_ih", "bias")):
                part = whole.unflatten(0, (cell.gates, 3, 2))[:, n].flatten(0, 1)
            else:
                part = whole.unflatten(0, (3, 2))[n]
            weight.data.copy_(part)
        entering = [s[..., 2 * n : 2 * n + 2] for s in hx]
        y_n, after_n = own(x, entering if len(entering) > 1 else entering[0])
        assert_alike(y_n, y.unflatten(-1, (2, 3, 2))[:, :, :, n].flatten(2))
        assert_alike(after_n, [s[..., 2 * n : 2 * n + 2] for s in flat(after)])


@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("cell", USER_CELLS.values(), ids=lambda cell: cell.name)
def test_gradients(cell: Any, heads: int) -> None:
    """First and second derivatives, of all states over time."""
    module = make(cell, 1, 2, bidirectional=True, heads=heads, return_sequences="states", init={})
    for name, p in module.named_parameters():
        p.data = torch.randn_like(p) * 0.5 if "l" in name else p
    names, weights = zip(*module.named_parameters(), strict=True)
    x, hx = torch.randn(3, 2, 1, dtype=F64) + 0.1, flat(states_of(module, 2))
    lengths, reset = torch.tensor([3, 2]), torch.tensor([[False, False], [True, False], [False, False]])

    def run(x: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        states, own = rest[: len(hx)], rest[len(hx) :]
        args = (x, states if len(hx) > 1 else states[0])
        call = {"lengths": lengths, "reset": reset}
        return tuple(flat(torch.func.functional_call(module, dict(zip(names, own, strict=True)), args, call)))

    inputs = [t.detach().requires_grad_() for t in (x, *hx, *weights)]
    assert torch.autograd.gradcheck(run, inputs, **GRADCHECK)
    assert torch.autograd.gradgradcheck(run, inputs, **GRADCHECK)


def test_initial_values() -> None:
    def fill(t: Tensor) -> None:
        t.fill_(7)

    module = FlexRNN(chain, 4, 16, 2, bidirectional=True, init={"a": torch.arange(16.0), "b": fill})
    for suffix in ("l0", "l0_reverse", "l1", "l1_reverse"):
        assert torch.equal(module.get_parameter(f"a_{suffix}"), torch.arange(16.0))
        assert torch.equal(module.get_parameter(f"b_{suffix}"), torch.full((16,), 7.0))
    assert not FlexRNN(leaky, 4, 16).a_l0.any()
    heads = FlexRNN(lstm, 64, 64, heads=16)
    assert heads.weight_hh_l0.shape == (16, 16, 4)
    bound = 1 / 8
    assert bound * 0.98 < heads.weight_ih_l0.max().item() <= bound
    assert bound * 0.98 < heads.bias_ih_l0.max().item() <= bound
    assert 0.5 * 0.98 < heads.weight_hh_l0.max().item() <= 0.5  # four terms a sum
    before = heads.weight_hh_l0.clone()
    heads.reset_parameters()
    assert not torch.equal(heads.weight_hh_l0, before)


def test_parameters_of_a_cell_without_a_recurrent_product() -> None:
    module = FlexRNN(indrnn, 4, 6, bidirectional=True, heads=2)
    assert list(module.state_dict()) == [
        *("weight_ih_l0", "bias_ih_l0", "u_l0"),
        *("weight_ih_l0_reverse", "bias_ih_l0_reverse", "u_l0_reverse"),
    ]
    assert module.heads == 1
    assert list(FlexRNN(indrnn, 4, 6, bias=False).state_dict()) == ["weight_ih_l0", "u_l0"]


def test_attributes_and_repr() -> None:
    module = FlexRNN(lstm, 4, 6, 2, True, True, 0.5, True, heads=2, return_sequences="states", save="recompute")
    assert (module.cell, module.heads, module.return_sequences) == (lstm, 2, "states")
    assert (module.mode, module.input_size, module.hidden_size, module.num_layers) == ("lstm", 4, 6, 2)
    assert (module.batch_first, module.dropout, module.bidirectional, module.save) == (True, 0.5, True, "recompute")
    assert repr(module) == (
        "FlexRNN(lstm, 4, 6, num_layers=2, batch_first=True, dropout=0.5, bidirectional=True, save='recompute',"
        " heads=2, return_sequences='states')"
    )
    assert repr(FlexRNN(gru, 4, 6)) == "FlexRNN(gru, 4, 6)"
    module.flatten_parameters()
    assert isinstance(module, nn.RNNBase)


@pytest.mark.parametrize("cell", USER_CELLS.values(), ids=lambda cell: cell.name)
def test_copies_and_pickles(cell: Any) -> None:
    module = make(cell, num_layers=2, heads=2, bidirectional=True, return_sequences="states")
    x = torch.randn(5, 3, 4, dtype=F64)
    expected = module(x)
    for other in (copy.copy(module), copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert other.cell is cell
        assert_alike(other(x), expected)
        assert repr(other) == repr(module)
    assert b"fused_rnn.cell 1|" not in pickle.dumps(module)  # a step that changes is traced anew
    fresh = make(cell, num_layers=2, heads=2, bidirectional=True, return_sequences="states")
    fresh.load_state_dict(module.state_dict())
    assert_alike(fresh(x), expected)


def test_other_devices_and_dtypes() -> None:
    meta = FlexRNN(chain, 4, 6, 2, device="meta", return_sequences="states", backend="reference")
    y, after = meta(torch.randn(5, 3, 4, device="meta"))
    assert all(t.is_meta for t in (*y, *after))
    empty = nn.utils.skip_init(FlexRNN, chain, 4, 6, init={"a": 1.0})
    assert not any(p.is_meta for p in empty.parameters())
    empty.reset_parameters()
    assert bool((empty.a_l0 == 1).all())
    half = make(chain).to(torch.bfloat16)
    assert half._flat_weights[0].dtype == torch.bfloat16
    y, _ = half(torch.randn(5, 3, 4, dtype=torch.bfloat16))
    assert y.dtype == torch.bfloat16
    with torch.device("meta"):
        assert FlexRNN(lstm, 4, 6).weight_hh_l0.is_meta


def test_weights_are_read_as_they_are() -> None:
    """Tied, and parametrized."""
    module, x = make(lstm, heads=2), torch.randn(5, 3, 4, dtype=F64)
    before, _ = module(x)
    module.weight_ih_l0 = nn.Parameter(module.weight_ih_l0.detach() * 2)
    tied, _ = module(x)
    assert not torch.equal(before, tied)
    nn.utils.parametrizations.weight_norm(module, "weight_hh_l0", dim=0)
    assert_alike(module(x)[0], tied)
    module.weight_ih_l0 = nn.Parameter(torch.randn(24, 5, dtype=F64))
    with pytest.raises(ValueError, match=r"weight_ih_l0: got \[24, 5\], expected \[24, 4\]"):
        module(x)


@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("cell", USER_CELLS.values(), ids=lambda cell: cell.name)
def test_a_stream_is_the_sequence(cell: Any, heads: int) -> None:
    module = make(cell, num_layers=2, heads=heads)
    stream, x = module.stream(3), torch.randn(7, 3, 4, dtype=F64)
    expected, after = module(x)
    got = torch.cat([stream.steps(x[:3]), stream.step(x[3]).unsqueeze(0), stream.steps(x[4:])])
    assert_alike(got, expected)
    assert_alike(stream.state, after)
    assert list(stream.state_dict()) == list(cell.states)
    stream.reset()
    stream.state = states_of(module)
    entered = stream.state
    assert_alike(stream.steps(x), module(x, entered)[0])
    other = pickle.loads(pickle.dumps(stream))
    assert_alike(other.state, stream.state)
    assert_alike(other.step(x[0]), stream.step(x[0]))
    assert repr(stream) == f"Stream({cell.name}, 4, 6, num_layers=2, batch_size=3)"
    with torch.no_grad():
        module.weight_ih_l0.mul_(2)
    stream.refresh()
    stream.reset()
    assert_alike(stream.steps(x), module(x)[0])
    with pytest.raises((TypeError, ValueError), match="state"):
        stream.state = torch.zeros(2, 3, 5, dtype=F64)


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("cell", USER_CELLS.values(), ids=lambda cell: cell.name)
def test_without_gradient_past_the_dispatcher(cell: Any, batch_first: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The numbers are those of the op."""
    module, x = make(cell, batch_first=batch_first), torch.randn(3, 5, 4, dtype=F64)
    if fused_rnn.nn.flex.FAST_PATH is None:
        pytest.skip("this torch does not lend its tensors, or the extension is not built")
    for hx in (None, states_of(module, 3 if batch_first else 5)):
        for masks in ({}, {"lengths": torch.tensor([3, 0, 2, 1, 3][: 3 if batch_first else 5])}):
            expected = module(x, hx, **masks)
            with torch.no_grad(), monkeypatch.context() as patch:
                patch.setattr(fused_rnn.nn.flex, "run", None)
                got = module(x, hx, **masks)
            assert isinstance(got[1], tuple) == (len(cell.states) > 1)
            for a, b in zip(flat(got), flat(expected), strict=True):
                assert torch.equal(a, b)


@pytest.mark.parametrize("weights", ["bf16", "int8"])
@pytest.mark.parametrize("cell", USER_CELLS.values(), ids=lambda cell: cell.name)
def test_a_stream_of_narrow_weights(cell: Any, weights: str) -> None:
    """The matrices are rounded, and nothing else."""
    module = FlexRNN(cell, 9, 21, 2, init=dict.fromkeys(cell.params, 0.3))
    stream, x = module.stream(3, weights=weights), torch.randn(20, 3, 9)
    with torch.no_grad():
        for p in module.parameters():
            if p.dim() == 2 and weights == "bf16":
                p.copy_(p.bfloat16())
            elif p.dim() == 2:
                scale = p.abs().amax(1, keepdim=True) / 127
                p.copy_(torch.round(p / scale) * scale)
        torch.testing.assert_close(stream.steps(x), module(x)[0])


def test_autocast() -> None:
    module = FlexRNN(chain, 4, 6, heads=2, return_sequences="states", backend="reference", init={"a": 0.5})
    x = torch.randn(5, 3, 4)
    with torch.autocast("cpu", torch.bfloat16):
        y, after = module(x)
    assert {t.dtype for t in (*y, *after)} == {torch.bfloat16}
    expected, _ = copy.deepcopy(module).to(torch.bfloat16)(x.to(torch.bfloat16))
    for a, b in zip(y, expected, strict=True):
        assert torch.equal(a, b)


def test_the_default_warns_of_no_loop_in_python_where_ours_can(recwarn: pytest.WarningsRecorder) -> None:
    module = make(lstm, backend=None)
    with torch.autograd.forward_ad.dual_level():
        module(torch.randn(5, 3, 4, dtype=F64))
    assert not [w for w in recwarn if "without its own kernels" in str(w.message)]


def test_a_subclass_that_checks_otherwise() -> None:
    class Mine(FlexRNN):
        def check_input(self, input: Tensor, batch_sizes: Tensor | None) -> None:
            raise RuntimeError("not mine")

    class Other(FlexRNN):
        def __init__(self, size: int) -> None:
            super().__init__(chain, size, size, backend="reference")

        def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
            return super().forward(x * 2, *args, **kwargs)[0]

    assert not FlexRNN._fused_checks
    assert not Other._fused_checks
    with pytest.raises(RuntimeError, match="not mine"):
        Mine(chain, 4, 4, backend="reference")(torch.randn(5, 3, 4))
    other, x = Other(4), torch.randn(5, 3, 4)
    assert_close = torch.testing.assert_close
    assert_close(other(x), FlexRNN.forward(other, x * 2)[0])
    for keep_class in (False, True):
        assert type(fused_rnn.convert(nn.Sequential(other), keep_class=keep_class)[0]) is Other
    with pytest.warns(UserWarning, match="0 is a .*Other, .* left as it is"):
        assert type(fused_rnn.to_torch(nn.Sequential(other))[0]) is Other
    with pytest.warns(UserWarning, match="FlexRNN, which torch.nn has not, and is left as it is"):
        fused_rnn.to_torch(make(lstm))
