"""What `diagnose` found: numbers by name, tables, a picture, words."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from fused_rnn.diagnosis import flow, words
from fused_rnn.diagnosis.flow import Flow
from fused_rnn.diagnosis.recorder import Record
from fused_rnn.diagnosis.tables import as_text


class Report:
    """How gradients flowed. It is filled when the context of :func:`fused_rnn.diagnose` ends.

    Names are made as torch.nn's weights': the module's path, what it is, the layer and the direction, as in
    `encoder.c_l0_reverse`. Gates are i, f, g, o of an LSTM, r, z, n of a GRU, h of an RNN, and of any other
    cell what it calls them, gate0, gate1, … where they have no names. Steps are counted as in the input, in the other
    direction too.

    Attributes:
        gradients: of every state the norm of the loss's gradient over units and batch, [T] in float64, 0 where none
            came.
        gates: of every gate with a sigmoid, tanh or relu of its own the share of its activations within 5 % of its
            range of the lower end, and of the upper one, [2, T]. A relu has the lower end alone: what is 0.
        spectral_radius: of every gate that of the [H, H] matrix which takes h to it.
        flows: of every layer and direction, as `encoder.l0_reverse`, its `factor`, by which the recurrence alone
            multiplies the norm of a gradient a step back in time (None where there are too few steps), `span`, `reach`
            and `verdict`.

    Examples:
        >>> gru = fused_rnn.GRU(3, 8)
        >>> with fused_rnn.diagnose(gru) as report:
        ...     gru(torch.randn(20, 4, 3))[0].square().sum().backward()
        >>> list(report.gates)
        ['r_l0', 'z_l0', 'n_l0']
        >>> report.gates["z_l0"].shape
        torch.Size([2, 20])
    """

    gradients: dict[str, Tensor]
    gates: dict[str, Tensor]
    spectral_radius: dict[str, float]
    flows: dict[str, Flow]
    records: Sequence[Record]

    def fill(self, records: Sequence[Record]) -> None:
        """Take what was recorded."""
        self.records = [record for record in records if record.calls]
        self.gradients, self.gates, self.spectral_radius, self.flows = {}, {}, {}, {}
        for record in self.records:
            self.flows[record.name()] = flow.flow(record)
            for number, state in enumerate(record.states):
                self.gradients[record.name(state)] = flow.norms(record, number)
            for gate in flow.gates(record):
                self.gates[record.name(record.gate(gate))] = flow.saturation(record, gate)
            for gate, radius in flow.radii(record).items():
                self.spectral_radius[record.name(record.gate(gate))] = radius

    def __getattr__(self, name: str) -> Any:
        if name in Report.__annotations__:
            raise AttributeError(f"report.{name}: asked inside the with block, expected after its end")
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def __repr__(self) -> str:
        found = [f"{name} {flow.verdict}" for name, flow in vars(self).get("flows", {}).items()]
        return f"<Report: {', '.join(found) or 'not there before the end of the with block'}>"

    def summary(self) -> str:
        """Where gradients vanish or explode, a line for each layer and direction, and what helps."""
        return words.of_all(self.records, self.flows, self.gates, self.spectral_radius)

    def table(self) -> str:
        """The gradients and the gates of every layer, as text; drawn by rich where it is installed."""
        gradients = [("state", "first step", "last step", "factor", "reach", "gradient"), *self._gradient_rows()]
        gates = [("gate", "near lower end", "near upper end", "spectral radius"), *self._gate_rows()]
        return "\n".join((as_text("Norm of the gradient", gradients), as_text("Gates", gates)))

    def _gradient_rows(self) -> Iterator[tuple[str, ...]]:
        for record in self.records:
            found = self.flows[record.name()]
            factor = "" if found.factor is None else f"{found.factor:.3f}"
            of_layer: tuple[str, ...] = (factor, f"{found.reach} of {found.span}", found.verdict)
            for state in record.states:
                norm = self.gradients[record.name(state)]
                yield record.name(state), f"{norm[0]:.2e}", f"{norm[-1]:.2e}", *of_layer
                of_layer = ("", "", "")

    def _gate_rows(self) -> Iterator[tuple[str, ...]]:
        for name in dict.fromkeys((*self.gates, *self.spectral_radius)):
            ends = [f"{100 * float(end.mean()):.0f} %" for end in self.gates[name]] if name in self.gates else ["", ""]
            radius = self.spectral_radius.get(name, math.nan)
            yield name, *ends, "" if math.isnan(radius) else f"{radius:.3f}"

    def plot(self, path: str | Path) -> None:
        """Write a picture: norms of gradients over steps on a logarithmic scale, and how many gates are saturated.

        Args:
            path: its ending says in which format, .png or .svg for example.

        Raises:
            ModuleNotFoundError: without matplotlib, which the extra `diagnose` brings.
        """
        from fused_rnn.diagnosis.picture import draw

        draw(self.records, self.flows, self.gradients, self.gates, Path(path))
