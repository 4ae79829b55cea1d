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
CELLS = {"LSTM": "lstm", "GRU": "gru", "RNN": "rnn_tanh"}
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def call(
    name: str, dtype: torch.dtype = torch.float32, sequence: bool = True, given: bool = True, **kwargs: Any
) -> Any:
    """(module, arguments of fast_path, arguments of the op) for one step of B = 3, D = 5, H = 18."""
    torch.manual_seed(0)
    module = getattr(fused_rnn, name + ("" if sequence else "Cell"))(5, 18, dtype=dtype, **kwargs)
    x = torch.randn(1, 3, 5, dtype=dtype)
    states = make_states(name, 3, module._parameters.get("weight_hr_l0", torch.empty(18)).shape[0], dtype)
    if not sequence:
        x, states = x[0], [state[0] for state in states]
    if not given:
        states = []
    w = [module._parameters.get(key + ("_l0" if sequence else "")) for key in (*NAMES, "weight_hr")]
    weights = [t for t in w if t is not None]
    options = (None, None, CELLS[name], [1], "none", False, False) if sequence else (CELLS[name],)
    return (
        module,
        (module._parameters, module.bias, x, as_hx(states), CELLS[name], 0 if sequence else -1),
        (x, weights, states, *options),
    )


def make_states(name: str, batch: int, width: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    widths = (width, 18) if name == "LSTM" else (width,)
    return [torch.randn(1, batch, width, dtype=dtype) for width in widths]


def as_hx(states: list[Tensor]) -> Any:
    return (tuple(states) if len(states) > 1 else states[0]) if states else None


def by_op(arguments: Any) -> Any:
    return (ops.forward if len(arguments) > 4 else ops.step)(*arguments)


NAMES = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")


@pytest.mark.parametrize("dtype", DTYPES)
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


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(("name", "projected"), [("LSTM", 0), ("LSTM", 7), ("GRU", 0), ("RNN", 0)])
def test_a_sequence_is_the_op(name: str, projected: int, batch: int, given: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    module = getattr(fused_rnn, name)(5, 18, dtype=dtype, **({"proj_size": projected} if projected else {}))
    x = torch.randn(40, batch, 5, dtype=dtype)
    states = make_states(name, batch, projected or 18, dtype) if given else []
    with torch.no_grad():
        made = quick(module._parameters, True, x, as_hx(states), CELLS[name], 0)
        expected = ops.forward(x, list(module.parameters()), states, None, None, CELLS[name], [1], "none", False, False)
        assert made[0].shape == expected[0].shape
        for a, b in zip(made, expected, strict=True):
            assert torch.equal(a, b)
        first = quick(module._parameters, True, x.transpose(0, 1).contiguous(), as_hx(states), CELLS[name], 1)
        for a, b in zip(first, (made[0].transpose(0, 1), *made[1:]), strict=True):
            assert torch.equal(a, b)


def test_the_modules_take_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError("the op was called")

    monkeypatch.setattr("fused_rnn.nn.rnn.run", fail)
    monkeypatch.setattr("fused_rnn.nn.cells._run", fail)
    with torch.no_grad():
        for sequence in (True, False):
            for name in CELLS:
                for dtype in DTYPES:
                    module, (_, _, x, hx, *_), _ = call(name, dtype, sequence=sequence)
                    module(x, hx)
                    module(x)
                    if sequence:
                        module(x.repeat(9, 1, 1), hx)
        module, x = call("LSTM", batch_first=True)[0], torch.randn(3, 9, 5)
        assert module(x)[0].shape == (3, 9, 18)


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
        (3, lambda hx: (hx[0][:, :2], hx[1])),
        (3, lambda hx: (hx[0].transpose(1, 2).contiguous().transpose(1, 2), hx[1])),
        (3, lambda hx: (None, hx[1])),
        (3, lambda hx: (hx[0], None)),
        (3, lambda hx: (hx[0], hx[1].double())),
        (3, lambda hx: hx[0]),
        (3, list),
        (4, lambda _: "no such cell"),
        (5, lambda _: 1),  # the batch first, of three
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
    x, states = torch.randn(steps, batch, 5), make_states(name, batch, projected or 18)
    hx = as_hx(states)
    lengths = torch.tensor([0, steps, steps // 2][-batch:]) if given[0] else None
    reset = torch.rand(steps, batch) < 0.3 if given[1] else None
    if reset is not None:
        reset[0, -1] = True
    with torch.no_grad():
        made = quick(module._parameters, True, x, hx, CELLS[name], 0, lengths, reset)
        expected = ops.forward(
            x, list(module.parameters()), states, lengths, reset, CELLS[name], [1], "none", False, False
        )
        for a, b in zip(made, expected, strict=True):
            assert torch.equal(a, b)
        plain = quick(module._parameters, True, x, hx, CELLS[name], 0, None, None)
        assert not torch.equal(plain[0], made[0])
        turned = [t if t is None else t.transpose(0, 1).contiguous() for t in (x, reset)]
        first = quick(module._parameters, True, turned[0], hx, CELLS[name], 1, lengths, turned[1])
        for a, b in zip(first, (made[0].transpose(0, 1), *made[1:]), strict=True):
            assert torch.equal(a, b)


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
