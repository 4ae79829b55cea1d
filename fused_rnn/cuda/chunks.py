"""In how many chunks of time a stack runs as a wavefront."""

from __future__ import annotations

from fused_rnn.plan import Plan

# What the host takes to ask for one chunk of one layer of a wavefront: two or three launches of 7 to 9 µs and the
# Python around them. What the planner's cycles are counted at. Both of an H200 and its host, 2026-11-26. No wavefront
# has run on a GPU yet: one is taken where the estimate gains a good deal.
_CHUNK_ON_HOST, _HERTZ, _GAIN, _MOST_CHUNKS = 60e-6, 1.98e9, 1.25, 64


def paying_chunks(plan: Plan, layers: int, steps: int) -> int:
    """In how many chunks of time a stack runs fastest as a wavefront: each layer a chunk behind the one below it.

    plan: of the loop of one layer, R = 1.  layers: L.  steps: T.
    1, which is layer by layer, unless all layers' teams are resident together and the wavefront gains a quarter. Teams
    of the grid are left alone: a launch of theirs waits until all of it fits, and what two of them do side by side is
    not known.
    """
    if plan.exchange not in ("cta", "cluster", "scatter") or plan.waves > 1:
        return 1
    clusters, alone = plan.device.clusters, plan.exchange == "cta"
    resident = plan.device.multiprocessors if alone else clusters[plan.members - 1]
    if layers < 2 or layers * plan.tiles > resident:
        return 1
    step = sum(plan.cycles) / _HERTZ

    def seconds(chunks: int) -> float:
        """Stages in which every layer runs a chunk, or the host asks for one of each, if that takes longer."""
        return (chunks + layers - 1) * max(-(-steps // chunks) * step, layers * _CHUNK_ON_HOST)

    best = min(range(1, min(_MOST_CHUNKS, max(steps, 1)) + 1), key=seconds)
    return best if seconds(best) * _GAIN < layers * max(steps * step, _CHUNK_ON_HOST) else 1
