"""The Triton backend around its loops: ops, transforms, choice of schedule, what it refuses and how it says so."""

from __future__ import annotations

import itertools
import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import Case, Inputs, inputs
from nonfinite import assert_as_in_torch, with_nan, with_silence
from oracle import Results, by_backend, forward
from tolerances import tf32
from torch import Tensor
from triton_cases import DEVICE, LOOPS, MARKS, here, quicker_interpreter

import fused_rnn
from fused_rnn.backends import triton as backend
from fused_rnn.call import BackwardCall, LayerCall
from fused_rnn.cells import CELLS
from fused_rnn.dispatch import choose
from fused_rnn.functional import lstm
from fused_rnn.gpu.directions import direction_bits
from fused_rnn.gpu.loops import Layer
from fused_rnn.triton import aot, device, launch, measured, planner, tiles
from fused_rnn.triton.schedule import Schedule, Shape, Tile
from fused_rnn.triton.target import ARCHITECTURES, INTERPRETER

pytestmark = MARKS
QUICK = ("test_schema", "test_faketensor")
PROBLEM = Case("lstm").problem()._replace(device=DEVICE)


@pytest.fixture(autouse=True)
def _quick() -> None:
    quicker_interpreter()


def call_of(case: Case, given: Inputs, save: str, keep_hidden: bool = True) -> LayerCall:
    masks, directions = (given.lengths, given.reset), [1, -1][: case.R]
    return LayerCall(given.x, given.weights, given.hx, *masks, case.cell, directions, save, keep_hidden)


def backward_of(case: Case, given: Inputs, save: str) -> BackwardCall:
    call, states = call_of(case, given, save), len(CELLS[case.cell].states)
    saved, *histories, hidden = backend.forward(call)[1 + states :]
    kept = (hidden, saved, histories)
    return BackwardCall(given.dout[0], given.dout[1:], *call[:5], *kept, *call[5:8], True, True)


# --- the ops


@pytest.mark.parametrize("save", ["none", "gates", "recompute"])
@pytest.mark.parametrize("cell", CELLS)
def test_ops_pass_opcheck(cell: str, save: str) -> None:
    case = Case(cell, T=2, B=2, H=3, bidirectional=True, lengths=True, reset=True)
    given = here(inputs(case))
    full = (*QUICK, "test_aot_dispatch_dynamic") if (cell, save) == ("lstm", "gates") else QUICK
    torch.library.opcheck(backend.forward_op, tuple(call_of(case, given, save)), test_utils=full)
    unkept = call_of(case, given, save, keep_hidden=False)
    torch.library.opcheck(backend.forward_op, tuple(unkept), test_utils=QUICK)
    if save != "none":
        call = backward_of(case, given, save)
        torch.library.opcheck(backend.backward_op, tuple(call), test_utils=full)
        few = call._replace(dy=None, need_dx=False, need_dw=False)
        torch.library.opcheck(backend.backward_op, tuple(few), test_utils=QUICK)


@pytest.mark.parametrize("save", ["gates", "recompute"])
@pytest.mark.parametrize("loop", LOOPS)
def test_same_bits_every_time_all_written_and_none_shared(loop: str, save: str) -> None:
    """No atomics in a gradient. Uninitialised memory is NaN here: none may come out."""
    case = Case(
        "gru" if loop.startswith("solo") else "lstm", T=3, B=3, H=17, bidirectional=True, lengths=True, reset=True
    )
    given = here(inputs(case))
    with planner.override(**LOOPS[loop]):
        runs = []
        for _ in range(2):
            grads = backend.backward(backward_of(case, given, save))
            runs.append([*backend.forward(call_of(case, given, save)), *grads])
    for one, other in zip(*runs, strict=True):
        assert not one.isnan().any()
        assert torch.equal(one, other)
    every = [t for t in (*runs[1], given.x, *given.weights, *given.hx, *given.dout) if t.numel()]
    assert len({t.untyped_storage().data_ptr() for t in every}) == len(every)


