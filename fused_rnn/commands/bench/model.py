"""A model of the user's before and after fused_rnn.convert: the whole of it, and each layer that was turned.

Whole models take turns as providers do (measure.py), results compared first. A layer is timed alone, on the inputs and
with the output gradients that one run of the model gave it; every call of it counts, as a cell's in a loop.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor, nn
from torch.utils._pytree import tree_map

import fused_rnn
from fused_rnn.commands.bench.factory import Example, ModelError, example, floating, load
from fused_rnn.commands.bench.grid import DTYPES
from fused_rnn.commands.bench.measure import (
    BLOCK_S,
    DISTURBED,
    GPU_BLOCK_S,
    TOLERANCE,
    Timing,
    clock,
    interleave,
    percentiles,
)
from fused_rnn.commands.bench.tables import EVEN, duration, grid, ratio, style
from fused_rnn.commands.bench.verdict import AGAIN, LEAVE, TAKE, judge
from fused_rnn.commands.machine import crowded, describe

BEFORE, AFTER = "torch.nn", "fused_rnn"


class ModelCall:
    """One of the two models: `prepare()` is outside the clock, `run()` inside it."""

    def __init__(self, given: Example, training: bool) -> None:
        self.given, self.training = given, training
        self.outputs: Any = None
        given.module.train(training)

    def prepare(self) -> None:
        """Drop the last results and, in training, write the weights as an optimiser would."""
        self.outputs = None
        forget(self.given.module, floating((self.given.args, self.given.kwargs)), self.training)

    def run(self) -> None:
        if not self.training:
            with torch.no_grad():
                self.outputs = self.given.module(*self.given.args, **self.given.kwargs)
            return
        self.outputs = self.given.module(*self.given.args, **self.given.kwargs)
        self.given.loss(self.outputs).backward()

    def results(self) -> tuple[Tensor, Tensor]:
        """All outputs as one vector, and all gradients."""
        gradients = [p.grad for p in self.given.module.parameters() if p.grad is not None] if self.training else []
        return _vector(floating(self.outputs)), _vector(gradients)


def forget(module: nn.Module, inputs: Sequence[Tensor], training: bool) -> None:
    """No gradients any more; weights that have been written, with what they had."""
    if not training:
        return
    for tensor in (*module.parameters(), *inputs):
        tensor.grad = None
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad and parameter.is_floating_point():
                parameter.mul_(1)


def _vector(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([torch.zeros(1, device="cpu").double(), *(t.detach().double().flatten().cpu() for t in tensors)])


@dataclass
class Visit:
    """One call of a layer in a run of the model: what went in, and the gradient of each output, by its place."""

    args: Any
    kwargs: Any
    gradients: dict[int, Tensor]


class LayerCall:
    """A layer alone, called as in the model."""

    def __init__(self, module: nn.Module, visits: list[Visit], training: bool) -> None:
        self.module, self.visits, self.training = module, visits, training
        self.inputs = [leaf for visit in visits for leaf in floating((visit.args, visit.kwargs))]

    def prepare(self) -> None:
        forget(self.module, self.inputs, self.training)

    def run(self) -> None:
        with torch.set_grad_enabled(self.training):
            for visit in self.visits:
                outputs = floating(self.module(*visit.args, **visit.kwargs))
                if visit.gradients:
                    torch.autograd.backward([outputs[i] for i in visit.gradients], list(visit.gradients.values()))


def visits(call: ModelCall, modules: dict[str, nn.Module]) -> dict[str, list[Visit]]:
    """What every module gets in one run, by name. Tensors are detached, and have a gradient where they had one."""
    found: dict[str, list[Visit]] = {name: [] for name in modules}
    handles = []

    def alone(leaf: Any) -> Any:
        return leaf.detach().requires_grad_(leaf.requires_grad) if isinstance(leaf, Tensor) else leaf

    def as_seen(leaf: Any) -> Any:
        # A tensor of its own: the layer's h may be computed from its c, whose gradient would then have h's in it.
        return leaf.view_as(leaf) if isinstance(leaf, Tensor) and leaf.requires_grad else leaf

    def watch(name: str) -> Callable[..., Any]:
        def hook(_: nn.Module, args: Any, kwargs: Any, outputs: Any) -> Any:
            visit = Visit(tree_map(alone, args), tree_map(alone, kwargs), {})
            found[name].append(visit)
            outputs = tree_map(as_seen, outputs)
            for place, leaf in enumerate(floating(outputs)):
                if leaf.requires_grad:
                    leaf.register_hook(lambda gradient, place=place: visit.gradients.__setitem__(place, gradient))
            return outputs

        return hook

    for name, module in modules.items():
        handles.append(module.register_forward_hook(watch(name), with_kwargs=True))
    call.prepare()
    call.run()
    for handle in handles:
        handle.remove()
    return found


@dataclass(frozen=True)
class Gain:
    """Times of one part, before and after. visits: how often a run calls it; 0 of the whole model."""

    name: str
    kind: str
    visits: int
    before: Timing
    after: Timing

    @property
    def speedup(self) -> float:
        return self.before.p50 / self.after.p50

    @property
    def sure(self) -> float:
        """The speed-up if ours had been disturbed most of the time, and torch.nn hardly."""
        return self.before.p20 / self.after.p80

    @property
    def saved(self) -> float:
        return self.before.p50 - self.after.p50

    def marks(self, whole: Gain) -> tuple[bool, bool]:
        """Which of the two times cannot be: one that varies too much, or a layer's that is longer than the whole's."""
        pairs = ((self.before, whole.before), (self.after, whole.after))
        before, after = (own.disturbed or longer(own, all_) for own, all_ in pairs)
        return before, after


def longer(own: Timing, other: Timing) -> bool:
    """By more than what is no difference elsewhere."""
    return own.p50 > other.p50 / EVEN


def compare(
    factory: Callable[[], Any], mode: str, budget_s: float, device: str | None = None
) -> tuple[list[Gain], str]:
    """The whole model and then its layers, and how close the results are. mode: "inference" or "training".

    Raises ModelError if nothing can be converted, or the results differ by more than rounding.
    """
    before, after = example(factory, device), example(factory, device)
    fused_rnn.to_torch(before.module)
    try:
        after.module.load_state_dict(before.module.state_dict())
    except RuntimeError as error:
        raise ModelError(f"the factory is called twice and must build the same model each time: {error}") from error
    after.args, after.kwargs = before.args, before.kwargs
    fused_rnn.convert(after.module)
    turned = [
        name
        for (name, old), new in zip(before.module.named_modules(), after.module.modules(), strict=True)
        if type(old) is not type(new)
    ]
    if not turned:
        kinds = sorted({type(module).__name__ for module in before.module.modules()})
        raise ModelError(f"convert finds no LSTM, GRU, RNN or cell of torch.nn in the model; it has {', '.join(kinds)}")
    training = mode == "training"
    calls = {BEFORE: ModelCall(before, training), AFTER: ModelCall(after, training)}
    coincide = _check(calls, before.module, mode)
    where = next((p.device.type for p in before.module.parameters()), "cpu")
    gains = [_timed("the whole model", type(before.module).__name__, 0, dict(calls), where, budget_s / 2)]
    old, new = (dict(module.named_modules()) for module in (before.module, after.module))
    seen = visits(calls[BEFORE], {name: old[name] for name in turned})
    for name in turned:
        if name and seen[name]:  # a model that is itself a layer has been timed
            both: dict[str, Any] = {
                BEFORE: LayerCall(old[name], seen[name], training),
                AFTER: LayerCall(new[name], seen[name], training),
            }
            kind = type(old[name]).__name__
            gains.append(_timed(name, kind, len(seen[name]), both, where, budget_s / 2 / len(turned)))
    return gains, coincide


def _check(calls: dict[str, ModelCall], module: nn.Module, mode: str) -> str:
    found = []
    for call in calls.values():
        torch.manual_seed(0)  # the same dropout
        call.prepare()
        call.run()
        found.append(call.results())
    names = {dtype: name for name, dtype in DTYPES.items() if name != "tf32"}
    dtypes = [p.dtype for p in module.parameters()]
    bound = max((TOLERANCE[names[dtype]] for dtype in dtypes if dtype in names), default=TOLERANCE["fp32"])
    said = []
    for what, theirs, ours in zip(("outputs", "gradients"), *found, strict=True):
        if theirs.numel() != ours.numel():
            sizes = f"{theirs.numel() - 1} numbers with torch.nn, {ours.numel() - 1} with fused_rnn"
            raise ModelError(f"{mode}: the {what} differ: {sizes}")
        off = float((theirs - ours).norm() / theirs.norm().clamp_min(1e-30))
        if not off <= bound:
            raise ModelError(f"{mode}: the {what} differ by {off:.1e} of their norm, expected {bound:.0e} at most")
        if what == "outputs" or mode == "training":
            said.append(f"{what} by {off:.1e}")
    return f"Results coincide: {', '.join(said)} of their norm."


def _timed(name: str, kind: str, times: int, calls: dict[str, Any], device: str, budget_s: float) -> Gain:
    run = clock(device)
    cost = {which: run(call, 2)[1] for which, call in calls.items()}
    seconds = interleave(calls, cost, run, GPU_BLOCK_S if device == "cuda" else BLOCK_S, budget_s)
    return Gain(name, kind, times, *(percentiles(seconds[which]) for which in (BEFORE, AFTER)))


def execute(
    name: str, modes: Sequence[str], threads: Sequence[int], budget_s: float, device: str | None, console: Console
) -> None:
    """Measure what `name` names, in every mode and with every number of threads, and print what came out."""
    factory = load(name)
    before = torch.get_num_threads()
    try:
        for count in threads:
            torch.set_num_threads(count)
            facts = describe(device or "cpu")
            console.rule(f"{facts['device_name']}, {count} thread{'s' * (count > 1)}")
            console.print(f"{name}: torch {facts['torch']}, fused_rnn {facts['fused_rnn']}, kernels {facts['kernels']}")
            for mode in modes:
                why = crowded(count)
                gains, coincide = compare(factory, mode, budget_s / len(modes), device)
                why = why or crowded(count)
                said = verdict(gains, mode) if why is None else Text(why, style="yellow")
                console.print("", table(gains, mode), coincide, said, sep="\n")
    finally:
        torch.set_num_threads(before)


def table(gains: list[Gain], mode: str) -> Table:
    """The whole, then the layers, each alone; "~" marks a time that cannot be right."""
    shown = grid(f"{mode}: medians", ("",), (BEFORE, AFTER, "as fast", "of the model"))
    whole = gains[0]
    for gain in gains:
        times = f", {gain.visits} calls" if gain.visits > 1 else ""
        name = f"{gain.name}: {gain.kind}{times}" if gain is whole else f"  {gain.name}: {gain.kind}{times}"
        share = "–" if longer(gain.before, whole.before) else f"{100 * min(1, gain.before.p50 / whole.before.p50):.0f}%"
        share = "" if gain is whole else share
        timings = zip((gain.before, gain.after), gain.marks(whole), strict=True)
        both = (f"{'~' * marked}{duration(1e6 * timing.p50)}" for timing, marked in timings)
        shown.add_row(name, *both, Text(f"{ratio(gain.speedup)}×", style=style(gain.speedup)), share)
    return shown


def verdict(gains: list[Gain], mode: str) -> Text:
    """Whether to convert the model, which layer gains most, and which none."""
    return Text("\n").join(_sentences(gains, mode))


def _sentences(gains: list[Gain], mode: str) -> Iterator[Text]:
    whole, *layers = gains
    disturbed = whole.sure < whole.speedup / DISTURBED
    said = judge(whole.speedup) if not disturbed or judge(whole.sure) == TAKE else AGAIN
    text = Text.assemble((f"{mode.capitalize()}: ", "bold"), f"the model is {ratio(whole.speedup)}× as fast: ")
    text.append(said, style=style(whole.speedup))
    yield text.append(f" (the machine was disturbed: {ratio(whole.sure)}× at least)." if disturbed else ".")
    sound = [gain for gain in layers if not any(gain.marks(whole))]
    best = max(sound, key=lambda gain: gain.saved, default=None)
    if best is not None and best.saved > 0:
        each = f"{duration(1e6 * best.saved)} of {duration(1e6 * best.before.p50)}, {ratio(best.speedup)}× as fast"
        yield Text(f"{best.name} gains most: {each}.")
    for gain in sound:
        if judge(gain.speedup) == LEAVE:
            yield Text(f"{gain.name} is slower, {ratio(gain.speedup)}×: fused_rnn.to_torch(...) of it takes it back.")
    if any(any(gain.marks(whole)) for gain in gains):
        yield Text(_why([gain.name for gain in layers if gain not in sound]), style="yellow")


def _why(unsound: list[str]) -> str:
    """What "~" means, and of which layers nothing is said for its sake."""
    what = f"~: the 80th percentile is more than {DISTURBED}× the 20th"
    if not unsound:
        return f"{what}: the machine was disturbed."
    what += ", or a layer alone takes longer than the whole model"
    return f"{what}: the machine was disturbed, and nothing is said of {', '.join(unsound)}."
