"""Which backend runs what, and what is said when none can."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import programs
import pytest
import torch
from cases import Case, inputs
from oracle import forward, require
from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence

import fused_rnn
from fused_rnn import dispatch, missing, ops
from fused_rnn.cells import CELLS
from fused_rnn.dispatch import BACKENDS, choose, fastest
from fused_rnn.gpu.wavefront import Wavefront
from fused_rnn.nn import base, cells, quick
from fused_rnn.problem import Problem

PROBLEM = Case("lstm").problem()


def test_every_backend_has_the_same_names() -> None:
    for name, module in BACKENDS.items():
        assert name == module.NAME
        assert isinstance(module.DIFFERENTIABLE, bool)
        for attribute in ("supports", "forward", "backward", "step", "describe"):
            assert callable(getattr(module, attribute)), (name, attribute)
        assert module.stack is None or callable(module.stack)
        assert module.wavefront is None or isinstance(module.wavefront, Wavefront)
        assert isinstance(module.describe(PROBLEM), str)


def test_named_backend_is_taken() -> None:
    for name, module in BACKENDS.items():
        if module.supports(PROBLEM) is None:
            assert choose(PROBLEM, name) is module


def test_automatic_choice_can_run_it() -> None:
    for options in ({}, {"reset": True}, {"lengths": True}, {"save": "recompute"}, {"B": 1}, {"T": 1}):
        for cell in ("lstm", "gru", "rnn_tanh", "rnn_relu"):
            for needs_grad in (True, False):
                problem = Case(cell, **options).problem(needs_grad)
                if options == {"save": "recompute"} and needs_grad:
                    require("cpu", Case(cell, **options))
                assert choose(problem).supports(problem) is None
                assert set(dispatch.preference(problem)) == set(BACKENDS)


def test_unknown_name() -> None:
    with pytest.raises(ValueError, match="backend: got 'cudnn', expected None or one of 'cpu', 'torch', 'reference'"):
        choose(PROBLEM, "cudnn")


def test_refusal_has_every_reason() -> None:
    with pytest.raises(NotImplementedError) as raised:
        choose(PROBLEM._replace(reset=True), "torch")
    lines = str(raised.value).splitlines()
    assert lines[0] == "backend 'torch' cannot run this lstm problem (torch.float32 on cpu):"
    assert [line.split(":")[0].strip() for line in lines[1:]] == list(BACKENDS)
    assert "  torch: torch's kernels know no reset" in lines
    assert "  reference: can run this" in lines


def test_forced_backend_refuses_through_functional() -> None:
    case = Case("gru", reset=True)
    with pytest.raises(NotImplementedError, match="torch's kernels know no reset"):
        forward(case, inputs(case), "torch")
    case = Case("gru", save="recompute")
    given = inputs(case)
    given.x.requires_grad_()
    with pytest.raises(NotImplementedError, match="save='recompute' goes with cpu, cuda and triton"):
        forward(case, given, "reference")
    with torch.no_grad():  # where nothing is kept, there is nothing to refuse
        forward(case, given, "reference")


def test_other_devices_and_dtypes_are_refused() -> None:
    cpu = BACKENDS["cpu"]
    if ops.MISSING is not None:
        assert cpu.supports(PROBLEM) == ops.MISSING
        assert "did not load" in ops.MISSING
        return
    assert cpu.supports(PROBLEM._replace(device="cuda")) == "it runs tensors on the cpu, these are on cuda"
    assert (
        cpu.supports(PROBLEM._replace(dtype=torch.complex64))
        == "it knows float32, float64, bfloat16 and float16, not torch.complex64"
    )
    assert cpu.supports(PROBLEM._replace(forward_ad=True)) == "it has no forward-mode derivative"


def test_bfloat16_goes_to_onednn_where_that_is_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    step = Case("gru", T=1, B=8, H=512, dtype=torch.bfloat16).problem(needs_grad=True)
    for isa, first in (("amx", "torch"), ("avx2", "cpu")):
        monkeypatch.setattr(dispatch.ops, "ISA", isa)
        assert dispatch.preference(step)[0] == first
    monkeypatch.setattr(dispatch.ops, "ISA", "amx")
    for changed in (
        {"cell": "lstm"},
        {"dtype": torch.float32},
        {"transformed": True},
        {"needs_grad": False},
        {"single_step": False},
        {"hidden_size": 511},
    ):
        assert dispatch.preference(step._replace(**changed))[0] == "cpu", changed


def test_the_choice_is_remembered() -> None:
    dispatch.resolve(PROBLEM, None)
    before = dispatch._choose_cached.cache_info()
    assert dispatch.resolve(PROBLEM, None) is choose(PROBLEM)
    assert dispatch._choose_cached.cache_info().hits == before.hits + 1


def test_nothing_depends_on_the_length() -> None:
    """Or torch.compile would specialise on T."""
    assert Case("lstm", T=17).problem() == Case("lstm", T=1000).problem()
    assert Case("lstm", T=1).problem().single_step


def take_the_cpu_for_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """For want of one. Calls past the dispatcher are a CPU's alone."""
    monkeypatch.setattr(base, "ON_A_GPU", "cpu")
    for room in (quick, cells):
        monkeypatch.setattr(room, "FAST_PATH", None)


