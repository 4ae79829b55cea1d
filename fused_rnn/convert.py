"""Models that exist: torch.nn's recurrent modules turned into ours in place, and back, or ours built in their stead."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from fused_rnn.nn import GRU, LSTM, RNN, GRUCell, LSTMCell, RNNCell
from fused_rnn.nn.base import Fused, known_backend
from fused_rnn.nn.sequence import Recurrent, known_save

M = TypeVar("M", bound=nn.Module)

_OURS: tuple[type[Fused], ...] = (LSTM, GRU, RNN, LSTMCell, GRUCell, RNNCell)
_TO_OURS: dict[type[nn.Module], type[nn.Module]] = {cls._fused_twin: cls for cls in _OURS}
_TO_TORCH: dict[type[nn.Module], type[nn.Module]] = {cls: cls._fused_twin for cls in _OURS}


def convert(model: M, *, backend: str | None = None, save: str = "gates") -> M:
    """Turn every torch.nn LSTM, GRU, RNN, LSTMCell, GRUCell and RNNCell in `model` into ours, in place.

    The modules stay the objects they are, in another class: parameters, buffers, hooks, parametrizations, names,
    train() or eval(), device, and whoever refers to them, an optimizer for one, know of no change. `model` may itself
    be such a module. Ours are left as they are. A class derived from one of torch.nn's has a forward of its own that
    may call its parent's by name: it is left alone, with a UserWarning that says which module it was.

    Args:
        model: any module.
        backend: as the modules' argument of that name, for those that are turned.
        save: as the modules' argument of that name, for those that are turned.

    Returns:
        `model` itself.

    Raises:
        TypeError: if model is no torch.nn.Module.
        ValueError: for an unknown backend or save.

    Examples:
        >>> model = torch.nn.Sequential(torch.nn.Embedding(100, 16), torch.nn.LSTM(16, 32))
        >>> type(fused_rnn.convert(model)[1])
        <class 'fused_rnn.nn.rnn.LSTM'>
    """
    known_backend(backend)
    known_save(save)
    for name, module in _modules(model):
        if _turn(module, _TO_OURS):
            if backend is not None:
                module._fused_backend = backend  # type: ignore[assignment]
            if save != "gates" and isinstance(module, Recurrent):
                module._fused_save = save
        elif isinstance(module, tuple(_TO_OURS)):
            kind = type(module)
            warnings.warn(
                f"convert: {name or 'the model'} is a {kind.__module__}.{kind.__qualname__}, derived from torch.nn's "
                "class, and is left as it is",
                stacklevel=2,
            )
    return model


def to_torch(model: M) -> M:
    """Turn every module of ours in `model` into torch.nn's of the same name, in place.

    The inverse of :func:`convert`, for exporters and tools that look for torch.nn's classes. `backend` and `save` are
    forgotten; lengths and reset have no place in torch.nn's forward.

    Args:
        model: any module.

    Returns:
        `model` itself.

    Raises:
        TypeError: if model is no torch.nn.Module.

    Examples:
        >>> type(fused_rnn.to_torch(fused_rnn.GRU(8, 16)))
        <class 'torch.nn.modules.rnn.GRU'>
    """
    for _, module in _modules(model):
        if _turn(module, _TO_TORCH):
            module.__dict__.pop("_fused_backend", None)
            module.__dict__.pop("_fused_save", None)
    return model


@contextmanager
def patch() -> Iterator[None]:
    """While it is open, torch.nn.LSTM, GRU, RNN and their cells are ours, for code that builds its own model.

    It changes the names in torch.nn, for the whole process: code that bound one before (`from torch.nn import LSTM`)
    keeps torch's. What was built stays ours when it closes. May be nested.

    Examples:
        >>> with fused_rnn.patch():
        ...     model = torch.nn.GRU(8, 16)
        >>> isinstance(model, fused_rnn.GRU)
        True
    """
    places = (nn, nn.modules, nn.modules.rnn)
    before = [(place, cls.__name__, getattr(place, cls.__name__)) for place in places for cls in _OURS]
    try:
        for place, name, _ in before:
            setattr(place, name, next(cls for cls in _OURS if cls.__name__ == name))
        yield
    finally:
        for place, name, value in before:
            setattr(place, name, value)


def _modules(model: nn.Module) -> list[tuple[str, nn.Module]]:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got {type(model).__name__}, expected a torch.nn.Module")
    return list(model.named_modules())


def _turn(module: nn.Module, table: dict[type[nn.Module], type[nn.Module]]) -> bool:
    """Give the module the class that the table has for its own; False if it has none."""
    kind = type(module)
    if kind in table:
        module.__class__ = table[kind]
        return True
    # torch.nn.utils.parametrize gives a module a class of its own, derived from the one it had, for its properties.
    if is_parametrized(module) and kind.__bases__[0] in table:
        own = {key: value for key, value in vars(kind).items() if key not in ("__dict__", "__weakref__")}
        module.__class__ = type(kind.__name__, (table[kind.__bases__[0]],), own)
        return True
    return False
