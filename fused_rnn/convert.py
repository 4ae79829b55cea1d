"""Models that exist: torch.nn's recurrent modules turned into ours in place, and back, or ours built in their stead."""

from __future__ import annotations

import copyreg
import warnings
from collections.abc import Callable
from contextlib import ContextDecorator
from functools import cache
from threading import Lock
from types import new_class
from typing import Any, ClassVar, TypeVar

from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from fused_rnn import nn as room
from fused_rnn.call import known_save
from fused_rnn.dispatch import known_backend
from fused_rnn.nn import GRU, LSTM, RNN, FlexRNN, GRUCell, LSTMCell, RNNCell, both, extras
from fused_rnn.nn.base import Fused, mark_leaf, unmark_leaf
from fused_rnn.nn.recurrent import Recurrent, overrides_checks

M = TypeVar("M", bound=nn.Module)
F = TypeVar("F", bound=Callable[..., Any])

_OURS: tuple[type[Fused], ...] = (LSTM, GRU, RNN, LSTMCell, GRUCell, RNNCell)
_BOTH: tuple[type[Fused], ...] = (both.LSTM, both.GRU, both.RNN, both.LSTMCell, both.GRUCell, both.RNNCell)
# From torch.nn's class, by keep_class, and there from every class of the three kinds.
_CLASSES: dict[bool, dict[type[nn.Module], type[Fused]]] = {
    keep_class: {cls._fused_counterpart: cls for cls in classes}
    for keep_class, classes in ((False, _OURS), (True, _BOTH))
}
_COUNTERPARTS: dict[type[nn.Module], type[nn.Module]] = {
    cls: ours._fused_counterpart for ours in (*_OURS, *_BOTH) for cls in (ours, ours._fused_counterpart)
}
# What an instance may have of its own under a name that our classes need.
_IN_THE_WAY = ("forward", "backend", "save")


