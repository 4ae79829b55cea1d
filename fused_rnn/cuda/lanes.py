"""The lanes of a wavefront on a GPU: streams, joined by events."""

from __future__ import annotations

import threading
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from fused_rnn.gpu.wavefront import Lanes, OneThread

# cuBLAS has a workspace for each stream, so they are made once. By the device and the caller's stream: who captures a
# graph has one of his own, and shares these with nobody, as long as torch's pool of 32 streams has others to give. (Not
# by thread: the backward of all threads is run by one of autograd's.)
_made: dict[tuple[int, int], list[torch.cuda.Stream]] = {}
_lock = threading.Lock()


def _beside(caller: torch.cuda.Stream, count: int) -> list[torch.cuda.Stream]:
    """So many streams beside the caller's."""
    device = torch.cuda.current_device()
    with _lock:
        streams = _made.setdefault((device, caller.cuda_stream), [])
        streams += [torch.cuda.Stream(device) for _ in range(count - len(streams))]
        return streams[:count]


class Streams:
    """fused_rnn.gpu.wavefront.Lanes. The host never waits, and all of it can be captured."""

    def __init__(self, device: torch.device, count: int) -> None:
        caller = torch.cuda.current_stream(device)
        self._streams = [caller, *_beside(caller, count - 1)]

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