def test_a_team_counts_every_arrival(monkeypatch: pytest.MonkeyPatch) -> None:
    """A member that does not report a step would leave its team waiting, which the interpreter's order cannot show."""
    made: list[Tensor] = []
    original = launch.new_counters
    monkeypatch.setattr(launch, "new_counters", lambda *args: made.append(original(*args)) or made[-1])
    case = Case("lstm", T=4, B=33, H=17, bidirectional=True)
    with planner.override(loop="cooperative", tile=Tile(16, 16, 16, 4)):
        by_backend(case, here(inputs(case)), "triton")
    forward_counts, backward_counts = (counters[:, 0].tolist() for counters in made)
    assert forward_counts == [2 * 4] * 6  # 2 directions x 3 batch tiles; a team of 2, 4 steps
    assert backward_counts == [2 * 5] * 6  # and the product that closes the loop
    assert all(int(counters[:, 1:].abs().sum()) == 0 for counters in made)


def test_sizes_of_nothing() -> None:
    case = Case("lstm", B=0, bidirectional=True)
    results = by_backend(case, here(inputs(case)), "triton")
    assert results["y"].shape == (5, 0, 34)
    assert results["dweights[1]"].abs().sum() == 0


def test_padding_may_hold_anything() -> None:
    """NaN in one sequence, or past its end, reaches neither other sequences nor the gradients of weights."""
    case = Case("gru", T=4, B=4, H=5, lengths=True, bidirectional=True)
    given = here(inputs(case))
    lengths = torch.tensor([4, 2, 3, 4], device=DEVICE)
    x = given.x.clone()
    x[2:, 1] = float("nan")
    clean = by_backend(case, given._replace(lengths=lengths), "triton")
    dirty = by_backend(case, given._replace(lengths=lengths, x=x), "triton")
    for name, value in clean.items():
        assert torch.equal(dirty[name], value), name


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of the interpreter
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("cell", CELLS)
def test_what_is_not_finite(cell: str, loop: str, dtype: torch.dtype) -> None:
    def run(case: Case, given: Inputs) -> Results:
        with planner.override(**LOOPS[loop]):
            results = by_backend(case, here(given), "triton")
        return {name: value.cpu() for name, value in results.items()}

    team = not loop.startswith("solo")
    case = Case(cell, T=3, D=5, hx=team, bidirectional=team, dtype=dtype)
    for make in (with_silence, with_nan):
        assert_as_in_torch(case, make(case), run)


def test_results_are_no_views() -> None:
    """They may be changed in place, as torch's."""
    for module in (fused_rnn.GRU(4, 5, batch_first=True), fused_rnn.LSTM(4, 5, proj_size=2, bidirectional=True)):
        module.to(DEVICE).backend = "triton"
        y, _ = module(torch.randn(2, 3, 4, device=DEVICE))
        y.mul_(2).sum().backward()
        assert not y._is_view() and all(p.grad is not None for p in module.parameters())


def test_an_input_per_recurrence() -> None:
    case = Case("gru", T=3, bidirectional=True)
    given = here(inputs(case))
    each = given.x.unsqueeze(2).repeat(1, 1, 2, 1)
    shared, apart = (backend.forward(call_of(case, given._replace(x=x), "gates")) for x in (given.x, each))
    torch.testing.assert_close(shared[:2], apart[:2])
    dx, *rest = backend.backward(backward_of(case, given._replace(x=each), "gates"))
    sum_dx, *others = backend.backward(backward_of(case, given, "gates"))
    torch.testing.assert_close(dx.sum(2), sum_dx)
    torch.testing.assert_close(rest, others)


# --- transforms


def test_double_backward_is_the_composite() -> None:
    case = Case("lstm", T=3, B=2, H=3)
    given = here(inputs(case))

    def second(name: str) -> list[Tensor]:
        leaves = [t.clone().requires_grad_() for t in (given.x, *given.weights)]
        y = lstm(leaves[0], leaves[1:], tuple(given.hx), backend=name)[0]
        grads = torch.autograd.grad(y.square().sum(), leaves, create_graph=True)
        return list(torch.autograd.grad(sum(g.square().sum() for g in grads), leaves))

    for ours, theirs in zip(second("triton"), second("reference"), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3 * float(theirs.abs().max()))


def test_vmap_over_an_ensemble_is_one_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case("lstm", T=3, B=2, H=3, bidirectional=True)
    given = here(inputs(case))
    members = [torch.stack([w, 2 * w, -w]) for w in given.weights]
    launches: list[int] = []
    original = launch.Loops.forward

    def counted(loops: launch.Loops, **given: Any) -> None:
        launches.append(loops.layer.recurrences)
        original(loops, **given)

    monkeypatch.setattr(launch.Loops, "forward", counted)

    def run(*weights: Tensor) -> Tensor:
        return lstm(given.x, weights, tuple(given.hx), bidirectional=True, backend="triton")[0]

    with torch.no_grad():
        together = torch.func.vmap(run)(*members)
        assert launches == [6]
        for i in range(3):
            torch.testing.assert_close(together[i], run(*(m[i] for m in members)))


