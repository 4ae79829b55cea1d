"""The modules of nn/field against each paper's formula in a plain loop, and what a user sees of them."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from field_loop import VARIANTS, Case, check, given, plain_loop
from tolerances import GRADCHECK, assert_same_formula
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import fused_rnn

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
OPTIONS: list[dict[str, Any]] = [
    {"H": 17},
    {"T": 2, "B": 5, "H": 3, "bias": False, "hx": False},
    {"B": 2, "D": 33, "H": 65, "hx": False},
    {"T": 6, "H": 9, "bidirectional": True, "lengths": True},
    {"T": 4, "B": 33, "D": 7, "H": 7, "layers": 2, "reset": True},
    {"T": 66, "B": 3, "D": 1, "H": 19, "save": "recompute", "lengths": True},
    {"H": 34, "layers": 2, "bidirectional": True, "lengths": True, "reset": True, "save": "recompute"},
    {"T": 3, "B": 2, "H": 8, "D": 8, "bidirectional": True, "bias": False, "reset": True},
]


def options(number: int) -> list[Case]:
    """Every module in every dtype with so many options, another one first for each."""
    return [
        Case(name, **OPTIONS[(c + number * d + k) % len(OPTIONS)], dtype=dtype).fit()
        for c, name in enumerate(VARIANTS)
        for d, dtype in enumerate(DTYPES)
        for k in range(number)
    ]


@pytest.mark.parametrize("case", options(2), ids=str)
def test_on_the_cpu(case: Case) -> None:
    """Every module meets every option."""
    check(case, "cpu")


@pytest.mark.parametrize("case", [case for case in options(1) if case.dtype == torch.float64], ids=str)
def test_by_the_reference_loop(case: Case) -> None:
    check(case._replace(save="gates"), "reference")


@pytest.mark.parametrize("name", VARIANTS)
def test_derivatives(name: str) -> None:
    """First and second ones against differences."""
    case = Case(name, T=3, B=2, D=2, H=2, dtype=torch.float64)
    rnn = case.module()
    call = given(case, len(rnn.cell.states))
    weights, states = dict(rnn.named_parameters()), len(call.hx)

    def run(x: Tensor, *leaves: Tensor) -> tuple[Tensor, ...]:
        hx: Any = leaves[0] if states == 1 else leaves[:states]
        own = dict(zip(weights, leaves[states:], strict=True))
        y, after = torch.func.functional_call(rnn, own, (x, hx))
        return (y, after) if isinstance(after, Tensor) else (y, *after)

    leaves = [t.detach().requires_grad_() for t in (call.x, *call.hx, *weights.values())]
    assert torch.autograd.gradcheck(run, leaves, **GRADCHECK)
    assert torch.autograd.gradgradcheck(run, leaves, fast_mode=True, **GRADCHECK)


def flat(value: Any) -> list[Tensor]:
    return [value] if isinstance(value, Tensor) else [t for part in value for t in flat(part)]


def alike(got: Any, expected: Any) -> None:
    for a, b in zip(flat(got), flat(expected), strict=True):
        assert_same_formula(a, b)


@pytest.mark.parametrize("name", VARIANTS)
def test_layouts(name: str) -> None:
    """batch_first, packed and unbatched are the padded call; an empty batch is one."""
    case = Case(name, layers=2, bidirectional=True, dtype=torch.float64)
    rnn = case.module().eval()  # of batch norm the running statistics: one sequence alone has others
    call = given(case, len(rnn.cell.states))
    hx: Any = call.hx[0] if len(call.hx) == 1 else tuple(call.hx)
    lengths = torch.tensor([2, 5, 3])
    y, after = rnn(call.x, hx, lengths=lengths)
    packed, last = rnn(pack_padded_sequence(call.x, lengths, enforce_sorted=False), hx)
    alike((pad_packed_sequence(packed)[0], last), (y, after))
    one, last = rnn(call.x[:, 1], flat(hx)[0][:, 1] if len(call.hx) == 1 else tuple(s[:, 1] for s in hx))
    alike((one, last), (y[:, 1], [s[:, 1] for s in flat(after)]))
    first = copy.deepcopy(rnn)
    first.batch_first = True
    alike(first(call.x.transpose(0, 1), hx, lengths=lengths)[0].transpose(0, 1), y)
    assert rnn(call.x[:, :0])[0].shape == (5, 0, 12)
    assert torch.equal(rnn(call.x, hx)[0], rnn(call.x, hx)[0])


@pytest.mark.parametrize("name", VARIANTS)
def test_what_a_module_is(name: str) -> None:
    """Copies, pickles, state_dict, dtypes, devices, initial values, repr, a stream."""
    case = Case(name, layers=2, dtype=torch.float64)
    rnn, kind = case.module().eval(), getattr(fused_rnn, case.variant.module)
    assert isinstance(rnn, nn.RNNBase) and isinstance(rnn, fused_rnn.FlexRNN)
    assert repr(rnn).startswith(f"{case.variant.module}(4, 6, num_layers=2")
    x = given(case, len(rnn.cell.states)).x
    expected = rnn(x)
    for other in (copy.copy(rnn), copy.deepcopy(rnn), pickle.loads(pickle.dumps(rnn))):
        alike(other(x), expected)
        assert repr(other) == repr(rnn)
    fresh = kind(4, 6, 2, dtype=torch.float64, **case.variant.options).eval()
    fresh.load_state_dict(rnn.state_dict())
    alike(fresh(x), expected)
    before = {name: w.clone() for name, w in fresh.named_parameters()}
    fresh.reset_parameters()
    assert any(not torch.equal(w, before[name]) for name, w in fresh.named_parameters())
    assert kind(4, 6, device="meta", **case.variant.options).weight_ih_l0.is_meta
    stream = rnn.stream(3)
    alike(torch.stack([stream.step(t) for t in x]), expected[0])
    alike(stream.state, expected[1])
    states, _ = kind(4, 6, return_sequences="states", dtype=torch.float64, **case.variant.options)(x)
    assert len(states) == len(rnn.cell.states) if isinstance(states, tuple) else len(rnn.cell.states) == 1


@pytest.mark.parametrize("name", VARIANTS)
def test_compiled_and_exported(name: str) -> None:
    case = Case(name, layers=2)
    rnn = case.module().eval()
    x = given(case, len(rnn.cell.states)).x
    exported = torch.export.export(rnn, (x,)).module()
    torch.testing.assert_close(exported(x), rnn(x))
    rnn.train()
    torch._dynamo.reset()
    found = []
    for module in (copy.deepcopy(rnn), torch.compile(copy.deepcopy(rnn), backend="aot_eager", fullgraph=True)):
        y = module(x)[0]
        y.sum().backward()
        grads = [p.grad for p in module.parameters()]
        found.append([y, *grads, *(b for b in module.buffers() if b.is_floating_point())])
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("name", VARIANTS)
def test_regularisers_and_gates_over_time(name: str) -> None:
    """What FlexRNN has beside, as test_extras.py judges it: in eval mode zoneout's expectation, by the formula."""
    case = Case(name, layers=2, bidirectional=True, dtype=torch.float64)
    rnn = case.module().eval()
    states = len(rnn.cell.states)
    kind = getattr(fused_rnn, case.variant.module)
    zoned = kind(
        4, 6, 2, bidirectional=True, dtype=torch.float64, zoneout=0.25, return_gates=True, **case.variant.options
    )
    zoned.load_state_dict(rnn.state_dict())
    call = given(case, states)
    hx: Any = call.hx[0] if states == 1 else tuple(call.hx)
    y, after, gates = zoned.eval()(call.x, hx)
    assert {tuple(gate.shape) for gate in gates.values()} == {(5, 3, 12)} and tuple(gates) == rnn.cell.gate_names
    if states == 1 and not case.variant.prepare:
        step = case.variant.step
        mixed = case.variant._replace(step=lambda x, s, w: (0.25 * s[0] + 0.75 * step(x, s, w)[0],))
        alike([y, after], plain_loop(zoned, mixed, call, call.x, call.hx, dict(zoned.named_parameters())))
    y, after, _ = zoned.train()(call.x, hx)
    (y.sum() + sum(s.sum() for s in flat(after))).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in zoned.parameters())


