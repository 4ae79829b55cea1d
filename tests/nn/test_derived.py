"""Classes that users and other libraries derive from ours, and from torch.nn's before convert, by whatever way."""

from __future__ import annotations

import copy
import pickle
from abc import ABC, ABCMeta, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import fused_rnn
from fused_rnn.nn import both

NAMES = ["LSTM", "GRU", "RNN", "LSTMCell", "GRUCell", "RNNCell"]
OURS = {name: getattr(fused_rnn, name) for name in NAMES}
BOTH = {name: getattr(both, name) for name in NAMES}
THEIRS = {name: getattr(nn, name) for name in NAMES}
T = TypeVar("T")
Class = Any  # a class, from which another is derived


def by_type(base: Class) -> Class:
    return type("Kind", (base,), {})


def with_another_forward(base: Class) -> Class:
    class Scaled(base):
        def forward(self, x: Tensor, hx: Any = None) -> Any:
            return super().forward(x / 2, hx)

    return Scaled


class Copies(type):
    """As Pyro does it: a subclass for every class above, all of one metaclass."""

    made: dict[type, Class] = {}  # noqa: RUF012

    def __getitem__(cls, kind: Class) -> Class:
        if issubclass(kind, Copied):
            return kind
        if kind is nn.Module:
            return Copied
        if kind not in Copies.made:
            above = [cls[base] for base in kind.__bases__ if issubclass(base, nn.Module)]
            Copies.made[kind] = Copies(f"Copied{kind.__name__}", (kind, *above), {})
        return Copies.made[kind]


class Copied(nn.Module, metaclass=Copies):
    pass


def by_a_metaclass_that_copies_every_base(base: Class) -> Class:
    return Copied[base]


def with_an_abstract_mixin_before(base: Class) -> Class:
    class Interface(ABC, nn.Module):
        @abstractmethod
        def width(self) -> int: ...

    class Kind(Interface, base):
        def width(self) -> int:
            return int(self.hidden_size)

    return Kind


def with_abc_first(base: Class) -> Class:
    class Kind(ABC, base):
        pass

    return Kind


def generic(base: Class) -> Class:
    class Kind(base, Generic[T]):
        pass

    return Kind[int]


def generic_first(base: Class) -> Class:
    class Kind(Generic[T], base):
        pass

    return Kind


def dataclass_of_sizes(base: Class) -> Class:
    @dataclass(eq=False, repr=False)
    class Kind(base):
        input_size: int
        hidden_size: int

        def __post_init__(self) -> None:
            super().__init__(self.input_size, self.hidden_size)

    return Kind


def with_slots(base: Class) -> Class:
    class Kind(base):
        __slots__ = ("mark",)

    return Kind


