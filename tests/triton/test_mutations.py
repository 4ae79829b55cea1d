"""Planted mutations in the Triton kernels: what the loop tests compare by must catch every one of them.

Each is one edit of a kernel's source, run in the kernel's place. What no test here can catch is a missing wait of a
team: the interpreter runs its programs one after the other.
"""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from cases import Case, inputs
from oracle import by_backend, by_reference, by_torch
from tolerances import assert_as_good_as_torch
from triton_cases import LOOPS, MARKS, here, quicker_interpreter

from fused_rnn.triton import cells, launch, tiles

pytestmark = MARKS

MASKED = Case("lstm", T=5, B=5, H=17, bidirectional=True, lengths=True, reset=True)
# file, text in it, what to write instead, case, loops in which it must be seen
MUTATIONS: dict[str, tuple[str, str, str, Case, tuple[str, ...]]] = {
    "lstm: gates i and f swapped": ("lstm", "c = f * c + i * g", "c = i * c + f * g", Case("lstm"), ("c",)),
    "lstm: order i, f, o, g": (
        "lstm",
        "g = tanh(x[2] + h[2], HOW)\n    o = sigmoid(x[3] + h[3], HOW)",
        "g = tanh(x[3] + h[3], HOW)\n    o = sigmoid(x[2] + h[2], HOW)",
        Case("lstm"),
        ("c",),
    ),
    "lstm: gradients of f and g swapped": (
        "lstm",
        "dc * c_before * f * (1.0 - f), dc * i * (1.0 - g * g),",
        "dc * i * (1.0 - g * g), dc * c_before * f * (1.0 - f),",
        Case("lstm"),
        ("c",),
    ),
    "gru: order z, r, n": (
        "gru",
        "r = sigmoid(x[0] + h[0], HOW)\n    z = sigmoid(x[1] + h[1], HOW)",
        "z = sigmoid(x[0] + h[0], HOW)\n    r = sigmoid(x[1] + h[1], HOW)",
        Case("gru"),
        ("c",),
    ),
    "gru: no bias inside": ("gru", "hn = h[2] + bias", "hn = h[2]", Case("gru"), ("c",)),
    "rnn: relu's gradient at a negative": ("rnn", "(tl.where(h <= 0, 0.0, dh),)", "(dh,)", Case("rnn_relu"), ("c",)),
    "forward: resets ignored": (
        "forward",
        "live = valid & (tl.load(reset",
        "live = valid | (tl.load(reset",
        MASKED,
        ("a-registers", "b-resident", "c"),
    ),
    "forward: y past the end": (
        "forward",
        "out = tl.where(valid[:, None], new, 0.0)",
        "out = (new + 0.0)",
        MASKED,
        ("a-registers", "b-resident"),
    ),
    "forward: c past the end": (
        "forward",
        "s = tl.where(valid[:, None], s_new, s) if HAS_LENGTHS else s_new",
        "s = s_new",
        MASKED,
        ("a-registers", "a-streamed"),
    ),
    "forward: reverse does not start at its own end": (
        "forward",
        "first = first | (t == tl.where(backwards, length - 1, -2))",
        "first = first",
        MASKED,
        ("b-streamed", "c"),
    ),
    "forward: another row's h0": (
        "forward",
        "tl.where(first, h0 + row_rb * H,",
        "tl.where(first, h0 + row * H,",
        Case("gru", bidirectional=True),
        ("c",),
    ),
    "forward: a gate's depth unmasked": (
        "forward",
        "mask=(n < H)[None, :] & (k < H)[:, None], other=0.0)",
        "mask=(n < H)[None, :] & (k < H)[:, None], other=0.5)",
        Case("gru"),
        ("a-registers",),
    ),
    "backward: gradient passes a reset": (
        "backward",
        "reaches = reaches & (tl.load",
        "reaches = reaches | (tl.load",
        MASKED,
        ("b-resident", "c"),
    ),
    "backward: gradient passes a reset, in registers": (
        "backward",
        "d = tl.where(live[:, None], d_gates[DG - G + g], 0.0)",
        "d = (d_gates[DG - G + g] + 0.0)",
        MASKED,
        ("a-registers",),
    ),
    "backward: gradient lost past the end": (
        "backward",
        "dh = tl.where(valid[:, None], d_by, dh)",
        "dh = d_by",
        MASKED,
        ("a-registers", "b-spread"),
    ),
    "backward: dgates past the end": (
        "backward",
        "d = tl.where(valid[:, None], d_gates[g], 0.0)",
        "d = (d_gates[g] + 0.0)",
        MASKED._replace(cell="rnn_tanh"),
        ("c",),
    ),
    "backward: the input side for the recurrent one": ("backward", "(DG - G) * H)", "0 * H)", Case("gru"), ("c",)),
    "backward: another row's c0": (
        "backward",
        "first_state + row_rb * H",
        "first_state + row * H",
        Case("lstm", bidirectional=True),
        ("a-registers", "a-streamed"),
    ),
    "backward: no gradient of h0": (
        "backward",
        "if step + 1 < steps:",
        "if (step + 1 < steps) & (step >= 0):",
        Case("gru"),
        ("c",),
    ),
}


@pytest.fixture(autouse=True)
def _quick() -> None:
    quicker_interpreter()


def planted(name: str, old: str, new: str, folder: Path) -> ModuleType:
    """The kernels' module with one edit. Triton reads a kernel's source from its file."""
    source = (Path(cells.__file__).parent / f"{name}.py").read_text()
    assert source.count(old) == 1, f"{name}.py has {old!r} {source.count(old)} times"
    path = folder / f"planted_{name}.py"
    path.write_text(source.replace(old, new))
    spec = importlib.util.spec_from_file_location(f"planted_{name}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def judged(case: Case, loop: str) -> None:
    given = here(inputs(case))
    with tiles.override(**LOOPS[loop]):
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
        suffix = f"_{case.cell[4:]}" if name == "rnn" else ""
        wrong = {"fwd": getattr(module, f"fwd{suffix}"), "bwd": getattr(module, f"bwd{suffix}")}
        monkeypatch.setitem(cells.KERNELS, case.cell, replace(cells.KERNELS[case.cell], **wrong))
    for loop in loops:
        with pytest.raises(AssertionError, match="error"):
            judged(case, loop)


def test_unchanged_kernels_pass() -> None:
    """The same comparison without a mutation: what is caught above is caught because of it."""
    for case in {case for *_, case, _ in MUTATIONS.values()}:
        judged(case, "c")
