"""The base of the modules whose cells are of the literature: FlexRNN with a cell, and initial values, of its own."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fused_rnn.checks import shape_text
from fused_rnn.flex import UserCell
from fused_rnn.nn.flex import FlexRNN


class Field(FlexRNN):
    """FlexRNN of the cell that the class has. A subclass with options chooses its cell by `_fused_choose`."""

    _fused_step: ClassVar[UserCell]

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
    ) -> None:
        super().__init__(
            self._fused_choose(), input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional,
            device, dtype, heads=heads, return_sequences=return_sequences, backend=backend, save=save,
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

    def extra_repr(self) -> str:
        """FlexRNN's, without the cell, which the class's name says."""
        return super().extra_repr().removeprefix(f"{self.mode}, ")


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
