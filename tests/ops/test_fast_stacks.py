"""The way past the dispatcher, of stacks, both directions and packed input: the modules take it, and it is the op."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import fused_rnn
from fused_rnn import ops

from .test_watchers import WATCHERS

pytestmark = pytest.mark.skipif(
    ops.fast_path is None, reason="the extension is not built, or this torch does not lend tensors"
)
B, D, H = 5, 6, 18
LENGTHS = torch.tensor([3, 9, 1, 9, 6])
KINDS = (
    "padded",
    "unbatched",
    "lengths",
    "resets",
    "lengths and resets",
    "packed",
    "packed sorted",
    "packed whole",
)
CELLS = [("LSTM", 0), ("LSTM", 7), ("GRU", 0), ("RNN", 0)]
STACKS = [(1, False), (1, True), (2, False), (3, True)]


def flatten(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [t for part in value if part is not None for t in flatten(part)]


def make(
    name: str, layers: int, both: bool, dtype: torch.dtype = torch.float32, projected: int = 0, **more: Any
) -> Any:
    torch.manual_seed(0)
    more |= {"proj_size": projected} if projected else {}
    return getattr(fused_rnn, name)(D, H, layers, bidirectional=both, dtype=dtype, **more)


def arguments(kind: str, module: Any, steps: int = 9, given: bool = True) -> tuple[list[Any], dict[str, Any]]:
    """What a call of this kind is given: by position, and by name."""
    dtype, rows = module.weight_ih_l0.dtype, module.num_layers * (1 + module.bidirectional)
    x, extras = torch.randn(steps, B, D, dtype=dtype), {}
    lengths = LENGTHS.clamp(max=steps)
    hx = [torch.randn(rows, B, width, dtype=dtype) for width in (module.proj_size or H, H)[: module._fused_states]]
    if "lengths" in kind:
        extras["lengths"] = lengths
    if "resets" in kind:
        reset = torch.rand(steps, B) < 0.3
        extras["reset"] = reset.t().contiguous() if module.batch_first else reset
    x = x.transpose(0, 1).contiguous() if module.batch_first else x
    data: Any = x
    if kind == "unbatched":
        data, hx = torch.randn(steps, D, dtype=dtype), [state[:, 0].contiguous() for state in hx]
    elif kind == "packed sorted":
        data = pack_padded_sequence(x, lengths.sort(descending=True)[0], module.batch_first)
    elif kind == "packed":
        data = pack_padded_sequence(x, lengths, module.batch_first, enforce_sorted=False)
    elif kind == "packed whole":
        data = pack_padded_sequence(x, torch.full((B,), steps), module.batch_first)
    states = (tuple(hx) if len(hx) > 1 else hx[0]) if given else None
    return [data, states], extras


@pytest.fixture
def both_ways(monkeypatch: pytest.MonkeyPatch) -> Any:
    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError("the op was called")

    def results(module: Any, args: Sequence[Any], extras: dict[str, Any]) -> tuple[Any, Any]:
        """Of a call without gradient: past the dispatcher, which it must take, and by the op."""
        with torch.no_grad():
            with monkeypatch.context() as patch:
                patch.setattr("fused_rnn.nn.rnn.run", fail)
                quick = module(*args, **extras)
            with monkeypatch.context() as patch:
                patch.setattr("fused_rnn.nn.quick.FAST_PATH", None)
                return quick, module(*args, **extras)

    return results


def strides(t: Tensor) -> list[int]:
    return [stride for stride, size in zip(t.stride(), t.shape, strict=True) if size > 1]


def assert_same(quick: Any, by_op: Any) -> None:
    assert type(quick[0]) is type(by_op[0])
    for a, b in zip(flatten(quick), flatten(by_op), strict=True):
        assert torch.equal(a, b)
        assert strides(a) == strides(b)
        assert a.dtype == b.dtype
    made = flatten(quick[0])[:1] + flatten(quick[1])
    assert len({t.data_ptr() for t in made}) == len(made)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize(("layers", "both"), STACKS)
@pytest.mark.parametrize(("name", "projected"), CELLS)
def test_it_is_the_op(
    name: str, projected: int, layers: int, both: bool, given: bool, kind: str, both_ways: Any
) -> None:
    module = make(name, layers, both, projected=projected)
    args, extras = arguments(kind, module, given=given)
    before = [t.clone() for t in flatten(args)]
    assert_same(*both_ways(module, args, extras))
    for t, kept in zip(flatten(args), before, strict=True):
        assert torch.equal(t, kept)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["LSTM", "GRU", "RNN"])
def test_in_other_dtypes(name: str, dtype: torch.dtype, kind: str, both_ways: Any) -> None:
    module = make(name, 2, True, dtype)
    assert_same(*both_ways(module, *arguments(kind, module)))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("steps", [1, 9])
@pytest.mark.parametrize("bias", [True, False])
def test_batch_first_and_without_biases(steps: int, bias: bool, kind: str, both_ways: Any) -> None:
    module = make("GRU", 2, True, batch_first=True, bias=bias)
    assert_same(*both_ways(module, *arguments(kind, module, steps)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("longest", [0, 5, None])
def test_many_lengths_are_run_longest_first(
    longest: int | None, first: bool, dtype: torch.dtype, both_ways: Any
) -> None:
    """Where it is worth it. The bits are those of the caller's order, also where one sequence runs alone at the end."""
    torch.manual_seed(1)
    module = fused_rnn.GRU(32, 64, batch_first=first, dtype=dtype)
    lengths = torch.randint(0, 30, (40,))
    if longest is not None:
        lengths[longest] = 40
    x, reset = torch.randn(40, 40, 32, dtype=dtype), torch.rand(40, 40) < 0.1
    extras = {"lengths": lengths, "reset": reset}
    assert_same(*both_ways(module, [x, torch.randn(1, 40, 64, dtype=dtype)], extras))
    assert_same(*both_ways(module, [x], {"lengths": lengths}))