@pytest.fixture
def counterpart_calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The calls that torch.nn's own forward gets on a device that is left to torch: here the cpu, for want of a GPU."""
    calls: list[str] = []
    take_the_cpu_for_a_gpu(monkeypatch)
    dispatch._choose_cached.cache_clear()
    for cls in (fused_rnn.LSTM, fused_rnn.GRUCell):

        def forward(module: Any, *args: Any, counterpart: Any = cls._fused_counterpart) -> Any:
            calls.append(counterpart.__name__)
            return counterpart.forward(module, *args)

        monkeypatch.setattr(cls, "_fused_counterpart", type("Counterpart", (), {"forward": staticmethod(forward)}))
    yield calls
    dispatch._choose_cached.cache_clear()


def test_a_device_that_is_left_to_torch(counterpart_calls: list[str]) -> None:
    """The whole call goes to torch.nn's forward: it keeps the weights flat for cuDNN, and takes packed input."""
    lstm, cell, x = fused_rnn.LSTM(3, 4, 2), fused_rnn.GRUCell(3, 4), torch.randn(5, 2, 3)
    y = lstm(x)[0]
    lstm(pack_padded_sequence(x, [5, 3]))
    cell(x[0])
    with torch.no_grad():
        lstm.eval()(x)
    assert counterpart_calls == ["LSTM", "LSTM", "GRUCell", "LSTM"]
    torch.testing.assert_close(y, fused_rnn.functional.lstm(x, list(lstm.parameters()), num_layers=2)[0])


def test_what_cudnn_cannot_do_is_kept_from_it(counterpart_calls: list[str]) -> None:
    """Its backward refuses eval mode; it keeps all gates; it knows no reset, no lengths, no vmap, no forward mode."""
    lstm, x = fused_rnn.LSTM(3, 4), torch.randn(5, 2, 3)
    lstm.eval()(x)[0].sum().backward()
    lstm.train()(x, lengths=[5, 3])
    lstm(x, reset=torch.zeros(5, 2, dtype=torch.bool))
    lstm.save = "recompute"
    lstm(x)[0].sum().backward()
    lstm.save, lstm.backend = "gates", "cpu"
    lstm(x)
    assert counterpart_calls == []


# --- on a GPU: by what was measured

MEASURED = {
    "lstm bf16 training sequence": [[256, [[None, "cuda"]]], [None, [[32, "cuda"], [96, "triton"], [None, "torch"]]]],
    "rnn tf32 inference step": [[None, [[None, "torch"]]]],
}


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """A table of a GPU that is not there."""
    (tmp_path / "sm_90.json").write_text(json.dumps({"rows": MEASURED}))
    monkeypatch.setattr(fastest, "FOLDER", tmp_path)
    monkeypatch.setattr(fastest, "architecture", lambda: "sm_90")
    for name in ("cuda", "triton"):  # as if they could run there
        monkeypatch.setattr(BACKENDS[name], "supports", lambda problem: None)
    fastest.table.cache_clear()
    dispatch._choose_cached.cache_clear()
    yield
    fastest.table.cache_clear()
    dispatch._choose_cached.cache_clear()


