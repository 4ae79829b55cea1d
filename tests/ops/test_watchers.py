"""Whatever may watch a call, or change what operators mean, meets a step as it meets torch's: nothing slips by."""

from __future__ import annotations

import contextlib
import json
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import fused_rnn
from fused_rnn import ops

quick: Any = ops.fast_path
needs_quick = pytest.mark.skipif(
    quick is None, reason="the extension is not built, or this torch does not lend tensors"
)
NAMES = ("LSTM", "GRU", "RNN", "LSTMCell", "GRUCell", "RNNCell")
ONE_STEP = {"one step": 1, "a sequence": 4}


class Ops(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


class Functions(TorchFunctionMode):
    pass


@contextlib.contextmanager
def legacy_vmap() -> Iterator[None]:
    torch._C._vmapmode_increment_nesting()
    try:
        yield
    finally:
        torch._C._vmapmode_decrement_nesting()


@contextlib.contextmanager
def default_device() -> Iterator[None]:
    torch.set_default_device("cpu")
    try:
        yield
    finally:
        torch.set_default_device(None)


@contextlib.contextmanager
def execution_trace() -> Iterator[None]:
    observer = torch.profiler.ExecutionTraceObserver()
    with tempfile.TemporaryDirectory() as folder:
        observer.register_callback(str(Path(folder) / "trace.json"))
        observer.start()
        try:
            yield
        finally:
            observer.stop()
            observer.unregister_callback()


# What a step past the dispatcher would slip by.
WATCHERS: dict[str, Callable[[], Any]] = {
    "forward-mode AD": forward_ad.dual_level,
    "autocast": lambda: torch.autocast("cpu"),
    "torch-function mode": Functions,
    "default device": default_device,
    "dispatch mode": Ops,
    "fake tensors": FakeTensorMode,
    "counter of operations": lambda: FlopCounterMode(display=False),
    "profiler": torch.profiler.profile,
    "autograd's profiler": torch.autograd.profiler.profile,
    "execution trace": execution_trace,
}
# What asks for nothing where there is no gradient, or is kept to by the way in which results are made.
BYSTANDERS: dict[str, Callable[[], Any]] = {
    "saved tensors' hooks": lambda: torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t),
    "anomaly detection": lambda: torch.autograd.set_detect_anomaly(True),
    "inference mode": torch.inference_mode,
    "a named record": lambda: torch.profiler.record_function("step"),
    "older vmap": legacy_vmap,
}


def call(name: str, steps: int = 1) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    cell = name.endswith("Cell")
    return getattr(fused_rnn, name)(5, 18), torch.randn(3, 5) if cell else torch.randn(steps, 3, 5)


def flatten(value: Any) -> list[Tensor]:
    return [value] if isinstance(value, Tensor) else [t for part in value for t in flatten(part)]


def arguments(name: str = "GRU") -> tuple[Any, ...]:
    module, x = call(name)
    return (module._parameters, True, x, None, {"LSTM": "lstm", "GRU": "gru", "RNN": "rnn_tanh"}[name], 0, None, None)


@needs_quick
@pytest.mark.parametrize("watcher", WATCHERS)
def test_what_watches_is_not_slipped_by(watcher: str) -> None:
    given = arguments()
    with torch.no_grad():
        assert quick(*given) is not None
        with WATCHERS[watcher]():
            assert quick(*given) is None
        assert quick(*given) is not None


@needs_quick
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("bystander", BYSTANDERS)
def test_what_does_not_watch(bystander: str, name: str) -> None:
    module, x = call(name)
    with torch.no_grad():
        expected = flatten(module(x))
        with BYSTANDERS[bystander]():
            got = flatten(module(x))
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b)
        assert a.is_inference() == (bystander == "inference mode")


@pytest.mark.parametrize("steps", ONE_STEP.values(), ids=ONE_STEP)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", NAMES)
def test_tangents_live_without_a_gradient(name: str, dtype: torch.dtype, steps: int) -> None:
    module, x = call(name, steps)
    module, x = module.to(dtype), x.to(dtype)
    dx = torch.randn_like(x)

    def tangents(grad: bool) -> list[Tensor]:
        with forward_ad.dual_level(), torch.set_grad_enabled(grad):
            outputs = flatten(module(forward_ad.make_dual(x, dx)))
            found = [forward_ad.unpack_dual(t).tangent for t in outputs]
            assert all(t is not None for t in found)
            return [t.detach().clone() for t in found if t is not None]

    for a, b in zip(tangents(False), tangents(True), strict=True):
        assert torch.equal(a, b)
        assert a.any()


