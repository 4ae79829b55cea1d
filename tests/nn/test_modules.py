"""The modules compute what torch.nn's do, gradients included, and what lengths and reset add."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from counterparts import (
    CELLS,
    MODULES,
    SEQUENCES,
    assert_alike,
    assert_same,
    flatten,
    leaves,
    make,
    outputs_and_gradients,
    states,
)
from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence, pack_sequence, pad_packed_sequence

# torch's own remark about its own kernels
pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")

# None is what a user gets; the reference shows that the modules, not a backend, make what they make of a call.
BACKENDS = (None, "reference")
DTYPES = (torch.float32, torch.float64)

OPTIONS: list[dict[str, Any]] = [
    {},
    {"bias": False},
    {"batch_first": True},
    {"bidirectional": True},
    {"num_layers": 3, "batch_first": True},
    {"num_layers": 2, "bidirectional": True, "bias": False},
]
CONFIGURATIONS = [(name, options) for name in SEQUENCES for options in OPTIONS] + [
    ("RNN", {"nonlinearity": "relu"}),
    ("LSTM", {"proj_size": 4}),
    ("LSTM", {"proj_size": 3, "num_layers": 2, "bidirectional": True, "batch_first": True, "bias": False}),
]


def name_of(value: Any) -> str | None:
    """A test's name for a set of options."""
    return "-".join(f"{k}={v}" for k, v in value.items()) or "plain" if isinstance(value, dict) else None


def configurations(*extra: dict[str, Any]) -> pytest.MarkDecorator:
    """Parametrize over (name, options)."""
    return pytest.mark.parametrize(("name", "options"), CONFIGURATIONS + list(extra), ids=name_of)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", [*BACKENDS, "torch"])
@configurations()
def test_sequence(name: str, options: dict[str, Any], backend: str | None, dtype: torch.dtype) -> None:
    ours, counterpart = make(name, 5, 7, extras={"backend": backend}, dtype=dtype, **options)
    x = torch.randn(4, 3, 5, dtype=dtype)
    batch = 4 if counterpart.batch_first else 3
    assert_alike(ours, counterpart, x)
    assert_alike(ours, counterpart, x, states(counterpart, batch, dtype))


@configurations()
def test_unbatched(name: str, options: dict[str, Any]) -> None:
    ours, counterpart = make(name, 5, 7, dtype=torch.float64, **options)
    x = torch.randn(4, 5, dtype=torch.float64)
    assert_alike(ours, counterpart, x)
    assert_alike(ours, counterpart, x, states(counterpart, None, torch.float64))


@pytest.mark.parametrize("lengths", [[2, 5, 1, 4], [5, 4, 4, 1], [3, 3, 3, 3]], ids=str)
@pytest.mark.parametrize("enforce_sorted", [True, False])
@configurations()
def test_packed(name: str, options: dict[str, Any], lengths: list[int], enforce_sorted: bool) -> None:
    if enforce_sorted and sorted(lengths, reverse=True) != lengths:
        lengths = sorted(lengths, reverse=True)
    ours, counterpart = make(name, 5, 7, dtype=torch.float64, **options)
    x = torch.randn(5, 4, 5, dtype=torch.float64)
    packed = pack_padded_sequence(x, lengths, enforce_sorted=enforce_sorted)
    assert_alike(ours, counterpart, packed)
    assert_alike(ours, counterpart, packed, states(counterpart, 4, torch.float64))


def test_packed_of_single_precision() -> None:
    ours, counterpart = make("LSTM", 5, 7, 2, bidirectional=True)
    packed = pack_sequence([torch.randn(n, 5) for n in (3, 9, 1, 4)], enforce_sorted=False)
    assert_alike(ours, counterpart, packed, states(counterpart, 4))
    y, _ = ours(packed)
    assert type(y) is type(packed)
    assert y.batch_sizes is packed.batch_sizes and y.unsorted_indices is packed.unsorted_indices


@pytest.mark.parametrize("size", [(1, 3, 5), (1, 1, 5), (4, 0, 5)], ids=str)
@pytest.mark.parametrize("name", SEQUENCES)
def test_edges_of_time_and_batch(name: str, size: tuple[int, ...]) -> None:
    for options in ({}, {"num_layers": 2, "bidirectional": True}):
        ours, counterpart = make(name, 5, 7, **options)
        assert_alike(ours, counterpart, torch.randn(size))
        assert_alike(ours, counterpart, torch.randn(size), states(counterpart, size[1]))


