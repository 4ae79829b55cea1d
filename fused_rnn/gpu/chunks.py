"""Chunks of time side by side on a GPU, of cells that are linear in their states: of how many steps each."""

from __future__ import annotations

# A chunk of time has this many steps at least; as many CTAs run on a multiprocessor side by side as hide each other's
# waiting for memory; and fewer chunks than these do not make up for running the steps twice. No GPU has run one yet.
SHORTEST_CHUNK, RESIDENT, FEWEST_CHUNKS = 64, 4, 4


def chunk_of(steps: int, ctas: int, multiprocessors: int) -> int:
    """How many steps a chunk has; all of them where one loop over time fills the device, or where it is too short.
    ctas: how many run one chunk."""
    chunks = min(RESIDENT * multiprocessors // max(1, ctas), steps // SHORTEST_CHUNK)
    return -(-steps // chunks) if chunks >= FEWEST_CHUNKS else steps


def fewest_steps() -> int:
    """From how many steps on there are chunks, on a device that has room."""
    return FEWEST_CHUNKS * SHORTEST_CHUNK
