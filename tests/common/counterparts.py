"""Our modules beside torch.nn's: made alike, run alike, compared in outputs and all gradients."""

from __future__ import annotations

import copy
from typing import Any

import tolerances
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

import fused_rnn

# name → (ours, torch's)
SEQUENCES = {
    "LSTM": (fused_rnn.LSTM, nn.LSTM),
    "GRU": (fused_rnn.GRU, nn.GRU),
    "RNN": (fused_rnn.RNN, nn.RNN),
}
CELLS = {
    "LSTMCell": (fused_rnn.LSTMCell, nn.LSTMCell),
    "GRUCell": (fused_rnn.GRUCell, nn.GRUCell),
    "RNNCell": (fused_rnn.RNNCell, nn.RNNCell),
}
MODULES = {**SEQUENCES, **CELLS}


def make(name: str, *args: Any, seed: int = 0, extras: dict[str, Any] | None = None, **kwargs: Any) -> Any:
    """(ours, torch's), each built after the same seed. extras: arguments that only ours has."""
    ours, counterpart = MODULES[name]
    torch.manual_seed(seed)
    first = ours(*args, **(extras or {}), **kwargs)
    torch.manual_seed(seed)
    return first, counterpart(*args, **kwargs)


def states(module: nn.RNNBase, batch: int | None, dtype: torch.dtype = torch.float32) -> Any:
    """A random hx for the module; batch None: for unbatched input."""
    rows = module.num_layers * (2 if module.bidirectional else 1)
    size = () if batch is None else (batch,)
    h = torch.randn(rows, *size, module.proj_size or module.hidden_size, dtype=dtype)
    return (h, torch.randn(rows, *size, module.hidden_size, dtype=dtype)) if module.mode == "LSTM" else h


def flatten(value: Any) -> list[Tensor]:
    """The tensors of a nest, those of a PackedSequence with its indices."""
    if value is None:
        return []
    if isinstance(value, Tensor):
        return [value]
    return [t for part in tuple(value) for t in flatten(part)]


def leaves(value: Any) -> Any:
    """A deep copy of a nest of tensors whose floating tensors are leaves that require a gradient."""
    if value is None:
        return None
    if isinstance(value, Tensor):
        copy = value.detach().clone()
        return copy.requires_grad_() if copy.is_floating_point() else copy
    if isinstance(value, PackedSequence):
        return PackedSequence(*(leaves(part) for part in value))
    return tuple(leaves(part) for part in value)


def outputs_and_gradients(module: nn.Module, *args: Any, seed: int = 1, **kwargs: Any) -> dict[str, Tensor]:
    """By name: all that the module returns, and a random combination's gradient in arguments and parameters."""
    args = tuple(leaves(a) for a in args)
    torch.manual_seed(seed)  # the dropout masks
    outputs = flatten(module(*args, **kwargs))
    module.zero_grad()
    generator = torch.Generator().manual_seed(2)
    moving = [o for o in outputs if o.requires_grad]
    weights = [torch.randn(o.shape, generator=generator, dtype=torch.float64).to(o.dtype) for o in moving]
    torch.autograd.backward(moving, weights)
    results = {f"outputs[{k}]": o.detach() for k, o in enumerate(outputs)}
    inputs = [t for t in flatten(args) if t.is_floating_point()]
    named = [(f"inputs[{k}]", t) for k, t in enumerate(inputs)] + list(module.named_parameters())
    return results | {f"d{name}": t.grad for name, t in named if t.grad is not None}


def cast(value: Any, dtype: torch.dtype) -> Any:
    """A nest of tensors with its floating ones in dtype."""
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, PackedSequence):
        return value._replace(data=value.data.to(dtype))
    return None if value is None else tuple(cast(part, dtype) for part in value)


def assert_alike(ours: nn.Module, counterpart: nn.Module, *args: Any) -> None:
    """Outputs and gradients equal the counterpart's in number, shape and dtype, and in value up to tolerances.py."""
    got, expected = outputs_and_gradients(ours, *args), outputs_and_gradients(counterpart, *args)
    assert got.keys() == expected.keys()
    for name in [name for name, t in got.items() if not t.is_floating_point()]:  # the indices of a PackedSequence
        assert torch.equal(got.pop(name), expected.pop(name)), name
    if all(t.dtype == torch.float64 for t in got.values()):
        for name, t in got.items():
            tolerances.assert_same_formula(t, expected[name])
    else:
        wide = outputs_and_gradients(copy.deepcopy(counterpart).double(), *(cast(a, torch.float64) for a in args))
        tolerances.assert_as_good_as_torch(got, expected, {name: wide[name] for name in got})


def assert_same(got: Any, expected: Any) -> None:
    """Two nests of float64 results of the same mathematics."""
    for a, b in zip(flatten(got), flatten(expected), strict=True):
        tolerances.assert_same_formula(a.detach(), b.detach())
