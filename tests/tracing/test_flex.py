"""FlexRNN under torch.compile, torch.export, AOTInductor, torch.jit, torch.fx, fake tensors and the ONNX exporter."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import Dim
from user_cells import USER_CELLS, chain, gru, indrnn, lstm

import fused_rnn
from fused_rnn import FlexRNN, ops

pytestmark = [
    pytest.mark.compile,
    pytest.mark.skipif(ops.MISSING is not None, reason=f"programs hold the cpu backend's ops: {ops.MISSING}"),
    # torch's own, from what it calls inside
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),
]

T, B = Dim("T", min=2), Dim("B", min=2)
ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _fresh_compiler() -> None:
    torch._dynamo.reset()


blocks = fused_rnn.cell(gates=chain.gates, states=chain.states, params=chain.params, diagonal=2)(chain.step)


class Model(nn.Module):
    """Everything at once, in by position as exporters take it."""

    def __init__(self, cell: Any, **options: Any) -> None:
        super().__init__()
        init = dict.fromkeys(cell.params, 0.4)
        self.rnn = FlexRNN(
            cell,
            4,
            6,
            2,
            bidirectional=True,
            batch_first=True,
            heads=1 if cell.diagonal > 1 else 2,
            init=init,
            return_sequences="states",
            **options,
        )

    def forward(self, x: Tensor, lengths: Tensor, reset: Tensor) -> Any:
        return self.rnn(x, lengths=lengths, reset=reset)


def arguments(batch: int, steps: int) -> tuple[Tensor, Tensor, Tensor]:
    lengths = torch.randint(0, steps + 1, (batch,))
    return torch.randn(batch, steps, 4), lengths, torch.rand(batch, steps) < 0.3


def leaves(value: Any) -> list[Tensor]:
    return list(torch.utils._pytree.tree_leaves(value))


def assert_close(got: Any, expected: Any) -> None:
    for a, b in zip(leaves(got), leaves(expected), strict=True):
        torch.testing.assert_close(a, b)


def gradients(outputs: Any, module: nn.Module) -> list[Tensor]:
    return list(torch.autograd.grad(sum(t.square().sum() for t in leaves(outputs)), list(module.parameters())))


@pytest.mark.parametrize("save", ["gates", "recompute"])
@pytest.mark.parametrize("cell", [*USER_CELLS.values(), blocks], ids=repr)
def test_one_graph_for_every_length(cell: Any, save: str) -> None:
    """And one that a new cell, which is traced between two calls, does not compile again."""
    model, counter = Model(cell, save=save), CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for steps in (5, 9):
        args = arguments(3, steps)
        for t in (args[0], args[2]):
            torch._dynamo.mark_dynamic(t, 1)
        got, expected = compiled(*args), model(*args)
        assert_close(got, expected)
        assert_close(gradients(got, model), gradients(expected, model))

        @fused_rnn.cell(gates=1)
        def another(x: Any, r: Any, s: Any, p: Any, number: float = torch.rand(()).item()) -> Any:
            return torch.tanh(x[0] + number * r[0])

        FlexRNN(another, 4, 6)(torch.randn(2, 3, 4))
    assert counter.frame_count == 1


def test_a_new_cell_compiles_no_module_again() -> None:
    module, counter = fused_rnn.LSTM(4, 6), CompileCounterWithBackend("eager")
    compiled, x = torch.compile(module, backend=counter, fullgraph=True), torch.randn(5, 3, 4)
    compiled(x)

    @fused_rnn.cell(gates=1)
    def another(x: Any, r: Any, s: Any, p: Any) -> Any:
        return torch.sin(x[0] - 2 * r[0])

    FlexRNN(another, 4, 6)(x)
    compiled(x)
    assert counter.frame_count == 1


def test_inductor() -> None:
    model = FlexRNN(chain, 4, 6, heads=2, return_sequences="states")
    compiled = torch.compile(model, fullgraph=True, dynamic=True)
    for steps in (5, 7):
        args = (torch.randn(steps, 3, 4),)
        got, expected = compiled(*args), model(*args)
        assert_close(got, expected)
        assert_close(gradients(got, model), gradients(expected, model))
    with torch.no_grad():
        assert_close(compiled(*args), model(*args))


def test_a_compiled_single_step() -> None:
    module = FlexRNN(lstm, 4, 6)
    compiled, x = torch.compile(module, fullgraph=True, backend="aot_eager"), torch.randn(1, 3, 4)
    got, expected = compiled(x), module(x)
    assert_close(got, expected)
    assert_close(gradients(got, module), gradients(expected, module))


@pytest.mark.parametrize(
    ("cell", "strict"), [(chain, True), (lstm, False), (gru, False), (indrnn, False), (blocks, True)]
)
def test_an_exported_program_holds_the_cell(cell: Any, strict: bool) -> None:
    """Whole, as the op's argument; it takes any length and batch, and trains."""
    model = Model(cell)
    shapes = ({0: B, 1: T}, {0: B}, {0: B, 1: T})
    program = torch.export.export(model, arguments(3, 5), dynamic_shapes=shapes, strict=strict)
    nodes = [node for node in program.graph.nodes if "fused_rnn" in str(node.target)]
    assert [str(node.target) for node in nodes] == ["fused_rnn.forward.default"] * 2
    assert all(cell.descriptor().name in node.args for node in nodes)
    assert "'gates'" not in str(program.graph)
    loaded = program.module()
    for batch, steps in ((2, 2), (7, 33)):
        args = arguments(batch, steps)
        got, expected = loaded(*args), model(*args)
        assert_close(got, expected)
        assert_close(gradients(got, loaded), gradients(expected, model))


