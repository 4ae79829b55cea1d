"""torch.export: any length and batch, saved and loaded in a fresh process, trained; AOTInductor's packages."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo
from counterparts import CELLS, SEQUENCES, flatten, make, states
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.nn.utils.rnn import pack_padded_sequence

from fused_rnn import ops

pytestmark = [
    pytest.mark.compile,
    pytest.mark.skipif(ops.MISSING is not None, reason=f"exported programs hold the cpu backend's ops: {ops.MISSING}"),
    # torch's own, from what it calls inside
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"),
]

T, B = Dim("T", min=2), Dim("B", min=2)
ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _fresh_compiler() -> None:
    torch._dynamo.reset()


def assert_close(got: Any, expected: Any) -> None:
    for a, b in zip(flatten(got), flatten(expected), strict=True):
        torch.testing.assert_close(a, b)


def called(program: ExportedProgram) -> set[str]:
    """The ops of ours that a program calls, those of its submodules too."""
    graphs = [m for m in program.graph_module.modules() if isinstance(m, torch.fx.GraphModule)]
    names = {str(node.target) for g in graphs for node in g.graph.nodes if node.op == "call_function"}
    return {name for name in names if name.startswith("fused_rnn.")}


class Model(nn.Module):
    """With states and lengths in, as exporters take them: by position."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.enter = nn.Linear(4, 4)
        self.rnn = make(name, 4, 6, 2, bidirectional=True, batch_first=True)[0]
        self.leave = nn.Linear(12, 3)

    def forward(self, x: Tensor, hx: Any, lengths: Tensor) -> tuple[Tensor, Any]:
        y, hx = self.rnn(self.enter(x), hx, lengths=lengths)
        return self.leave(y), hx

    def arguments(self, batch: int, steps: int) -> tuple[Tensor, Any, Tensor]:
        lengths = torch.randint(1, steps + 1, (batch,))
        return torch.randn(batch, steps, 4), states(self.rnn, batch), lengths

    def dynamic(self) -> Any:
        state = {1: B}
        return ({0: B, 1: T}, (state, state) if self.rnn.mode == "LSTM" else state, {0: B})


@pytest.mark.parametrize(("name", "strict"), [("LSTM", True), ("LSTM", False), ("GRU", True), ("RNN", False)], ids=str)
def test_any_length_and_batch(name: str, strict: bool) -> None:
    """Traced with gradients enabled, as everybody does: the program keeps nothing for a backward all the same."""
    model = Model(name).eval()
    program = torch.export.export(model, model.arguments(3, 5), dynamic_shapes=model.dynamic(), strict=strict)
    assert called(program) == {"fused_rnn.forward.default"}
    assert "'gates'" not in str(program.graph)
    decomposed = program.run_decompositions()
    assert called(decomposed) == {"fused_rnn.forward.default"}
    for batch, steps in ((2, 2), (7, 33)):
        args = model.arguments(batch, steps)
        with torch.no_grad():
            expected = model(*args)
            assert_close(program.module()(*args), expected)
            assert_close(decomposed.module()(*args), expected)


@pytest.mark.parametrize("name", SEQUENCES)
def test_exported_programs_train(name: str) -> None:
    """The gradients are the model's: none is lost at the op."""
    model = Model(name)
    loaded = torch.export.export(model, model.arguments(3, 5), dynamic_shapes=model.dynamic()).module()
    args = model.arguments(4, 9)
    args[0].requires_grad_()
    expected, got = flatten(model(*args)), flatten(loaded(*args))
    own, copied = [dict(m.named_parameters()) for m in (model, loaded)]
    assert own.keys() == copied.keys()
    for outputs, parameters in ((expected, own), (got, copied)):
        sum(t.square().sum() for t in outputs).backward(inputs=list(parameters.values()))
    for key, p in own.items():
        torch.testing.assert_close(copied[key].grad, p.grad)