@pytest.mark.compile
def test_compiles_as_one_graph_for_any_length() -> None:
    module = fused_rnn.GRU(3, 4, bidirectional=True, backend="triton").to(DEVICE)
    graphs = []

    def note(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph)
        return graph

    compiled = torch.compile(module, backend=note, fullgraph=True, dynamic=True)
    for steps in (5, 6, 9):
        x = torch.randn(steps, 2, 3, device=DEVICE)
        torch._dynamo.mark_dynamic(x, 0)
        y, _ = compiled(x)
        torch.testing.assert_close(y, module(x)[0])
        y.sum().backward()
    assert len(graphs) == 1


def test_autocast_gives_its_dtype() -> None:
    case = Case("lstm", T=2, B=2, H=3)
    given = here(inputs(case))
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        y, (h, c) = forward_pair = lstm(given.x, given.weights, tuple(given.hx), backend="triton")
    assert {t.dtype for t in (y, h, c)} == {torch.bfloat16}, forward_pair


def test_module_takes_a_packed_sequence() -> None:
    ours, counterpart = fused_rnn.LSTM(3, 4, 2, backend="triton"), torch.nn.LSTM(3, 4, 2)
    ours.load_state_dict(counterpart.state_dict())
    ours, counterpart = ours.to(DEVICE), counterpart.to(DEVICE)
    x = torch.nn.utils.rnn.pack_padded_sequence(torch.randn(5, 3, 3, device=DEVICE), [2, 5, 1], enforce_sorted=False)
    (packed, (h, c)), (expected, (h_counterpart, c_counterpart)) = ours(x), counterpart(x)
    for a, b in ((packed.data, expected.data), (h, h_counterpart), (c, c_counterpart)):
        torch.testing.assert_close(a, b)


def test_one_step() -> None:
    cell = fused_rnn.LSTMCell(3, 4, device=DEVICE)
    x, h, c = (torch.randn(2, n, device=DEVICE) for n in (3, 4, 4))
    weights = [cell.weight_ih, cell.weight_hh, cell.bias_ih, cell.bias_hh]
    ours = backend.step(x, [w.detach() for w in weights], [h, c], "lstm")
    torch.testing.assert_close(ours, list(cell(x, (h, c))))


# --- what it refuses


def test_reasons() -> None:
    supports = backend.supports
    assert supports(PROBLEM) is None
    assert (
        supports(PROBLEM._replace(dtype=torch.float64)) == "it knows float32, bfloat16 and float16, not torch.float64"
    )
    assert supports(PROBLEM._replace(forward_ad=True)) == "it has no forward-mode derivative"
    reason = supports(PROBLEM._replace(batch=1 << 20, hidden_size=1024, width=1024))
    assert reason == "B·R·H·4 = 4294967296 is beyond the 2^31 that its kernels can address in a step"
    reason = supports(PROBLEM._replace(hidden_size=50_000, width=50_000))
    assert reason == "H·H = 2500000000 is beyond the 2^31 that its kernels can address in a gate's W_hh"
    with pytest.raises(NotImplementedError, match="triton: it has no forward-mode derivative"):
        choose(PROBLEM._replace(forward_ad=True), "triton")


def test_sizes_beyond_the_kernels_reach_are_refused_by_the_op_too() -> None:
    """Under vmap B and R grow after dispatch has asked. Shapes alone: nobody has such tensors."""
    for sizes, message in (((1 << 31, 1, 1), "T = 2147483648"), ((1, 1 << 20, 1024), "B·R·H·4 = 4294967296")):
        layer = Layer(CELLS["gru"], *sizes, (1,), None, None)
        with pytest.raises(RuntimeError, match=f"x: .*{message}"):
            backend._loops(layer, torch.zeros(1, 1, 1, device=DEVICE), False)


def test_more_steps_than_a_team_can_count_are_refused() -> None:
    team = Schedule("cooperative", Tile(16, 16, 16, 4), 64)
    for steps, refused in ((1 << 24, False), (1 << 25, True)):
        layer = Layer(CELLS["gru"], steps, 16, 1024, (1,), None, None)
        with pytest.raises(NotImplementedError, match=r"beyond the 2\^31") if refused else nullcontext():
            launch.new_counters(layer, team, torch.device(DEVICE))