def test_what_lies_past_the_end_of_a_sequence_is_not_read(both_ways: Any) -> None:
    module = fused_rnn.GRU(32, 64, 2, bidirectional=True)
    lengths, x = torch.randint(1, 30, (40,)), torch.randn(30, 40, 32)
    clean = both_ways(module, [x], {"lengths": lengths})[0]
    x[torch.arange(30).unsqueeze(1) >= lengths] = torch.nan
    assert_same(both_ways(module, [x], {"lengths": lengths})[0], clean)


def test_a_call_leaves_nothing_to_the_next(both_ways: Any) -> None:
    """A thread keeps its memory: of a large call, then of a small one, then of one that is larger still."""
    module = make("LSTM", 3, True)
    for steps in (60, 3, 200):
        lengths = torch.tensor([steps, 1, 2, steps // 2, 3])
        x = pack_padded_sequence(torch.randn(steps, B, D), lengths, enforce_sorted=False)
        assert_same(*both_ways(module, [x], {}))


def fast(module: Any, input: Any, hx: Any = None, lengths: Any = None, reset: Any = None) -> Any:
    quick: Any = ops.fast_path
    stack = (module.num_layers, module.bidirectional)
    return quick(module._parameters, module.bias, input, hx, module._fused_cell, 0, lengths, reset, *stack)


class Packed(PackedSequence):
    pass


def strange(packed: PackedSequence, **fields: Any) -> PackedSequence:
    return packed._replace(**fields)


@torch.no_grad()
@pytest.mark.parametrize(
    "to",
    [
        lambda p: Packed(*p),
        tuple,
        lambda p: strange(p, data=p.data.double()),
        lambda p: strange(p, data=p.data[:-1]),
        lambda p: strange(p, data=p.data[:, :5]),
        lambda p: strange(p, data=p.data.unsqueeze(1)),
        lambda p: strange(p, data=torch.stack([p.data, p.data], 1)[:, 0]),
        lambda p: strange(p, batch_sizes=p.batch_sizes.int()),
        lambda p: strange(p, batch_sizes=p.batch_sizes.flip(0)),
        lambda p: strange(p, batch_sizes=torch.cat([p.batch_sizes, torch.tensor([0])])),
        lambda p: strange(p, batch_sizes=p.batch_sizes.tolist()),
        lambda p: strange(p, sorted_indices=None),
        lambda p: strange(p, unsorted_indices=None),
        lambda p: strange(p, unsorted_indices=p.sorted_indices),
        lambda p: strange(p, sorted_indices=p.sorted_indices + 1),
        lambda p: strange(p, sorted_indices=p.sorted_indices[:-1], unsorted_indices=p.unsorted_indices[:-1]),
        lambda p: strange(p, sorted_indices=p.sorted_indices.int(), unsorted_indices=p.unsorted_indices.int()),
    ],
)
def test_strange_packed_sequences_are_left_alone(to: Any) -> None:
    module = make("GRU", 2, True)
    (packed, hx), _ = arguments("packed", module)
    assert fast(module, packed, hx) is not None
    assert fast(module, to(packed), hx) is None


@torch.no_grad()
def test_so_is_what_does_not_fit() -> None:
    module = make("LSTM", 2, True, projected=7)
    (packed, hx), _ = arguments("packed", module)
    (x, _), extras = arguments("lengths and resets", module)
    assert fast(module, packed, hx) is not None
    assert fast(module, packed, hx, extras["lengths"]) is None
    assert fast(module, packed, hx, None, extras["reset"]) is not None
    assert fast(module, packed, hx, None, extras["reset"].t().contiguous()) is None
    assert fast(module, packed, tuple(state[:2] for state in hx)) is None
    assert fast(module, packed, tuple(state[:, :3] for state in hx)) is None
    assert fast(module, x[:, 0].contiguous(), hx) is None
    assert fast(module, x[:, 0].contiguous(), None, extras["lengths"]) is None
    assert fast(module, x[:, 0].contiguous(), None, None, extras["reset"]) is None
    for name in dict(module.named_parameters()):
        other = make("LSTM", 2, True, projected=7)
        setattr(other, name, nn.Parameter(torch.zeros(3, 3)))
        assert fast(other, x) is None
        other = make("LSTM", 2, True, projected=7)
        delattr(other, name)
        assert fast(other, x) is None


@pytest.mark.parametrize("watcher", WATCHERS)
def test_what_watches_is_not_slipped_by(watcher: str) -> None:
    module = make("GRU", 2, True)
    (packed, _), _ = arguments("packed", module)
    with torch.no_grad():
        assert fast(module, packed) is not None
        with WATCHERS[watcher]():
            assert fast(module, packed) is None


def test_dropout_is_torchs_in_training_alone(both_ways: Any) -> None:
    module = make("GRU", 2, False, dropout=0.5)
    args, extras = arguments("packed", module)
    assert_same(*both_ways(module.eval(), args, extras))
    with torch.no_grad():
        expected = module(*args)[0].data
        assert not torch.equal(module.train()(*args)[0].data, expected)
    with pytest.raises(AssertionError, match="the op was called"):
        both_ways(module, args, extras)


def test_more_layers_than_it_knows() -> None:
    module = make("RNN", 17, True)
    args, _ = arguments("padded", module)
    with torch.no_grad():
        assert fast(module, *args) is None
        expected = module(*args)
    torch.testing.assert_close(expected, tuple(t.detach() for t in module(*args)))


def test_a_packed_sequence_comes_back_as_one() -> None:
    module = make("GRU", 1, False)
    (packed, hx), _ = arguments("packed", module)
    with torch.no_grad():
        y, _ = module(packed, hx)
    assert type(y) is PackedSequence
    assert y.batch_sizes is packed.batch_sizes
    assert y.sorted_indices is packed.sorted_indices
    assert y.unsorted_indices is packed.unsorted_indices
