"""The base of the modules whose cells are of the literature: FlexRNN with a cell, and initial values, of its own."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm

from fused_rnn.call import wide
from fused_rnn.checks import shape_text
from fused_rnn.flex import UserCell
from fused_rnn.nn.flex import FlexRNN
from fused_rnn.nn.recurrent import read_weights


class Field(FlexRNN):
    """FlexRNN of the cell that the class has. A subclass with options chooses its cell by `_fused_choose`."""

    _fused_step: ClassVar[UserCell]
    _fused_headed: ClassVar[bool] = False  # whether it takes heads

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        *,
        heads: int = 1,
        return_sequences: str = "h",
        backend: str | None = None,
        save: str = "gates",
        recurrent_dropout: float = 0.0,
        zoneout: float | Sequence[float] = 0.0,
        weight_dropout: float = 0.0,
        return_gates: bool = False,
        **unknown: Any,
    ) -> None:
        name = type(self).__name__
        if unknown:
            raise TypeError(f"{name}: got an argument {next(iter(unknown))!r}, which it has not")
        if heads != 1 and not self._fused_headed:
            raise ValueError(f"heads: got {heads!r}, expected 1: {name} has no heads")
        super().__init__(
            self._fused_choose(), input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional,
            device, dtype, heads=heads, return_sequences=return_sequences, backend=backend, save=save,
            recurrent_dropout=recurrent_dropout, zoneout=zoneout, weight_dropout=weight_dropout,
            return_gates=return_gates,
        )  # fmt: skip

    def _fused_choose(self) -> UserCell:
        return self._fused_step

    def reset_parameters(self) -> None:
        """Draw the weights anew, as the class's docstring says."""
        if not self._fused_cell:  # torch.nn.RNNBase calls it on its own weights
            return
        with torch.no_grad():
            for names in self._all_weights:
                self._fused_draw({name.rpartition("_l")[0]: getattr(self, name) for name in names})

    def _fused_draw(self, weights: Mapping[str, Tensor]) -> None:
        """Initial values of a recurrence's weights, by name. Here all of them as torch.nn.LSTM's: uniform in ±1/√H."""
        bound = 1.0 / math.sqrt(self.hidden_size)
        for weight in weights.values():
            nn.init.uniform_(weight, -bound, bound)

    def _check_shapes(self, width: int, weights: Sequence[Tensor], first: int) -> None:
        """Whether a recurrence's weights, from the first of `_flat_weights_names` on, have their shapes. Raises
        ValueError. width: of its input."""
        for k, (weight, shape) in enumerate(zip(weights, self._shapes(width).values(), strict=True), first):
            if weight.shape != shape:
                name = self._flat_weights_names[k]
                raise ValueError(f"{name}: got {shape_text(weight.shape)}, expected {shape_text(shape)}")

    def _fused_viewing(self, names: Sequence[str], bias: bool) -> tuple[Mapping[str, Any], bool]:
        """`_fused_by_name`, where what the cell has are parts of the parameters: views, made once for as long as these
        lie where they lie; none where some are computed, or lie nowhere. names: of what `_fused_read` returns."""
        try:
            own = [self._parameters[name] for name in self._flat_weights_names]
            key = [(id(p), p.data_ptr(), p.dtype) for p in own]  # type: ignore[union-attr]
        except (KeyError, AttributeError, RuntimeError):
            return {}, False
        known = self.__dict__.get("_fused_views")
        if known is None or known[0] != key:
            views = {f"{name}_l0": part.detach() for name, part in zip(names, self._fused_read(), strict=True)}
            known = self.__dict__["_fused_views"] = (key, views)
        return known[1], bias

    def extra_repr(self) -> str:
        """FlexRNN's, without the cell, which the class's name says."""
        return super().extra_repr().removeprefix(f"{self.mode}, ")


def orthogonal(weight: Tensor) -> None:
    """torch.nn.init.orthogonal_, which is not for 16 bits."""
    weight.copy_(nn.init.orthogonal_(torch.empty_like(weight, dtype=wide(weight.dtype))))


def uniform_by_inputs(weights: Mapping[str, Tensor]) -> None:
    """torch.nn.Linear's initial values of weight_ih and bias_ih: uniform in ±1/√D."""
    bound = 1.0 / math.sqrt(max(weights["weight_ih"].shape[1], 1))
    for name in ("weight_ih", "bias_ih"):
        if name in weights:
            nn.init.uniform_(weights[name], -bound, bound)


def known(argument: str, value: Any, options: Mapping[str, Any]) -> Any:
    """The option of that name. Raises ValueError."""
    if not isinstance(value, str) or value not in options:
        raise ValueError(f"{argument}: got {value!r}, expected {' or '.join(map(repr, options))}")
    return options[value]


class Made(Field):
    """Field of a cell whose weights are made of the module's, recurrence by recurrence, by `_fused_parts`."""

    def _fused_read(self) -> list[Tensor]:
        """The weights of every recurrence as the cell has them."""
        weights, count, sides = read_weights(self), len(self._all_weights[0]), 1 + self.bidirectional
        made: list[Tensor] = []
        for first in range(0, len(weights), count):
            own = weights[first : first + count]
            width = self.input_size if first < sides * count else self.hidden_size * sides
            self._check_shapes(width, own, first)
            made += self._fused_parts(dict(zip(self._shapes(width), own, strict=True)))
        return made

    def _fused_parts(self, own: Mapping[str, Tensor]) -> list[Tensor]:
        """A recurrence's weights as the cell has them. own: the module's, by name."""
        raise NotImplementedError


class Parted(Made):
    """Made of a cell whose params are parts, of a gate each, of a module's vectors [n·H].

    _fused_vectors: n of each vector, by name, in the order of the cell's params. Those whose names begin with "bias"
    are zero where the module has no bias, and the cell has no other biases.
    """

    _fused_vectors: ClassVar[Mapping[str, int]]

    def _shapes(self, input_size: int) -> dict[str, tuple[int, ...]]:
        shapes = super()._shapes(input_size)
        parts = {name: (n * self.hidden_size,) for name, n in self._fused_vectors.items() if self._has(name)}
        return {name: shapes[name] for name in ("weight_ih", "weight_hh")} | parts

    def _has(self, name: str) -> bool:
        return self.bias or not name.startswith("bias")

    def _fused_draw(self, weights: Mapping[str, Tensor]) -> None:
        """Of each gate weight_ih Glorot's, weight_hh orthogonal; gains one, all else zero."""
        for name, weight in weights.items():
            if name == "weight_ih":
                for gate in weight.split(self.hidden_size):
                    nn.init.xavier_uniform_(gate)
            elif name == "weight_hh":
                for gate in weight.split(self.hidden_size):
                    orthogonal(gate)
            else:
                nn.init.constant_(weight, float(name.startswith("gamma")))

    def _fused_by_name(self) -> tuple[Mapping[str, Any], bool]:
        return self._fused_viewing(("weight_ih", "weight_hh", *self._fused_user.params), False)

    def _fused_parts(self, own: Mapping[str, Tensor]) -> list[Tensor]:
        parts = [own["weight_ih"], own["weight_hh"]]
        for name, n in self._fused_vectors.items():
            parts += own[name].chunk(n) if name in own else [parts[0].new_zeros(self.hidden_size)] * n
        return parts


def normed(gates: Sequence[Tensor], epsilon: float) -> Sequence[Any]:
    """Layer norm over all gates together, in a step."""
    whole = torch.cat(tuple(gates), -1)
    return layer_norm(whole, whole.shape[-1:], eps=epsilon).chunk(len(gates), -1)
