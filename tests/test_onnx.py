"""Export to ONNX, checked in onnxruntime: directly to ONNX's LSTM, GRU and RNN nodes, and by way of torch.nn's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch._dynamo
from torch import Tensor, nn
from twins import CELLS, SEQUENCES, flatten, make, states

import fused_rnn

onnxruntime = pytest.importorskip("onnxruntime", reason="exported models are checked in onnxruntime")
pytest.importorskip("onnxscript", reason="torch.onnx.export needs onnxscript")

import fused_rnn.onnx  # noqa: E402

pytestmark = [
    pytest.mark.compile,
    # torch's own, and its exporter's optimiser's
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"),
]

T, B = torch.export.Dim("T", min=2), torch.export.Dim("B", min=2)
OPTIONS: list[tuple[str, dict[str, Any]]] = [
    ("LSTM", {"num_layers": 2, "bidirectional": True, "batch_first": True}),
    ("GRU", {"num_layers": 2, "bias": False}),
    ("RNN", {"nonlinearity": "relu", "bidirectional": True}),
]


@pytest.fixture(autouse=True)
def _fresh_compiler() -> None:
    torch._dynamo.reset()


def exported(model: nn.Module, args: tuple[Any, ...], translate: bool = True, **options: Any) -> torch.onnx.ONNXProgram:
    table = fused_rnn.onnx.translations() if translate else None
    program = torch.onnx.export(
        model.eval(), args, dynamo=True, verbose=False, custom_translation_table=table, **options
    )
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


@pytest.mark.parametrize(("name", "options"), OPTIONS, ids=["LSTM", "GRU", "RNN"])
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


@pytest.mark.parametrize("name", SEQUENCES)
def test_states_and_lengths(name: str) -> None:
    model = Ragged(make(name, 4, 6, 2, bidirectional=True)[0])
    two = name == "LSTM"
    shapes = ({0: T, 1: B}, ({1: B}, {1: B}) if two else {1: B}, {0: B})
    args = (torch.randn(5, 3, 4), states(model.inner, 3), torch.tensor([2, 5, 1]))
    program = exported(model, args, dynamic_shapes=shapes)
    check(program, model, *args)
    check(program, model, torch.randn(9, 2, 4), states(model.inner, 2), torch.tensor([9, 4]))


@pytest.mark.parametrize("name", CELLS)
def test_cells(name: str) -> None:
    model, _ = make(name, 4, 6)
    h = torch.randn(3, 6)
    args = (torch.randn(3, 4), (h, torch.randn(3, 6)) if name == "LSTMCell" else h)
    shapes = ({0: B}, ({0: B}, {0: B}) if name == "LSTMCell" else {0: B})
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


def test_by_way_of_torchs_modules() -> None:
    """For the one length traced: torch's own exporter takes it for a constant."""
    model = fused_rnn.to_torch(make("GRU", 4, 6, 2, bidirectional=True)[0])
    program = exported(model, (torch.randn(5, 3, 4),), translate=False)
    check(program, model, torch.randn(5, 3, 4))


def test_a_reset_is_refused() -> None:
    class Reset(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = make("GRU", 4, 6)[0]

        def forward(self, x: Tensor, reset: Tensor) -> Tensor:
            return self.inner(x, reset=reset)[0]

    with pytest.raises(torch.onnx.OnnxExporterError) as raised:
        exported(Reset(), (torch.randn(5, 3, 4), torch.zeros(5, 3, dtype=torch.bool)))
    cause: BaseException | None = raised.value
    while cause is not None and not isinstance(cause, NotImplementedError):
        cause = cause.__cause__
    assert "reset: got a tensor, expected None" in str(cause)


def test_a_projection_and_an_ensemble_are_refused() -> None:
    forward = fused_rnn.onnx.translations()[torch.ops.fused_rnn.forward.default]
    x, w = torch.empty(5, 3, 4), [torch.empty(24, 4), torch.empty(24, 6)]
    with pytest.raises(NotImplementedError, match="proj_size: got a projection, expected none"):
        forward(x, [*w, torch.empty(3, 6)], None, None, None, None, "lstm", [1], "none", False)
    with pytest.raises(NotImplementedError, match=r"directions: got \[1, 1, 1\], expected \[1\] or \[1, -1\]"):
        forward(x, w * 3, None, None, None, None, "lstm", [1, 1, 1], "none", False)


def test_without_translations_the_exporter_names_the_op() -> None:
    with pytest.raises(torch.onnx.OnnxExporterError, match="fused_rnn"):
        exported(make("GRU", 4, 6)[0], (torch.randn(5, 3, 4),), translate=False)


def test_every_cell_has_a_node() -> None:
    assert set(fused_rnn.onnx._NODES) == set(fused_rnn.cells.CELLS)
