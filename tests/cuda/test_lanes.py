"""A wavefront's streams and events: every read comes after its write, in whatever order a GPU runs the lanes.

The real schedule, products and streams run on tensors of the CPU, with streams that keep vector clocks in the place of
CUDA's, while every operation of torch is looked at: which memory it reads and writes, on which stream. Two accesses of
the same bytes, one of them a write, that no chain of events orders are a race, whichever came first here.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, ClassVar, NamedTuple

import pytest
import torch
from cases import Case, inputs
from plain_gpu import make
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from fused_rnn.call import StackCall
from fused_rnn.cuda import lanes
from fused_rnn.gpu import wavefront
from fused_rnn.gpu.run import Forward
from fused_rnn.gpu.wavefront import Kept

LAYERS, STEPS, CHUNKS = 3, 6, 3


class Stream:
    """A stream as far as lanes use one: its clock says how far into every stream's work it comes after."""

    all: ClassVar[list[Stream]] = []

    def __init__(self, device: Any = None) -> None:
        self.place = self.cuda_stream = len(Stream.all)
        self.clock: dict[int, int] = {}
        Stream.all.append(self)

    def record_event(self) -> dict[int, int]:
        return dict(self.clock)

    def wait_event(self, event: dict[int, int]) -> None:
        for place, time in event.items():
            self.clock[place] = max(self.clock.get(place, 0), time)

    def tick(self) -> int:
        self.clock[self.place] = self.clock.get(self.place, 0) + 1
        return self.clock[self.place]


class Access(NamedTuple):
    stream: int
    time: int
    writes: bool
    first: int  # byte of the storage
    last: int


class Memory:
    """One storage. owner: the stream that alone may touch it, None for what was there before the lanes began."""

    def __init__(self, tensor: Tensor, owner: int | None) -> None:
        self.alive, self.owner = StorageWeakRef(tensor.untyped_storage()), owner
        self.accesses: list[Access] = []
        self.shared = False  # other streams than the caller's have touched it since lanes were joined


class Watch(TorchDispatchMode):
    """Looks at every operation. found: what is wrong."""

    def __init__(self) -> None:
        super().__init__()
        Stream.all = []
        self.caller = self.current = Stream()
        self.inside = False  # a lane's work
        self.began: dict[int, int] | None = None  # the lane's clock before the first access of this work
        self.memory: dict[int, Memory] = {}
        self.found: list[str] = []
        self.work: list[tuple[int, dict[int, int], int]] = []  # stream, its clock as a chunk began, its time at the end

    @contextmanager
    def on(self, stream: Stream) -> Iterator[None]:
        before, self.current, self.inside, self.began = (self.current, self.inside), stream, True, None
        try:
            yield
        finally:
            self.work.append((stream.place, self.began or {}, stream.clock.get(stream.place, 0)))
            self.current, self.inside = before

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = dict(zip((a.name for a in func._schema.arguments), args, strict=False)) | (kwargs or {})
        views = any(r.alias_info and not r.alias_info.is_write for r in func._schema.returns)
        for argument in func._schema.arguments:
            written = argument.alias_info is not None and argument.alias_info.is_write
            for tensor in _tensors(given.get(argument.name)):
                if not views:
                    self._touch(func, tensor, written)
        for tensor in _tensors(result):
            if not views and tensor.untyped_storage()._cdata not in self.memory:
                self._touch(func, tensor, "empty" not in str(func), made=True)
        return result

    def _touch(self, func: Any, tensor: Tensor, writes: bool, made: bool = False) -> None:
        if tensor.numel() == 0:
            return
        key, stream = tensor.untyped_storage()._cdata, self.current
        self.began = self.began or dict(stream.clock)
        if key not in self.memory:
            self.memory[key] = Memory(tensor, stream.place if made and self.inside else None)
        memory = self.memory[key]
        begin = tensor.storage_offset() * tensor.itemsize
        last = begin + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True)) * tensor.itemsize
        access = Access(stream.place, stream.tick(), writes, begin, last + tensor.itemsize)
        if memory.owner not in (None, stream.place):
            self.found.append(f"{func}: stream {stream.place} touches what stream {memory.owner} has allocated")
        for other in memory.accesses:
            overlaps = other.first < access.last and access.first < other.last
            ordered = stream.clock.get(other.stream, 0) >= other.time
            if overlaps and (writes or other.writes) and not ordered:
                self.found.append(f"{func}: a race of streams {other.stream} and {stream.place}")
        memory.accesses.append(access)
        memory.shared |= stream is not self.caller

    def joined(self) -> None:
        """What other streams have touched was not freed under their hands."""
        for memory in self.memory.values():
            if memory.owner is None and memory.alive.expired() and memory.shared:
                self.found.append("memory was freed before the lanes were joined")
            memory.shared = False


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for one in value:
            yield from _tensors(one)


