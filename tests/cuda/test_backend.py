"""The CUDA backend in the emulator: op, Function, functional and module, against the float64 reference.

The very Python code and kernel sources that run on a GPU, on the cpu; test_gpu.py has what only a GPU shows.
"""

from __future__ import annotations

import shutil
from typing import Any

import pytest
import torch
from cases import PROJECTIONS, Case, Inputs, inputs
from cuda_cases import EXCHANGES, PRECISIONS, Row, by_torch_in_tf32, case_of, rounded, rows
from emulated import on_the_emulator
from nonfinite import assert_as_in_torch, with_nan, with_silence
from oracle import Results, by_backend, by_reference, by_torch, forward, over_draws
from tolerances import assert_as_good_as_torch, tf32
from torch import Tensor

import fused_rnn
from fused_rnn import ops
from fused_rnn.backends import cuda as backend
from fused_rnn.call import BackwardCall, LayerCall
from fused_rnn.cells import CELLS
from fused_rnn.cuda import module, plain, plans
from fused_rnn.dispatch import choose
from fused_rnn.plan import PRECISIONS as PLACES

pytestmark = [
    pytest.mark.skipif(shutil.which("g++") is None, reason="the emulator is compiled by g++"),
    pytest.mark.skipif(ops.MISSING is not None, reason=str(ops.MISSING)),
    pytest.mark.timeout(1200),  # the first of them builds the module, on a busy machine for minutes
]
QUICK = ("test_schema", "test_faketensor")
# Forced plans of backward whose teams the emulator alone has kernels for; rows of the batch are 16, and 8.
DIRECT: dict[str, dict[str, Any]] = {
    f"direct{members}": {"exchange": "direct", "members": members} for members in (2, 8)
}
WIDE: dict[str, Any] = {"exchange": "grid", "members": 10, "rows": 16}  # likewise of forward, at H = 320


def check(case: Case, precision: str, seed: int = 0, given: Inputs | None = None, **forced: Any) -> None:
    def ours(case: Case, given: Inputs) -> Results:
        with tf32(precision == "tf32"), on_the_emulator(seed, **forced):
            return by_backend(case, given, "cuda")

    ways = (ours, by_torch_in_tf32 if precision == "tf32" else by_torch, by_reference)
    assert_as_good_as_torch(*(over_draws(case, way) if given is None else way(case, given) for way in ways))


# --- the loops


@pytest.mark.parametrize("row", rows(), ids=lambda row: f"{row['precision']}-{row['exchange']}-{case_of(row)}")
def test_every_loop(row: Row) -> None:
    check(case_of(row), row["precision"], seed=row["H"] + row["T"], **EXCHANGES[row["exchange"]])


