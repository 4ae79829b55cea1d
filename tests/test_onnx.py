"""Export to ONNX by default arguments, to ONNX's own LSTM, GRU and RNN nodes, checked in onnxruntime."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo
from counterparts import CELLS, MODULES, SEQUENCES, flatten, make, states
from torch import Tensor, nn

import fused_rnn
from fused_rnn.call import LayerCall

onnxruntime = pytest.importorskip("onnxruntime", reason="exported models are checked in onnxruntime")
pytest.importorskip("onnxscript", reason="torch.onnx.export needs onnxscript")

import fused_rnn.onnx  # noqa: E402

pytestmark = [
    pytest.mark.compile,
    # torch's own, and its exporter's optimiser's
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),
]

T, B = torch.export.Dim("T", min=2), torch.export.Dim("B", min=2)
OPTIONS: list[tuple[str, dict[str, Any]]] = [
    ("LSTM", {"num_layers": 2, "bidirectional": True, "batch_first": True}),
    ("LSTM", {"num_layers": 2, "bidirectional": True, "proj_size": 3}),
    ("LSTM", {"proj_size": 3, "bias": False}),
    ("GRU", {"num_layers": 2, "bias": False}),
    ("RNN", {"nonlinearity": "relu", "bidirectional": True}),
]


@pytest.fixture(autouse=True)
def _fresh_compiler() -> None:
    torch._dynamo.reset()


def exported(model: nn.Module, args: tuple[Any, ...], **options: Any) -> torch.onnx.ONNXProgram:
    program = torch.onnx.export(model.eval(), args, verbose=False, **options)
    assert program is not None
    return program


def nodes(program: torch.onnx.ONNXProgram) -> list[str]:
    return [node.op_type for node in program.model.graph]


def check(program: torch.onnx.ONNXProgram, model: nn.Module, *args: Any) -> None:
    """onnxruntime's result is the model's, to float32's rounding in sums of some ten terms over some ten steps."""
    session = onnxruntime.InferenceSession(program.model_proto.SerializeToString(), providers=["CPUExecutionProvider"])
    tensors = flatten(args)
    assert len(tensors) == len(session.get_inputs())
    names = [given.name for given in session.get_inputs()]
    got = session.run(None, {name: t.numpy() for name, t in zip(names, tensors, strict=True)})
    with torch.no_grad():
        expected = flatten(model(*args))
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(torch.from_numpy(one), other, rtol=1e-5, atol=1e-6)


def name_of(value: Any) -> str | None:
    """A test's name for a set of options."""
    return "-".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else None


@pytest.mark.parametrize(("name", "options"), OPTIONS, ids=name_of)
def test_layers_become_nodes_of_any_length_and_batch(name: str, options: dict[str, Any]) -> None:
    model, _ = make(name, 4, 6, **options)
    time, batch = (1, 0) if model.batch_first else (0, 1)
    program = exported(model, (torch.randn(5, 3, 4),), dynamic_shapes=({time: T, batch: B},))
    assert nodes(program).count(name) == model.num_layers
    assert not {"Split", "Loop", "Scan", "If"} & set(nodes(program))
    for size in ((5, 3, 4), (9, 2, 4), (2, 7, 4)):
        check(program, model, torch.randn(size))


class Ragged(nn.Module):
    """Exporters take a positional call."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor, hx: Any, lengths: Tensor) -> Any:
        return self.inner(x, hx, lengths=lengths)


@pytest.mark.parametrize(
    ("name", "options"), [*((name, {}) for name in SEQUENCES), ("LSTM", {"proj_size": 3})], ids=name_of
)
def test_states_and_lengths(name: str, options: dict[str, Any]) -> None:
    model = Ragged(make(name, 4, 6, 2, bidirectional=True, **options)[0])
    two = name == "LSTM"
    shapes = ({0: T, 1: B}, ({1: B}, {1: B}) if two else {1: B}, {0: B})
    args = (torch.randn(5, 3, 4), states(model.inner, 3), torch.tensor([2, 5, 1]))
    program = exported(model, args, dynamic_shapes=shapes)
    check(program, model, *args)
    check(program, model, torch.randn(9, 2, 4), states(model.inner, 2), torch.tensor([9, 4]))
    check(program, model, torch.randn(7, 4, 4), states(model.inner, 4), torch.tensor([0, 7, 1, 0]))


def test_states_alone_with_a_projection() -> None:
    """Of no place in ONNX's node: it comes in with the first step of each direction."""
    model = make("LSTM", 4, 6, 2, bidirectional=True, proj_size=3)[0]
    state = {1: B}
    program = exported(model, (torch.randn(5, 3, 4), states(model, 3)), dynamic_shapes=({0: T, 1: B}, (state, state)))
    check(program, model, torch.randn(9, 2, 4), states(model, 2))


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("name", CELLS)
def test_cells(name: str, grad: bool) -> None:
    """Without gradients the program holds the op of one step, with them that of a layer."""
    model, _ = make(name, 4, 6)
    h = torch.randn(3, 6)
    args = (torch.randn(3, 4), (h, torch.randn(3, 6)) if name == "LSTMCell" else h)
    shapes = ({0: B}, ({0: B}, {0: B}) if name == "LSTMCell" else {0: B})
    with torch.set_grad_enabled(grad):
        program = exported(model, args, dynamic_shapes=shapes)
    assert name.removesuffix("Cell") in nodes(program)
    check(program, model, *args)
    check(program, model, *torch.utils._pytree.tree_map(lambda t: torch.randn(7, t.shape[1]), args))