def faked(monkeypatch: pytest.MonkeyPatch) -> Watch:
    """The lanes' streams are watched ones."""
    watch = Watch()
    cuda = SimpleNamespace(
        Stream=Stream, Event=dict, stream=watch.on, current_stream=lambda device: watch.caller, current_device=lambda: 0
    )
    monkeypatch.setattr(lanes, "torch", SimpleNamespace(cuda=cuda))
    monkeypatch.setattr(lanes, "_made", {})
    return watch


def watched(monkeypatch: pytest.MonkeyPatch) -> Watch:
    """A forward and a backward, with dropout, lengths, resets and gradients of all states."""
    watch = faked(monkeypatch)

    class Joined(lanes.Streams):
        def wait(self, lane: int, point: Any) -> None:
            super().wait(lane, point)
            if lane == 0:
                watch.joined()

    run = wavefront.Wavefront(make, lambda x, count: Joined(x.device, count), lambda *sizes: CHUNKS)
    given = inputs(Case("lstm", T=STEPS, B=2, D=2, H=4, layers=LAYERS, lengths=True, reset=True, dtype=torch.float64))
    each = [given.weights[4 * n : 4 * n + 4] for n in range(LAYERS)]
    states = [[s[n : n + 1].clone() for s in given.hx] for n in range(LAYERS)]
    call = StackCall(given.x, each, states, given.lengths, given.reset, "lstm", 0.3, "gates", True)
    with torch.no_grad(), watch:
        outputs, entering, masks = run.forward(call)
        hidden = [output[0] for output in outputs]
        kept = Kept([given.x, *entering], hidden, [o[3] for o in outputs], [o[4:5] for o in outputs], masks)
        dafter = [[torch.ones_like(s) for s in own] for own in states]
        pulled = run.backward(call, kept, torch.ones_like(hidden[-1]), dafter, 0, True, [True] * LAYERS)
        for results in (*outputs, *((own.dx, *own.states, *own.weights) for own in pulled)):
            for result in results:
                result.sum()
    return watch


def side_by_side(watch: Watch) -> int:
    """Pairs of chunks of which neither waits for the other."""
    pairs = 0
    for i, (stream, began, _) in enumerate(watch.work):
        for other, others, end in watch.work[:i]:
            mine = watch.work[i][2]
            pairs += stream != other and began.get(other, 0) < end and others.get(stream, 0) < mine
    return pairs


def test_every_read_is_after_its_write(monkeypatch: pytest.MonkeyPatch) -> None:
    watch = watched(monkeypatch)
    assert watch.found == []
    assert len(Stream.all) == LAYERS  # one beside the caller's for each further layer, backward the same
    assert len(watch.work) == 2 * LAYERS * CHUNKS


