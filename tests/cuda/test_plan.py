"""The planner of the CUDA loops, asked about many shapes and devices, on any machine."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from programs import CHAIN, GRU, INDRNN, LSTM, SRU

import fused_rnn
from fused_rnn import ops
from fused_rnn.backends import cuda as backend
from fused_rnn.cells import CELLS

# `fused_rnn.plan` is the function; the module of that name is to be had through what imports from it.
from fused_rnn.cuda.chunks import paying_chunks
from fused_rnn.plan import DEVICES, Forced, Plan, fewer_blocks, make, precision_of

pytestmark = pytest.mark.skipif(ops.MISSING is not None, reason=str(ops.MISSING))
BLOCKS = CELLS[GRU].program._replace(diagonal=4).text  # type: ignore[union-attr]
STAGES = fused_rnn.LayerNormLSTM(1, 1).cell.program.text
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
H100 = DEVICES["sm_90"]


def ask(cell: str = "lstm", batch: int = 64, hidden: int = 512, **options: Any) -> Plan:
    options = {"dtype": torch.bfloat16, "device": "sm_90"} | options
    return fused_rnn.plan(cell, batch, hidden, **options)


def assert_runs(plan: Plan, cell: str, batch: int, hidden: int, recurrences: int) -> None:
    """What every plan must hold for its kernel to be right and its launch not to be refused."""
    device = plan.device
    assert plan.units % 16 == 0
    assert (plan.members - 1) * plan.units < hidden <= plan.members * plan.units  # every member has work
    assert plan.rows in (8, 16, 32)
    assert (plan.tiles - 1) * plan.rows < batch <= plan.tiles * plan.rows
    assert 32 * plan.warps[0] * plan.warps[1] <= plan.threads <= 256
    assert plan.units * plan.rows <= 2 * plan.threads  # cells, two a thread
    assert 0 < plan.shared <= device.shared
    assert plan.tiles_at_once >= 1
    assert plan.waves >= 1
    if plan.exchange == "cta":
        assert plan.members == 1
    elif plan.exchange in ("cluster", "scatter"):
        assert device.arch >= 90
        assert 2 <= plan.members <= len(device.clusters)
        beside = 1 + (plan.threads <= 128 and 2 * plan.shared <= device.shared)  # CTAs on a multiprocessor
        assert plan.exchange == "cluster" or plan.known
        assert plan.waves * device.clusters[plan.members - 1] * beside >= plan.tiles * recurrences
    else:  # all of a launch are resident together, or it would be refused
        assert min(plan.tiles_at_once, plan.tiles) * recurrences * plan.members <= device.multiprocessors
    assert all(part >= 0 for part in plan.cycles)
    assert plan.cycles.product > 0
    if plan.known:
        assert plan.units * plan.members == hidden
    assert (plan.cycles.exchange > 0) == (plan.exchange != "cta")


@pytest.mark.parametrize("arch", DEVICES)
def test_every_plan_can_run(arch: str) -> None:
    hidden_sizes = (1, 3, 16, 17, 33, 64, 100, 128, 130, 250, 256, 512, 768, 1000, 1024, 1536, 2048, 4096)
    persistent = 0
    for cell, dtype, hidden, batch, recurrences, backward in itertools.product(
        CELLS, DTYPES, hidden_sizes, (1, 8, 33, 256, 5000), (1, 2), (False, True)
    ):
        plan = ask(cell, batch, hidden, dtype=dtype, tf32=True, recurrences=recurrences, backward=backward, device=arch)
        if plan.reason is None:
            persistent += 1
            assert_runs(plan, cell, batch, hidden, recurrences)
        else:
            assert plan.exchange == "stepwise"
            is_slow = "it is estimated to take" in plan.reason and batch > 33
            assert is_slow or hidden > 128, (cell, dtype, hidden, batch, recurrences, backward)
    assert persistent > 1000


@pytest.mark.parametrize("exchange", ["cta", "cluster", "grid"])
def test_what_is_insisted_on(exchange: str) -> None:
    found = 0
    for hidden, rows, dtype in itertools.product((17, 33, 64, 128, 250, 512), (8, 16, 32), DTYPES[1:]):
        plan = ask(hidden=hidden, exchange=exchange, rows=rows, dtype=dtype, tf32=False)
        if plan.reason is None:
            found += 1
            assert (plan.exchange, plan.rows) == (exchange, rows)
            assert_runs(plan, "lstm", 64, hidden, 1)
        else:
            assert "with the exchange, members or rows that were asked for" in plan.reason
    assert found >= 3


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_backward_scatters_where_a_kernel_is_compiled_for_the_team(cell: str) -> None:
    for hidden, members in ((64, 4), (128, 4), (128, 8), (256, 16), (256, 8), (512, 16)):
        plan = ask(cell, 8, hidden, backward=True, exchange="scatter", members=members)
        assert (plan.exchange, plan.members, plan.known) == ("scatter", members, True)
        assert_runs(plan, cell, 8, hidden, 1)
        forward = ask(cell, 8, hidden, exchange="scatter", members=members)
        assert (forward.exchange, forward.members, forward.known) == ("cluster", members, True)
    assert ask(cell, 8, 128, backward=True).exchange == "scatter"
    for hidden in (100, 130, 1024):
        reason = ask(cell, 8, hidden, backward=True, exchange="scatter").reason
        assert reason is not None and f"there is none of H = {hidden}" in reason
    assert ask(cell, 8, 128, backward=True, exchange="scatter", dtype=torch.float32, tf32=False).reason is not None
    assert ask("rnn_tanh", 8, 128, backward=True, exchange="scatter").reason is not None
    assert ask(cell, 8, 128, backward=True, exchange="scatter", device="sm_80").reason is not None


def test_a_scattering_warp_has_the_registers_for_its_weights() -> None:
    device = ops._C.Device(*H100)
    for gates in range(2, 9):
        native = make(ops._C, (0, True, gates, 8, 512, 1), device, Forced("scatter", 16))
        assert bool(native.refusal) == (gates > 4), gates  # four tiles of so many blocks


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_backward_of_a_wide_layer_reads_its_operand_directly(cell: str) -> None:
    """All of a batch of 64 in one wave at H = 1024, and a team at H = 2048."""
    for hidden, batch, members, rows, tf32 in (
        (1024, 8, 64, 8, False),
        (1024, 64, 32, 16, False),
        (2048, 8, 128, 8, False),
        (1024, 16, 64, 8, True),
    ):
        options: dict[str, Any] = {"dtype": torch.float32 if tf32 else torch.bfloat16, "tf32": tf32, "backward": True}
        plan = ask(cell, batch, hidden, **options)
        assert (plan.exchange, plan.members, plan.rows, plan.waves) == ("direct", members, rows, 1)
        assert_runs(plan, cell, batch, hidden, 1)
        forward = ask(cell, batch, hidden, **options | {"backward": False}, exchange="direct", members=members)
        assert (forward.exchange, forward.members) == ("grid", members)
    general: dict[str, Any] = {"batch": 8, "backward": True, "exchange": "direct"}
    for hidden in (512, 1000, 1040):
        reason = ask(cell, hidden=hidden, **general).reason
        assert reason is not None and reason.startswith("only backward reads its operand directly, and in teams that ")
    assert ask("rnn_tanh", hidden=1024, **general).reason is not None
    assert ask(cell, hidden=1024, dtype=torch.float32, tf32=False, **general).reason is not None
    assert str(ask(cell, 64, 1024, backward=True)).startswith("32 CTAs of the grid that read each other's gradients ")


@pytest.mark.parametrize("members", [2, 4, 8, 16])
def test_members_that_are_insisted_on(members: int) -> None:
    assert ask(hidden=16 * members, members=members, exchange="cluster").members == members
    assert ask(hidden=16 * members - 15, members=members, exchange="cluster").units == 16
    assert ask(hidden=16 * members - 16, members=members, exchange="cluster").reason is not None


@pytest.mark.parametrize("members", range(2, 17))
def test_clusters_of_any_size(members: int) -> None:
    options: dict[str, Any] = {"batch": 8, "hidden": 16 * members, "members": members, "exchange": "cluster"}
    assert (ask(**options).members, ask(**options).units) == (members, 16)
    assert (ask(device="sm_120", **options).reason is None) == (members <= 8)  # the largest there


def test_a_cluster_stays_within_a_gpc() -> None:
    """An H200 that was asked has room for 7 clusters of 16, 112 of its 132 multiprocessors."""
    assert len(H100.clusters) == 16
    assert [H100.clusters[n - 1] for n in (1, 2, 4, 8, 9, 12, 16)] == [132, 66, 30, 15, 9, 7, 7]
    options: dict[str, Any] = {"exchange": "cluster", "hidden": 768, "members": 16, "rows": 8}
    assert ask(batch=56, **options).waves == 1
    assert ask(batch=56, **options).tiles_at_once == 7
    assert ask(batch=57, **options).waves == 2
    assert ask(batch=56, recurrences=2, **options).waves == 2
    eight = H100._replace(clusters=(*H100.clusters[:15], 8))  # as another H100 may have
    assert ask(batch=64, device=eight, **options).waves == 1
    small: dict[str, Any] = {"exchange": "cluster", "hidden": 64, "members": 4, "rows": 8}
    assert ask(batch=256, **small).threads == 128  # of which a multiprocessor has room for two
    assert (ask(batch=256, **small).tiles, ask(batch=256, **small).waves) == (32, 1)
    none = H100._replace(clusters=(*H100.clusters[:15], 0))
    assert "that were asked for" in str(ask(device=none, **options).reason)
    assert ask(device=none, exchange="cluster").members != 16


def test_teams_that_take_turns_too_often_leave_it_to_matrix_products() -> None:
    """Many waves of teams against one product over the whole batch a step; not where a team is insisted on."""
    plan = ask(batch=256, hidden=2048)
    assert str(plan.reason).startswith("it is estimated to take ")
    assert "step by step" in str(plan.reason)
    assert ask(batch=256, hidden=2048, exchange="grid").waves > 8
    assert ask(batch=8, hidden=2048).reason is None


def test_gru_of_33_to_48_units_runs_in_one_cta() -> None:
    """Its 9 m tiles are 5 warps, its cells 6: the last one has cells only."""
    for hidden in (33, 48):
        plan = ask("gru", 8, hidden, exchange="cta")
        assert plan.reason is None
        assert plan.threads > 32 * plan.warps[0] * plan.warps[1]


def test_true_float32_is_estimated_by_what_it_reads() -> None:
    """Its lanes share each 16 bytes of the operand that they read, eight times what the tensor cores' lanes read."""
    options: dict[str, Any] = {"dtype": torch.float32, "hidden": 64, "exchange": "cluster", "members": 4, "rows": 8}
    shared = [ask(tf32=tf32, **options).cycles.loads for tf32 in (False, True)]
    assert shared[0] > 3 * shared[1]


