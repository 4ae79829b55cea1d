"""The way past the dispatcher: the same numbers as the op, and nothing that an op would have met goes by unseen."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import fused_rnn
from fused_rnn import ops

quick: Any = ops.fast_path
pytestmark = pytest.mark.skipif(quick is None, reason="the extension is not built, or this torch does not lend tensors")
CELLS = {"LSTM": 0, "GRU": 1, "RNN": 2}
KINDS = {"LSTM": "lstm", "GRU": "gru", "RNN": "rnn_tanh"}


def call(
    name: str, dtype: torch.dtype = torch.float32, sequence: bool = True, given: bool = True, **kwargs: Any
) -> Any:
    """(module, arguments of fast_path, arguments of the op) for one step of B = 3, D = 5, H = 18."""
    torch.manual_seed(0)
    module = getattr(fused_rnn, name + ("" if sequence else "Cell"))(5, 18, dtype=dtype, **kwargs)
    x = torch.randn(1, 3, 5, dtype=dtype)
    h, c = torch.randn(1, 3, module._parameters.get("weight_hr_l0", torch.empty(18)).shape[0], dtype=dtype), None
    if name == "LSTM":
        c = torch.randn(1, 3, 18, dtype=dtype)
    if not sequence:
        x, h, c = x[0], h[0], None if c is None else c[0]
    if not given:
        h = c = None  # type: ignore[assignment]
    w = [module._parameters.get(key + ("_l0" if sequence else "")) for key in (*NAMES, "weight_hr")]
    weights, states = [t for t in w if t is not None], [s for s in (h, c) if s is not None]
    options = (None, None, KINDS[name], [1], "none", False) if sequence else (KINDS[name],)
    return (
        module,
        (module._parameters, module.bias, x, h, c, CELLS[name], 0 if sequence else -1),
        (x, weights, states, *options),
    )


def by_op(arguments: Any) -> Any:
    return (ops.forward if len(arguments) > 4 else ops.step)(*arguments)


NAMES = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("sequence", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", CELLS)
def test_it_is_the_op(name: str, bias: bool, sequence: bool, given: bool, dtype: torch.dtype) -> None:
    _, arguments, of_op = call(name, dtype, sequence, given, bias=bias)
    tensors = [of_op[0], *of_op[1], *of_op[2]]
    before = [t.clone() for t in tensors]
    with torch.no_grad():
        made, expected = quick(*arguments), by_op(of_op)
    assert len(made) == len(expected)
    for a, b in zip(made, expected, strict=True):
        assert torch.equal(a, b)
        assert a.dtype == dtype
        assert not a.requires_grad
        assert a.untyped_storage().resizable()
    assert len({t.data_ptr() for t in made}) == len(made)
    for t, kept in zip(tensors, before, strict=True):
        assert torch.equal(t, kept)


def test_projection() -> None:
    _, arguments, of_op = call("LSTM", proj_size=7)
    with torch.no_grad():
        for a, b in zip(quick(*arguments), by_op(of_op), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(("name", "projected"), [("LSTM", 0), ("LSTM", 7), ("GRU", 0), ("RNN", 0)])
def test_a_sequence_is_the_op(name: str, projected: int, batch: int, given: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    module = getattr(fused_rnn, name)(5, 18, dtype=dtype, **({"proj_size": projected} if projected else {}))
    x = torch.randn(40, batch, 5, dtype=dtype)
    states = [torch.randn(1, batch, width, dtype=dtype) for width in (projected or 18, 18)[: 1 + (name == "LSTM")]]
    h, c = (*states, None)[:2] if given else (None, None)
    cell = {"LSTM": "lstm", "GRU": "gru", "RNN": "rnn_tanh"}[name]
    with torch.no_grad():
        made = quick(module._parameters, True, x, h, c, CELLS[name], 0)
        given_states = [s for s in (h, c) if s is not None]
        expected = ops.forward(x, list(module.parameters()), given_states, None, None, cell, [1], "none", False)
        assert made[0].shape == expected[0].shape
        for a, b in zip(made, expected, strict=True):
            assert torch.equal(a, b)
        if batch == 1:
            first = quick(module._parameters, True, x.transpose(0, 1).contiguous(), h, c, CELLS[name], 1)
            assert torch.equal(first[0], made[0].transpose(0, 1))


def test_the_modules_take_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError("the op was called")

    monkeypatch.setattr("fused_rnn.nn.rnn.run", fail)
    monkeypatch.setattr("fused_rnn.nn.cells._run", fail)
    with torch.no_grad():
        for sequence in (True, False):
            module, (_, _, x, h, *_), _ = call("GRU", sequence=sequence)
            module(x, h)
            module(x)
            if sequence:
                module(x.repeat(9, 1, 1), h)


class Calls(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


def test_a_dispatch_mode_sees_the_op() -> None:
    module, (_, _, x, h, *_), _ = call("GRU")
    with torch.no_grad(), Calls() as mode:
        module(x, h)
    assert "fused_rnn.forward.default" in mode.seen


def test_a_profiler_sees_the_op() -> None:
    module, (_, _, x, h, *_), _ = call("GRU")
    with torch.no_grad(), torch.profiler.profile() as profile:
        module(x, h)
    assert "fused_rnn::forward" in {event.key for event in profile.key_averages()}


class Functions(TorchFunctionMode):
    pass


class Strange(Tensor):
    pass


def changed(position: int, to: Any) -> Any:
    arguments = list(call("LSTM")[1])
    arguments[position] = to(arguments[position])
    return arguments


@pytest.mark.parametrize(
    ("position", "to"),
    [
        (0, lambda w: {k: v for k, v in w.items() if k != "weight_hh_l0"}),
        (0, lambda w: {k: v for k, v in w.items() if k != "bias_hh_l0"}),
        (0, lambda w: w | {"weight_ih_l0": nn.Parameter(torch.randn(72, 6))}),
        (0, lambda w: w | {"weight_ih_l0": nn.Parameter(torch.randn(5, 72).t())}),
        (0, lambda w: w | {"bias_ih_l0": torch.randn(72).double()}),
        (0, lambda w: w | {"weight_hh_l0": torch.randn(72, 18, device="meta")}),
        (2, lambda x: x.double()),
        (2, lambda x: x.bfloat16()),
        (2, lambda x: x.to_sparse()),
        (2, lambda x: x.as_subclass(Strange)),
        (2, lambda x: x[0]),
        (2, lambda x: x[:, :0]),
        (2, lambda x: x.repeat(1, 2, 1)),
        (2, lambda x: x[..., :4]),
        (2, lambda _: None),
        (2, lambda _: [1.0]),
        (3, lambda h: h[:, :2]),
        (3, lambda h: h.transpose(1, 2).contiguous().transpose(1, 2)),
        (3, lambda _: None),  # without c's absence
        (4, lambda _: None),
        (4, lambda c: c.double()),
        (5, lambda _: 4),
        (6, lambda _: 1),  # the batch first, of three
    ],
)
def test_what_is_out_of_the_ordinary_is_left_alone(position: int, to: Any) -> None:
    with torch.no_grad():
        assert quick(*changed(position, to)) is None


def test_so_is_what_something_watches() -> None:
    arguments = call("GRU")[1]
    assert quick(*arguments) is None  # a gradient could be asked for
    with torch.no_grad():
        assert quick(*arguments) is not None
        with Calls():
            assert quick(*arguments) is None
        with Functions():
            assert quick(*arguments) is None
        with torch.autocast("cpu"):
            assert quick(*arguments) is None
        assert torch.vmap(lambda x: x if quick(*arguments) is None else x / 0)(torch.ones(2)).tolist() == [1, 1]


@pytest.mark.parametrize("steps", [1, 40])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("given", [(True, False), (False, True), (True, True)])
@pytest.mark.parametrize(("name", "projected"), [("LSTM", 0), ("LSTM", 7), ("GRU", 0), ("RNN", 0)])
def test_lengths_and_resets(name: str, projected: int, given: tuple[bool, bool], batch: int, steps: int) -> None:
    torch.manual_seed(0)
    module = getattr(fused_rnn, name)(5, 18, **({"proj_size": projected} if projected else {}))
    x, h = torch.randn(steps, batch, 5), torch.randn(1, batch, projected or 18)
    c = torch.randn(1, batch, 18) if name == "LSTM" else None
    lengths = torch.tensor([0, steps, steps // 2][-batch:]) if given[0] else None
    reset = torch.rand(steps, batch) < 0.3 if given[1] else None
    if reset is not None:
        reset[0, -1] = True
    cell = {"LSTM": "lstm", "GRU": "gru", "RNN": "rnn_tanh"}[name]
    with torch.no_grad():
        made = quick(module._parameters, True, x, h, c, CELLS[name], 0, lengths, reset)
        states = [s for s in (h, c) if s is not None]
        expected = ops.forward(x, list(module.parameters()), states, lengths, reset, cell, [1], "none", False)
        for a, b in zip(made, expected, strict=True):
            assert torch.equal(a, b)
        plain = quick(module._parameters, True, x, h, c, CELLS[name], 0, None, None)
        assert not torch.equal(plain[0], made[0])
        if batch == 1:
            turned = [t if t is None else t.transpose(0, 1).contiguous() for t in (x, reset)]
            first = quick(module._parameters, True, turned[0], h, c, CELLS[name], 1, lengths, turned[1])
            assert torch.equal(first[0], made[0].transpose(0, 1))


@pytest.mark.parametrize(
    ("lengths", "reset"),
    [
        (torch.tensor([1, 2, 2]), None),  # T is 1
        (torch.tensor([-1, 1, 1]), None),
        (torch.tensor([1, 1]), None),
        (torch.tensor([[1, 1, 1]]), None),
        (torch.tensor([1, 1, 1], dtype=torch.int32), None),
        (torch.tensor([1, 1, 1.0]), None),
        ([1, 1, 1], None),
        (torch.tensor([1, 0, 1, 0, 1, 0])[::2], None),
        (None, torch.ones(3, 1, dtype=torch.bool)),
        (None, torch.ones(1, 3, dtype=torch.uint8)),
        (None, torch.ones(3, dtype=torch.bool)),
        (None, torch.ones(1, 6, dtype=torch.bool)[:, ::2]),
        (None, torch.ones(1, 3, dtype=torch.bool, device="meta")),
        (None, True),
    ],
)
def test_other_lengths_and_resets_are_left_alone(lengths: Any, reset: Any) -> None:
    with torch.no_grad():
        assert quick(*call("GRU")[1], None, None) is not None
        assert quick(*call("GRU")[1], lengths, reset) is None
        assert quick(*call("GRU", sequence=False)[1], torch.ones(3, dtype=torch.int64), None) is None


def test_what_it_leaves_alone_is_refused_in_words() -> None:
    module, (_, _, x, h, *_), _ = call("GRU")
    with torch.no_grad():
        with pytest.raises(ValueError, match="lengths: got values from 1 to 2, expected 0 to T = 1"):
            module(x, h, lengths=torch.tensor([1, 2, 2]))
        with pytest.raises(ValueError, match=r"reset: got torch\.uint8, expected torch\.bool"):
            module(x, h, reset=torch.ones(1, 3, dtype=torch.uint8))
        assert torch.equal(module(x, h, lengths=[1, 0, 1])[1], module(x, h, lengths=torch.tensor([1, 0, 1]))[1])
