"""One call by ours, by torch's modules in the same dtype, and in float64: named results and gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from cases import FUNCTIONS, Case, Inputs
from counterparts import MODULES, flatten
from oracle import torch_cells
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import functional_call
from torch.nn.utils.rnn import PackedSequence

import fused_rnn
from fused_rnn import functional

from .generate import Call
from .given import Given, hx_shapes, lengths_argument, random_like, view, x_shape

Results = dict[str, Tensor]
Function = Callable[[Tensor, Sequence[Tensor], Sequence[Tensor] | None], Any]
NAMES = {"lstm": "LSTM", "gru": "GRU", "rnn_tanh": "RNN", "rnn_relu": "RNN"}
STEPS = {"lstm": functional.lstm_cell, "gru": functional.gru_cell}


class Subject:
    """What is called, by our side or by torch's: built once, callable many times."""

    def __init__(self, call: Call, given: Given, ours: bool) -> None:
        self.call, self.given, self.ours = call, given, ours
        self.module: Any = None
        self.stream: Any = None
        if not ours or call.kind in ("module", "cell", "stream"):
            self.module = make_module(call, given, ours)
        if ours and call.kind == "stream":
            self.stream = self.module.stream(call.B, weights=call.narrow)

    def weights(self) -> list[Tensor]:
        """The weights that a gradient is taken in."""
        return self.given.weights if self.module is None else list(self.module.parameters())

    def arguments(self, x: Tensor, hx: Sequence[Tensor]) -> tuple[Any, Any]:
        """input and hx as the module takes them, of their bases."""
        call, given = self.call, self.given
        data: Any = view(x, call.memory, x_shape(call, given.batch_sizes))
        if given.batch_sizes is not None:
            back = None if given.order is None else given.order.argsort()
            data = PackedSequence(data, given.batch_sizes, given.order, back)
        states = tuple(view(h, call.hx, shape) for h, shape in zip(hx, hx_shapes(call), strict=False))
        return data, (states if call.has_c else states[0]) if states else None

    def __call__(self, x: Tensor, hx: Sequence[Tensor], weights: Sequence[Tensor] | None = None) -> Any:
        """The result as it is returned. weights: in place of the module's own."""
        data, states = self.arguments(x, hx)
        if self.ours:
            return call_ours(self, data, states, weights)
        return call_torch(self, data, states, weights)


def make_module(call: Call, given: Given, ours: bool) -> Any:
    """The module with the given weights."""
    name = NAMES[call.cell] + ("Cell" if call.is_cell else "")
    options: dict[str, Any] = {"bias": call.bias, "dtype": given.x.dtype}
    if call.cell == "rnn_relu":
        options["nonlinearity"] = "relu"
    if not call.is_cell:
        options |= {"num_layers": call.layers, "bidirectional": call.bidirectional, "dropout": call.dropout}
        options |= {"batch_first": call.batch_first} | ({"proj_size": call.proj} if call.proj else {})
    if ours:
        options |= {"backend": call.backend} | ({} if call.is_cell else {"save": call.save})
    module = MODULES[name][0 if ours else 1](call.D, call.H, **options)
    with torch.no_grad():
        for parameter, w in zip(module.parameters(), given.weights, strict=True):
            parameter.copy_(w)
    return module.train(call.mode != "eval" and call.kind != "stream")


def call_ours(subject: Subject, data: Any, hx: Any, weights: Sequence[Tensor] | None) -> Any:
    call, given = subject.call, subject.given
    if call.kind == "stream":
        return run_stream(subject, data, hx)
    if call.kind in ("functional", "functional_cell"):
        return call_functional(call, given, data, hx, given.weights if weights is None else weights)
    extras: dict[str, Any] = {}
    if given.lengths is not None:
        extras["lengths"] = lengths_argument(call, given)
    if given.reset is not None:
        extras["reset"] = given.reset
    if weights is None:
        return subject.module(data, hx, **extras)
    return functional_call(subject.module, _named(subject.module, weights), (data, hx), extras)


def _named(module: Any, weights: Sequence[Tensor]) -> dict[str, Tensor]:
    return dict(zip(dict(module.named_parameters()), weights, strict=True))


def call_functional(call: Call, given: Given, x: Tensor, hx: Any, weights: Sequence[Tensor], **others: Any) -> Any:
    options: dict[str, Any] = {"backend": call.backend}
    if call.is_cell:
        if call.cell.startswith("rnn"):
            return functional.rnn_cell(x, hx, weights, nonlinearity=call.cell[4:], **options)
        return STEPS[call.cell](x, hx, weights, **options)
    options |= {"num_layers": call.layers, "bidirectional": call.bidirectional, "save": call.save}
    options |= {"dropout": call.dropout, "training": call.mode != "eval"}
    options |= {"lengths": lengths_argument(call, given), "reset": given.reset} | others
    return FUNCTIONS[call.cell](x, weights, hx, **options)