def test_reasons_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "interpreting", lambda: False)
    assert "TRITON_INTERPRET=1" in str(device.refusal("cpu"))
    assert "on a CUDA or ROCm GPU, not on xpu" in str(device.refusal("xpu"))
    monkeypatch.setattr(device, "interpreting", lambda: True)
    assert "takes tensors on the cpu, not on cuda" in str(device.refusal("cuda"))
    monkeypatch.setattr(device, "installed", lambda: False)
    assert device.refusal("cuda") == device.refusal("cpu") == "Triton is not installed (pip install triton)"
    case = Case("lstm")
    with pytest.raises(NotImplementedError, match="triton: Triton is not installed"):
        forward(case, inputs(case), "triton")
    with pytest.raises(RuntimeError, match="x: Triton is not installed"):
        backend.forward(call_of(case, inputs(case), "none"))


def test_wrong_devices_are_refused() -> None:
    case = Case("lstm", lengths=True)
    given = here(inputs(case))
    assert given.lengths is not None
    wrong = given._replace(lengths=given.lengths.to("meta"))
    with pytest.raises(RuntimeError, match=r"got tensors on .* and on meta, expected all on one device"):
        backend.forward(call_of(case, wrong, "none"))


WRONG: list[tuple[str, Any, str]] = [
    ("x", torch.zeros(5, 3), r"x: got \[5, 3\], expected \[T, B, D\] or \[T, B, 2, D\]"),
    ("x", torch.zeros(0, 3, 4), r"x: got \[0, 3, 4\], expected at least one step"),
    ("h", torch.zeros(2, 3, 5), r"h0: got \[2, 3, 5\], expected \[2, 3, 17\]"),
    ("c", torch.zeros(2, 3, 17, dtype=torch.float64), "c0: got torch.float64, expected torch.float32"),
    ("lengths", torch.zeros(3, dtype=torch.int32), "lengths: got torch.int32, expected torch.int64"),
    ("reset", torch.zeros(5, 2, dtype=torch.bool), r"reset: got \[5, 2\], expected \[5, 3\]"),
    ("directions", [1], "weights: got 8 tensors for 1 recurrence"),
    ("directions", [], "weights: got 8 tensors for 0 recurrence"),
    ("save", "all", "save: got 'all', expected none, gates or recompute"),
]


@pytest.mark.parametrize(("name", "value", "message"), WRONG, ids=[message[:20] for *_, message in WRONG])
def test_the_op_names_what_does_not_fit(name: str, value: Any, message: str) -> None:
    """No pointer reaches a kernel with sizes that are not its own."""
    case = Case("lstm", bidirectional=True, lengths=True, reset=True)
    call = call_of(case, here(inputs(case)), "none")
    value = value.to(DEVICE) if isinstance(value, Tensor) else value
    if name in "hc":
        name, value = "states", [value if name == state else t for state, t in zip("hc", call.states, strict=True)]
    with pytest.raises(RuntimeError, match=message):
        backend.forward(call._replace(**{name: value}))


@pytest.mark.parametrize(
    ("field", "at", "named"),
    [
        ("dy", None, "dy"), ("dstates", 0, "h_n's gradient"), ("dstates", 1, "c_n's gradient"), ("x", None, "weights"),
        ("weights", 0, "weights"), ("states", 0, "h0"), ("states", 1, "c0"), ("lengths", None, "lengths"),
        ("reset", None, "reset"), ("hidden", None, "hidden"), ("saved", None, "saved"), ("histories", 0, "histories"),
    ],
)  # fmt: skip
def test_the_backward_op_names_what_does_not_fit(field: str, at: int | None, named: str) -> None:
    case = Case("lstm", T=2, B=3, H=4, lengths=True, reset=True)
    call = backward_of(case, here(inputs(case)), "gates")
    given = getattr(call, field)
    cut = given[..., :-1] if at is None else [t[..., :-1] if j == at else t for j, t in enumerate(given)]
    with pytest.raises(RuntimeError, match=f"{named}.*: got .*, expected"):
        backend.backward(call._replace(**{field: cut}))


def test_directions_without_a_pattern() -> None:
    assert direction_bits([1, -1]) == (2, 2)
    assert direction_bits([-1] * 100) == (1, 1)
    assert direction_bits([1, -1, -1] * 50) == (6, 3)
    with pytest.raises(NotImplementedError, match="directions: 101 in no pattern"):
        direction_bits([1] * 100 + [-1])