def test_a_model_around_it() -> None:
    class Tagger(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(11, 4)
            self.rnn = make("LSTM", 4, 6, batch_first=True, bidirectional=True)[0]
            self.head = nn.Linear(12, 3)

        def forward(self, tokens: Tensor) -> Tensor:
            return self.head(self.rnn(self.embed(tokens))[0]).log_softmax(-1)

    model = Tagger()
    program = exported(model, (torch.randint(11, (3, 5)),), dynamic_shapes=({0: B, 1: T},))
    check(program, model, torch.randint(11, (2, 9)))


@pytest.mark.parametrize("name", MODULES)
def test_as_small_as_it_gets(name: str) -> None:
    """One static length, unbatched input, no states; and the program that torch.export made before."""
    model, _ = make(name, 4, 6)
    x = torch.randn(4) if name in CELLS else torch.randn(5, 4)
    check(exported(model, (x,)), model, x)
    before = torch.export.export(model.eval(), (x,))
    assert "fused_rnn" in str(before.graph) and "fused_rnn" in str(before.run_decompositions().graph)
    program = torch.onnx.export(before.run_decompositions(fused_rnn.onnx.decompositions()), verbose=False)
    assert program is not None
    check(program, model, x)


def test_the_op_stays_an_op_for_all_others() -> None:
    """Whoever asks torch's whole table of decompositions, fake tensors among them."""
    model, _ = make("GRU", 4, 6)
    program = torch.export.export(model, (torch.randn(5, 3, 4),), dynamic_shapes=({0: T, 1: B},))
    assert not torch._decomp.get_decompositions(list(fused_rnn.onnx.decompositions()))  # Inductor would want it used
    decomposed = program.run_decompositions(dict(torch._decomp.decomposition_table))
    assert "torch.ops.fused_rnn.forward.default" in decomposed.graph_module.code
    x = torch.randn(9, 2, 4)
    torch.testing.assert_close(decomposed.module()(x), model(x))


@pytest.mark.parametrize("name", MODULES)
def test_by_torchscript(name: str, tmp_path: Path) -> None:
    """The older exporter traces, and finds torch's own operators."""
    model, _ = make(name, 4, 6)
    args = (torch.randn(3, 4),) if name in CELLS else (torch.randn(5, 3, 4),)
    axes = {"x": {0: "B"}} if name in CELLS else {"x": {0: "T", 1: "B"}}
    path = str(tmp_path / "model.onnx")
    torch.onnx.export(model.eval(), args, path, dynamo=False, input_names=["x"], dynamic_axes=axes)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    x = torch.randn(7, 4) if name in CELLS else torch.randn(9, 3, 4)
    with torch.no_grad():
        for one, other in zip(session.run(None, {"x": x.numpy()}), flatten(model(x)), strict=True):
            torch.testing.assert_close(torch.from_numpy(one), other, rtol=1e-5, atol=1e-6)


def test_by_way_of_torchs_modules() -> None:
    model = fused_rnn.to_torch(make("GRU", 4, 6, 2, bidirectional=True)[0])
    program = exported(model, (torch.randn(5, 3, 4),))
    check(program, model, torch.randn(5, 3, 4))


def causes(error: BaseException | None) -> str:
    """What an error says, and all that it comes from."""
    return "" if error is None else f"{error}\n{causes(error.__cause__ or error.__context__)}"


def test_a_reset_is_refused() -> None:
    class Reset(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = make("GRU", 4, 6)[0]

        def forward(self, x: Tensor, reset: Tensor) -> Tensor:
            return self.inner(x, reset=reset)[0]

    with pytest.raises(torch.onnx.OnnxExporterError) as raised:
        exported(Reset(), (torch.randn(5, 3, 4), torch.zeros(5, 3, dtype=torch.bool)))
    assert "reset: got a tensor, expected None" in causes(raised.value)


def test_an_ensemble_is_refused() -> None:
    x, w = torch.empty(5, 3, 4), [torch.empty(24, 4), torch.empty(24, 6)]
    with pytest.raises(NotImplementedError, match=r"directions: got \[1, 1, 1\], expected \[1\] or \[-1\] or \[1, "):
        fused_rnn.onnx.forward(LayerCall(x, w * 3, (), None, None, "lstm", [1, 1, 1]))


def test_every_cell_has_a_node() -> None:
    assert set(fused_rnn.onnx.NODES) == set(fused_rnn.cells.CELLS)