def run_stream(subject: Subject, x: Tensor, hx: Any) -> Any:
    """The first half step by step, the rest in one go; y and the state."""
    stream, time = subject.stream, 1 if subject.call.batch_first else 0
    if hx is None:
        stream.reset()
    else:
        stream.state = hx
    half = x.size(time) // 2
    ys = [stream.step(x.select(time, t)).unsqueeze(time) for t in range(half)]
    ys.append(stream.steps(x.narrow(time, half, x.size(time) - half)))
    return torch.cat(ys, time), stream.state


def call_torch(subject: Subject, data: Any, hx: Any, weights: Sequence[Tensor] | None) -> Any:
    """torch's own module; where there are lengths or resets, which it has not, torch's kernels or cells on each."""
    call, given, module = subject.call, subject.given, subject.module
    if given.lengths is None and given.reset is None:
        if weights is None:
            return module(data, hx)
        return functional_call(module, _named(module, weights), (data, hx))
    x = data.transpose(0, 1) if call.batch_first else data
    y, after = _torch_layers(call, given, x, hx, subject.weights())
    return (y.transpose(0, 1) if call.batch_first else y), after


def _torch_layers(call: Call, given: Given, x: Tensor, hx: Any, weights: list[Tensor]) -> tuple[Tensor, Any]:
    lengths, reset = given.lengths, given.reset
    if reset is not None and call.batch_first:
        reset = reset.t()
    pushes = call.mode.startswith("forward_ad")  # which torch's whole kernels cannot
    if (reset is None and not pushes) or x.dtype == torch.float64:
        how: dict[str, Any] = {"backend": "torch" if reset is None and not pushes else "reference", "save": "gates"}
        return call_functional(call, given, x, hx, weights, lengths=lengths, reset=reset, **how)
    case = Case(call.cell, call.T, call.B, call.D, call.H, call.layers, call.bidirectional, call.bias, call.proj)
    states = [] if hx is None else list(hx) if call.has_c else [hx]
    y, *after = torch_cells(case, Inputs(x, weights, states, lengths, reset, []))
    return y, tuple(after) if call.has_c else after[0]


# ---- watching a call


@contextmanager
def surroundings(call: Call, ours: bool) -> Iterator[None]:
    """Grad mode, autocast and threads, put back afterwards; of torch's kernels those that can what is asked."""
    threads = torch.get_num_threads()
    grad: Any = nullcontext()
    if call.mode in ("no_grad", "forward_ad_no_grad"):
        grad = torch.no_grad()
    if call.mode == "inference":
        grad = torch.inference_mode()
    special = call.mode in ("twice", "forward_ad", "forward_ad_no_grad") or call.transform != "none"
    # oneDNN's LSTM has one derivative, and no rule for transforms.
    onednn: Any = torch.backends.mkldnn.flags(enabled=False) if special and not ours else nullcontext()
    autocast: Any = torch.autocast("cpu", torch.bfloat16) if call.autocast and ours else nullcontext()
    try:
        torch.set_num_threads(call.threads)
        with grad, onednn, autocast:
            yield
    finally:
        torch.set_num_threads(threads)


def leaves(call: Call, subject: Subject) -> dict[str, Tensor]:
    """x, hx and weights by name, those that are wanted requiring a gradient."""
    given = subject.given
    named = {"x": given.x} | {f"hx[{k}]": h for k, h in enumerate(given.hx)}
    wanted = {"all": ("x", "hx", "weights"), "none": ()}.get(call.wants, (call.wants,))
    for name, t in named.items():
        t.requires_grad_(name.split("[")[0] in wanted and call.transform == "none")
    for k, w in enumerate(subject.weights()):
        w.requires_grad_("weights" in wanted and call.transform == "none")
        named[f"weights[{k}]"] = w
    return named


def structure(value: Any) -> str:
    """The kinds of a nest, and the dtype, shape and need of a gradient of its tensors."""
    if isinstance(value, Tensor):
        return f"{value.dtype}{list(value.shape)}{'∂' if value.requires_grad else ''}"
    if value is None:
        return "None"
    return f"{type(value).__name__}({', '.join(structure(part) for part in value)})"


def run(call: Call, subject: Subject) -> tuple[Results, str]:
    """Named results, and the structure of what was returned."""
    torch.manual_seed(call.index)  # the dropout masks
    with surroundings(call, subject.ours):
        named = leaves(call, subject)
        if call.transform != "none":
            return _transformed(call, subject, named), ""
        if call.mode.startswith("forward_ad"):
            return _pushed(call, subject), ""
        outputs = subject(subject.given.x, subject.given.hx)
        told = structure(outputs)
        results = {f"outputs[{k}]": o for k, o in enumerate(flatten(outputs))}
        if call.differentiates:
            results |= _gradients(call, results, named)
        return {name: t.detach() for name, t in results.items()}, told