def test_h_up_to_768_stays_resident_on_an_h100() -> None:
    """In 16 bits, both loops, both directions at once: the sizes that the backend was designed for."""
    for cell, hidden, batch, backward in itertools.product(
        ("lstm", "gru"), (128, 256, 512, 768), (8, 64, 128), (False, True)
    ):
        assert ask(cell, batch, hidden, backward=backward, recurrences=2).reason is None


def test_an_estimate_falls_with_more_multiprocessors() -> None:
    small = ask(batch=256, device=H100._replace(multiprocessors=66, clusters=tuple(n // 2 for n in H100.clusters)))
    large = ask(batch=256)
    assert large.waves * sum(large.cycles) < small.waves * sum(small.cycles)


def test_reasons() -> None:
    assert ask(dtype=torch.float64).reason == "float64 has no tensor-core product: it runs stepwise"
    assert "sm_75 is older than sm_80" in str(ask(device=(75, 72, 64 * 1024, ())).reason)
    reason = str(ask(hidden=8192).reason)
    assert "W_hh of 536870912 bytes for each of 1 recurrence(s) fits no team of 132 multiprocessors" in reason
    assert "with 232448 bytes of shared memory each" in reason
    assert ask(hidden=512, device="sm_80", exchange="cluster").reason is not None  # clusters begin with sm_90
    assert ask(hidden=70000).reason is not None


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_plan_of_narrow_weights_can_run(dtype: torch.dtype) -> None:
    """As good as one of whole weights, at the least, where there is one for the rows and units."""
    for cell, hidden, batch, weights in itertools.product(
        CELLS, (1, 17, 100, 128, 512, 1000, 1024, 2048), (1, 8, 33, 256), ("bf16", "int8")
    ):
        if weights == "bf16" and dtype != torch.float32:
            continue
        for tf32 in (False, True):
            options: dict[str, Any] = {"dtype": dtype, "tf32": tf32}
            narrow, whole = (ask(cell, batch, hidden, weights=w, **options) for w in (weights, None))
            if narrow.reason is None:
                assert_runs(narrow, cell, batch, hidden, 1)
                fixed = {"exchange": narrow.exchange, "members": narrow.members, "rows": narrow.rows}
                same = ask(cell, batch, hidden, **fixed, **options)
                assert same.reason is not None or same.shared >= narrow.shared
            else:
                assert whole.reason is not None or "it is estimated to take" in narrow.reason


def test_narrow_weights_fit_where_whole_ones_do_not() -> None:
    options: dict[str, Any] = {"batch": 8, "dtype": torch.float32, "tf32": True}
    assert ask(hidden=2048, **options).reason is not None
    assert ask(hidden=2048, weights="int8", **options).exchange == "grid"
    assert ask(hidden=1536, weights="bf16", **options).exchange == "grid"
    # H = 1024 in half of the multiprocessors that float32 takes, or in one cluster.
    for members, weights in ((32, "bf16"), (32, "int8"), (16, "int8")):
        forced = {"members": members, "exchange": "grid"}
        assert ask(hidden=1024, **forced, **options).reason is not None
        assert ask(hidden=1024, weights=weights, **forced, **options).members == members
    assert ask(batch=8, hidden=1024, weights="int8", exchange="cluster").members == 16
    assert "W_hh of 67108864 bytes" in str(ask(hidden=4096, weights="int8", **options).reason)


def test_known_teams_of_narrow_weights() -> None:
    """Some have no registers for whole weights: H = 1024 in 32 members, and float32's in 64."""
    for members, weights, options in (
        (32, "int8", {"dtype": torch.bfloat16}),
        (64, "bf16", {"dtype": torch.float32, "tf32": True}),
        (32, "int8", {"dtype": torch.float32, "tf32": True}),
    ):
        forced: dict[str, Any] = {"batch": 8, "hidden": 1024, "exchange": "grid", "members": members, **options}
        narrow, general = ask(weights=weights, **forced), ask(**forced)
        assert narrow.known and not general.known
        assert_runs(narrow, "lstm", 8, 1024, 1)
        assert general.reason is not None or sum(narrow.cycles) < sum(general.cycles)


def test_what_widening_costs() -> None:
    """Of known teams with registers for whole weights nothing; of others more where it takes more instructions."""
    for dtype, weights in ((torch.bfloat16, "int8"), (torch.float32, "bf16"), (torch.float32, "int8")):
        options: dict[str, Any] = {"batch": 8, "dtype": dtype, "tf32": True, "exchange": "cluster", "rows": 8}
        known, whole = (ask(hidden=128, members=8, weights=w, **options) for w in (weights, None))
        assert known.known and known.cycles.product == whole.cycles.product
        general, whole = (ask(hidden=100, members=4, weights=w, **options) for w in (weights, None))
        assert not general.known and general.cycles.product > whole.cycles.product
        assert general.shared < whole.shared or general.cycles.loads <= whole.cycles.loads
    in_f16, in_bf16 = (
        ask(batch=8, hidden=100, members=4, exchange="cluster", rows=8, weights="int8", dtype=dtype).cycles.product
        for dtype in (torch.float16, torch.bfloat16)
    )
    assert in_f16 < in_bf16


@pytest.mark.parametrize(
    ("arguments", "options", "said"),
    [
        (("mgu", 1, 1), {}, "cell: got 'mgu', expected one of lstm, gru, rnn_tanh, rnn_relu"),
        (("lstm", 0, 1), {}, "batch: got 0, expected at least 1"),
        (("lstm", 1, 0), {}, "hidden_size: got 0"),
        (("lstm", 1, 1), {"recurrences": 0}, "recurrences: got 0"),
        (("lstm", 1, 1), {"dtype": torch.int8}, "dtype: got torch.int8, expected one of torch.bfloat16"),
        (("lstm", 1, 1), {"exchange": "ring"}, "exchange: got 'ring', expected None or one of cta, cluster, grid"),
        (("lstm", 1, 1), {"device": "cpu"}, "device: got 'cpu', expected a CUDA device, one of sm_80"),
        (("lstm", 1, 1), {"weights": "int4"}, "weights: got 'int4', expected None, 'bf16' or 'int8'"),
        (
            ("lstm", 1, 1),
            {"weights": "int8", "backward": True},
            "weights: got 'int8' with torch.float32, backward=True",
        ),
        (("lstm", 1, 1), {"weights": "bf16", "dtype": torch.float16}, "expected forward in torch.float32"),
        ((BLOCKS, 1, 6), {}, "hidden_size: got 6, expected a multiple of diagonal = 4"),
        ((BLOCKS, 1, 8), {"weights": "bf16"}, "there are no narrow weights of a W_hh of blocks"),
        ((STAGES, 1, 8), {"weights": "bf16"}, "there are no narrow weights of a cell that sums over its units"),
    ],
)
def test_bad_questions(arguments: tuple[Any, ...], options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError) as raised:
        fused_rnn.plan(*arguments, **options)
    assert said in str(raised.value)


def test_float32_is_tf32_where_torch_says_so() -> None:
    flags = torch.backends.cudnn
    for allowed in (False, True):
        with flags.flags(flags.enabled, flags.benchmark, deterministic=flags.deterministic, allow_tf32=allowed):
            assert fused_rnn.plan("lstm", 8, 64, device="sm_90").number == ("tf32" if allowed else "ieee")
    assert precision_of(torch.float32, True) == "tf32"
    assert ask(dtype=torch.float32, tf32=False).number == "ieee"


def test_a_plan_reads_well() -> None:
    text = str(ask(batch=8))
    assert text.startswith("a cluster of 16, compiled for it, bf16, 32 units x ")
    assert " cycles a step" in text
    assert str(ask(dtype=torch.float64)).startswith("stepwise: float64")
    assert ask() == ask()
    assert backend.NAME == "cuda"


def test_a_stack_runs_as_a_wavefront_where_that_pays() -> None:
    """By the teams that are resident together, and the time of a chunk against the host's part of it."""
    one = ask(batch=8, hidden=256)
    assert [paying_chunks(one, 3, steps) for steps in (1, 64, 256, 512, 1024)] == [1, 1, 1, 2, 3]
    assert paying_chunks(one, 1, 1024) == 1  # nothing to run beside it
    assert paying_chunks(one, 2, 1 << 20) == 64
    # An H200 holds 7 clusters of 16: 2 tiles of 3 layers, not of 4.
    two = ask(batch=16, hidden=256)
    assert (two.members, two.tiles) == (16, 2)
    assert paying_chunks(two, 3, 4096) > 1 and paying_chunks(two, 4, 4096) == 1
    assert paying_chunks(ask(batch=64, hidden=512), 2, 4096) == 1  # two waves of its own
    assert paying_chunks(ask(batch=8, hidden=1024), 2, 4096) == 1  # over the grid
    assert paying_chunks(ask(batch=8, hidden=32, exchange="cta"), 2, 4096) > 1
    assert paying_chunks(ask(batch=2000, hidden=32, exchange="cta", device=(90, 250, 227 * 1024, ())), 2, 4096) == 1
    assert paying_chunks(ask(dtype=torch.float64), 2, 4096) == 1
    assert paying_chunks(ask(batch=8, hidden=128, device="sm_80"), 2, 4096) == 1  # no clusters there


def test_plans_of_users_cells() -> None:
    for backward in (False, True):
        ours, built_in = (ask(cell, backward=backward) for cell in (LSTM, "lstm"))
        assert ours == built_in and ours.known
        assert ask(GRU, backward=backward) == ask("gru", backward=backward)
    for cell in (INDRNN, SRU):
        plan = ask(cell)
        assert (plan.exchange, plan.members) == ("none", 0)
        assert str(plan).startswith("no team: the cell has no W_hh, and a unit's thread")


def test_a_cell_of_many_numbers_leaves_weights_to_shared_memory() -> None:
    wide = CELLS[CHAIN]._replace(params=tuple("abcdefgh"))
    for precision, backward in itertools.product(("bf16", "tf32", "ieee"), (False, True)):
        few, more = (fewer_blocks(cell, precision, backward) for cell in (CELLS[CHAIN], wide))
        assert 0 <= few <= more
        assert fewer_blocks(CELLS["lstm"], precision, backward) == fewer_blocks(CELLS[LSTM], precision, backward) == 0
    assert fewer_blocks(wide, "bf16", True) > 0
    sizes = (0, True, 4, 8, 512, 1)
    plans = [make(ops._C, sizes, ops._C.Device(*H100), Forced("cluster"), False, fewer) for fewer in (0, 4)]
    assert plans[1].shared > plans[0].shared  # of the same team


@pytest.mark.skipif(torch.cuda.is_available(), reason="there the default is the GPU")
def test_without_a_gpu_the_question_is_about_an_h100() -> None:
    assert fused_rnn.plan("gru", 64, 256).device == H100