@pytest.mark.parametrize("name", CELLS)
def test_cells(name: str) -> None:
    """Without a gradient the op for one step; with one the op of a layer, which has a gradient."""
    model, _ = make(name, 4, 6)
    h = torch.randn(5, 6)
    args = (torch.randn(5, 4), (h, torch.randn(5, 6)) if name == "LSTMCell" else h)
    shapes = ({0: B}, ({0: B}, {0: B}) if name == "LSTMCell" else {0: B})
    with torch.no_grad():
        program = torch.export.export(model, args, dynamic_shapes=shapes)
        assert called(program) == {"fused_rnn.step.default"}
        larger = torch.utils._pytree.tree_map(lambda t: torch.randn(7, t.shape[1]), args)
        assert_close(program.module()(*larger), model(*larger))
    program = torch.export.export(model, args, dynamic_shapes=shapes)
    assert called(program) == {"fused_rnn.forward.default"}
    loaded = program.module()
    grads = [
        torch.autograd.grad(sum(t.square().sum() for t in flatten(m(*args))), list(m.parameters()))
        for m in (model, loaded)
    ]
    assert_close(grads[1], grads[0])


def test_an_op_by_itself_is_differentiable_once() -> None:
    model, _ = make("GRU", 4, 6)
    loaded = torch.export.export(model, (torch.randn(5, 3, 4),)).module()
    x = torch.randn(5, 3, 4, requires_grad=True)
    with pytest.raises(RuntimeError, match="an op by itself is differentiable once; differentiate the module"):
        torch.autograd.grad(loaded(x)[0].sum(), x, create_graph=True)


def in_a_fresh_process(program: str) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


USE = """
args, expected = torch.load({numbers!r})
got = {run}(*args)
torch.testing.assert_close(torch.utils._pytree.tree_leaves(got), torch.utils._pytree.tree_leaves(expected))
"""


def test_saved_programs_run_in_a_fresh_process(tmp_path: Path) -> None:
    """With the package imported, or nothing but its library of ops loaded; a package of AOTInductor's likewise."""
    model, _ = make("LSTM", 4, 6, 2, bidirectional=True)
    args = (torch.randn(9, 4, 4),)
    numbers, saved, package = (str(tmp_path / name) for name in ("numbers.pt", "program.pt2", "package.pt2"))
    with torch.no_grad():
        torch.save((args, model(*args)), numbers)
        program = torch.export.export(model, (torch.randn(5, 3, 4),), dynamic_shapes=({0: T, 1: B},))
    torch.export.save(program, saved)
    load = f"program = torch.export.load({saved!r}).module()"
    in_a_fresh_process(f"import torch, fused_rnn\n{load}" + USE.format(numbers=numbers, run="program"))

    quick = {"aot_inductor.compile_wrapper_opt_level": "O0"}  # of g++'s time, most goes into the wrapper around the ops
    torch._inductor.aoti_compile_and_package(program, package_path=package, inductor_configs=quick)
    library = f"import sys, torch\ntorch.ops.load_library({ops._C.__file__!r})\nassert 'fused_rnn' not in sys.modules\n"
    compiled = f"package = torch._inductor.aoti_load_package({package!r})"
    in_a_fresh_process(
        library
        + load
        + USE.format(numbers=numbers, run="program")
        + compiled
        + USE.format(numbers=numbers, run="package")
    )


class Packs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn = make("GRU", 4, 6)[0]

    def forward(self, x: Tensor, lengths: Tensor) -> Any:
        return self.rnn(pack_padded_sequence(x, lengths, enforce_sorted=False))[1]


def test_a_model_that_packs_is_told_of_lengths() -> None:
    """torch's exporter knows no packing; without it, the same model exports."""
    packs, given = Packs().eval(), (torch.randn(7, 3, 4), torch.tensor([5, 7, 2]))
    with pytest.raises(Exception, match=r"expected .* nothing exports packing, give the padded batch and lengths="):
        torch.export.export(packs, given, strict=False)

    class Exports(Packs):
        def forward(self, x: Tensor, lengths: Tensor) -> Any:
            return self.rnn(x, lengths=lengths)[1]

    exports = Exports().eval()
    exports.load_state_dict(packs.state_dict())
    program = torch.export.export(exports, given, dynamic_shapes=({0: T, 1: B}, {0: B}))
    longer = (torch.randn(12, 5, 4), torch.tensor([3, 12, 1, 12, 8]))
    assert_close(program.module()(*longer), packs(*longer))