@pytest.mark.parametrize("save", ["gates", "recompute"])
@pytest.mark.parametrize("cell", CELLS)
def test_arguments_have_the_types_that_are_compiled_for(cell: str, save: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What `make cubin` compiles is what a launch does: the key in Triton's cache has their types."""
    launched: list[tuple[Any, dict[str, Any], tuple[Any, ...]]] = []
    original = launch.Launches.__call__

    def spied(self: Any, tiles: int, args: Any, stage: int) -> None:
        constants = self.constants | self._of_schedule(self.config.schedule, stage)
        launched.append((self.kernel, constants, args))
        original(self, tiles, args, stage)

    monkeypatch.setattr(launch.Launches, "__call__", spied)
    for masks in (False, True):
        case = Case(cell, T=2, B=2, H=3, dtype=torch.bfloat16, lengths=masks, reset=masks)
        backend.backward(backward_of(case, here(inputs(case)), save))
    assert {kernel for kernel, *_ in launched} == {launch.fwd_kernel, launch.bwd_kernel}
    names = {torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.int32: "*i32", torch.int64: "*i64"}
    for kernel, constants, args in launched:
        expected = aot._pointers(kernel, CELLS[cell], "bfloat16", {"REPLAY": save == "recompute", **constants})
        given = dict(zip(kernel.arg_names, args, strict=False))
        for name, kinds in expected.items():
            found = given[name]
            assert kinds == (tuple(names[t.dtype] for t in found) if isinstance(found, tuple) else names[found.dtype])
        assert not any(isinstance(value, (Tensor, tuple)) for name, value in given.items() if name not in expected)


# --- which schedule


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_there_is_a_plan_for_everything(arch: str) -> None:
    known = ARCHITECTURES[arch]
    for cell in CELLS.values():
        for kind in ("half", "tf32", "ieee"):
            for hidden in (1, 17, 32, 130, 256, 512, 768, 1024, 2048, 5000):
                for backward in (False, True):
                    shape = Shape(cell.name, cell.gates, kind, hidden, backward)
                    shipped = planner.shipped(shape, known)
                    for batch in (1, 16, 64, 256, 4096):
                        schedule = planner.choose(shape, known, batch, 2)
                        assert schedule in shipped
                        assert schedule.team * schedule.spread * schedule.tile.units >= hidden
                        assert schedule.loop != "cooperative" or schedule.team * 2 <= known.processors
                        assert schedule.loop != "stepwise" or batch > 64 or hidden > 2000 or known.processors < 80


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_what_a_streamed_product_stages_fits(arch: str) -> None:
    """Of up to sixteen gates, by what Triton was seen to take."""
    known = ARCHITECTURES[arch]
    for kind, gates, hidden in itertools.product(("half", "tf32", "ieee"), range(1, 17), (17, 130, 512, 2048)):
        for backward, large in itertools.product((False, True), repeat=2) if kind != "tf32" or known.nvidia else ():
            shape = Shape("lstm", gates, kind, hidden, backward)
            tile = tiles.stream(shape, known, large)
            rows = tile.batch * (gates if backward else 1) + tile.units * gates
            assert rows * tile.depth * shape.size * (tile.stages - 1) <= known.shared
            assert tile.depth >= 16


def test_h_up_to_512_never_takes_a_launch_a_step_on_an_h100() -> None:
    for gates in (1, 3, 4):
        for hidden in (32, 64, 128, 256, 512):
            for batch in (1, 8, 32, 64, 128, 256):
                shape = Shape("lstm", gates, "half", hidden, False)
                assert planner.choose(shape, ARCHITECTURES["sm_90"], batch, 1).loop != "stepwise"


def test_forcing_a_schedule() -> None:
    shape = Shape("lstm", 4, "half", 100, False)
    with planner.override(loop="cooperative", tile=Tile(16, 32, 32, 4), spread=2):
        with planner.override(loop="stepwise"):
            assert planner.choose(shape, INTERPRETER, 1, 1).loop == "stepwise"
        assert planner.choose(shape, INTERPRETER, 1, 1) == Schedule("cooperative", Tile(16, 32, 32, 4), 2, 2)
    message = "loop: expected one of solo, cooperative, stepwise, got 'd'"
    with pytest.raises(ValueError, match=message), planner.override(loop="d"):
        planner.choose(shape, INTERPRETER, 1, 1)


def test_a_measured_table_comes_first(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FUSED_RNN_TRITON_TILES", str(tmp_path / "tiles.json"))
    monkeypatch.setattr(planner, "_forced", {})
    measured._table.cache_clear()
    known, shape = ARCHITECTURES["sm_90"], Shape("gru", 3, "half", 512, True)
    small, large = (
        Schedule("cooperative", Tile(16, 16, 64, 4), 32, hold=True),
        Schedule("stepwise", Tile(64, 64, 32, 8), 8),
    )
    try:
        before = planner.choose(shape, known, 16, 1)
        measured.record(shape, known, [(64, small), (256, large)], {"device": "a test"})
        assert before not in (small, large)
        assert planner.choose(shape, known, 16, 1) == small
        assert planner.choose(shape, known, 64, 2) == large
        assert planner.choose(shape, known, 4096, 1) == large  # beyond what was measured: the last
        assert planner.choose(shape._replace(backward=False), known, 16, 1) != small
        assert planner.choose(shape, known, 8, 5) == large  # five teams of 32 are more than there are multiprocessors
        assert [path.name for path in tmp_path.iterdir()] == ["tiles.json"]
        assert (
            json.loads((tmp_path / "tiles.json").read_text())["notes"]["sm_90/gru/half/512/backward"]["device"]
            == "a test"
        )
    finally:
        measured._table.cache_clear()


@pytest.mark.parametrize("text", ["{", "[]", '{"schedules": {"k": [[1, {"loop": "solo"}]]}}'])
def test_a_table_that_cannot_be_read_is_named(text: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "tiles.json"
    path.write_text(text)
    monkeypatch.setenv("FUSED_RNN_TRITON_TILES", str(path))
    measured._table.cache_clear()
    try:
        with pytest.raises(RuntimeError, match=r"tiles.json: not a table that this version's tune wrote"):
            planner.choose(Shape("gru", 3, "half", 512, True), ARCHITECTURES["sm_90"], 16, 1)
    finally:
        measured._table.cache_clear()


def test_description_names_the_schedule() -> None:
    text = backend.describe(PROBLEM)
    assert "forward: loop solo, one program" in text
    assert "backward: " in text
    assert "not on a GPU" in backend.describe(PROBLEM._replace(device="xpu")) or "nothing" in backend.describe(
        PROBLEM._replace(device="xpu")
    )


def test_reference_agrees_in_a_stack_with_dropout() -> None:
    """The mask of dropout between layers is torch's, whatever the backend."""
    case = Case("gru", T=3, layers=2)
    given = here(inputs(case))
    ours, theirs = [], []
    for name, results in (("triton", ours), ("reference", theirs)):
        torch.manual_seed(1)
        results += fused_rnn.functional.gru(
            given.x, given.weights, given.hx[0], num_layers=2, dropout=0.5, training=True, backend=name
        )
    torch.testing.assert_close(ours, theirs)


def test_tf32_is_what_torch_says() -> None:
    known = ARCHITECTURES["sm_90"]
    with tf32(False):
        assert device.kind_of(torch.float32, known) == "ieee"
    with tf32(True):
        assert device.kind_of(torch.float32, known) == "tf32"
        assert device.kind_of(torch.float32, ARCHITECTURES["gfx942"]) == "ieee"
        assert device.kind_of(torch.bfloat16, known) == "half"


def test_tuning_keeps_the_fastest(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """With a clock that likes one schedule, that schedule is what the table holds afterwards."""
    from fused_rnn.triton import tune

    monkeypatch.setenv("FUSED_RNN_TRITON_TILES", str(tmp_path / "tiles.json"))
    measured._table.cache_clear()
    known = INTERPRETER if DEVICE == "cpu" else device.target_at(0)
    favourite = Schedule("stepwise", Tile(16, 16, 16, 4), 1)
    monkeypatch.setattr(
        tune, "candidates", lambda *_: [Schedule("solo", Tile(16, 16, 16, 4), 1, registers=True), favourite]
    )
    for backward in (False, True):
        shape, times = Shape("lstm", 4, "ieee", 5, backward), iter((2.0, 1.0))

        def clock(run: Any, times: Any = times) -> float:
            run()
            return next(times)

        try:
            tune.tune(shape, torch.float32, known, 2, [3], clock)
            assert planner.choose(shape, known, 1, 1) == favourite
        finally:
            measured._table.cache_clear()
