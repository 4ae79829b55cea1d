"""Planted mutations in the Triton kernels: what the loop tests compare by must catch every one of them.

Each is one edit of a kernel's source, run in the kernel's place. What no test here can catch is a missing wait of a
team: the interpreter runs its programs one after the other.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from cases import Case, inputs
from oracle import by_backend, by_reference, by_torch
from tolerances import assert_as_good_as_torch
from triton_cases import LOOPS, MARKS, here, planted, quicker_interpreter

from fused_rnn.triton import cells, launch, planner

pytestmark = MARKS

MASKED = Case("lstm", T=5, B=5, H=17, bidirectional=True, lengths=True, reset=True)
# file, text in it, what to write instead, case, loops in which it must be seen
MUTATIONS: dict[str, tuple[str, str, str, Case, tuple[str, ...]]] = {
    "lstm: gates i and f swapped": (
        "lstm",
        "c = f * states[1] + i * g",
        "c = i * states[1] + f * g",
        Case("lstm"),
        ("stepwise",),
    ),
    "lstm: order i, f, o, g": (
        "lstm",
        "g = tanh(x[2] + r[2], ACTIVATION)\n    o = sigmoid(x[3] + r[3], ACTIVATION)",
        "g = tanh(x[3] + r[3], ACTIVATION)\n    o = sigmoid(x[2] + r[2], ACTIVATION)",
        Case("lstm"),
        ("stepwise",),
    ),
    "lstm: gradients of f and g swapped": (
        "lstm",
        "dc * before[1] * f * (1.0 - f), dc * i * (1.0 - g * g),",
        "dc * i * (1.0 - g * g), dc * before[1] * f * (1.0 - f),",
        Case("lstm"),
        ("stepwise",),
    ),
    "gru: order z, r, n": (
        "gru",
        "reset = sigmoid(x[0] + r[0], ACTIVATION)\n    z = sigmoid(x[1] + r[1], ACTIVATION)",
        "z = sigmoid(x[0] + r[0], ACTIVATION)\n    reset = sigmoid(x[1] + r[1], ACTIVATION)",
        Case("gru"),
        ("stepwise",),
    ),
    "gru: no bias inside": ("gru", "hn = r[2] + bias[0]", "hn = r[2]", Case("gru"), ("stepwise",)),
    "rnn: relu's gradient at a negative": (
        "rnn_relu",
        "(tl.where(after[0] <= 0, 0.0, dh),)",
        "(dh,)",
        Case("rnn_relu"),
        ("stepwise",),
    ),
    "forward: resets ignored": (
        "forward",
        "live = valid & (tl.load(reset",
        "live = valid | (tl.load(reset",
        MASKED,
        ("solo-registers", "cooperative-resident", "stepwise"),
    ),
    "forward: y past the end": (
        "forward",
        "out = tl.where(valid[:, None], after[0], 0.0)",
        "out = (after[0] + 0.0)",
        MASKED,
        ("solo-registers", "cooperative-resident"),
    ),
    "forward: c past the end": (
        "forward",
        "s = where_each(valid, s_new, s) if HAS_LENGTHS else s_new",
        "s = s_new",
        MASKED,
        ("solo-registers", "solo-streamed"),
    ),
    "forward: reverse does not start at its own end": (
        "forward",
        "first = first | (t == tl.where(backwards, length - 1, -2))",
        "first = first",
        MASKED,
        ("cooperative-streamed", "stepwise"),
    ),
    "forward: another row's h0": (
        "forward",
        "tl.where(first, h0 + row_rb * H,",
        "tl.where(first, h0 + row * H,",
        Case("gru", bidirectional=True),
        ("stepwise",),
    ),
    "forward: W_hh transposed": (
        "forward",
        "n[None, :] * H + k[:, None]",
        "n[None, :] + k[:, None] * H",
        Case("gru"),
        ("solo-registers", "stepwise"),
    ),
    "backward: gradient passes a reset": (
        "backward",
        "reaches = reaches & (tl.load",
        "reaches = reaches | (tl.load",
        MASKED,
        ("cooperative-resident", "stepwise"),
    ),
    "backward: gradient passes a reset, in registers": (
        "backward",
        "d = tl.where(live[:, None], d_gates[APART + g], 0.0)",
        "d = (d_gates[APART + g] + 0.0)",
        MASKED,
        ("solo-registers",),
    ),
    "backward: gradient lost past the end": (
        "backward",
        "ds = where_each(valid, ds_before, ds)",
        "ds = ds_before",
        MASKED,
        ("solo-registers", "cooperative-spread"),
    ),
    "backward: dgates past the end": (
        "backward",
        "d = tl.where(valid[:, None], d_gates[g], 0.0)",
        "d = (d_gates[g] + 0.0)",
        MASKED._replace(cell="rnn_tanh"),
        ("stepwise",),
    ),
    "backward: the input side for the recurrent one": (
        "backward",
        "+ APART * H)",
        "+ 0 * H)",
        Case("gru"),
        ("stepwise",),
    ),
    "backward: another row's c0": (
        "backward",
        "first[j] + row_rb * H",
        "first[j] + row * H",
        Case("lstm", bidirectional=True),
        ("solo-registers", "solo-streamed"),
    ),
    "backward: no gradient of h0": (
        "backward",
        "if step + 1 < steps:",
        "if (step + 1 < steps) & (step >= 0):",
        Case("gru"),
        ("stepwise",),
    ),
}


@pytest.fixture(autouse=True)
def _quick() -> None:
    quicker_interpreter()


def judged(case: Case, loop: str) -> None:
    given = here(inputs(case))
    with planner.override(**LOOPS[loop]):
        ours = by_backend(case, given, "triton")
    assert_as_good_as_torch(ours, by_torch(case, given), by_reference(case, given))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, in the interpreter, of what nobody wrote
@pytest.mark.parametrize("mutation", MUTATIONS)
def test_mistake_is_caught(mutation: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    name, old, new, case, loops = MUTATIONS[mutation]
    module: Any = planted(name, old, new, tmp_path)
    if name == "forward":
        monkeypatch.setattr(launch, "fwd_kernel", module.fwd_kernel)
    elif name == "backward":
        monkeypatch.setattr(launch, "bwd_kernel", module.bwd_kernel)
    else:
        monkeypatch.setitem(sys.modules, cells.MODULES[case.cell], module)
    for loop in loops:
        with pytest.raises(AssertionError, match="error"):
            judged(case, loop)


def test_unchanged_kernels_pass() -> None:
    """The same comparison without a mutation: what is caught above is caught because of it."""
    for case in {case for *_, case, _ in MUTATIONS.values()}:
        judged(case, "stepwise")