def test_the_list() -> None:
    names = fused_rnn.list_cells()
    assert names == sorted(names) and {"LSTM", "GRU", "RNN"} <= set(names)
    assert {variant.module for variant in VARIANTS.values()} | {"LSTM", "GRU", "RNN"} == set(names)
    assert all(issubclass(getattr(fused_rnn, name), nn.RNNBase) and name in fused_rnn.__all__ for name in names)


def test_initial_values() -> None:
    """Where they are not torch.nn.LSTM's."""
    rnn = fused_rnn.IndRNN(4, 64)
    assert 0 <= rnn.u_l0.min() < 0.1 and 0.9 < rnn.u_l0.max() <= 1
    assert 0.45 < fused_rnn.MinGRU(4, 64).weight_ih_l0.abs().max() <= 0.5
    sru = fused_rnn.SRU(9, 400)
    own, f, _, skip = sru.weight_ih_l0.detach().chunk(4)
    for block, variance in ((own, 1 / 9), (f, 0.5 / 9), (skip, 3 / 9)):
        assert block.var().item() == pytest.approx(variance, rel=0.1)
    assert not sru.bias_ih_l0.any() and sru.v_f_l0.var().item() == pytest.approx(0.5, rel=0.2)
    gru = fused_rnn.LiGRU(4, 8)
    torch.testing.assert_close(gru.weight_hh_l0.T @ gru.weight_hh_l0, torch.eye(8))
    assert bool((gru.gamma_l0 == 1).all()) and not gru.beta_l0.any()
    slstm = fused_rnn.SLSTM(4, 6, heads=2)
    assert not slstm.weight_hh_l0.any()
    torch.testing.assert_close(slstm.bias_ih_l0[6:12], torch.tensor([5, 5 - 12 * 0.5**0.3, -7]).repeat(2))
    assert not slstm.bias_ih_l0[:6].any() and not slstm.bias_ih_l0[12:].any()


