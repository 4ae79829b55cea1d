"""Until the loops' protocol changes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import torch

from fused_rnn.gpu.loops import Layer


class Cell(NamedTuple):
    name: str
    gates: int
    states: tuple[str, ...]
    saved: int
    apart: int
    reads_h: bool
    gradients: int


def cell_of(old: Any) -> Cell:
    if isinstance(old, Cell):
        return old
    return Cell(
        old.name,
        old.gates,
        ("h", "c") if old.has_c else ("h",),
        old.stored,
        int(old.hidden_bias),
        old.hidden_bias,
        old.gradients,
    )


def new_layer(layer: Layer) -> Layer:
    return replace(layer, cell=cell_of(layer.cell))


def old_loops(loops_class: Any) -> Any:
    class Old(loops_class):
        def __init__(self, layer: Any, config: Any) -> None:
            super().__init__(new_layer(layer), config)
            self.old = layer

        def forward(self, *, gx, w, bias, h0, state, y, h_n, saved, cells, checkpoints, every):
            some = lambda t: [] if t is None else [t]
            loops_class.forward(
                self,
                gx=gx,
                w=w,
                bias=None if bias is None else bias.unsqueeze(1),
                h0=h0,
                carried=some(state),
                y=y,
                h_n=h_n,
                saved=saved,
                histories=some(cells),
                checkpoints=some(checkpoints),
                every=every,
            )

        def replay(self, *, gx, given, bias, h0, hidden, state, saved, cells, window):
            if state is None:
                state = torch.zeros(h0.shape, dtype=torch.float32, device=h0.device)
            some = lambda t: [] if t is None else [t]
            loops_class.replay(
                self,
                gx=gx,
                given=given,
                bias=None if bias is None else bias.unsqueeze(1),
                h0=h0,
                hidden=hidden,
                carried=[state],
                saved=saved,
                histories=some(cells),
                window=window,
            )

        def backward(self, *, dy, w, states, first_state, saved, dgates, dh, dc, window=None):
            if self.old.cell.has_c:
                st, fi, ds = [states, states], [first_state, first_state], [dh, dc]
            else:
                st, fi, ds = [states], [first_state], [dh]
            loops_class.backward(
                self, dy=dy, w=w, states=st, first=fi, saved=saved, dgates=dgates, dstates=ds, window=window
            )

    return Old
