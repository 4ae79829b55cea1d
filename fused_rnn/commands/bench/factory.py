"""The model to be measured, as a function of the user's makes it: how it is found, and what it has to return."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.utils._pytree import tree_leaves, tree_map

Loss = Callable[[Any], Tensor]
EXPECTED = "(module, inputs) or (module, inputs, loss)"


class ModelError(Exception):
    """What keeps a model from being measured, in words; what the model's own code raises is not caught."""


@dataclass
class Example:
    """What a factory gave. inputs: a tuple for positional arguments, a dict for named ones."""

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    loss: Loss


def load(name: str) -> Callable[[], Any]:
    """The factory that "module:factory" or "path/to/file.py:factory" names.

    Raises ModelError in words where there is none.
    """
    place, _, attribute = name.rpartition(":")
    if not place or not attribute:
        raise ModelError(f"got {name!r}, expected module:factory or file.py:factory")
    module = _from_file(Path(place)) if place.endswith(".py") else _from_name(place)
    factory = getattr(module, attribute, None)
    if not callable(factory):
        own = [n for n, v in vars(module).items() if callable(v) and getattr(v, "__module__", "") == module.__name__]
        raise ModelError(f"got {name!r}, but {place} has no function {attribute!r}; it has: {', '.join(own) or 'none'}")
    return factory  # type: ignore[no-any-return]


def _from_file(path: Path) -> Any:
    if not path.is_file():
        raise ModelError(f"got {path}: no such file")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    sys.path.insert(0, str(path.parent.resolve()))  # what lies beside it can be imported, as when it is run
    spec.loader.exec_module(module)
    return module


def _from_name(name: str) -> Any:
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise  # something that the module needs
        raise ModelError(f"got {name!r}: no module of that name here or installed; a file is named file.py") from None


def example(factory: Callable[[], Any], device: str | None = None) -> Example:
    """Call the factory, always with the same seed; what its inputs were computed by is cut off.

    Raises ModelError if what it returns is nothing of the kind.
    """
    torch.manual_seed(0)
    made = factory()
    if not isinstance(made, tuple) or len(made) not in (2, 3) or not isinstance(made[0], nn.Module):
        what = f"a tuple of {len(made)}" if isinstance(made, tuple) else f"a {type(made).__name__}"
        raise ModelError(f"the factory returned {what}, expected {EXPECTED}")
    module, inputs, loss = (*made, mean_square)[:3]
    if not callable(loss):
        raise ModelError(f"the factory's loss: got a {type(loss).__name__}, expected a function of the outputs")
    if device is not None:
        module = module.to(device)
        inputs = tree_map(lambda leaf: leaf.to(device) if isinstance(leaf, Tensor) else leaf, inputs)
    inputs = tree_map(_alone, inputs)
    if isinstance(inputs, dict):
        return Example(module, (), inputs, loss)
    several = isinstance(inputs, (tuple, list)) and not isinstance(inputs, PackedSequence)
    return Example(module, tuple(inputs) if several else (inputs,), {}, loss)


def _alone(leaf: Any) -> Any:
    """A tensor without the graph that it came from, which only the first of many backward passes would find."""
    if not isinstance(leaf, Tensor) or leaf.is_leaf:
        return leaf
    return leaf.detach().requires_grad_(leaf.requires_grad)


def mean_square(outputs: Any) -> Tensor:
    """The loss where the factory gives none: of every floating output that has a gradient."""
    found = [leaf.float().square().mean() for leaf in floating(outputs) if leaf.requires_grad]
    if not found:
        raise ModelError(f"no output of the model has a gradient: return a loss as well, {EXPECTED}")
    return torch.stack(found).sum()


def floating(values: Any) -> list[Tensor]:
    """The tensors in a tree that may have a gradient."""
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
