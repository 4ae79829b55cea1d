"""Where a gradient is asked for, the way past the dispatcher leads to the same Function, with the op's results."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

import fused_rnn
from fused_rnn import ops
from fused_rnn.nn import quick

from .test_fast_stacks import CELLS, arguments, assert_same, flatten, make
from .test_watchers import WATCHERS

pytestmark = pytest.mark.skipif(
    ops.fast_path is None, reason="the extension is not built, or this torch does not lend tensors"
)
KINDS = ("padded", "lengths", "resets", "lengths and resets", "packed", "packed sorted", "packed whole")


def wanting(value: Any) -> Any:
    """The same, with gradients asked for."""
    if isinstance(value, PackedSequence):
        return value._replace(data=wanting(value.data))
    if isinstance(value, Tensor):
        return value.detach().clone().requires_grad_(value.is_floating_point())
    return tuple(map(wanting, value)) if isinstance(value, tuple) else value


def graph_of(module: Any, args: Any, extras: Any) -> tuple[Any, list[Tensor], list[Tensor]]:
    """The results of a call, its inputs that ask for a gradient, and these gradients, of a weighted sum of all."""
    args = [wanting(value) for value in args]
    results = module(*args, **extras)
    inputs = [t for t in flatten([a for a in args if a is not None]) if t.requires_grad] + list(module.parameters())
    outputs = [t for t in flatten(results) if t.requires_grad]
    torch.manual_seed(2)
    gradients = torch.autograd.grad(outputs, inputs, [torch.randn_like(t) for t in outputs])
    return results, inputs, list(gradients)


@pytest.fixture
def both_ways(monkeypatch: pytest.MonkeyPatch) -> Any:
    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError("the way through the op was taken")

    def results(module: Any, args: Any, extras: Any) -> tuple[Any, Any]:
        with monkeypatch.context() as patch:
            patch.setattr("fused_rnn.nn.rnn.run", fail)
            made = graph_of(module, args, extras)
        with monkeypatch.context() as patch:
            patch.setattr("fused_rnn.nn.quick.FAST_PATH", None)
            return made, graph_of(module, args, extras)

    return results


def compare(ways: Any) -> None:
    (made, _, gradients), (by_op, _, expected) = ways
    assert_same(made, by_op)
    for a, b in zip(gradients, expected, strict=True):
        assert torch.equal(a, b)
        assert a.is_contiguous()


@pytest.mark.parametrize("steps", [1, 9])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("layers", "both"), [(1, False), (1, True), (3, True)])
@pytest.mark.parametrize(("name", "projected"), CELLS)
def test_it_is_the_op(
    name: str, projected: int, layers: int, both: bool, kind: str, steps: int, both_ways: Any
) -> None:
    packed = kind.startswith("packed")
    if packed and layers > 1:
        pytest.skip("packed stacks take the way through the op")
    module = make(name, layers, both, projected=projected)
    args, extras = arguments(kind, module, steps, given=kind != "packed")
    compare(both_ways(module, args, extras))
    args[1] = None
    compare(both_ways(module, args, extras))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_in_other_dtypes(kind: str, dtype: torch.dtype, both_ways: Any) -> None:
    module = make("LSTM", 1, True, dtype, bias=False)
    compare(both_ways(module, *arguments(kind, module, given=kind != "packed")))


@pytest.mark.parametrize("kind", ["padded", "packed", "packed whole"])
@pytest.mark.parametrize("steps", [1, 4])
def test_second_derivatives(steps: int, kind: str) -> None:
    module = make("GRU", 1, False, torch.float64)
    args, _ = arguments(kind, module, steps, given=False)
    packed = args[0] if isinstance(args[0], PackedSequence) else None

    def call(data: Tensor, weight: Tensor) -> Any:
        module._parameters["weight_hh_l0"] = weight
        y, h = module(data if packed is None else packed._replace(data=data))
        return (y if packed is None else y.data), h

    data = args[0].data if packed is not None else args[0]
    weight = module.weight_hh_l0.detach().clone().requires_grad_()
    data = data[..., :2, :].clone() if packed is None else data
    assert torch.autograd.gradgradcheck(call, (data.requires_grad_(), weight), fast_mode=True)


def test_what_changes_in_place_is_noticed() -> None:
    module = make("GRU", 2, True)
    x = torch.randn(3, 2, 6, requires_grad=True)
    y, _ = module(x)
    y.mul_(2).sum().backward()  # y is the caller's own
    y, _ = module(x)
    with torch.no_grad():
        module.weight_hh_l1.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_hooks_of_saved_tensors_see_all() -> None:
    module, seen = make("LSTM", 1, False), []

    def pack(t: Tensor) -> Tensor:
        seen.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        module(torch.randn(3, 2, 6))[0].sum().backward()
    assert len(seen) == 1 + 3 + 4  # x; hidden, saved and the history; the weights


def test_only_what_asks_gets_a_gradient() -> None:
    module = make("GRU", 2, False).requires_grad_(False)
    x = torch.randn(3, 2, 6)
    y, h = module(x)
    assert not y.requires_grad
    assert not h.requires_grad
    module.bias_hh_l1.requires_grad_()
    y, h = module(x)
    (y.sum() + h.sum()).backward()
    assert [name for name, p in module.named_parameters() if p.grad is not None] == ["bias_hh_l1"]


class Strange(Tensor):
    pass


def is_left_alone(module: Any, args: Any, **extras: Any) -> bool:
    made = quick.call(module, args[0], args[1], extras.get("lengths"), extras.get("reset"))
    return made is None


def test_what_is_left_to_the_op() -> None:
    module = make("GRU", 1, True)
    args, extras = arguments("lengths and resets", module)
    x, hx = args
    assert not is_left_alone(module, args, **extras)
    assert is_left_alone(module, [x.as_subclass(Strange), hx])
    assert is_left_alone(module, [x.double(), hx])
    assert is_left_alone(module, [x.transpose(0, 1), None])
    assert is_left_alone(module, [x[:, 0], None])
    assert is_left_alone(module, [x, [hx]])
    assert is_left_alone(module, [x, hx[:, :2]])
    assert is_left_alone(module, [x, hx], lengths=extras["lengths"] + 9)
    packed = arguments("packed", module)[0]
    assert is_left_alone(module, packed)  # states, or resets, that are to be put into its order
    assert is_left_alone(module, [packed[0], None], reset=extras["reset"])
    assert not is_left_alone(module, [packed[0], None])
    for other in (
        make("GRU", 1, True, save="recompute"),
        make("GRU", 1, True, batch_first=True),
        make("GRU", 2, True, dropout=0.5),
        make("GRU", 1, True, backend="reference"),
        make("GRU", 1, True).requires_grad_(False),
    ):
        assert is_left_alone(other, [x, None])
    parametrize.register_parametrization(module, "weight_hh_l0", nn.Identity())
    assert is_left_alone(module, args)
    with torch.inference_mode():
        made = make("GRU", 1, True)
    assert is_left_alone(made, [x.requires_grad_(), None])


@pytest.mark.parametrize("watcher", WATCHERS)
def test_what_watches_is_not_slipped_by(watcher: str) -> None:
    past: Any = ops.fast_path
    module = make("GRU", 1, False)
    given = (module._parameters, True, torch.randn(9, 5, 6), None, "gru", 0, None, None, 1, False, None, 0)
    assert past(*given) is not None
    with WATCHERS[watcher]():
        assert past(*given) is None
    with torch.no_grad():
        assert past(*given) is None


def test_under_a_transform(monkeypatch: pytest.MonkeyPatch) -> None:
    module = make("GRU", 1, False)
    x = torch.randn(4, 3, 2, 6)
    made = torch.vmap(lambda x: module(x)[0])(x)
    monkeypatch.setattr("fused_rnn.nn.quick.FAST_PATH", None)
    assert torch.equal(made, torch.vmap(lambda x: module(x)[0])(x))


@pytest.mark.parametrize("gradient", [False, True])
def test_resets_beside_packed_input_are_laid_out_by_batch_first(gradient: bool) -> None:
    torch.manual_seed(0)
    gru, x = fused_rnn.GRU(3, 5, batch_first=True), torch.randn(4, 4, 3)
    lengths, reset = [4, 4, 3, 2], torch.zeros(4, 4, dtype=torch.bool)
    reset[0, 2] = True
    packed = pack_padded_sequence(x, lengths, batch_first=True)
    with torch.set_grad_enabled(gradient):
        y, h_n = gru(packed, reset=reset)
        expected, expected_h_n = gru(x, lengths=torch.tensor(lengths), reset=reset)
    torch.testing.assert_close(pad_packed_sequence(y, batch_first=True)[0], expected)
    torch.testing.assert_close(h_n, expected_h_n)


def test_it_is_this_module_that_is_called() -> None:
    assert fused_rnn.GRU(2, 3)(torch.randn(1, 1, 2))[0].grad_fn.name() == "LayerFunctionBackward"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", ["LSTMCell", "GRUCell", "RNNCell"])
def test_a_step_of_a_cell(
    name: str, bias: bool, given: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError("the way through the op was taken")

    torch.manual_seed(0)
    cell = getattr(fused_rnn, name)(6, 18, bias=bias, dtype=dtype)
    states = torch.randn(2, 3, 18, dtype=dtype).unbind(0)
    args = [torch.randn(3, 6, dtype=dtype), (tuple(states) if name == "LSTMCell" else states[0]) if given else None]
    with monkeypatch.context() as patch:
        patch.setattr("fused_rnn.layers.step", fail)
        made = graph_of(cell, args, {})
    monkeypatch.setattr("fused_rnn.nn.quick.FAST_PATH", None)
    for ours, expected in zip(made, graph_of(cell, args, {}), strict=True):
        for a, b in zip(flatten(ours), flatten(expected), strict=True):
            assert torch.equal(a, b)
            assert a.stride() == b.stride()
    assert not any(state._is_view() for state in flatten(made[0]))


@pytest.mark.parametrize("name", ["LSTMCell", "GRUCell", "RNNCell"])
def test_second_derivatives_of_a_step(name: str) -> None:
    cell = getattr(fused_rnn, name)(4, 5, dtype=torch.float64)
    tensors = [torch.randn(2, width, dtype=torch.float64, requires_grad=True) for width in (4, 5, 5)]

    def call(x: Tensor, *states: Tensor) -> Any:
        return cell(x, states if len(states) > 1 else states[0])

    tensors = tensors if name == "LSTMCell" else tensors[:2]
    assert torch.autograd.gradgradcheck(call, tensors, fast_mode=True)


def test_a_step_of_which_a_state_alone_is_used() -> None:
    cell, torchs = fused_rnn.LSTMCell(4, 5), nn.LSTMCell(4, 5)
    torchs.load_state_dict(cell.state_dict())
    x = torch.randn(2, 4)
    for place in (0, 1):
        for ours, theirs in zip(
            torch.autograd.grad(cell(x)[place].mul_(2).sum(), list(cell.parameters())),
            torch.autograd.grad(torchs(x)[place].mul(2).sum(), list(torchs.parameters())),
            strict=True,
        ):
            torch.testing.assert_close(ours, theirs)


def test_a_step_notices_what_changes_in_place() -> None:
    cell = fused_rnn.GRUCell(4, 5)
    h = cell(torch.randn(2, 4), torch.zeros(2, 5))
    with torch.no_grad():
        cell.weight_hh.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        h.sum().backward()
