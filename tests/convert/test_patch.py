"""patch and unpatch: torch.nn's names as ours, for a block, for a function, or until told otherwise."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

import fused_rnn
from fused_rnn.nn import both

NAMES = ("LSTM", "GRU", "RNN", "LSTMCell", "GRUCell", "RNNCell")
THEIRS = {name: getattr(nn, name) for name in NAMES}


def named() -> Any:
    """What torch.nn's names mean: torch.nn itself, fused_rnn, or both."""
    for library in (nn.modules, nn.modules.rnn):
        assert all(getattr(library, name) is getattr(nn, name) for name in NAMES)
    for library, classes in ((nn, THEIRS), (fused_rnn, vars(fused_rnn)), (both, vars(both))):
        if all(getattr(nn, name) is classes[name] for name in NAMES):
            return library
    raise AssertionError("a mixture")


@pytest.fixture(autouse=True)
def closed() -> Iterator[None]:
    assert named() is nn
    yield
    fused_rnn.unpatch()
    assert named() is nn


def test_a_switch() -> None:
    fused_rnn.patch()
    assert named() is fused_rnn
    model = nn.LSTM(3, 4)
    fused_rnn.unpatch()
    assert named() is nn
    assert type(model) is fused_rnn.LSTM
    assert model(torch.ones(5, 2, 3))[0].shape == (5, 2, 4)


def test_twice_on_and_twice_off() -> None:
    fused_rnn.unpatch()  # of nothing
    fused_rnn.patch()
    fused_rnn.patch()
    fused_rnn.unpatch()
    assert named() is nn
    fused_rnn.unpatch()
    assert named() is nn


def test_the_last_one_has_the_say() -> None:
    with fused_rnn.patch(keep_class=True) as outer:
        assert named() is both
        with fused_rnn.patch():
            assert named() is fused_rnn
        assert named() is both
        with pytest.raises(KeyError), fused_rnn.patch():
            raise KeyError
        assert named() is both
        assert repr(outer) == "<fused_rnn.patch(keep_class=True), open>"
    assert repr(outer) == "<fused_rnn.patch(keep_class=True), closed>"


def test_a_block_inside_a_switch_leaves_it_on() -> None:
    fused_rnn.patch(keep_class=True)
    with fused_rnn.patch():
        assert named() is fused_rnn
    assert named() is both


def test_a_switch_inside_a_block_outlives_it() -> None:
    with fused_rnn.patch():
        fused_rnn.patch(keep_class=True)
    assert named() is both


def test_unpatch_inside_blocks_closes_them_all() -> None:
    with fused_rnn.patch(), fused_rnn.patch(keep_class=True):
        fused_rnn.unpatch()
        assert named() is nn
        with fused_rnn.patch():
            assert named() is fused_rnn
        assert named() is nn
    assert named() is nn


def test_closed_in_any_order() -> None:
    first, second = fused_rnn.patch(), fused_rnn.patch(keep_class=True)
    first.__exit__(None, None, None)
    assert named() is both
    second.__exit__(None, None, None)
    assert named() is nn


def test_a_patch_may_be_opened_again() -> None:
    again = fused_rnn.patch()
    for _ in range(2):
        with again:
            assert named() is fused_rnn
        assert named() is nn


def test_a_decorator() -> None:
    @fused_rnn.patch(keep_class=True)
    def build(size: int) -> nn.Module:
        assert named() is both
        return nn.GRU(size, size)

    assert named() is nn  # the decorator by itself patches nothing
    for _ in range(2):
        assert type(build(3)) is both.GRU
        assert named() is nn


def test_threads_that_overlap() -> None:
    """One opens first and closes first; the other's names stay until it closes."""
    steps = [threading.Event() for _ in range(3)]
    seen = {}

    def one() -> None:
        with fused_rnn.patch():
            steps[0].set()
            assert steps[1].wait(10)
        seen["one has closed"] = named()
        steps[2].set()

    def two() -> None:
        assert steps[0].wait(10)
        with fused_rnn.patch(keep_class=True):
            steps[1].set()
            assert steps[2].wait(10)
            seen["two is open"] = named()

    threads = [threading.Thread(target=run) for run in (one, two)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert seen == {"one has closed": both, "two is open": both}
    assert named() is nn


def test_many_threads() -> None:
    def run(keep_class: bool) -> None:
        for _ in range(50):
            with fused_rnn.patch(keep_class=keep_class):
                assert issubclass(nn.LSTM, fused_rnn.LSTM)

    threads = [threading.Thread(target=run, args=(bool(k % 2),)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert named() is nn


def test_what_somebody_else_had_bound_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    class Special(nn.LSTM):
        pass

    with monkeypatch.context() as patched:
        for place in (nn, nn.modules, nn.modules.rnn):
            patched.setattr(place, "LSTM", Special)
        with fused_rnn.patch():
            assert nn.LSTM is fused_rnn.LSTM
        assert nn.LSTM is Special


def test_a_class_derived_under_a_patch_stays_ours() -> None:
    fused_rnn.patch()

    class Own(nn.LSTM):
        pass

    fused_rnn.unpatch()
    assert isinstance(Own(3, 4), fused_rnn.LSTM)
    assert not isinstance(Own(3, 4), nn.LSTM)