@pytest.mark.parametrize("exchange", DIRECT)
@pytest.mark.parametrize("precision", ["bf16", "f16", "tf32"])
@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_gradients_that_are_read_directly(
    cell: str, precision: str, exchange: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More rows than a team has; and windows."""
    monkeypatch.setattr("fused_rnn.call.CHECKPOINT_EVERY", 3)
    hidden = 64 if exchange == "direct2" else 128
    case = Case(cell, T=5, B=18, H=hidden, bidirectional=True, lengths=True, reset=True, dtype=PRECISIONS[precision])
    check(case._replace(save="recompute" if exchange == "direct2" else "gates"), precision, **DIRECT[exchange])


@pytest.mark.parametrize("precision", ["bf16", "f16", "tf32"])
@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_a_known_team_with_weights_in_shared_memory(cell: str, precision: str) -> None:
    with tf32(precision == "tf32"), on_the_emulator(**WIDE):
        assert plans.ask(0, PLACES.index(precision), 0, CELLS[cell].gates, 18, 320, 1).known
    check(Case(cell, T=3, B=18, H=320, lengths=True, reset=True, dtype=PRECISIONS[precision]), precision, **WIDE)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("cell", CELLS)
def test_what_the_planner_chooses(cell: str, precision: str) -> None:
    """A stack of layers with everything, by the plans of an H100."""
    case = Case(cell, T=4, layers=2, bidirectional=True, lengths=True, reset=True, dtype=PRECISIONS[precision])
    check(case, precision)


PROJECTED = [
    *(
        (precision, Case("lstm", T=4, B=4, H=9, dtype=PRECISIONS[precision], **o))
        for precision in PRECISIONS
        for o in PROJECTIONS
    ),
    ("ieee", Case("lstm", T=6, B=5, H=9, proj=3, lengths=True, bidirectional=True, reset=True, save="recompute")),
]


@pytest.mark.parametrize(("precision", "case"), PROJECTED, ids=str)
def test_projections(precision: str, case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fused_rnn.call.CHECKPOINT_EVERY", 3)
    check(case, precision)


@pytest.mark.parametrize("exchange", ["cta", "cluster2", "grid", "stepwise"])
@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn_tanh"])
def test_gates_are_made_again_chunk_by_chunk(cell: str, exchange: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of 2 over 5 steps, sequences that end in each of them, both directions, resets."""
    monkeypatch.setattr("fused_rnn.call.CHECKPOINT_EVERY", 2)
    case = Case(cell, T=5, B=4, H=17, bidirectional=True, lengths=True, reset=True, save="recompute")
    for seed, ends in enumerate(([5, 2, 3, 1], [0, 4, 5, 4])):
        given = inputs(case)._replace(lengths=torch.tensor(ends))
        check(case, "ieee", seed, given, **EXCHANGES[exchange])


@pytest.mark.parametrize("exchange", ["cta", "cluster2", "grid", "stepwise"])
@pytest.mark.parametrize("precision", ["bf16", "ieee"])
@pytest.mark.parametrize("cell", CELLS)
def test_what_is_not_finite(cell: str, precision: str, exchange: str) -> None:
    def run(case: Case, given: Inputs) -> Results:
        with on_the_emulator(**EXCHANGES[exchange]):
            return by_backend(case, given, "cuda")

    for case in (
        Case(cell, T=4, D=5, bidirectional=True, dtype=PRECISIONS[precision]),
        Case(cell, T=3, D=5, hx=False, save="recompute", dtype=PRECISIONS[precision]),
    ):
        for make in (with_silence, with_nan):
            assert_as_in_torch(case, make(case), run)


def test_results_are_no_views() -> None:
    """They may be changed in place, as torch's."""
    for model in (fused_rnn.GRU(4, 5, batch_first=True), fused_rnn.LSTM(4, 5, proj_size=2, bidirectional=True)):
        model.backend = "cuda"
        with on_the_emulator():
            y, _ = model(torch.randn(2, 3, 4))
            y.mul_(2).sum().backward()
        assert not y._is_view() and all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("rows_", [8, 16, 32])
def test_every_batch_tile(rows_: int) -> None:
    """A tile more than the batch fills, and one that it fills in part; none of 32 rows without tensor cores."""
    for precision in ("bf16", "tf32", "ieee") if rows_ < 32 else ("bf16", "tf32"):
        case = Case("lstm", T=3, B=35, H=20, dtype=PRECISIONS[precision], lengths=True)
        check(case, precision, exchange="cluster", rows=rows_)


def test_more_teams_than_fit_at_once() -> None:
    """The grid exchange runs in several launches where its teams do not fit beside each other."""
    case = Case("gru", T=2, B=600, H=17, D=2, bidirectional=True)
    with on_the_emulator(exchange="grid", rows=8):
        assert plans.choose(0, 3, False, 3, case.B, case.H, 2).tiles_at_once < 600 / 8
    check(case, "ieee", exchange="grid", rows=8)


def test_a_mixed_pattern_of_directions() -> None:
    """Heads whose directions repeat with a period of 3, stepwise and persistent, are the same numbers."""
    case = Case("lstm", T=4, B=3, H=17)
    given, one = inputs(case), inputs(case, seed=1)
    weights = [*given.weights, *one.weights, *given.weights] * 2
    h0, c0 = (torch.randn(6, 3, 17) for _ in range(2))
    directions = [1, -1, -1, 1, -1, -1]
    made = []
    for exchange in ("cta", "stepwise"):
        with on_the_emulator(exchange=exchange):
            call = LayerCall(given.x, weights, [h0, c0], None, None, "lstm", directions, "gates", True)
            outputs = backend.forward(call)
            dy = torch.randn(outputs[0].shape, generator=torch.Generator().manual_seed(0))
            kept = (outputs[-1], outputs[3], outputs[4:-1])
            made.append([*outputs, *backend.backward(BackwardCall(dy, [], *call[:5], *kept, *call[5:8], True, True))])
    for ours, theirs in zip(*made, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


# --- the ops


def arguments(case: Case, given: Inputs, save: str) -> LayerCall:
    directions = [1, -1][: case.R]
    return LayerCall(given.x, given.weights, given.hx, given.lengths, given.reset, case.cell, directions, save, True)


def backward_arguments(case: Case, given: Inputs, save: str) -> BackwardCall:
    call, states = arguments(case, given, save), len(CELLS[case.cell].states)
    saved, *histories, hidden = backend.forward(call)[1 + states :]
    dy, *dstates = given.dout
    return BackwardCall(dy, dstates, *call[:5], hidden, saved, histories, *call[5:8], True, True)


@pytest.mark.parametrize("save", ["none", "gates", "recompute"])
@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn_tanh"])
def test_ops_pass_opcheck(cell: str, save: str) -> None:
    case = Case(cell, T=2, B=2, H=3, bidirectional=True, lengths=True, reset=True)
    given = inputs(case)
    with on_the_emulator():
        torch.library.opcheck(backend.forward_op, arguments(case, given, save), test_utils=QUICK)
        if save != "none":
            torch.library.opcheck(backend.backward_op, backward_arguments(case, given, save), test_utils=QUICK)


@pytest.mark.parametrize("save", ["gates", "recompute"])
@pytest.mark.parametrize("exchange", [*EXCHANGES, *DIRECT, "wide"])
def test_same_bits_whatever_the_schedule_all_written_and_none_shared(exchange: str, save: str) -> None:
    """Threads run in another order each time. Uninitialised memory is NaN here: none may come out."""
    wide = {"cluster4": 50, "cluster8": 115, "cluster16": 250, "scatter4": 128, "scatter8": 128, "scatter16": 256}
    hidden = (wide | {"direct2": 64, "direct8": 128, "wide": 320}).get(exchange, 17)
    case = Case("gru" if exchange < "d" else "lstm", T=3, B=3, H=hidden, bidirectional=True, lengths=True, reset=True)
    if exchange.startswith(("scatter", "direct", "wide")):
        case = case._replace(dtype=torch.bfloat16)
    given, runs = inputs(case), []
    for seed in range(3):
        with on_the_emulator(seed, **(EXCHANGES | DIRECT | {"wide": WIDE})[exchange]):
            call = backward_arguments(case, given, save)
            runs.append([*backend.forward(arguments(case, given, save)), *backend.backward(call)])
    for first, *others in zip(*runs, strict=True):
        assert not first.isnan().any()
        assert all(torch.equal(first, other) for other in others)
    every = [t for t in (*runs[1], given.x, *given.weights, *given.hx, *given.dout) if t.numel()]
    assert len({t.untyped_storage().data_ptr() for t in every}) == len(every)


@pytest.mark.parametrize("precision", ["bf16", "f16", "tf32"])
@pytest.mark.parametrize(("cell", "hidden"), [("lstm", 128), ("gru", 128), ("lstm", 64), ("gru", 256)])
def test_a_kernel_that_is_compiled_for_its_team_gives_the_same_bits(cell: str, hidden: int, precision: str) -> None:
    """Forward, where the general kernel has the same team."""
    case = Case(cell, T=4, B=11, H=hidden, bidirectional=True, lengths=True, reset=True, dtype=PRECISIONS[precision])
    given, members = inputs(case), 4 if hidden == 64 else hidden // 16
    found = []
    for known in (True, False):
        with tf32(precision == "tf32"), on_the_emulator(3, exchange="cluster", members=members, known=known):
            assert plans.ask(0, PLACES.index(precision), 0, CELLS[cell].gates, 11, hidden, 2).known == known
            found.append(backend.forward(arguments(case, given, "gates")))
    for ours, theirs in zip(*found, strict=True):
        assert torch.equal(ours.nan_to_num(), theirs.nan_to_num())


def test_sizes_of_nothing() -> None:
    case = Case("lstm", B=0, bidirectional=True)
    with on_the_emulator():
        results = by_backend(case, inputs(case), "cuda")
    assert results["y"].shape == (5, 0, 34)
    assert results["dweights[1]"].abs().sum() == 0


@pytest.mark.parametrize("exchange", ["cta", "cluster2", "grid", "stepwise"])
def test_padding_may_hold_anything(exchange: str) -> None:
    """NaN in one sequence, past its end, reaches neither other sequences nor the gradients of weights."""
    case = Case("gru", T=4, B=4, H=17, lengths=True, bidirectional=True)
    given = inputs(case)._replace(lengths=torch.tensor([4, 2, 3, 4]))
    x = given.x.clone()
    x[2:, 1] = float("nan")
    with on_the_emulator(**EXCHANGES[exchange]):
        clean, dirty = by_backend(case, given, "cuda"), by_backend(case, given._replace(x=x), "cuda")
    for name, value in clean.items():
        assert torch.equal(dirty[name], value), name


def test_a_view_off_the_sixteen_bytes() -> None:
    case = Case("lstm", T=3, B=2, H=5)
    given = inputs(case)
    shifted = [torch.cat([torch.zeros(1), t.flatten()])[1:].view(t.shape) for t in (*given.weights, *given.hx)]
    assert all(t.data_ptr() % 16 for t in shifted)
    moved = given._replace(weights=shifted[:4], hx=shifted[4:])
    with on_the_emulator():
        for ours, theirs in zip(forward(case, moved, "cuda"), forward(case, given, "cuda"), strict=True):
            assert torch.equal(ours, theirs)


# --- everything above the ops


def test_double_backward_is_the_composite() -> None:
    case = Case("lstm", T=3, B=2, H=3)
    given = inputs(case)

    def second(name: str) -> list[Tensor]:
        leaves = [t.clone().requires_grad_() for t in (given.x, *given.weights)]
        y = fused_rnn.functional.lstm(leaves[0], leaves[1:], tuple(given.hx), backend=name)[0]
        grads = torch.autograd.grad(y.square().sum(), leaves, create_graph=True)
        return list(torch.autograd.grad(sum(g.square().sum() for g in grads), leaves))

    with on_the_emulator():
        for ours, theirs in zip(second("cuda"), second("reference"), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3 * float(theirs.abs().max()))


def test_vmap_over_an_ensemble_is_one_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case("lstm", T=3, B=2, H=3, bidirectional=True)
    given = inputs(case)
    members = [torch.stack([w, 2 * w, -w]) for w in given.weights]
    launches: list[int] = []
    original = plain.forward

    def counted(call: LayerCall) -> list[Tensor]:
        launches.append(call.recurrences)
        return original(call)

    monkeypatch.setattr(plain, "forward", counted)

    def run(*weights: Tensor) -> Tensor:
        return fused_rnn.functional.lstm(given.x, weights, tuple(given.hx), bidirectional=True, backend="cuda")[0]

    with torch.no_grad(), on_the_emulator():
        together = torch.func.vmap(run)(*members)
        assert launches == [6]
        for i in range(3):
            torch.testing.assert_close(together[i], run(*(m[i] for m in members)))


@pytest.mark.compile
def test_compiles_as_one_graph_for_any_length() -> None:
    net, graphs = fused_rnn.GRU(3, 4, bidirectional=True, backend="cuda"), []

    def note(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph)
        return graph

    compiled = torch.compile(net, backend=note, fullgraph=True, dynamic=True)
    with on_the_emulator():
        for steps in (5, 6, 9):
            x = torch.randn(steps, 2, 3)
            torch._dynamo.mark_dynamic(x, 0)
            y, _ = compiled(x)
            torch.testing.assert_close(y, net(x)[0])
            y.sum().backward()
    assert len(graphs) == 1


def test_module_takes_a_packed_sequence_and_autocast() -> None:
    ours, counterpart = fused_rnn.LSTM(3, 4, 2, backend="cuda"), torch.nn.LSTM(3, 4, 2)
    ours.load_state_dict(counterpart.state_dict())
    x = torch.nn.utils.rnn.pack_padded_sequence(torch.randn(5, 3, 3), [2, 5, 1], enforce_sorted=False)
    with on_the_emulator():
        (packed, (h, c)), (expected, (h_counterpart, c_counterpart)) = ours(x), counterpart(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert ours(x)[1][0].dtype == torch.bfloat16
    for a, b in ((packed.data, expected.data), (h, h_counterpart), (c, c_counterpart)):
        torch.testing.assert_close(a, b)


def test_one_step() -> None:
    cell = fused_rnn.LSTMCell(3, 4)
    x, h, c = (torch.randn(2, n) for n in (3, 4, 4))
    weights = [w.detach() for w in (cell.weight_ih, cell.weight_hh, cell.bias_ih, cell.bias_hh)]
    with on_the_emulator():
        ours = backend.step(x, weights, [h, c], "lstm")
    torch.testing.assert_close(ours, list(cell(x, (h, c))))


# --- what it refuses


PROBLEM = Case("lstm").problem()


def test_reasons() -> None:
    with on_the_emulator():
        assert backend.supports(PROBLEM) is None
        assert backend.supports(PROBLEM._replace(forward_ad=True)) == "it has no forward-mode derivative"
        assert "not torch.complex64" in str(backend.supports(PROBLEM._replace(dtype=torch.complex64)))
        reason = backend.supports(PROBLEM._replace(batch=1 << 20, hidden_size=1024, width=1024))
        assert reason == "B·R·H·4 = 4294967296 is beyond the 2^31 that its kernels can address in a step"
        assert "takes tensors on the cpu, not on cuda" in str(backend.supports(PROBLEM._replace(device="cuda")))
        assert choose(PROBLEM, "cuda") is backend
    with pytest.raises(NotImplementedError, match="cuda: it runs tensors on a CUDA GPU, not on cpu"):
        choose(PROBLEM, "cuda")
    with pytest.raises(RuntimeError, match="x: it runs tensors on a CUDA GPU, not on cpu"):
        backend.forward(arguments(Case("lstm"), inputs(Case("lstm")), "none"))


class _Gpu:
    """A module as a GPU's build gives it."""

    ARCHITECTURES = "8.0 8.6 9.0a 10.0"

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def device(self, index: int) -> Any:
        if self.arch == 0:
            raise RuntimeError("fused_rnn: cudaDeviceGetAttribute: CUDA driver version is insufficient")
        return self


@pytest.mark.parametrize(
    ("arch", "said"),
    [
        (75, "an sm_75, older than sm_80: the torch backend runs"),
        (120, 'code for 8.0 8.6 9.0a 10.0, and GPU 0 is an sm_120: install with TORCH_CUDA_ARCH_LIST="12.0"'),
        (0, "driver version is insufficient; the torch backend"),
        (89, None),
        (90, None),
    ],
)
def test_reasons_of_a_gpu(arch: int, said: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_cuda", _Gpu(arch))
    module.refusal_of_gpu.cache_clear()
    try:
        reason = module.refusal_of_gpu(0)
    finally:
        module.refusal_of_gpu.cache_clear()
    assert reason is None if said is None else said in str(reason)


def test_code_and_architectures() -> None:
    assert module.has_code_for(89, "8.0")
    assert module.has_code_for(121, "9.0;12.0")
    assert not module.has_code_for(90, "8.0 8.9 10.0")
    assert module.has_code_for(90, "8.0+PTX")
    assert not module.has_code_for(100, "9.0a+PTX")
    assert not module.has_code_for(80, "8.6 9.0")


def test_a_build_without_the_module(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MISSING", "this build has no CUDA kernels (a test)")
    assert module.refusal("cuda") == "this build has no CUDA kernels (a test)"
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert "triton backend" in str(module.refusal("cuda"))


def test_a_forced_plan_that_there_is_not() -> None:
    case = Case("lstm", H=17)
    refused = pytest.raises(RuntimeError, match=r"no plan with .*members=16.*fits no team")
    with on_the_emulator(exchange="cluster", members=16), refused:
        forward(case, inputs(case), "cuda")
    with pytest.raises(ValueError, match="exchange: got 'ring'"), plans.override("ring"):
        pass
    with on_the_emulator(), plans.override(known=False):  # insists on nothing: it runs a step at a time
        assert plans.choose(0, 0, True, 4, 256, 2048, 1) is None


def test_description_names_the_plans() -> None:
    with on_the_emulator():
        text = backend.describe(PROBLEM._replace(hidden_size=512, dtype=torch.bfloat16))
        assert text.startswith("CUDA loops in the emulator; forward: a cluster of ")
        assert "; backward: " in text
        assert "forward: stepwise: float64 has no" in backend.describe(PROBLEM._replace(dtype=torch.float64))
    assert backend.describe(PROBLEM) == "nothing here"


def test_what_is_rounded_to_tf32() -> None:
    """The stand-in for torch in TF32 rounds to 10 bits, to nearest; or takes the first 10, as some GPUs do."""
    ulp = 2.0**-10
    given = torch.tensor([1 + 0.49 * ulp, 1 + 0.5 * ulp, -3.0])
    assert rounded(given).tolist() == [1.0, 1 + ulp, -3.0]
    assert rounded(given, truncate=True).tolist() == [1.0, 1.0, -3.0]
