"""Gradient flow made visible: what backward sends through every step, and where it gets lost."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from fused_rnn.checks import kind
from fused_rnn.diagnosis.recorder import Recorder
from fused_rnn.diagnosis.report import Report
from fused_rnn.nn.field.xlstm import XLSTMCell
from fused_rnn.nn.recurrent import Recurrent

__all__ = ["Report", "diagnose"]


@contextmanager
def diagnose(module: nn.Module) -> Iterator[Report]:
    """Record how gradients flow through a module's recurrent layers, while the context is on.

    All LSTM, GRU, RNN and FlexRNN inside run the reference loop, so results and gradients are the same up to rounding,
    and calls are slow. Outside of the context nothing is different. Several calls and several backwards count together.
    docs/diagnose.md says what each number means.

    Args:
        module: one of ours, or a model with some inside.

    Yields:
        A :class:`~fused_rnn.diagnosis.Report`, which is there once the context has ended.

    Raises:
        TypeError: for what is no module.
        ValueError: for a module without recurrent layers of ours.
        RuntimeError: for a module that is being diagnosed already; at the end, where no backward went through it.

    Examples:
        >>> rnn = fused_rnn.RNN(3, 8)
        >>> with fused_rnn.diagnose(rnn) as report:
        ...     y, h_n = rnn(torch.randn(50, 4, 3))
        ...     y[-1].sum().backward()
        >>> report.gradients["h_l0"].shape
        torch.Size([50])
        >>> 0 < report.flows["l0"].factor < 1  # a step back in time
        True
    """
    recorders = [Recorder(found, path) for path, found in _recurrent(module)]
    report = Report()
    try:
        for recorder in recorders:
            recorder.start()
        yield report
    finally:
        for recorder in recorders:
            recorder.stop()
    records = [record for recorder in recorders for record in recorder.records]
    if not any(call.squares.any() for record in records for call in record.calls):
        got = "calls but no backward through them" if any(r.calls for r in records) else "no call of its layers"
        raise RuntimeError(f"diagnose: got {got}, expected a forward and a loss.backward() inside the with block")
    for recorder in recorders:
        recorder.probe()
    report.fill(records)


def _recurrent(module: nn.Module) -> list[tuple[str, Recurrent]]:
    """The recurrent layers by their paths. Raises as `diagnose` does."""
    if not isinstance(module, nn.Module):
        raise TypeError(f"module: got {kind(module)}, expected a torch.nn.Module")
    found = [(path, child) for path, child in module.named_modules() if isinstance(child, Recurrent)]
    if not found:
        theirs = any(isinstance(child, nn.RNNBase) for child in module.modules())
        hint = ": fused_rnn.convert turns torch.nn's into ours" if theirs else ""
        if any(isinstance(child, XLSTMCell) for child in module.modules()):
            hint = "; cells of the package xlstm, converted or not, are not seen"
        raise ValueError(
            f"module: got {type(module).__name__} without a recurrent layer of ours, expected LSTM, GRU, RNN or FlexRNN"
            f" of fused_rnn in it{hint}"
        )
    for path, child in found:
        if isinstance(child._fused_backend, Recorder):
            raise RuntimeError(
                f"module: got {path or type(child).__name__!r}, which is being diagnosed already, expected one context"
                " at a time"
            )
    return found
