"""torch.compile in one graph, gradients too, any length without compiling again; torch.jit."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
import torch._dynamo
from counterparts import CELLS, MODULES, SEQUENCES, flatten, make, outputs_and_gradients, states
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode

import fused_rnn
from fused_rnn import ops

pytestmark = [
    pytest.mark.compile,
    # torch's own, from what it calls inside
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),
]

OPTIONS: list[tuple[str, dict[str, Any]]] = [
    ("LSTM", {}),
    ("LSTM", {"num_layers": 2, "bidirectional": True, "batch_first": True, "proj_size": 3}),
    ("GRU", {"num_layers": 2, "dropout": 0.0}),
    ("GRU", {"bidirectional": True, "bias": False}),
    ("RNN", {}),
    ("RNN", {"nonlinearity": "relu", "batch_first": True}),
]


def name_of(value: Any) -> str | None:
    """A test's name for a set of options."""
    return "-".join(f"{k}={v}" for k, v in value.items()) or "plain" if isinstance(value, dict) else None


@pytest.fixture(autouse=True)
def _fresh_compiler() -> None:
    torch._dynamo.reset()


def compiled(module: nn.Module, **options: Any) -> tuple[Any, CompileCounterWithBackend]:
    """The module in one graph, by a compiler that runs AOTAutograd but generates no code; and what counts its runs."""
    counter = CompileCounterWithBackend("aot_eager")
    return torch.compile(module, backend=counter, fullgraph=True, **options), counter


