"""The lanes of a wavefront on a GPU: streams, joined by events."""

from __future__ import annotations

import threading
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from fused_rnn.gpu.wavefront import Lanes, OneThread

# cuBLAS has a workspace for each stream, and a thread that captures a graph shares its streams with nobody: so they are
# made once, of each thread. By the device's number.
_made = threading.local()


def _beside(device: int, count: int) -> list[torch.cuda.Stream]:
    """So many streams beside the caller's."""
    streams: list[torch.cuda.Stream] = vars(_made).setdefault(str(device), [])
    streams += [torch.cuda.Stream(device) for _ in range(count - len(streams))]
    return streams[:count]


class Streams:
    """fused_rnn.gpu.wavefront.Lanes. The host never waits, and all of it can be captured."""

    def __init__(self, device: torch.device, count: int) -> None:
        self._streams = [torch.cuda.current_stream(device), *_beside(torch.cuda.current_device(), count - 1)]

    def on(self, lane: int) -> AbstractContextManager[None]:
        return torch.cuda.stream(self._streams[lane])

    def record(self, lane: int) -> torch.cuda.Event:
        event: torch.cuda.Event = self._streams[lane].record_event()
        return event

    def wait(self, lane: int, point: torch.cuda.Event) -> None:
        self._streams[lane].wait_event(point)


def lanes(x: Tensor, count: int) -> Lanes:
    """Lanes of x's device, which is current. In the emulator there are no streams."""
    return Streams(x.device, count) if x.is_cuda else OneThread()
