"""Who else runs a layer on a CPU, and is measured where it is installed. A name of RIVALS is a provider's."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

from fused_rnn.commands.bench.rivals import compiled, ort, scan
from fused_rnn.commands.bench.rivals.rival import Build, Rival

RIVALS: dict[str, Rival] = {
    "onnxruntime": ort.RIVAL,
    "scan": scan.RIVAL,
    "compile-loop": compiled.LOOP,
    "compile-scan": compiled.SCAN,
}


def missing(name: str, jax_python: str = sys.executable) -> str | None:
    """A line that says what a rival lacks; None where nothing is."""
    lacking = RIVALS[name].missing(jax_python)
    return f"{name} is not measured, it needs: {lacking}" if lacking else None


def versions(names: Sequence[str], jax_python: str = sys.executable) -> dict[str, str]:
    """What a run says of the rivals among these providers."""
    found: dict[str, str] = {}
    for name in names:
        found |= RIVALS[name].versions(jax_python) if name in RIVALS else {}
    return found


@contextmanager
def opened(names: Sequence[str], jax_python: str = sys.executable) -> Iterator[dict[str, Build]]:
    """What builds the calls of the rivals among these providers, with torch's threads as they are now."""
    with ExitStack() as stack:
        yield {name: stack.enter_context(RIVALS[name].opened(jax_python)) for name in names if name in RIVALS}
