"""The package xlstm's sLSTM cell in the loops of :class:`SLSTM`: what convert puts over that package's classes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fused_rnn import layers
from fused_rnn.nn.base import Fused
from fused_rnn.nn.field.slstm import slstm

_CELLS = ("sLSTMCell_vanilla", "sLSTMCell_cuda")


def is_slstm_cell(kind: type) -> bool:
    """Whether it is the package's own class of an sLSTM cell, which need not be installed."""
    return kind.__name__ in _CELLS and kind.__module__.startswith("xlstm.")


def why_not(cell: Any) -> str | None:
    """Why a cell of that package has to stay what it is; None if it need not."""
    config = cell.config
    if config.function != "slstm":
        return f"computes {config.function!r} and not 'slstm'"
    if config.backend != "vanilla" and (config.gradient_recurrent_cut or config.gradient_recurrent_clipval is not None):
        return "cuts or clips the gradient of the recurrence"
    return None


class XLSTMCell(Fused):
    """Goes before the package's class, whose parameters, arguments and results it keeps: the pre-activations of the
    gates i, f, z, o, [B, S, 4·H] or as its configuration says, and the states [4, B, H]."""

    _fused_counterpart = None

    def forward(self, input: Tensor, state: Tensor | None = None, lengths: Any = None) -> tuple[Tensor, Tensor]:
        """Output and the last states. lengths: not read, as in the package."""
        cell: Any = self
        cell._check_input(input)
        x = input if cell.config.input_shape == "SBGNH" else input.transpose(0, 1)
        heads, units = cell.config.num_heads, cell.head_dim
        x = x.unflatten(2, (4, heads, units))
        states = cell._get_state(x.flatten(2), state).unflatten(2, (heads, units))
        w_hh = cell._recurrent_kernel_int2ext(cell._recurrent_kernel)  # [N, H/N in, 4, H/N out]
        bias = cell._bias_int2ext(cell._bias)  # [N, 4, H/N]
        alone = torch.eye(4 * units, dtype=x.dtype, device=x.device)
        made = []
        for n in range(heads):
            own = [alone, w_hh[n].permute(1, 2, 0).flatten(0, 1), bias[n].flatten(), bias.new_zeros(4 * units)]
            made.append(
                layers.run(
                    slstm.descriptor().name, x[:, :, :, n].flatten(2), [w.to(x.dtype) for w in own],
                    [s.unsqueeze(0) for s in states[:, :, n].to(x.dtype)], backend=self._fused_backend,
                )
            )  # fmt: skip
        y, *after = (torch.cat(parts, -1) for parts in zip(*made, strict=True))
        return cell._permute_output(y), torch.cat(after)