def test_batch_norm_of_ligru() -> None:
    """Running statistics as torch.nn.BatchNorm1d's; they serve eval mode and streams, and mind no padding."""
    gru, x = fused_rnn.LiGRU(4, 6, dtype=torch.float64), torch.randn(5, 3, 4, dtype=torch.float64)
    norm = nn.BatchNorm1d(12, momentum=0.05, dtype=torch.float64)
    lengths = torch.tensor([5, 2, 4])
    poisoned = x.clone()
    for b, n in enumerate(lengths.tolist()):
        poisoned[n:, b] = float("nan")
    within = torch.cat([x[:n, b] for b, n in enumerate(lengths.tolist())])
    gru(poisoned, lengths=lengths)
    norm(within @ gru.weight_ih_l0.T)
    assert_same_formula(gru.running_mean_l0, norm.running_mean)
    assert_same_formula(gru.running_var_l0, norm.running_var)
    assert gru.num_batches_tracked_l0 == 1
    kept = gru.running_mean_l0.clone()
    gru.eval()
    y, _ = gru(x)
    assert torch.equal(gru.running_mean_l0, kept)
    plain = fused_rnn.LiGRU(4, 6, norm="none", dtype=torch.float64)
    scale = gru.gamma_l0 / (gru.running_var_l0 + 1e-5).sqrt()
    with torch.no_grad():
        plain.weight_ih_l0.copy_(gru.weight_ih_l0 * scale.unsqueeze(1))
        plain.weight_hh_l0.copy_(gru.weight_hh_l0)
        plain.bias_ih_l0.copy_(gru.beta_l0 - gru.running_mean_l0 * scale)
        plain.bias_hh_l0.zero_()
    assert_same_formula(y, plain(x)[0])
    gru.train()
    with pytest.raises(ValueError, match="input: got 1 steps in all, expected two or more"):
        gru(x[:1, :1])
    packed = pack_padded_sequence(x, lengths, enforce_sorted=False)
    torch.testing.assert_close(pad_packed_sequence(gru(packed)[0])[0], gru(x, lengths=lengths)[0])


@pytest.mark.parametrize(
    ("name", "option", "message"),
    [
        ("IndRNN", {"nonlinearity": "sin"}, r"nonlinearity: got 'sin', expected 'relu' or 'tanh' or 'none'"),
        ("LiGRU", {"norm": "layer"}, r"norm: got 'layer', expected 'batch' or 'none'"),
        ("SRU", {"skip": 1}, r"skip: got 1, expected True or False"),
        ("SLSTM", {"heads": 4}, r"heads: got 4, expected a positive divisor of hidden_size = 6"),
    ],
)
def test_errors(name: str, option: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        getattr(fused_rnn, name)(4, 6, **option)


@pytest.mark.parametrize("name", sorted({variant.module for variant in VARIANTS.values()}))
def test_the_signature_names_the_regularisers(name: str) -> None:
    """All that the module takes, and no other."""
    kind = getattr(fused_rnn, name)
    signature = kind.__doc__.partition("\n")[0]
    assert "return_sequences='h'" in signature and "return_gates=False" in signature
    for option in ("recurrent_dropout", "zoneout", "weight_dropout"):
        if f"{option}=0.0" in signature:
            assert f"{option}=0.5" in repr(kind(4, 8, **{option: 0.5}))
        else:
            with pytest.raises(ValueError, match=f"{option}: got 0.5, expected 0"):
                kind(4, 8, **{option: 0.5})


@pytest.mark.parametrize("name", ["SRU", "LiGRU"])
def test_a_weight_of_another_shape(name: str) -> None:
    """Of the modules that make the cell's weights of their own."""
    rnn = getattr(fused_rnn, name)(4, 6, 2)
    rnn.weight_ih_l1 = nn.Parameter(torch.randn(7, 6))
    with pytest.raises(ValueError, match=r"weight_ih_l\d: got \[7, 6\], expected \[\d\d, 6\]"):
        rnn(torch.randn(5, 3, 4))
    with pytest.raises(RuntimeError, match=r"input\.size"):
        getattr(fused_rnn, name)(4, 6)(torch.randn(5, 3, 9))


@pytest.mark.parametrize("hx", ["a", [torch.zeros(1, 3, 6)], (torch.zeros(1, 3, 6),)])
def test_li_gru_says_what_is_wrong_with_hx_in_training_too(hx: Any) -> None:
    for module in (fused_rnn.LiGRU(4, 6), fused_rnn.LiGRU(4, 6, 1, zoneout=0.1), fused_rnn.LiGRU(4, 6).eval()):
        with pytest.raises(TypeError, match=r"hx: got .*, expected a tensor \[1, 3, 6\]"):
            module(torch.randn(5, 3, 4), hx)


@pytest.mark.parametrize("size", ["a", 8.0])
def test_block_gru_of_a_size_that_is_no_int(size: Any) -> None:
    with pytest.raises(TypeError, match="hidden_size should be of type int"):
        fused_rnn.BlockGRU(4, size, blocks=2)