@pytest.mark.parametrize(("input_size", "hidden_size"), [(1, 1), (3, 33), (130, 2)])
@pytest.mark.parametrize("name", SEQUENCES)
def test_odd_sizes(name: str, input_size: int, hidden_size: int) -> None:
    ours, counterpart = make(name, input_size, hidden_size, dtype=torch.float64)
    assert_alike(ours, counterpart, torch.randn(6, 2, input_size, dtype=torch.float64))


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("name", SEQUENCES)
def test_dropout_draws_the_masks_that_torch_draws(name: str, packed: bool) -> None:
    ours, counterpart = make(name, 5, 7, 3, dropout=0.4, bidirectional=True, dtype=torch.float64)
    x: Any = torch.randn(6, 3, 5, dtype=torch.float64)
    if packed:
        x = pack_padded_sequence(x, [2, 6, 3], enforce_sorted=False)
    assert_alike(ours, counterpart, x, states(counterpart, 3, torch.float64))
    ours.eval(), counterpart.eval()
    assert_alike(ours, counterpart, x, states(counterpart, 3, torch.float64))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", [*BACKENDS, "torch"])
@pytest.mark.parametrize(
    ("name", "options"),
    [(name, options) for name in CELLS for options in ({}, {"bias": False})] + [("RNNCell", {"nonlinearity": "relu"})],
    ids=name_of,
)
def test_cell(name: str, options: dict[str, Any], backend: str | None, dtype: torch.dtype) -> None:
    ours, counterpart = make(name, 5, 7, extras={"backend": backend}, dtype=dtype, **options)
    for size in ((3,), (1,), (0,), ()):
        x, h = torch.randn(*size, 5, dtype=dtype), torch.randn(*size, 7, dtype=dtype)
        assert_alike(ours, counterpart, x)
        assert_alike(ours, counterpart, x, (h, torch.randn_like(h)) if name == "LSTMCell" else h)


@configurations()
def test_lengths_are_a_packed_sequence_in_any_order(name: str, options: dict[str, Any]) -> None:
    ours, _ = make(name, 5, 7, dtype=torch.float64, **options)
    x, lengths = torch.randn(6, 4, 5, dtype=torch.float64), torch.tensor([3, 6, 1, 5])
    hx = states(ours, 4, torch.float64)
    packed = pack_padded_sequence(x, lengths, enforce_sorted=False)
    y, final = ours(packed, hx)
    expected = [pad_packed_sequence(y)[0], *flatten(final)]
    y, final = ours(x.transpose(0, 1) if ours.batch_first else x, hx, lengths=lengths.int())
    assert_same((y.transpose(0, 1) if ours.batch_first else y, final), expected)
    assert not y.detach()[2, 1:].any() if ours.batch_first else not y.detach()[1:, 2].any()


def with_resets(module: Any, x: Tensor, reset: Tensor, hx: Any) -> tuple[Tensor, Any]:
    """What reset means, for one direction and time-major input: a call per step, its state zeroed where reset says."""
    outputs = []
    for t in range(x.size(0)):
        keep = (~reset[t]).to(x.dtype).unsqueeze(-1)
        hx = tuple(s * keep for s in hx) if isinstance(hx, tuple) else hx * keep
        y, hx = module(x[t : t + 1], hx)
        outputs.append(y)
    return torch.cat(outputs), hx


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("name", SEQUENCES)
def test_reset_zeroes_the_state_that_enters_a_step(name: str, batch_first: bool) -> None:
    ours, counterpart = make(name, 5, 7, 2, batch_first=batch_first, dtype=torch.float64)
    x, reset, hx = torch.randn(6, 3, 5, dtype=torch.float64), torch.rand(6, 3) < 0.4, states(ours, 3, torch.float64)
    counterpart.batch_first = False
    y, final = with_resets(counterpart, x, reset, hx)
    if batch_first:
        y_ours, final_ours = ours(x.transpose(0, 1), hx, reset=reset.t())
        y_ours = y_ours.transpose(0, 1)
    else:
        y_ours, final_ours = ours(x, hx, reset=reset)
    assert_same((y_ours, final_ours), (y, final))


@pytest.mark.parametrize("name", SEQUENCES)
def test_reset_and_packed_input(name: str) -> None:
    """reset is in the order that the sequences had before they were packed, as hx is."""
    ours, _ = make(name, 5, 7, bidirectional=True, dtype=torch.float64)
    x, lengths, reset = torch.randn(6, 3, 5, dtype=torch.float64), torch.tensor([2, 6, 4]), torch.rand(6, 3) < 0.4
    y, final = ours(x, lengths=lengths, reset=reset)
    y_packed, final_packed = ours(pack_padded_sequence(x, lengths, enforce_sorted=False), reset=reset)
    assert_same((pad_packed_sequence(y_packed)[0], final_packed), (y, final))


