"""What was found, in sentences: what happens to the gradients of a layer, and what helps."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from torch import Tensor

from fused_rnn.cells import CELLS, title
from fused_rnn.diagnosis.flow import Flow
from fused_rnn.diagnosis.gates import Keeper
from fused_rnn.diagnosis.recorder import Record

OFTEN = 0.3  # a gate is called saturated from this share of its activations on


def of_all(
    records: Sequence[Record], flows: Mapping[str, Flow], gates: Mapping[str, Tensor], radii: Mapping[str, float]
) -> str:
    """A line on each layer and direction, and then what helps."""
    lines: list[str] = []
    helps: list[str] = []
    for record in records:
        found = flows[record.name()]
        saturated = list(_saturated(record, gates))
        lines.append(" ".join((_what_happens(record, found), *_radius(record, found.verdict, radii), *saturated)))
        if found.verdict == "vanishes":
            helps += _against_vanishing(record, bool(saturated))
        elif found.verdict == "explodes":
            helps += _against_exploding(record)
    if helps:
        lines += ["", "What helps:", *(f"- {line}" for line in dict.fromkeys(helps))]
    return "\n".join(lines)


def _what_happens(record: Record, found: Flow) -> str:
    where = f"{record.name()} ({title(record.cell)})"
    if found.overflows:
        return f"{where}: the gradient explodes: it is inf or NaN."
    if found.factor is None:
        return f"{where}: too few steps have a gradient to say how it changes."
    each = f"a step back in time multiplies it by {found.factor:.3g}"
    if found.verdict == "explodes":
        return f"{where}: the gradient explodes: {each}, {found.span} steps by {found.factor**found.span:.1e}."
    much = "a thousandth of it arrives" if found.factor < 1 else "it arrives"
    verb = "vanishes" if found.verdict == "vanishes" else "flows"
    return f"{where}: the gradient {verb}: {each}, and {much} {found.reach} of {found.span} steps back."


def _radius(record: Record, verdict: str, radii: Mapping[str, float]) -> Iterator[str]:
    name = record.name("h")
    if record.cell.startswith("rnn") and name in radii:
        radius = radii[name]
        if verdict == "vanishes" and radius < 1:
            yield f"The spectral radius of weight_hh is {radius:.3g}: below 1, a product with it shrinks what it meets."
        if verdict == "explodes" and radius > 1:
            yield f"The spectral radius of weight_hh is {radius:.3g}: above 1, a product with it makes gradients grow."


def _saturated(record: Record, gates: Mapping[str, Tensor]) -> Iterator[str]:
    kinds = {gate: how for call in record.calls for gate, how in call.kinds.items()}
    for gate, how in kinds.items():
        low, high = (float(end.mean()) for end in gates[record.name(record.gate(gate))])
        if how == "relu" and low >= OFTEN:
            yield f"Of {_gate(record, gate)} {100 * low:.0f} % are 0, where no gradient passes."
        elif how != "relu" and low + high >= OFTEN:
            ends = f"{100 * low:.0f} % near its lower end, {100 * high:.0f} % near its upper one"
            name = _gate(record, gate)
            yield f"G{name[1:]} is saturated ({ends}): its own gradient is small there."
    if record.cell == "lstm" and record.name("f") in gates:
        closed = float(gates[record.name("f")][0].mean())
        if closed >= OFTEN:
            yield f"The forget gate is closed in {100 * closed:.0f} %: there c begins anew, and no gradient goes past."


def _gate(record: Record, number: int) -> str:
    name = record.gate(number)
    return name if name == f"gate{number}" else f"gate {name}"


def _against_vanishing(record: Record, saturated: bool) -> Iterator[str]:
    if record.cell == "lstm":
        yield "A larger bias of the forget gate, 1 to 3, keeps c (bias_ih and bias_hh add up; rows H to 2H are f's)."
    elif record.cell == "gru":
        yield "A larger bias of the z gate, 1 to 3, keeps h (bias_ih and bias_hh add up; rows H to 2H are z's)."
    elif record.gated:
        yield _bias(record, record.keeper)
    else:
        yield "A gated cell, such as LSTM or GRU, has a state that a gate may hand on as it is."
    if _is_recurrent(record):
        yield "An orthogonal W_hh, each gate's block by torch.nn.init.orthogonal_, shrinks and stretches nothing."
    if saturated and not record.normed:
        yield "Layer norm of what goes into the gates keeps them out of saturation."


def _bias(record: Record, found: Keeper | None) -> str:
    if found is None:
        return "A bias with which the gate that multiplies a state is nearer to 1 keeps that state."
    much = "larger" if found.larger else "smaller"
    return f"A bias of {_gate(record, found.gate)} that is {much} by 1 to 3 keeps {found.state}."


def _against_exploding(record: Record) -> Iterator[str]:
    yield "Clipping, torch.nn.utils.clip_grad_norm_, bounds an update, whatever the cell."
    if _is_recurrent(record):
        yield "A smaller or an orthogonal W_hh (torch.nn.init.orthogonal_) takes the growth away."
    if not record.gated:
        yield "A gated cell, such as LSTM or GRU, keeps its states within bounds."
    yield "Truncated backpropagation, which detaches the states every some steps, bounds how far a gradient can grow."


def _is_recurrent(record: Record) -> bool:
    return CELLS[record.cell].recurrent