def on_gpu(cell: str = "lstm", dtype: torch.dtype = torch.bfloat16, **changes: Any) -> Problem:
    return Case(cell).problem(needs_grad=True)._replace(device="cuda", dtype=dtype, **changes)


def test_where_nothing_was_measured_torch_is_first(measured: None) -> None:
    for problem in (on_gpu("gru"), on_gpu(dtype=torch.float16), on_gpu(needs_grad=False), on_gpu(single_step=True)):
        assert dispatch.preference(problem)[0] == "torch"
        assert dispatch.is_left_to_torch(problem)
    assert not dispatch.is_left_to_torch(Case("lstm").problem())


@pytest.mark.parametrize(
    ("hidden", "batch", "first"),
    [(1, 1000, "cuda"), (256, 1000, "cuda"), (257, 32, "cuda"), (257, 33, "triton"), (9999, 97, "torch")],
)
def test_a_table_says_what_is_first(measured: None, hidden: int, batch: int, first: str) -> None:
    problem = on_gpu(hidden_size=hidden, width=hidden, batch=batch)
    assert dispatch.preference(problem)[0] == first
    assert first == "torch" or dispatch.preference(problem)[1] == "torch"  # where the first is not built
    assert set(dispatch.preference(problem)) == set(BACKENDS)
    assert dispatch.is_left_to_torch(problem) == (first == "torch")
    for apart in ({"lengths": True}, {"reset": True}, {"transformed": True}, {"width": hidden + 1}):
        assert not dispatch.is_left_to_torch(problem._replace(**apart))


