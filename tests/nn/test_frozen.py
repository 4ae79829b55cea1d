"""module.freeze(): packed weights that stay, never stale, and never in the way of anything else."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tolerances import allowed, error
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils import prune
from torch.nn.utils.rnn import PackedSequence, pack_sequence
from user_cells import leaky

import fused_rnn
from fused_rnn import ops

pytestmark = pytest.mark.skipif(ops.fast_path is None, reason="there is no way past the dispatcher")
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
KINDS: dict[str, Callable[..., Any]] = {
    "LSTM": lambda **more: fused_rnn.LSTM(9, 21, **more),
    "LSTM-proj": lambda **more: fused_rnn.LSTM(9, 21, proj_size=5, **more),
    "GRU": lambda **more: fused_rnn.GRU(9, 21, **more),
    "RNN": lambda **more: fused_rnn.RNN(9, 21, **more),
    "no-bias": lambda **more: fused_rnn.GRU(9, 21, bias=False, **more),
    "stack": lambda **more: fused_rnn.LSTM(9, 21, 3, bidirectional=True, **more),
    "batch-first": lambda **more: fused_rnn.GRU(9, 21, 2, batch_first=True, **more),
}


def flat(result: Any) -> list[Tensor]:
    y, hx = result
    return [y.data if isinstance(y, PackedSequence) else y, *(hx if isinstance(hx, tuple) else [hx])]


def assert_same(ours: Any, theirs: Any) -> None:
    for a, b in zip(flat(ours), flat(theirs), strict=True):
        assert torch.equal(a, b)


def panels(module: Any) -> int:
    """How many bytes its panels take: made where there are none."""
    weights = module._fused_by_name()[0] if isinstance(module, fused_rnn.FlexRNN) else module._parameters
    made: int = module._fused_frozen.bytes(weights)
    return made


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_a_long_call_is_bitwise_the_ordinary_one(kind: str, dtype: torch.dtype) -> None:
    """Of more rows than are read unpacked."""
    module = KINDS[kind](dtype=dtype)
    x = torch.randn(20, 20, 9).to(dtype)
    lengths, reset = torch.randint(0, 21, (20,)), torch.rand(20, 20) < 0.2
    with torch.no_grad():
        hx = module(x)[1]

        def calls() -> list[Any]:
            return [module(x), module(x, lengths=lengths), module(x, reset=reset), module(x, hx)]

        before = calls()
        assert module.freeze() is module
        for ours, theirs in zip(calls(), before, strict=True):
            assert_same(ours, theirs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_few_rows_are_as_good_as_the_ordinary_call(kind: str, dtype: torch.dtype) -> None:
    module, x = KINDS[kind](dtype=dtype), torch.randn(2, 2, 9).to(dtype)
    with torch.no_grad():
        plain = module(x)
        exact = copy.deepcopy(module).double()(x.double())
        for ours, own, right in zip(flat(module.freeze()(x)), flat(plain), flat(exact), strict=True):
            assert error(ours, right) <= allowed(own, right)


def test_packed_and_unbatched_input() -> None:
    module = KINDS["stack"]()
    packed, x = pack_sequence([torch.randn(n, 9) for n in (9, 5, 7)], enforce_sorted=False), torch.randn(40, 9)
    with torch.no_grad():
        before = [module(packed), module(x)]
        module.freeze()
        for ours, theirs in zip((module(packed), module(x)), before, strict=True):
            assert_same(ours, theirs)


def mul_in_place(module: Any) -> None:
    with torch.no_grad():
        module.weight_hh_l0.mul_(0.5)


def step_of_an_optimizer(module: Any) -> None:
    module(torch.randn(30, 2, 9))[0].sum().backward()
    torch.optim.Adam(module.parameters(), lr=0.1).step()


def step_of_a_fused_optimizer(module: Any) -> None:
    module(torch.randn(30, 2, 9))[0].sum().backward()
    torch.optim.SGD(module.parameters(), lr=0.1, fused=True).step()


def in_inference_mode(module: Any) -> None:
    with torch.inference_mode():
        module.bias_ih_l0.add_(1)


def load(module: Any) -> None:
    module.load_state_dict(KINDS["GRU"]().state_dict())


def assign(module: Any) -> None:
    module.load_state_dict(KINDS["GRU"]().state_dict(), assign=True)


def another_parameter(module: Any) -> None:
    module.weight_ih_l0 = nn.Parameter(module.weight_ih_l0.detach() * 2)


def another_on_the_same_memory(module: Any) -> None:
    module.weight_hh_l0 = nn.Parameter(module.weight_hh_l0.data)
    mul_in_place(module)


def data_twice(module: Any) -> None:
    """The second lies where the first one lay, if nothing holds that memory."""
    shape = module.weight_hh_l0.shape
    module.weight_hh_l0.data = torch.randn(shape)
    module.weight_hh_l0.data = torch.randn(shape)


def transposed(module: Any) -> None:
    """The same memory by other strides."""
    w = module.weight_ih_l0.data
    module.weight_ih_l0.data = w.as_strided(w.shape, (1, w.shape[0]))


def swapped(module: Any) -> None:
    """Tensors that change places, which torch does not do to those that somebody refers to weakly."""
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        module.bfloat16().float()
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


def vector_to_parameters(module: Any) -> None:
    nn.utils.vector_to_parameters(torch.randn(sum(p.numel() for p in module.parameters())), module.parameters())


def orthogonal(module: Any) -> None:
    nn.init.orthogonal_(module.weight_hh_l0)


def pruned(module: Any) -> None:
    prune.l1_unstructured(module, "weight_hh_l0", 0.5)  # type: ignore[no-untyped-call]


def double(module: Any) -> None:
    module.double().float()


CHANGES = (
    mul_in_place, step_of_an_optimizer, step_of_a_fused_optimizer, in_inference_mode, load, assign, another_parameter,
    another_on_the_same_memory, data_twice, transposed, swapped, vector_to_parameters, orthogonal, pruned, double,
)  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_it_is_never_stale(change: Callable[[Any], None]) -> None:
    torch.manual_seed(1)
    module, x = KINDS["GRU"]().freeze(), torch.randn(30, 2, 9)
    with torch.no_grad():
        before = module(x)[0]
    change(module)
    with torch.no_grad():
        ours = module(x)
        assert change is double or not torch.equal(ours[0], before)
        assert_same(ours, module.unfreeze()(x))


def test_what_it_cannot_see_is_seen_by_freezing_again() -> None:
    module, x = KINDS["GRU"]().freeze(), torch.randn(30, 2, 9)
    with torch.no_grad():
        before = module(x)[0]
        module.weight_hh_l0.data.mul_(0.5)
        assert torch.equal(module(x)[0], before)  # as the docs say
        after = module.freeze()(x)
        assert not torch.equal(after[0], before)
        assert_same(after, module.unfreeze()(x))


def test_another_dtype() -> None:
    module, x = KINDS["stack"]().freeze(), torch.randn(30, 2, 9)
    with torch.no_grad():
        module(x)
        for dtype in (torch.bfloat16, torch.float64, torch.float32):
            module.to(dtype)
            assert_same(module(x.to(dtype)), copy.deepcopy(module).unfreeze()(x.to(dtype)))


def test_a_gradient_takes_the_ordinary_way() -> None:
    module, x = KINDS["LSTM"]().freeze(), torch.randn(30, 2, 9)
    with torch.no_grad():
        module(x)
    module(x)[0].sum().backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in module.parameters())


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
@pytest.mark.parametrize("kind", ["stack", "FlexRNN"])
def test_copies_are_frozen_and_have_panels_of_their_own(copied: Callable[[Any], Any], kind: str) -> None:
    module = fused_rnn.FlexRNN(leaky, 9, 21, init={"a": 0.5}) if kind == "FlexRNN" else KINDS[kind]()
    module, x = module.freeze(), torch.randn(30, 2, 9)
    with torch.no_grad():
        y = module(x)
        other = copied(module)
        assert other._fused_frozen is not None and other._fused_frozen is not module._fused_frozen
        assert_same(other(x), y)
        mul_in_place(other)
        assert not torch.equal(other(x)[0], y[0])
        assert_same(module(x), y)


@pytest.mark.parametrize(("name", "value"), [("zoneout", 0.1), ("backend", "reference")])
def test_copies_of_one_that_takes_the_ordinary_way_since(name: str, value: Any) -> None:
    module, x = fused_rnn.FlexRNN(leaky, 9, 20).eval().freeze(), torch.randn(4, 2, 9)
    setattr(module, name, value)
    with torch.no_grad():
        assert_same(copy.deepcopy(module)(x), module(x))


def test_state_dict_save_and_torchs_class() -> None:
    module = KINDS["LSTM"]().freeze()
    assert module.state_dict().keys() == KINDS["LSTM"]().state_dict().keys()
    file, x = io.BytesIO(), torch.ones(20, 2, 9)
    torch.save(module, file)
    file.seek(0)
    with torch.no_grad():
        assert_same(torch.load(file, weights_only=False)(x), module(x))
    theirs = fused_rnn.to_torch(module)
    assert type(theirs) is nn.LSTM
    assert not any(key.startswith("_fused") for key in vars(theirs))


def test_functional_call_and_vmap_see_their_own_weights() -> None:
    module, x = KINDS["GRU"]().freeze(), torch.randn(30, 2, 9)
    plain = copy.deepcopy(module).unfreeze()
    others = [{name: torch.randn_like(p) for name, p in module.named_parameters()} for _ in range(2)]
    with torch.no_grad():
        y = module(x)
        for own in others:
            assert_same(functional_call(module, own, (x,)), functional_call(plain, own, (x,)))
        stacked = {name: torch.stack([own[name] for own in others]) for name in others[0]}
        by_vmap = torch.vmap(lambda own: functional_call(module, own, (x,))[0])(stacked)
        for k, own in enumerate(others):
            torch.testing.assert_close(by_vmap[k], functional_call(plain, own, (x,))[0])
        assert_same(module(x), y)


def test_compiled_it_is_the_op() -> None:
    module, x = KINDS["GRU"]().freeze(), torch.randn(30, 2, 9)
    run = torch.compile(module, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(run(x)[0], module(x)[0])
        mul_in_place(module)
        torch.testing.assert_close(run(x)[0], module(x)[0])


def test_inference_tensors_are_refused_and_never_kept() -> None:
    with torch.inference_mode():
        made = KINDS["GRU"]()
    with pytest.raises(RuntimeError, match="weight_ih_l0: got a tensor made under inference_mode"):
        made.freeze()
    module, x = KINDS["GRU"]().freeze(), torch.randn(30, 2, 9)
    with torch.inference_mode():
        module(x)
        module.weight_hh_l0 = nn.Parameter(torch.randn(63, 21))
        module(x)
        module.weight_hh_l0.mul_(0.5)
        assert_same(module(x), copy.copy(module).unfreeze()(x))


@pytest.mark.parametrize(
    "make",
    [
        lambda: fused_rnn.LSTM(9, 21, zoneout=0.1),
        lambda: fused_rnn.FlexRNN(leaky, 9, 20, heads=2),
        lambda: fused_rnn.LiGRU(9, 21),
    ],
)
def test_a_module_that_keeps_no_weights_is_refused(make: Callable[[], Any]) -> None:
    with pytest.raises(NotImplementedError, match=r"freeze: got .*expected one without"):
        make().freeze()


def test_computed_weights_are_refused() -> None:
    module = nn.utils.parametrizations.weight_norm(fused_rnn.GRU(3, 4), "weight_hh_l0")
    with pytest.raises(NotImplementedError, match="expected one without regularisers, heads, blocks, computed weights"):
        module.freeze()


@pytest.mark.parametrize("name", ["LayerNormLSTM", "MinGRU", "SLSTM", "PeepholeLSTM", "ResetBeforeGRU"])
def test_cells_of_the_literature(name: str) -> None:
    module, x = getattr(fused_rnn, name)(9, 21), torch.randn(30, 3, 9)
    with torch.no_grad():
        before = module(x)
        module.freeze()
        assert_same(module(x), before)
        assert panels(module) > 0
        for p in module.parameters():
            p.mul_(1.5)
        assert not torch.equal(module(x)[0], before[0])
        assert_same(module(x), copy.deepcopy(module).unfreeze()(x))


def test_calls_run_on_the_panels_until_the_weights_change() -> None:
    module, x = fused_rnn.GRU(64, 256).freeze(), torch.randn(1, 1, 64)
    assert panels(module) >= sum(p.numel() * 4 for p in module.parameters() if p.dim() == 2)
    with torch.no_grad():
        first = module(x)[0]
        module.weight_ih_l0.data.zero_()  # unseen: what runs is what was packed
        assert torch.equal(module(x)[0], first)
        module.weight_ih_l0.add_(0)
        assert not torch.equal(module(x)[0], first)


def test_the_end_gives_everything_back() -> None:
    module = KINDS["GRU"]().freeze()
    with torch.no_grad():
        module(torch.randn(30, 2, 9))
    module.weight_hh_l0.owner = module  # a circle, which the collector must see through
    dead, weight = weakref.ref(module), weakref.ref(module.weight_ih_l0)
    del module
    gc.collect()
    assert dead() is None
    assert weight() is None


def test_threads_call_while_another_changes_the_weights() -> None:
    module, x = fused_rnn.GRU(32, 64).freeze(), torch.randn(24, 2, 32)
    two = [copy.deepcopy(module.state_dict()), {k: v * 0.5 for k, v in module.state_dict().items()}]
    right = []
    with torch.no_grad():
        for own in two:
            module.load_state_dict(own)
            right.append(module(x)[0])
    stop = threading.Event()

    def call() -> None:
        with torch.no_grad():
            while not stop.is_set():
                module(x)

    callers = [threading.Thread(target=call) for _ in range(3)]
    for thread in callers:
        thread.start()
    try:
        with torch.no_grad():
            for k in range(60):
                module.load_state_dict(two[k % 2])
                assert torch.equal(module(x)[0], right[k % 2])
    finally:
        stop.set()
        for thread in callers:
            thread.join()


def test_threads_pack_at_once() -> None:
    module, x = fused_rnn.LSTM(8, 16, 3, bidirectional=True).eval().freeze(), torch.randn(2, 2, 8)
    with torch.no_grad():
        right = module(x)[0]
    stop, wrong = threading.Event(), []

    def call() -> None:
        with torch.no_grad():
            while not stop.is_set():
                if not torch.equal(module(x)[0], right):
                    wrong.append(1)

    callers = [threading.Thread(target=call) for _ in range(4)]
    for thread in callers:
        thread.start()
    try:
        with torch.no_grad():
            for _ in range(3000):  # what was packed before ends while others ask for it
                for weight in module.parameters():
                    weight.mul_(1.0)
    finally:
        stop.set()
        for thread in callers:
            thread.join()
    assert not wrong
