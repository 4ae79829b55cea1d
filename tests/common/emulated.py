"""The "cuda" backend over the emulator: csrc/cuda, compiled by g++ into a module that takes tensors on the cpu."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from types import ModuleType
from typing import Any

import emulated_build

from fused_rnn import dispatch
from fused_rnn.cuda import module, plans


@cache
def emulated(built_in: bool = True) -> ModuleType:
    """The module with every kernel, or without those of the built-in cells; imported."""
    library = emulated_build.module("plain", None if built_in else [])
    # pybind11 has one module of a name in a process: each library gets a name of its own.
    spec = importlib.util.spec_from_file_location(f"{library.stem}._emulated", library)
    assert spec is not None
    assert spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


@contextmanager
def on_the_emulator(seed: int = 0, built_in: bool = True, **forced: Any) -> Iterator[ModuleType]:
    """The "cuda" backend runs tensors on the cpu, by plans with these parts. seed: the order in which threads run.
    built_in: whether the built-in cells can be run, whose kernels take a minute to compile."""
    loaded = emulated(built_in)
    loaded.seed(seed)
    dispatch._choose_cached.cache_clear()  # what it remembers of the cpu holds no longer
    try:
        with module.emulating(loaded), plans.override(**forced):
            yield loaded
    finally:
        dispatch._choose_cached.cache_clear()