def test_what_is_not_built_is_left_to_torch(measured: None, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not dispatch.is_left_to_torch(on_gpu(hidden_size=64, width=64))
    dispatch._choose_cached.cache_clear()
    monkeypatch.setattr(BACKENDS["cuda"], "supports", lambda problem: "not built")
    monkeypatch.setattr(dispatch.cuda_loops, "MISSING", "not built")
    monkeypatch.setattr(missing, "_warned", set())
    with pytest.warns(RuntimeWarning, match="runs without its own kernels, at torch's speed or less: not built"):
        assert dispatch.is_left_to_torch(on_gpu(hidden_size=64, width=64))
    dispatch._choose_cached.cache_clear()
    assert dispatch.is_left_to_torch(on_gpu(hidden_size=64, width=64))  # and says so once


def test_a_float32_table_is_of_one_precision(measured: None) -> None:
    problem = on_gpu("rnn_relu", torch.float32, needs_grad=False, single_step=True)
    assert dispatch.fastest_on_gpu(problem) is None
    assert dispatch.fastest_on_gpu(problem._replace(tf32=True)) == "torch"


def test_no_table_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert fastest.architecture() == ""
    assert fastest.table("") == {}
    assert fastest.table("sm_1") == {}


def test_a_compiled_caller_asks_only_what_differs(measured: None) -> None:
    """Where one backend serves every batch, no size is specialised on; else there is one program for each backend."""
    compiled = []

    def count(graph: Any, _: Any) -> Any:
        compiled.append(graph)
        return graph

    def which(x: Tensor, hidden: int) -> Tensor:
        first = fastest.pick(fastest.rows_of("lstm bf16 training sequence"), hidden, x.shape[0])
        return x * {"cuda": 1, "triton": 2, "torch": 3}[first]

    torch._dynamo.reset()
    run = torch.compile(which, backend=count, fullgraph=True, dynamic=True)
    for hidden, expected in ((64, {3: 1, 50: 1, 500: 1}), (512, {3: 1, 20: 1, 50: 2, 80: 2, 500: 3, 1000: 3})):
        compiled.clear()
        for batch, factor in expected.items():
            assert torch.equal(run(torch.ones(batch), hidden), torch.full((batch,), float(factor)))
        assert len(compiled) == len(set(expected.values()))
    torch._dynamo.reset()


def test_modules_go_by_the_same_table(measured: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a module's call is taken for: the problem that functional would be asked about."""
    asked: list[Problem] = []
    monkeypatch.setattr(dispatch, "is_left_to_torch", lambda problem: asked.append(problem) or False)
    take_the_cpu_for_a_gpu(monkeypatch)
    x = torch.randn(5, 2, 3)
    gru = fused_rnn.GRU(3, 4, 2, bidirectional=True, bias=False)
    gru(x)
    fused_rnn.LSTM(3, 4, proj_size=2, batch_first=True)(x)
    with torch.no_grad():
        gru(pack_padded_sequence(x, [5, 3]))
    fused_rnn.RNNCell(3, 4)(x[0])
    fused_rnn.LSTM(3, 4)(x[:1, 0])
    names = (
        "cell",
        "single_step",
        "batch",
        "hidden_size",
        "width",
        "layers",
        "recurrences",
        "bias",
        "needs_grad",
        "lengths",
    )
    found = [tuple(getattr(problem, name) for name in names) for problem in asked]
    assert found == [
        ("gru", False, 2, 4, 4, 2, 2, False, True, False),
        ("lstm", False, 5, 4, 2, 1, 1, True, True, False),
        ("gru", False, 2, 4, 4, 2, 2, False, False, True),
        ("rnn_tanh", True, 2, 4, 4, 1, 1, True, True, False),
        ("lstm", True, 1, 4, 4, 1, 1, True, True, False),
    ]


def test_an_unknown_cell_is_refused_with_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    """By every backend for itself; also a cell that has a plain step, and no kernel yet."""
    unknown = PROBLEM._replace(cell="mlstm")
    for name, module in BACKENDS.items():
        if module.supports(PROBLEM) is None:
            expected = "it knows the cells lstm, gru, rnn_tanh, rnn_relu, not 'mlstm'"
            assert module.supports(unknown) == expected, name
    with pytest.raises(NotImplementedError, match="no backend can run this mlstm problem"):
        choose(unknown)
    monkeypatch.setitem(CELLS, "mlstm", CELLS["lstm"])
    assert [name for name, module in BACKENDS.items() if module.supports(unknown) is None] == ["reference"]


def test_every_backend_has_the_cells_that_it_says() -> None:
    pytest.importorskip("triton")
    from fused_rnn.triton.cells import MODULES, kernels

    assert tuple(MODULES) == tuple(CELLS)
    assert all({"fwd", "bwd", "AFTER", "BEFORE"} <= set(dir(kernels(cell))) for cell in MODULES)


# ---- a user's cell ----

LEAKY = Case("lstm").problem()._replace(cell=programs.LEAKY)


def test_a_users_cell_goes_to_our_own_loops_first() -> None:
    assert dispatch.preference(LEAKY)[:2] == ("cpu", "reference")
    assert dispatch.preference(LEAKY._replace(device="cuda"))[:3] == ("cuda", "triton", "reference")
    for device in ("cpu", "cuda", "meta"):
        assert set(dispatch.preference(LEAKY._replace(device=device))) == set(BACKENDS)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_loop_in_python_is_no_secret(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a user's cell it is what remains where no loops are built, or none can: said once, with the reason."""
    for backend in ("cpu", "cuda", "triton"):
        monkeypatch.setattr(BACKENDS[backend], "supports", lambda problem: "not today")
    for attribute, why in ((None, "cell leaky: not today"), ("MISSING", "not built")):
        if attribute:
            monkeypatch.setattr(ops if device == "cpu" else dispatch.cuda_loops, attribute, why)
        elif device == "cuda":
            monkeypatch.setattr(dispatch.cuda_loops, "MISSING", None)
        monkeypatch.setattr(missing, "_warned", set())
        problem = LEAKY._replace(device=device)
        with pytest.warns(RuntimeWarning, match=f"runs without its own kernels, at torch's speed or less: {why}"):
            assert choose(problem) is BACKENDS["reference"]
        assert choose(problem) is BACKENDS["reference"]
    with pytest.warns(RuntimeWarning, match="another reason"):  # is not hidden by the first
        missing.warn_once("another reason")


def test_where_only_the_reference_can_it_says_nothing(recwarn: pytest.WarningsRecorder) -> None:
    require("cpu", Case("lstm"))
    for only in ({"forward_ad": True}, {"functionalized": True}):
        assert choose(LEAKY._replace(**only)) is BACKENDS["reference"]
    assert not recwarn


def test_torch_has_states_over_time_of_no_cell() -> None:
    reason = BACKENDS["torch"].supports(PROBLEM._replace(sequences=True))
    assert reason == "torch's kernels return h alone over time"