def _fixed(call: Call, k: int, like: Tensor) -> Tensor:
    """A random tensor that is the same on every side."""
    return random_like(like, torch.Generator().manual_seed(1000 * call.index + k))


def _gradients(call: Call, outputs: Results, named: dict[str, Tensor]) -> Results:
    wanted = {name: t for name, t in named.items() if t.requires_grad}
    moving = [t for t in outputs.values() if t.requires_grad]
    if not wanted or not moving:
        return {}
    douts = [_fixed(call, k, t) for k, t in enumerate(moving)]
    twice = call.mode == "twice"
    some = {"allow_unused": True, "materialize_grads": True}
    grads = torch.autograd.grad(moving, list(wanted.values()), douts, create_graph=twice, **some)
    results = {f"d{name}": g for name, g in zip(wanted, grads, strict=True)}
    if twice:
        curved = [g for g in grads if g.requires_grad]
        directions = [_fixed(call, 100 + k, g) for k, g in enumerate(curved)]
        seconds = torch.autograd.grad(curved, list(wanted.values()), directions, **some)
        results |= {f"dd{name}": g for name, g in zip(wanted, seconds, strict=True)}
    return results


def _pushed(call: Call, subject: Subject) -> Results:
    """Tangents of forward-mode AD, in x and hx."""
    given, results = subject.given, {}
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(t, _fixed(call, k, t)) for k, t in enumerate([given.x, *given.hx])]
        for k, out in enumerate(flatten(subject(duals[0], duals[1:]))):
            if out.is_floating_point():
                primal, tangent = forward_ad.unpack_dual(out)
                results[f"outputs[{k}]"] = primal.detach()
                results[f"tangents[{k}]"] = torch.zeros_like(primal) if tangent is None else tangent.detach()
    return results


def _transformed(call: Call, subject: Subject, named: dict[str, Tensor]) -> Results:
    given = subject.given
    weights = [w.detach() for w in subject.weights()]

    def forward(x: Tensor, hx: list[Tensor], weights: list[Tensor]) -> tuple[Tensor, ...]:
        return tuple(flatten(subject(x, hx, weights)))

    if call.transform == "vmap":
        if subject.ours:
            outputs = torch.func.vmap(lambda x: forward(x, given.hx, weights))(given.x)
        else:
            each = [forward(x, given.hx, weights) for x in given.x]
            outputs = tuple(torch.stack(parts) for parts in zip(*each, strict=True))
        return {f"outputs[{k}]": o for k, o in enumerate(outputs)}
    primals = (given.x, given.hx, weights)
    if call.transform == "jvp":
        tangents = [_fixed(call, k, t) for k, t in enumerate(named.values())]
        split = (tangents[0], tangents[1 : 1 + len(given.hx)], tangents[1 + len(given.hx) :])
        outputs, moved = torch.func.jvp(forward, primals, split)
        return {f"outputs[{k}]": o for k, o in enumerate(outputs)} | {f"tangents[{k}]": o for k, o in enumerate(moved)}

    def loss(*primals: Any) -> Tensor:
        return torch.stack([(o * _fixed(call, k, o)).sum() for k, o in enumerate(forward(*primals))]).sum()

    dx, dhx, dweights = torch.func.grad(loss, argnums=(0, 1, 2))(*primals)
    return {f"d{name}": g for name, g in zip(named, [dx, *dhx, *dweights], strict=True)}


def effective(call: Call) -> torch.dtype:
    """What is computed in: autocast takes all but float64 to bfloat16."""
    return torch.bfloat16 if call.autocast and call.dtype != "float64" else getattr(torch, call.dtype)


def narrowed(call: Call, given: Given) -> Given:
    """The weights that a stream of narrow ones stands for (docs/streaming.md)."""
    if call.narrow is None:
        return given

    def rounded(w: Tensor) -> Tensor:
        if w.dim() != 2:
            return w
        if call.narrow == "bf16":
            return w.bfloat16().to(w.dtype)
        scale = w.abs().amax(1, keepdim=True) / 127
        return torch.where(scale > 0, (w / scale).round() * scale, w)

    return given._replace(weights=[rounded(w) for w in given.weights])


def by_torch(call: Call, given: Given, wide: bool) -> tuple[Results, str]:
    """torch's result in the dtype that is computed in, or in float64 on the same, rounded inputs."""
    given = narrowed(call, given).to(effective(call))
    return run(call, Subject(call, given.to(torch.float64) if wide else given.to(effective(call)), ours=False))


__all__ = ["Results", "Subject", "by_torch", "effective", "fused_rnn", "run", "surroundings"]