def convert(model: M, *, backend: str | None = None, save: str = "gates", keep_class: bool = False) -> M:
    """Turn every torch.nn LSTM, GRU, RNN, LSTMCell, GRUCell and RNNCell in `model` into ours, in place, and every sLSTM
    cell of the package xlstm.

    The modules stay the objects they are, in another class: parameters, buffers, hooks, parametrizations, names,
    train() or eval(), device, and whoever refers to them, an optimizer or DistributedDataParallel for one, know of no
    change. `model` may itself be such a module. torch's quantized modules are left as they are; of ours only the class
    changes, where keep_class asks for another.

    A class derived from one of torch.nn's becomes one derived from that class and ours: its methods stay, it is still
    an instance of both, and its super().forward(...) is ours. Where the module itself holds a `forward`, a `backend`
    or a `save`, or its class allows none to be derived from it, it is left alone, with a UserWarning that names it.

    Args:
        model: any module.
        backend: as the modules' argument of that name, for those that are turned.
        save: as the modules' argument of that name, for those that are turned.
        keep_class: whether isinstance(m, torch.nn.LSTM) shall stay true, for code that asks. torch.compile breaks the
            graph at such a module, unless it is a cell or torch._dynamo.config.allow_rnn is set.

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
        try:
            ours = _ours(kind, is_parametrized(module), bool(keep_class))
        except Exception as error:  # the user's metaclass or __init_subclass__, which may ask for keywords, or refuse
            warnings.warn(
                f"convert: {name or 'the model'}, a {kind.__module__}.{kind.__qualname__}, has a class from which none "
                f"can be derived, and is left as it is: {error}",
                stacklevel=2,
            )
            continue
        if ours is None:
            continue
        if isinstance(module, Fused):
            module.__class__ = ours  # type: ignore[assignment]
            mark_leaf(module)
            continue
        own = [attribute for attribute in _IN_THE_WAY if attribute in vars(module)]
        why = f"has an attribute {own[0]!r} of its own" if own else None
        if room.field.xlstm.is_slstm_cell(kind):
            why = why or room.field.xlstm.why_not(module)
        if why is not None:
            what = f"{name or 'the model'}, a {kind.__module__}.{kind.__qualname__}"
            warnings.warn(f"convert: {what}, {why}, and is left as it is", stacklevel=2)
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
        if theirs is not None and module._fused_asks():  # type: ignore[operator]
            what = f"{name or 'the model'} is a {kind.__module__}.{kind.__qualname__} with {module.extra_repr()}"
            warnings.warn(f"to_torch: {what}, which torch.nn has not, and is left as it is", stacklevel=2)
        elif theirs is not None:
            module.__class__ = theirs
            unmark_leaf(module)
            module.__dict__.pop("_fused_backend", None)
            module.__dict__.pop("_fused_save", None)
            module.__dict__.pop("_fused_frozen", None)
            extras.forget(module)
        elif isinstance(module, Fused):
            why = "which torch.nn has not" if kind in (FlexRNN, *room.field.FIELD) else "derived from fused_rnn's class"
            what = f"{name or 'the model'} is a {kind.__module__}.{kind.__qualname__}"
            warnings.warn(f"to_torch: {what}, {why}, and is left as it is", stacklevel=2)
    return model


def patch(*, keep_class: bool = False) -> Patch:
    """From now on torch.nn.LSTM, GRU, RNN and their cells are ours, for code that builds its own model.

    As a context manager (or the decorator of a function) it holds to the end of the block, by itself until
    :func:`unpatch`. It changes the names in torch.nn, for the whole process and all of its threads: code that bound one
    before (`from torch.nn import LSTM`) keeps torch's. What was built stays ours afterwards, and so do classes derived
    from those names. May be nested, and close in any order: the names are those of the last that is still open.

    Args:
        keep_class: as :func:`convert`'s: what is built is an instance of torch.nn's own class, too, and so is known to
            isinstance(m, torch.nn.LSTM) while it is open and after.

    Examples:
        >>> with fused_rnn.patch():
        ...     model = torch.nn.GRU(8, 16)
        >>> isinstance(model, fused_rnn.GRU)
        True
    """
    return Patch(keep_class)


def unpatch() -> None:
    """Close every :func:`patch` that is open: torch.nn's names are torch's own again. Nothing happens if none is.

    A `with` block around the call ends as if nothing had happened.

    Examples:
        >>> fused_rnn.patch()
        <fused_rnn.patch(keep_class=False), open>
        >>> isinstance(torch.nn.GRU(8, 16), fused_rnn.GRU)
        True
        >>> fused_rnn.unpatch()
        >>> isinstance(torch.nn.GRU(8, 16), fused_rnn.GRU)
        False
    """
    _PATCHES.close(None)


class Patch(ContextDecorator):
    """What :func:`patch` returns: open from the beginning, closed by the end of its block or by unpatch()."""

    def __init__(self, keep_class: bool) -> None:
        self.keep_class = bool(keep_class)
        _PATCHES.open(self)

    def __enter__(self) -> Patch:
        _PATCHES.open(self)
        return self

    def __exit__(self, *_: object) -> None:
        _PATCHES.close(self)

    def __call__(self, function: F) -> F:
        """function in a patch of its own: the call that made the decorator patches nothing."""
        _PATCHES.close(self)
        return super().__call__(function)

    def _recreate_cm(self) -> Patch:
        return Patch(self.keep_class)

    def __repr__(self) -> str:
        return f"<fused_rnn.patch(keep_class={self.keep_class}), {'open' if self in _PATCHES.opened else 'closed'}>"


class _Patches:
    """Those that are open, in order, and what torch.nn's names meant before the first."""

    _PLACES = (nn, nn.modules, nn.modules.rnn)

    def __init__(self) -> None:
        self.opened: list[Patch] = []
        self._before: list[tuple[Any, str, Any]] = []
        self._lock = Lock()

    def open(self, patch: Patch) -> None:
        """Does nothing for one that is open."""
        with self._lock:
            if not self.opened:
                names = [cls.__name__ for cls in _OURS]
                self._before = [(place, name, getattr(place, name)) for place in self._PLACES for name in names]
            if patch not in self.opened:
                self.opened.append(patch)
                self._name()

    def close(self, patch: Patch | None) -> None:
        """Close one, or all. Does nothing for one that is closed."""
        with self._lock:
            closing = [one for one in self.opened if patch is None or one is patch]
            if closing:
                self.opened = [one for one in self.opened if one not in closing]
                self._name()

    def _name(self) -> None:
        """Have the names mean what the last one wants."""
        ours = {cls.__name__: cls for cls in (_BOTH if self.opened[-1].keep_class else _OURS)} if self.opened else {}
        for place, name, before in self._before:
            setattr(place, name, ours.get(name, before))


_PATCHES = _Patches()


def _modules(model: nn.Module) -> list[tuple[str, nn.Module]]:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got {type(model).__name__}, expected a torch.nn.Module")
    return list(model.named_modules())