def with_a_cooperative_mixin_before(base: Class) -> Class:
    class Mixin(nn.Module):
        def __init__(self, *args: Any, note: str = "none", **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.note = note

    class Kind(Mixin, base):
        pass

    return Kind


def with_mixins_after(base: Class) -> Class:
    class Plain:
        def double(self) -> int:
            return 2 * int(self.hidden_size)  # type: ignore[attr-defined]

    class OfModules(nn.Module):
        pass

    class Kind(base, OfModules, Plain):
        pass

    return Kind


def below_an_interface_of_the_same_base(base: Class) -> Class:
    """As packages do it: class RNN(ABC, nn.RNNBase), and class LSTM(RNN, nn.LSTM)."""

    class Interface(ABC, nn.RNNBase if hasattr(base, "flatten_parameters") else nn.RNNCellBase):  # type: ignore[misc]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)

    class Kind(Interface, base):
        pass

    return Kind


def with_torchs_class_beside(base: Class) -> Class:
    if base in THEIRS.values():
        return base

    class Kind(base, THEIRS[base.__name__]):
        pass

    return Kind


def with_keywords(base: Class) -> Class:
    class Registered(base):
        known: list[str] = []  # noqa: RUF012

        def __init_subclass__(cls, *, key: str, **kwargs: Any) -> None:
            super().__init_subclass__(**kwargs)
            cls.known.append(key)

    class Kind(Registered, key="kind"):
        pass

    return Kind


def final(base: Class) -> Class:
    class Kind(base):
        def __init_subclass__(cls, **kwargs: Any) -> None:
            raise TypeError("no class may be derived from this one")

    return Kind


WAYS = [
    by_type,
    with_another_forward,
    by_a_metaclass_that_copies_every_base,
    with_an_abstract_mixin_before,
    with_abc_first,
    generic,
    generic_first,
    dataclass_of_sizes,
    with_slots,
    with_a_cooperative_mixin_before,
    with_mixins_after,
    below_an_interface_of_the_same_base,
    with_torchs_class_beside,
    with_keywords,
    final,
]


def call(module: nn.Module) -> list[Tensor]:
    """Results and gradients, of a module that has 3 inputs and 4 units."""
    x = torch.linspace(-1, 1, 30).view((5, 2, 3) if hasattr(module, "flatten_parameters") else (10, 3))
    y = module(x)
    y = y if isinstance(y, Tensor) else y[0]
    return [y, *torch.autograd.grad(y.square().sum(), list(module.parameters()))]


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
@pytest.mark.parametrize("name", NAMES)
def test_derived_from(name: str, way: Callable[[Class], Class]) -> None:
    theirs = way(THEIRS[name])(3, 4)
    expected = call(theirs)
    for classes in (OURS, BOTH):
        module = way(classes[name])(3, 4)
        assert isinstance(module, OURS[name])
        module.load_state_dict(theirs.state_dict())
        torch.testing.assert_close(call(module), expected)
        torch.testing.assert_close(call(copy.deepcopy(module)), expected)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("keep_class", [False, True])
@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
@pytest.mark.parametrize("name", NAMES)
def test_convert(name: str, way: Callable[[Class], Class], keep_class: bool) -> None:
    module = way(THEIRS[name])(3, 4)
    kind = type(module)
    expected = call(module)
    fused_rnn.convert(module, backend="reference", keep_class=keep_class)
    assert isinstance(module, OURS[name])
    assert isinstance(module, kind) is (keep_class or kind is not THEIRS[name])
    assert isinstance(module, THEIRS[name]) is (keep_class or kind is not THEIRS[name])
    torch.testing.assert_close(call(module), expected)
    torch.testing.assert_close(call(copy.deepcopy(module)), expected)
    again = type(module)(3, 4)  # as code that copies a model by its class and its sizes
    again.load_state_dict(module.state_dict())
    torch.testing.assert_close(call(again), expected)
    assert type(fused_rnn.to_torch(module)) is kind
    torch.testing.assert_close(call(module), expected)


@pytest.mark.parametrize("name", NAMES)
def test_nobodys_init_subclass_is_called_by_convert(name: str) -> None:
    module = with_keywords(THEIRS[name])(3, 4)
    fused_rnn.convert(module)
    assert isinstance(module, OURS[name])
    assert module.known == ["kind"]


class Counting(nn.GRU):
    """A check of its own, which torch.nn's forward calls."""

    checked = 0

    def __init_subclass__(cls, *, key: str) -> None:
        super().__init_subclass__()

    def check_input(self, input: Tensor, batch_sizes: Tensor | None) -> None:
        type(self).checked += 1
        super().check_input(input, batch_sizes)


def test_checks_of_the_users_are_called_all_the_same() -> None:
    module = fused_rnn.convert(Counting(3, 4))
    with torch.no_grad():
        module(torch.ones(1, 2, 3))
    assert module.checked == 1


class Meta(ABCMeta):
    def __new__(mcs, name: str, bases: Any, namespace: Any, *, key: str) -> Any:
        return super().__new__(mcs, name, bases, namespace)


class Asks(nn.LSTM, metaclass=Meta, key="a keyword"):
    pass


class Forbids(ABC, nn.LSTM):
    def __init_subclass__(cls, **kwargs: Any) -> None:
        raise RuntimeError("final: key")


@pytest.mark.parametrize("kind", [Asks, Forbids])
def test_a_class_from_which_none_can_be_derived(kind: Any) -> None:
    model = nn.Sequential(kind(3, 4), nn.LSTM(3, 4))
    match = f"convert: 0, a .*{kind.__name__}, has a class from which none can be derived, and is left as it is: .*key"
    with pytest.warns(UserWarning, match=match):
        fused_rnn.convert(model)
    assert type(model[0]) is kind
    assert type(model[1]) is fused_rnn.LSTM


class Mark:
    pass


@pytest.mark.parametrize("keep_class", [False, True])
def test_a_class_that_another_library_swapped_in(keep_class: bool) -> None:
    """As fully_shard does it, after parametrize has."""
    module = parametrizations.weight_norm(nn.GRU(3, 4), "weight_hh_l0")
    expected = call(module)
    module.__class__ = type(f"Marked{type(module).__name__}", (Mark, type(module)), {})  # type: ignore[assignment]
    kind = type(module)
    fused_rnn.convert(module, keep_class=keep_class)
    assert isinstance(module, fused_rnn.GRU) and isinstance(module, Mark)
    torch.testing.assert_close(call(module), expected)
    assert type(fused_rnn.to_torch(module)) is kind


class Pickled(nn.LSTM):
    def __reduce_ex__(self, protocol: Any) -> Any:
        how = super().__reduce_ex__(protocol)
        return (*how[:2], {**how[2], "note": "saved"}, *how[3:])


def test_a_mixin_behind_that_is_made_of_arguments() -> None:
    class Mixin:
        def __new__(cls, *args: Any, **kwargs: Any) -> Any:
            made = super().__new__(cls)
            made.__dict__["made_of"] = args
            return made

    for name in NAMES:
        module = type("Both", (getattr(fused_rnn, name), Mixin), {})(3, 4)
        assert module.made_of == (3, 4)


def test_a_way_to_pickle_of_the_users() -> None:
    module = fused_rnn.convert(Pickled(3, 4))
    loaded = pickle.loads(pickle.dumps(module))
    assert type(loaded) is type(module)
    assert loaded.note == "saved"
    torch.testing.assert_close(call(loaded), call(module))