@pytest.mark.parametrize("name", SEQUENCES)
def test_lengths_and_reset_of_unbatched_input(name: str) -> None:
    ours, _ = make(name, 5, 7, bidirectional=True)
    x, reset = torch.randn(6, 5), torch.rand(6) < 0.4
    y, final = ours(x.unsqueeze(1), lengths=torch.tensor([4]), reset=reset.unsqueeze(1))
    got = ours(x, lengths=torch.tensor(4), reset=reset)
    for a, b in zip(flatten(got), flatten((y, final)), strict=True):
        assert torch.equal(a, b.squeeze(1))


@pytest.mark.parametrize("name", SEQUENCES)
def test_gradients_through_lengths_and_reset(name: str) -> None:
    """Those of the default backend are those of the reference."""
    options: dict[str, Any] = {"num_layers": 2, "bidirectional": True, "dtype": torch.float64}
    x = torch.randn(5, 3, 4, dtype=torch.float64)
    extras = {"lengths": torch.tensor([2, 5, 3]), "reset": torch.rand(5, 3) < 0.3}
    results = []
    for backend in BACKENDS:
        ours, _ = make(name, 4, 6, extras={"backend": backend}, **options)
        torch.manual_seed(5)
        results.append(outputs_and_gradients(ours, x, states(ours, 3, torch.float64), **extras))
    assert results[0].keys() == results[1].keys()
    assert_same(results[0].values(), results[1].values())


@pytest.mark.parametrize("name", SEQUENCES)
def test_recompute_trains_alike(name: str) -> None:
    gates, _ = make(name, 4, 6, 2, dtype=torch.float64)
    recompute, _ = make(name, 4, 6, 2, dtype=torch.float64, extras={"save": "recompute"})
    x = torch.randn(70, 2, 4, dtype=torch.float64)
    a, b = outputs_and_gradients(gates, x), outputs_and_gradients(recompute, x)
    assert_same(a.values(), b.values())


def call(module: Any, mode: str, batch_first: bool = False) -> Any:
    """The module on one small input: a sequence, a single step, a packed sequence."""
    if type(module).__name__ in CELLS:
        return module(torch.randn(2, 5))
    if mode == "packed":
        return module(pack_sequence([torch.randn(n, 5) for n in (4, 2)]))
    return module(torch.randn(1 if mode == "step" else 4, 2, 5))


@pytest.mark.parametrize("mode", ["sequence", "step", "packed"])
@pytest.mark.parametrize("name", MODULES)
def test_without_gradient_nothing_is_kept(name: str, mode: str) -> None:
    ours, _ = make(name, 5, 7)
    kept: list[Tensor] = []

    def keep(t: Tensor) -> Tensor:
        kept.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        call(ours, mode)
        assert kept
        kept.clear()
        with torch.no_grad():
            outputs = flatten(call(ours, mode))
        with torch.inference_mode():
            call(ours, mode)
        ours.requires_grad_(False)
        outputs += flatten(call(ours, mode))
    assert not kept
    assert not any(t.requires_grad for t in outputs)


@pytest.mark.parametrize("name", MODULES)
def test_single_steps_without_gradient(name: str) -> None:
    """T = 1 under no_grad has a way of its own, which gives what all others give, and in memory of its own."""
    more: list[dict[str, Any]] = [{"batch_first": True}, {"num_layers": 2}, {"bidirectional": True}]
    more += [{"proj_size": 3}, {"proj_size": 3, "bias": False}] if name == "LSTM" else []
    for options in ({}, {"bias": False}, *(more if name in SEQUENCES else [])):
        ours, counterpart = make(name, 5, 7, **options)
        for batch in (1, 3):
            size = (batch, 5) if name in CELLS else (batch, 1, 5) if options.get("batch_first") else (1, batch, 5)
            h = torch.randn(batch, 7)
            given = (
                states(counterpart, batch)
                if name in SEQUENCES
                else (h, torch.randn_like(h))
                if name == "LSTMCell"
                else h
            )
            for hx in (None, given):
                x = torch.randn(size)
                with torch.no_grad():
                    got, expected = ours(x, hx), counterpart(x, hx)
                assert isinstance(got, tuple) == isinstance(expected, tuple)
                for a, b in zip(flatten(got), flatten(expected), strict=True):
                    torch.testing.assert_close(a, b)
                memory = {t.untyped_storage().data_ptr() for t in flatten((x, hx, got))}
                assert len(memory) == len(flatten((x, hx, got)))


@pytest.mark.parametrize("name", SEQUENCES)
def test_an_output_may_be_changed_in_place_and_a_weight_may_not(name: str) -> None:
    ours, counterpart = make(name, 5, 7, 2, dtype=torch.float64)
    x, gradients = torch.randn(4, 3, 5, dtype=torch.float64), []
    for module in (ours, counterpart):
        y, _ = module(x)
        y.relu_()
        y.sum().backward()
        gradients.append([p.grad for p in module.parameters()])
    assert_same(*gradients)
    y, _ = ours(x)
    with torch.no_grad():
        ours.weight_hh_l0.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("name", MODULES)