def _ours(kind: type[nn.Module], parametrized: bool, keep_class: bool) -> type[nn.Module] | None:
    """The class that stands for one of torch.nn's, of ours, or derived from either; None for one that may stay."""
    if kind in _COUNTERPARTS:
        cls = _CLASSES[keep_class][_COUNTERPARTS[kind]]
        return None if cls is kind else cls
    if _is_reparametrized(kind, parametrized):
        return _reparametrized(kind, _ours(kind.__bases__[0], False, keep_class))
    if not issubclass(kind, Fused):
        known = room.field.xlstm.is_slstm_cell(kind) or issubclass(kind, tuple(_COUNTERPARTS))
        return _derived(kind) if known else None  # type: ignore[arg-type]  # is hashable
    if keep_class:
        theirs = kind._fused_counterpart
        return None if theirs is None or issubclass(kind, theirs) else _derived(kind)  # type: ignore[arg-type]
    origin = vars(kind).get("_fused_from")
    return origin if origin is not None and issubclass(origin, Fused) else None


def _theirs(kind: type[nn.Module], parametrized: bool) -> type[nn.Module] | None:
    """The inverse of _ours; None for a class that has no part in it, a user's derived from ours among them."""
    if kind in _COUNTERPARTS:
        return None if _COUNTERPARTS[kind] is kind else _COUNTERPARTS[kind]
    if _is_reparametrized(kind, parametrized):
        return _reparametrized(kind, _theirs(kind.__bases__[0], False))
    origin = vars(kind).get("_fused_from")
    return None if origin is None or issubclass(origin, Fused) else origin


def _is_reparametrized(kind: type[nn.Module], parametrized: bool) -> bool:
    """Whether parametrize made the class, and nobody another of it since, as fully_shard does."""
    return parametrized and len(kind.__bases__) == 1


def _reparametrized(kind: type[nn.Module], base: type[nn.Module] | None) -> type[nn.Module] | None:
    """kind over another base: parametrize gives a module a class of its own, for its properties, derived from the one
    it had, and takes the first base when it leaves."""
    if base is None:
        return None
    own = {key: value for key, value in vars(kind).items() if key not in ("__dict__", "__weakref__")}
    return _class(kind.__name__, (base,), own)


class _Derived:
    """What a class made by _derived has beside.

    It has no name to be pickled by, so its instances are by the user's. And it is not the user who made it: his
    __init_subclass__, which may ask for keywords, register or refuse a class, is not called where this comes first.
    """

    _fused_from: ClassVar[type[nn.Module]]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        if "_fused_from" not in vars(cls):
            super().__init_subclass__(**kwargs)
        elif issubclass(cls, Recurrent):
            cls._fused_checks = overrides_checks(cls)

    def __reduce_ex__(self, protocol: Any) -> Any:
        how = super().__reduce_ex__(protocol)
        if isinstance(how, tuple) and how[0] is copyreg.__newobj__:  # type: ignore[attr-defined]
            return (_blank, (self._fused_from,), *how[2:])
        return how


@cache
def _derived(kind: type[nn.Module]) -> type[nn.Module]:
    """A class over kind, a user's subclass of torch.nn's or ours, that is both, and in which our forward comes right
    before torch.nn's; over xlstm's cell one with our forward.

    Every super() in the user's methods then finds ours: the order of bases is kind's up to torch.nn's class, ours, and
    torch.nn's.
    """
    own = {"__module__": kind.__module__, "__qualname__": kind.__qualname__, "_fused_from": kind}
    if room.field.xlstm.is_slstm_cell(kind):
        return _class(kind.__name__, (_Derived, room.field.xlstm.XLSTMCell, kind), own)
    counterpart = next(_COUNTERPARTS[cls] for cls in kind.__mro__ if cls in _COUNTERPARTS)
    root: type = kind
    while root.__base__ is not None and root.__base__.__dictoffset__:
        root = root.__base__
    # Python gives an object only a class of the same layout, which begins at the first base: with ABC or Generic, which
    # have no __dict__, that must be kind.
    first = (_Derived, kind) if root.__base__ is object else (kind, _Derived)
    return _class(kind.__name__, (*first, _CLASSES[True][counterpart]), own)


def _class(name: str, bases: tuple[type, ...], own: dict[str, Any]) -> type[nn.Module]:
    """A class made at run time, of whatever metaclass its bases have."""
    made: type[nn.Module] = new_class(name, bases, exec_body=lambda namespace: namespace.update(own))
    return made


def _blank(kind: type[nn.Module]) -> nn.Module:
    """An instance of _derived(kind) before its state is set."""
    cls = _derived(kind)  # type: ignore[arg-type]
    return cls.__new__(cls)