def assert_close(got: Any, expected: Any) -> None:
    for a, b in zip(flatten(got), flatten(expected), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(("name", "options"), OPTIONS, ids=name_of)
def test_one_graph_for_every_length(name: str, options: dict[str, Any]) -> None:
    """Forward and backward; 3 lengths, one compilation."""
    ours, _ = make(name, 4, 6, dtype=torch.float64, **options)
    fast, counter = compiled(ours)
    time = 1 if ours.batch_first else 0
    for steps in (5, 9, 2):
        size = (3, steps, 4) if ours.batch_first else (steps, 3, 4)
        x = torch.randn(size, dtype=torch.float64, requires_grad=True)
        torch._dynamo.mark_dynamic(x, time)
        expected, hx = flatten(ours(x)), None
        got = flatten(fast(x, hx))
        assert_close(got, expected)
        leaves = [x, *ours.parameters()]
        grads = [torch.autograd.grad(sum(t.pow(2).sum() for t in outputs), leaves) for outputs in (got, expected)]
        assert_close(*grads)
    assert counter.frame_count == 1


@pytest.mark.parametrize("name", SEQUENCES)
def test_one_graph_with_states_lengths_and_reset(name: str) -> None:
    ours, _ = make(name, 4, 6, 2, bidirectional=True, dtype=torch.float64)
    fast, counter = compiled(ours)
    for steps in (5, 7):
        x, hx = torch.randn(steps, 3, 4, dtype=torch.float64), states(ours, 3, torch.float64)
        extras = {"lengths": torch.tensor([2, steps, 3]), "reset": torch.rand(steps, 3) < 0.3}
        torch._dynamo.mark_dynamic(x, 0)
        torch._dynamo.mark_dynamic(extras["reset"], 0)
        expected = outputs_and_gradients(ours, x, hx, **extras)
        got = flatten(fast(x, hx, **extras))
        sum(t.sum() for t in got).backward()
        assert_close(got, [t for key, t in expected.items() if key.startswith("outputs")])
    assert counter.frame_count == 1


@pytest.mark.parametrize("name", SEQUENCES)
def test_lengths_are_found_dynamic_by_themselves(name: str) -> None:
    """With nothing marked, the second length makes T dynamic, and no later one compiles again."""
    ours, _ = make(name, 4, 6)
    fast, counter = compiled(ours)
    with torch.no_grad():
        for steps in (5, 9, 2, 31):
            x = torch.randn(steps, 3, 4)
            assert_close(fast(x), ours(x))
    assert counter.frame_count <= 2


@pytest.mark.parametrize("name", SEQUENCES)
def test_single_steps_and_unbatched_input_compile(name: str) -> None:
    ours, _ = make(name, 4, 6)
    fast, _ = compiled(ours)
    for size in ((1, 3, 4), (5, 4), (1, 4)):
        x = torch.randn(size)
        assert_close(fast(x), ours(x))
        with torch.no_grad():
            assert_close(fast(x), ours(x))


@pytest.mark.parametrize("name", CELLS)
def test_cells_compile(name: str) -> None:
    ours, _ = make(name, 4, 6)
    fast, _ = compiled(ours)
    for size in ((3, 4), (4,)):
        x, h = torch.randn(size), torch.randn(*size[:-1], 6)
        hx = (h, torch.randn_like(h)) if name == "LSTMCell" else h
        for args in ((x,), (x, hx)):
            got, expected = flatten(fast(*args)), flatten(ours(*args))
            assert_close(got, expected)
            parameters = list(ours.parameters())
            grads = [torch.autograd.grad(sum(t.sum() for t in o), parameters) for o in (got, expected)]
            assert_close(*grads)
            with torch.no_grad():
                assert_close(fast(*args), ours(*args))


@pytest.mark.parametrize("name", CELLS)
def test_cells_take_any_batch(name: str) -> None:
    ours, _ = make(name, 4, 6)
    fast, counter = compiled(ours)
    for batch in (3, 5, 2, 9):
        x = torch.randn(batch, 4)
        assert_close(fast(x), ours(x))
        with torch.no_grad():
            assert_close(fast(x), ours(x))
    assert counter.frame_count <= 4  # with a gradient and without one: for the first batch, then for any


@pytest.mark.parametrize("name", SEQUENCES)
def test_a_packed_sequence_breaks_the_graph_and_nothing_else(name: str) -> None:
    ours, _ = make(name, 4, 6, 2, bidirectional=True)
    fast = torch.compile(ours, backend="aot_eager")
    for lengths in ([5, 3, 2], [7, 7, 1]):
        packed = nn.utils.rnn.pack_padded_sequence(torch.randn(7, 3, 4), torch.tensor(lengths))
        got, expected = flatten(fast(packed)), flatten(ours(packed))
        assert_close(got, expected)
        parameters = list(ours.parameters())
        assert_close(*(torch.autograd.grad(o[0].sum(), parameters, allow_unused=True) for o in (got, expected)))


def test_a_model_around_them_compiles() -> None:
    """Inside another module's graph, with dropout's masks and parametrized weights."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(11, 4)
            self.rnn = make("LSTM", 4, 6, 2, batch_first=True)[0]
            self.cell = make("GRUCell", 6, 5)[0]
            self.head = nn.Linear(5, 11)
            nn.utils.parametrizations.weight_norm(self.head)

        def forward(self, tokens: Tensor) -> Tensor:
            y, (h, _) = self.rnn(self.embed(tokens))
            return self.head(self.cell(h[-1], y.mean(1)[:, :5]))

    model, tokens = Model(), torch.randint(11, (3, 8))
    fast, _ = compiled(model)
    got, expected = fast(tokens), model(tokens)
    assert_close(got, expected)
    parameters = list(model.parameters())
    assert_close(torch.autograd.grad(got.sum(), parameters), torch.autograd.grad(expected.sum(), parameters))


@pytest.mark.parametrize("name", SEQUENCES)
def test_parametrized_weights_compile(name: str) -> None:
    ours, _ = make(name, 4, 6)
    nn.utils.parametrizations.weight_norm(ours, "weight_hh_l0")
    fast, _ = compiled(ours)
    x = torch.randn(5, 3, 4)
    got, expected = flatten(fast(x)), flatten(ours(x))
    assert_close(got, expected)
    parameters = list(ours.parameters())
    assert_close(*(torch.autograd.grad(sum(t.sum() for t in o), parameters) for o in (got, expected)))


@pytest.mark.parametrize("name", ["LSTM", "GRUCell"])
def test_inductor(name: str) -> None:
    """The compiler that users have."""
    ours, _ = make(name, 4, 6)
    fast = torch.compile(ours, fullgraph=True, dynamic=True if name in SEQUENCES else None)
    for steps in (5, 7):
        x = torch.randn(steps, 3, 4) if name in SEQUENCES else torch.randn(3, 4)
        got, expected = flatten(fast(x)), flatten(ours(x))
        assert_close(got, expected)
        parameters = list(ours.parameters())
        assert_close(*(torch.autograd.grad(sum(t.pow(2).sum() for t in o), parameters) for o in (got, expected)))


def saved_and_loaded(scripted: torch.jit.ScriptModule) -> Any:
    file = io.BytesIO()
    torch.jit.save(scripted, file)
    file.seek(0)
    return torch.jit.load(file)


class Model(nn.Module):
    """Around the module: saved alone, a scripted sequence module, torch's too, has lost its overloaded forward."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Any:
        return self.inner(x)


@pytest.mark.parametrize("kind", ["trace", "script"])
@pytest.mark.parametrize("name", MODULES)
def test_torchscript(name: str, kind: str) -> None:
    """It holds torch's operators: takes any length, has a gradient, and can be saved for runtimes without our ops."""
    options = {} if name in CELLS else {"num_layers": 2, "bidirectional": True}
    ours, counterpart = make(name, 4, 6, **options)
    example, model = torch.randn(3, 4) if name in CELLS else torch.randn(1, 3, 4), Model(ours)
    scripted = torch.jit.script(model) if kind == "script" else torch.jit.trace(model, (example,), check_trace=False)
    loaded = saved_and_loaded(scripted)
    if kind == "trace":
        assert "fused_rnn::" not in str(loaded.graph)
    for size in (1, 2, 33):
        x = torch.randn(size, 4) if name in CELLS else torch.randn(size, 3, 4)
        got, expected = flatten(loaded(x)), flatten(counterpart(x))
        assert_close(got, expected)
        grads = [
            torch.autograd.grad(sum(t.sum() for t in outputs), list(module.parameters()))
            for outputs, module in ((got, loaded), (expected, counterpart))
        ]
        assert_close(*grads)
    next(ours.parameters()).data.zero_()  # torch.jit.script and trace share the weights with the module
    assert_close(scripted(example), ours(example))


@pytest.mark.parametrize("converted", [False, True])
@pytest.mark.parametrize("name", CELLS)
def test_scripted_subclass_of_a_cell(name: str, converted: bool) -> None:
    """It overrides no forward: the counterpart's is compiled, with what the subclass brings along."""

    class Scaled(CELLS[name][converted]):  # type: ignore[misc]
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            self.scale = 3

        @torch.jit.export
        def scaled(self, x: Tensor) -> Tensor:
            return self.scale * x

    ours = fused_rnn.convert(Scaled(4, 6)) if converted else Scaled(4, 6)
    loaded, x = saved_and_loaded(torch.jit.script(ours)), torch.randn(3, 4)
    assert loaded.original_name == "Scaled"
    assert_close(loaded(x), ours(x))
    assert_close(loaded.scaled(x), 3 * x)
    assert "forward" not in vars(ours)


class Around(nn.Module):
    """A trace is made of a positional call."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor, lengths: Tensor, reset: Tensor) -> Any:
        return self.inner(x, lengths=lengths, reset=reset)


@pytest.mark.skipif(ops.MISSING is not None, reason=f"a trace holds the cpu backend's ops: {ops.MISSING}")
@pytest.mark.parametrize(
    ("name", "backend", "extras"),
    [(name, "cpu", False) for name in MODULES] + [(name, kind, True) for name in SEQUENCES for kind in (None, "cpu")],
)
def test_a_trace_of_our_op(name: str, backend: str | None, extras: bool) -> None:
    """Of a backend by name, and of what torch's operators cannot: it takes any length, has a gradient, can be saved."""
    options = {} if name in CELLS else {"num_layers": 2, "bidirectional": True}
    inner, _ = make(name, 4, 6, extras={"backend": backend}, **options)
    ours = Around(inner) if extras else inner

    def arguments(size: int) -> tuple[Tensor, ...]:
        x = torch.randn(size, 4) if name in CELLS else torch.randn(size, 3, 4)
        return (x, torch.randint(1, size + 1, (3,)), torch.rand(size, 3) < 0.3) if extras else (x,)

    traced = torch.jit.trace(ours, arguments(5))  # which traces again, without gradients, and compares
    assert "fused_rnn::forward" in str(traced.inlined_graph)
    loaded = saved_and_loaded(traced)
    for size in (2, 33):
        args = arguments(size)
        got, expected = flatten(loaded(*args)), flatten(ours(*args))
        assert_close(got, expected)
        grads = [
            torch.autograd.grad(sum(t.square().sum() for t in outputs), list(module.parameters()))
            for outputs, module in ((got, loaded), (expected, ours))
        ]
        assert_close(*grads)


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("name", MODULES)
def test_fake_tensors(name: str, grad: bool) -> None:
    """Shapes and dtypes without data, as planners of memory and of parallelism run models."""
    with FakeTensorMode(), torch.set_grad_enabled(grad):
        for size in ((3, 4),) if name in CELLS else ((5, 3, 4), (1, 3, 4)):
            ours, counterpart = MODULES[name][0](4, 6), MODULES[name][1](4, 6)
            results = [flatten(module(torch.empty(size))) for module in (ours, counterpart)]
            facts = [[(t.shape, t.dtype, t.requires_grad) for t in result] for result in results]
            assert facts[0] == facts[1]