def test_backward_in_eval_mode(name: str) -> None:
    ours, counterpart = make(name, 5, 7, dtype=torch.float64)
    x = torch.randn(2, 5, dtype=torch.float64)
    assert_alike(ours.eval(), counterpart.eval(), x)


@pytest.mark.parametrize("name", MODULES)
def test_second_derivative(name: str) -> None:
    ours, _ = make(name, 2, 3, dtype=torch.float64)
    x = torch.randn(2, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x: flatten(ours(x)), (x,))


@pytest.mark.parametrize("mode", ["sequence", "step", "packed"])
@pytest.mark.parametrize("name", MODULES)
def test_autocast_decides_the_dtype(name: str, mode: str) -> None:
    """float32 modules and inputs give bfloat16, with a gradient and without one, and close to float32's result."""
    ours, _ = make(name, 5, 7)
    torch.manual_seed(1)
    with torch.autocast("cpu", torch.bfloat16):
        trained = flatten(call(ours, mode))
        torch.manual_seed(1)
        with torch.no_grad():
            inferred = flatten(call(ours, mode))
    torch.manual_seed(1)
    expected = flatten(call(ours, mode))
    for a, b, exact in zip(trained, inferred, expected, strict=True):
        if exact.is_floating_point():
            assert a.dtype == b.dtype == torch.bfloat16
            torch.testing.assert_close(a, b, rtol=0, atol=0)
            # outputs are below 1 and the sums short: a handful of roundings of 2^-9 each
            torch.testing.assert_close(a.float(), exact, rtol=0, atol=2**-6)
    sum(t.float().sum() for t in trained if t.is_floating_point()).backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in ours.parameters())


@pytest.mark.parametrize("name", SEQUENCES)
def test_mixed_states_under_autocast(name: str) -> None:
    """A bfloat16 state from the step before meets a float32 input."""
    ours, _ = make(name, 5, 7)
    with torch.autocast("cpu", torch.bfloat16):
        _, hx = ours(torch.randn(3, 2, 5))
        y, _ = ours(torch.randn(3, 2, 5), hx)
    assert y.dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", MODULES)
def test_sixteen_bits(name: str, dtype: torch.dtype) -> None:
    ours, counterpart = make(name, 5, 7, dtype=dtype)
    assert_alike(ours, counterpart, torch.randn(2, 5, dtype=dtype))


@pytest.mark.parametrize("name", SEQUENCES)
def test_vmap_over_input_and_over_an_ensemble(name: str) -> None:
    members = [make(name, 5, 7, seed=k, dtype=torch.float64)[0] for k in range(3)]
    params, _ = torch.func.stack_module_state(members)
    x = torch.randn(4, 2, 5, dtype=torch.float64)
    base = members[0]
    ys = torch.func.vmap(lambda p: torch.func.functional_call(base, p, (x,))[0])(params)
    assert_same(list(ys), [member(x)[0] for member in members])
    xs = torch.randn(3, 4, 2, 5, dtype=torch.float64)
    for batched in (lambda f: torch.func.vmap(f)(xs), lambda f: torch.stack([f(x) for x in xs])):
        with torch.no_grad():
            ys = batched(lambda x: base(x)[0])
        assert_same(ys, torch.stack([base(x)[0] for x in xs]))


@pytest.mark.parametrize("name", MODULES)
def test_per_sample_gradients(name: str) -> None:
    ours, _ = make(name, 5, 7, dtype=torch.float64)
    params = {key: p.detach() for key, p in ours.named_parameters()}
    xs = torch.randn(3, 4, 5, dtype=torch.float64)  # three samples of four steps, or of a batch of four

    def loss(params: dict[str, Tensor], x: Tensor) -> Tensor:
        return flatten(torch.func.functional_call(ours, params, (x,)))[0].pow(2).sum()

    per_sample = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(params, xs)
    for k, x in enumerate(xs):
        ours.zero_grad()
        loss(dict(ours.named_parameters()), x).backward()
        for key, p in ours.named_parameters():
            assert_same(per_sample[key][k], p.grad)


def test_leaves_and_hidden_states_of_a_stream() -> None:
    """A sequence cut in pieces, the state carried over, is the sequence."""
    ours, _ = make("LSTM", 5, 7, 2, dtype=torch.float64)
    x = leaves(torch.randn(6, 2, 5, dtype=torch.float64))
    whole, _ = ours(x)
    pieces, hx = [], None
    for piece in x.split([1, 3, 2]):
        y, hx = ours(piece, hx)
        pieces.append(y)
    assert_same(torch.cat(pieces), whole)