USE = """
args, expected = torch.load({numbers!r})
got = {run}(*args)
torch.testing.assert_close(torch.utils._pytree.tree_leaves(got), torch.utils._pytree.tree_leaves(expected))
"""


def in_a_fresh_process(program: str) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("cell", [chain, blocks], ids=repr)
def test_saved_programs_run_where_nobody_knows_the_step(cell: Any, tmp_path: Path) -> None:
    """With the package imported, or nothing but its library of ops loaded; a package of AOTInductor's likewise."""
    model, args = Model(cell), arguments(4, 9)
    numbers, saved, package = (str(tmp_path / name) for name in ("numbers.pt", "program.pt2", "package.pt2"))
    with torch.no_grad():
        torch.save((args, model(*args)), numbers)
        shapes = ({0: B, 1: T}, {0: B}, {0: B, 1: T})
        program = torch.export.export(model, arguments(3, 5), dynamic_shapes=shapes)
    torch.export.save(program, saved)
    load = f"program = torch.export.load({saved!r}).module()"
    use = USE.format(numbers=numbers, run="program")
    in_a_fresh_process(f"import torch, fused_rnn\n{load}\n{use}")
    quick = {"aot_inductor.compile_wrapper_opt_level": "O0"}  # of g++'s time, most goes into the wrapper around the ops
    torch._inductor.aoti_compile_and_package(program, package_path=package, inductor_configs=quick)
    library = f"import sys, torch\ntorch.ops.load_library({ops._C.__file__!r})\nassert 'fused_rnn' not in sys.modules\n"
    compiled = f"package = torch._inductor.aoti_load_package({package!r})"
    in_a_fresh_process(library + load + use + compiled + USE.format(numbers=numbers, run="package"))


def test_torchscript() -> None:
    """A trace holds our op; there is nothing for torch.jit.script to compile."""
    model, args = Model(chain), arguments(3, 5)
    traced = torch.jit.trace(model, args)
    assert "fused_rnn::forward" in str(traced.inlined_graph)
    file = io.BytesIO()
    torch.jit.save(traced, file)
    file.seek(0)
    loaded = torch.jit.load(file)
    for steps in (2, 33):
        args = arguments(3, steps)
        got, expected = loaded(*args), model(*args)
        assert_close(got, expected)
        assert_close(gradients(got, loaded), gradients(expected, model))
    with pytest.raises(NotImplementedError, match=r"FlexRNN: torch\.jit\.script compiles"):
        torch.jit.script(FlexRNN(lstm, 4, 6))


def test_a_leaf_of_fx() -> None:
    graph = torch.fx.symbolic_trace(Model(chain)).graph
    assert [node.target for node in graph.nodes if node.op == "call_module"] == ["rnn"]


@pytest.mark.parametrize("grad", [True, False])
def test_fake_tensors(grad: bool) -> None:
    with FakeTensorMode(), torch.set_grad_enabled(grad):
        y, after = Model(chain)(torch.empty(3, 5, 4), torch.empty(3, dtype=torch.int64), torch.empty(3, 5).bool())
    assert [(tuple(t.shape), t.requires_grad) for t in y] == [((3, 5, 12), grad)] * 3
    assert [tuple(t.shape) for t in after] == [(4, 3, 6)] * 3


def test_onnx_has_no_node_for_it() -> None:
    with pytest.raises(Exception) as refused:  # torch.onnx's own, with ours as its cause
        torch.onnx.export(FlexRNN(lstm, 4, 6), (torch.randn(5, 3, 4),), io.BytesIO(), verbose=False)
    causes, error = [], refused.value
    while error is not None:
        causes.append(str(error))
        error = error.__cause__
    assert any("cell: got 'lstm', for which ONNX has no node" in cause for cause in causes), causes