@pytest.mark.parametrize("name", NAMES)
def test_a_dispatch_mode_and_a_profiler_see_every_call(name: str) -> None:
    module, x = call(name)
    with torch.no_grad():
        with Ops() as mode:
            module(x)
        with torch.profiler.profile() as profile:
            module(x)
    assert any(seen.startswith("fused_rnn.") for seen in mode.seen)
    assert any(event.key.startswith("fused_rnn::") for event in profile.key_averages())


def test_an_execution_trace_has_every_call(tmp_path: Path) -> None:
    module, x = call("GRU")
    observer = torch.profiler.ExecutionTraceObserver()
    observer.register_callback(str(tmp_path / "trace.json"))
    observer.start()
    with torch.no_grad():
        module(x)
    observer.stop()
    observer.unregister_callback()
    nodes = json.loads((tmp_path / "trace.json").read_text())["nodes"]
    assert any(node["name"].startswith("fused_rnn::") for node in nodes)


def test_a_profiler_of_all_threads_sees_another_ones_call() -> None:
    module, x = call("GRU")

    def run() -> None:
        with torch.no_grad():
            module(x)

    config = torch.profiler._ExperimentalConfig(profile_all_threads=True)
    with torch.profiler.profile(experimental_config=config) as profile:
        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
    assert any(event.key.startswith("fused_rnn::") for event in profile.key_averages())


class Names(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", NAMES)
def test_a_torch_function_mode_sees_every_call(name: str) -> None:
    module, x = call(name)
    with torch.no_grad(), Names() as mode:
        module(x)
    assert any("fused_rnn" in seen for seen in mode.seen)


@pytest.mark.parametrize("pre_dispatch", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_make_fx_records_every_call(name: str, pre_dispatch: bool) -> None:
    module, x = call(name)
    with torch.no_grad():
        graph = make_fx(lambda x: flatten(module(x))[0], pre_dispatch=pre_dispatch)(x)
        assert any("fused_rnn" in str(node.target) for node in graph.graph.nodes)
        assert torch.equal(graph(x + 1), flatten(module(x + 1))[0])


@pytest.mark.parametrize("name", NAMES)
def test_deterministic_filling_leaves_no_nan(name: str) -> None:
    module, x = call(name)
    torch.use_deterministic_algorithms(True)
    try:
        with torch.no_grad():
            assert all(t.isfinite().all() for t in flatten(module(x)))
    finally:
        torch.use_deterministic_algorithms(False)


# Tensors whose memory is not what they stand for.
STRANGE: dict[str, Callable[[Tensor], Tensor]] = {
    "negative": torch._neg_view,
    "imaginary part of a conjugate": lambda x: torch.complex(x, -x).conj().imag,
    "zero": lambda x: torch._efficientzerotensor(x.shape),
    "functional": torch._to_functional_tensor,
}


@needs_quick
@pytest.mark.parametrize("kind", STRANGE)
def test_strange_tensors_are_not_read(kind: str) -> None:
    given = list(arguments())
    with torch.no_grad():
        given[2] = STRANGE[kind](given[2])
        assert quick(*given) is None


@pytest.mark.parametrize("name", NAMES)
def test_strange_tensors_are_what_they_stand_for(name: str) -> None:
    module, x = call(name)
    with torch.no_grad():
        for kind in ("negative", "imaginary part of a conjugate", "zero"):
            strange = STRANGE[kind](x)
            for a, b in zip(flatten(module(strange)), flatten(module(strange + torch.zeros(()))), strict=True):
                torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", NAMES)
def test_weights_and_buffers_that_stand_for_something_else(name: str) -> None:
    module, x = call(name)
    with torch.no_grad():
        expected = flatten(module(x))
        for key, weight in list(module.named_parameters()):
            setattr(module, key, nn.Parameter(torch._neg_view(-weight)))
            for a, b in zip(flatten(module(x)), expected, strict=True):
                torch.testing.assert_close(a, b)
            setattr(module, key, weight)
        if hasattr(module, "stream"):
            y, out = module.stream(3).step(x[0]), torch._neg_view(torch.zeros_like(expected[0][0]))
            torch.testing.assert_close(module.stream(3).step(x[0], out=out), y)


def test_a_stream_takes_no_tangents() -> None:
    module, x = call("GRU")
    stream = module.stream(3)  # type: ignore[operator]
    with torch.no_grad(), forward_ad.dual_level():
        with pytest.raises(RuntimeError, match="x_t: carries a tangent"):
            stream.step(forward_ad.make_dual(x[0], torch.ones_like(x[0])))
        stream.step(x[0])