# Of two layers the upper one's chunk comes after the lower one's chunks up to it; forward and backward.
PAIRS = 2 * (LAYERS * (LAYERS - 1) // 2) * (CHUNKS * (CHUNKS - 1) // 2)


def test_chunks_run_side_by_side(monkeypatch: pytest.MonkeyPatch) -> None:
    assert side_by_side(watched(monkeypatch)) == PAIRS


def test_lanes_are_kept_by_the_stream_of_the_caller(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who captures a graph has a stream of his own: what another one runs meanwhile is on other lanes than his."""
    watch = faked(monkeypatch)
    first, again = (lanes.Streams(torch.device("cuda", 0), count)._streams for count in (2, 3))
    assert first == again[:2] and len(set(again)) == 3
    watch.caller = Stream()
    others = lanes.Streams(torch.device("cuda", 0), 3)._streams
    assert not set(others) & set(again)


def test_an_error_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    """The caller, who may free what the lanes were given, waits for what they have been asked for."""
    watch = faked(monkeypatch)

    def work(row: int, chunk: int) -> None:
        watch.current.tick()
        if (row, chunk) == (1, 1):
            raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        wavefront.schedule(lanes.Streams(torch.device("cuda", 0), LAYERS), LAYERS, CHUNKS, work)
    assert [stream.clock[stream.place] for stream in Stream.all] == [2, 2, 1]
    assert [watch.caller.clock[place] for place in range(LAYERS)] == [2, 2, 1]


# What is planted in a copy of a function or class, and whether it makes races; else lanes wait for what they do not
# read.
_WORK, _RECORD = "work(row, stage - row)", "points[row] = lanes.record(row)"
MISTAKES: dict[str, tuple[Any, str, str, bool]] = {
    "no wait": (wavefront.schedule, "lanes.wait(row, points[row - 1])", "pass", True),
    "the event of another row": (wavefront.schedule, "points[row - 1]", "points[max(0, row - 2)]", True),
    "an event too early": (wavefront.schedule, f"{_WORK}\n{_RECORD}", f"{_RECORD}\n{_WORK}", True),
    "the other row waits": (wavefront.schedule, "lanes.wait(row,", "lanes.wait(row - 1,", True),
    "never joined": (wavefront.schedule, "lanes.wait(0, lanes.record(row))", "pass", True),
    "a row is not joined": (
        wavefront.schedule,
        "lanes.wait(0, lanes.record(row))",
        "lanes.wait(0, lanes.record(1))",
        True,
    ),
    "waits on the caller's stream": (lanes.Streams, "[lane].wait_event(", "[0].wait_event(", True),
    "the streams begin with another": (
        lanes.Streams,
        "[caller, *_beside(caller, count - 1)]",
        "_beside(caller, count)",
        True,
    ),
    "a lane's own memory is handed out": (Forward, "next(self.after)", "torch.empty_like(self.h)", True),
    "memory is freed while a lane has it": (
        wavefront.Wavefront,
        "layers[row].run(loops[chunk], first, last)",
        "layers[row].run(loops[chunk], first, last)\nif row == 2: loops[chunk] = None",
        True,
    ),
    "one lane for all": (wavefront.schedule, "lanes.on(row)", "lanes.on(0)", False),
    "waits for a later chunk": (wavefront.schedule, "in reversed(", "in (", False),
}


def mistaken(original: Any, text: str, instead: str) -> Any:
    """A copy with a mistake. The texts' lines are indented as those of the source are."""
    source = inspect.getsource(original)
    line = next(line for line in source.splitlines() if text.splitlines()[0] in line)
    indent = "\n" + " " * (len(line) - len(line.lstrip()))
    text, instead = (lines.replace("\n", indent) for lines in (text, instead))
    assert source.count(text) == 1
    made: dict[str, Any] = {}
    exec(
        "from __future__ import annotations\n" + source.replace(text, instead), vars(inspect.getmodule(original)), made
    )
    return made[original.__name__]


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    original, text, instead, races = MISTAKES[name]
    for module in {inspect.getmodule(original), wavefront}:
        monkeypatch.setattr(module, original.__name__, mistaken(original, text, instead), raising=False)
    watch = watched(monkeypatch)
    if races:
        assert watch.found
    else:
        assert side_by_side(watch) < PAIRS and not watch.found
