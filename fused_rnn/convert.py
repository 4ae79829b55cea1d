"""Models that exist: torch.nn's recurrent modules turned into ours in place, and back, or ours built in their stead."""

from __future__ import annotations

import copyreg
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from types import new_class
from typing import Any, ClassVar, TypeVar

from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from fused_rnn.nn import GRU, LSTM, RNN, GRUCell, LSTMCell, RNNCell
from fused_rnn.nn.base import Fused, known_backend, mark_leaf, unmark_leaf
from fused_rnn.nn.sequence import Recurrent, known_save

M = TypeVar("M", bound=nn.Module)

_OURS: tuple[type[Fused], ...] = (LSTM, GRU, RNN, LSTMCell, GRUCell, RNNCell)
_TO_OURS: dict[type[nn.Module], type[Fused]] = {cls._fused_twin: cls for cls in _OURS}
# What an instance may have of its own under a name that our classes need.
_IN_THE_WAY = ("forward", "backend", "save")


def convert(model: M, *, backend: str | None = None, save: str = "gates") -> M:
    """Turn every torch.nn LSTM, GRU, RNN, LSTMCell, GRUCell and RNNCell in `model` into ours, in place.

    The modules stay the objects they are, in another class: parameters, buffers, hooks, parametrizations, names,
    train() or eval(), device, and whoever refers to them, an optimizer or DistributedDataParallel for one, know of no
    change. `model` may itself be such a module. Ours are left as they are, and so are torch's quantized ones.

    A class derived from one of torch.nn's becomes one derived from that class and ours: its methods stay, it is still
    an instance of both, and its super().forward(...) is ours. Where the module itself holds a `forward`, a `backend`
    or a `save`, it is left alone, with a UserWarning that names it.

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
        kind = type(module)
        ours = _ours(kind, is_parametrized(module))
        if ours is None:
            continue
        own = [attribute for attribute in _IN_THE_WAY if attribute in vars(module)]
        if own:
            warnings.warn(
                f"convert: {name or 'the model'}, a {kind.__module__}.{kind.__qualname__}, has an attribute "
                f"{own[0]!r} of its own, and is left as it is",
                stacklevel=2,
            )
            continue
        module.__class__ = ours
        mark_leaf(module)
        if backend is not None:
            module._fused_backend = backend  # type: ignore[assignment]
        if save != "gates" and isinstance(module, Recurrent):
            module._fused_save = save
    return model


def to_torch(model: M) -> M:
    """Turn every module of ours in `model` into torch.nn's of the same name, in place.

    The inverse of :func:`convert`, for exporters and tools that look for torch.nn's classes. `backend` and `save` are
    forgotten; lengths and reset have no place in torch.nn's forward. A class that somebody derived from ours is left
    as it is, with a UserWarning that names the module.

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
    for name, module in _modules(model):
        kind = type(module)
        theirs = _theirs(kind, is_parametrized(module))
        if theirs is not None:
            module.__class__ = theirs
            unmark_leaf(module)
            module.__dict__.pop("_fused_backend", None)
            module.__dict__.pop("_fused_save", None)
        elif isinstance(module, Fused):
            warnings.warn(
                f"to_torch: {name or 'the model'} is a {kind.__module__}.{kind.__qualname__}, derived from fused_rnn's "
                "class, and is left as it is",
                stacklevel=2,
            )
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


def _ours(kind: type[nn.Module], parametrized: bool) -> type[nn.Module] | None:
    """The class that stands for torch.nn's, or for one derived from it; None for any other."""
    if kind in _TO_OURS:
        return _TO_OURS[kind]
    if parametrized:
        return _reparametrized(kind, _ours(kind.__bases__[0], False))
    if issubclass(kind, tuple(_TO_OURS)) and not issubclass(kind, Fused):
        return _derived(kind)  # type: ignore[arg-type]  # a class is hashable
    return None


def _theirs(kind: type[nn.Module], parametrized: bool) -> type[nn.Module] | None:
    """The inverse of _ours; None for a class that has no part in it, a user's derived from ours among them."""
    if kind in _OURS:
        return kind._fused_twin
    if parametrized:
        return _reparametrized(kind, _theirs(kind.__bases__[0], False))
    return vars(kind).get("_fused_from")


def _reparametrized(kind: type[nn.Module], base: type[nn.Module] | None) -> type[nn.Module] | None:
    """kind over another base: parametrize gives a module a class of its own, for its properties, derived from the one
    it had, and takes the first base when it leaves."""
    if base is None:
        return None
    own = {key: value for key, value in vars(kind).items() if key not in ("__dict__", "__weakref__")}
    return _class(kind.__name__, (base,), own)


class _Derived:
    """What a class made by _derived has beside: it has no name to be pickled by, so its instances are by the user's."""

    _fused_from: ClassVar[type[nn.Module]]

    def __reduce_ex__(self, protocol: Any) -> Any:
        how = super().__reduce_ex__(protocol)
        if isinstance(how, tuple) and how[0] is copyreg.__newobj__:  # type: ignore[attr-defined]
            return (_blank, (self._fused_from,), *how[2:])
        return how


@cache
def _derived(kind: type[nn.Module]) -> type[nn.Module]:
    """A class over kind, a user's subclass of torch.nn's, in which our forward comes right before torch.nn's.

    Every super() in the user's methods then finds ours: the order of bases is kind's up to torch.nn's class, ours, and
    torch.nn's.
    """
    twin = next(twin for twin in _TO_OURS if issubclass(kind, twin))
    both = _class(twin.__name__, (_Derived, _TO_OURS[twin], twin), {"__module__": __name__})
    own = {"__module__": kind.__module__, "__qualname__": kind.__qualname__, "_fused_from": kind}
    return _class(kind.__name__, (kind, both), own)


def _class(name: str, bases: tuple[type, ...], own: dict[str, Any]) -> type[nn.Module]:
    """A class made at run time, of whatever metaclass its bases have."""
    made: type[nn.Module] = new_class(name, bases, exec_body=lambda namespace: namespace.update(own))
    return made


def _blank(kind: type[nn.Module]) -> nn.Module:
    """An instance of _derived(kind) before its state is set."""
    cls = _derived(kind)  # type: ignore[arg-type]
    return cls.__new__(cls)
