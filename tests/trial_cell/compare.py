"""Compares the trial cells of a compiled extension, which stands in for the package's own, with the reference.

python compare.py EXTENSION: prints how many problems agreed.
"""

from __future__ import annotations

import sys
from importlib.util import module_from_spec, spec_from_file_location

import torch

spec = spec_from_file_location("fused_rnn._C", sys.argv[1])
assert spec is not None
assert spec.loader is not None
sys.modules["fused_rnn._C"] = module_from_spec(spec)
spec.loader.exec_module(sys.modules["fused_rnn._C"])

from coupled_lstm import COUPLED  # noqa: E402
from decay import DECAY  # noqa: E402
from leaky import LEAKY  # noqa: E402
from torch import Tensor  # noqa: E402

from fused_rnn import layers, ops  # noqa: E402
from fused_rnn.call import LayerCall  # noqa: E402
from fused_rnn.cells import Cell, register  # noqa: E402
from tests.common.program_calls import by_ops, by_reference, make_call  # noqa: E402

register(COUPLED)
register(DECAY)
register(LEAKY)
B, D, H = 3, 4, 17
STEPS = {"gates": 6, "recompute": 70}  # the latter more than between two checkpoints
# The error that an element may have beside its part of the largest one.
TOLERANCES = {torch.float64: 1e-11, torch.float32: 2e-5, torch.bfloat16: 4e-2}


def error_of(made: Tensor, expected: Tensor) -> float:
    """The largest one, each as a part of its element and the largest; where all are zero as it is."""
    scale = expected.abs() + expected.abs().max()
    return ((made - expected).abs() / torch.where(scale == 0, 1, scale)).max().item()


def run(cell: Cell, backend: str, given: list[Tensor], dtype: torch.dtype, **options: object) -> list[Tensor]:
    """y, the states after and the gradients of a sum of them with fixed weights, in x, the states and the weights."""
    leaves = [t.to(dtype).requires_grad_() for t in given]
    outputs = layers.run(cell.name, leaves[0], leaves[3:], leaves[1:3], backend=backend, **options)  # type: ignore
    random = torch.Generator().manual_seed(1)
    douts = [torch.randn(t.shape, generator=random).to(dtype) for t in outputs]
    return [*outputs, *torch.autograd.grad(list(outputs), leaves, douts)]


def compare(cell: Cell, dtype: torch.dtype, bidirectional: bool, width: int, masked: bool, save: str) -> None:
    """Raises AssertionError where the extension is wrong."""
    random, T = torch.Generator().manual_seed(0), STEPS[save]
    count, rows = 1 + bidirectional, cell.gates * H
    weights = [(rows, D), (rows, width), (rows,), (rows,), *[(width, H)] * (width != H)] * count
    shapes = [(T, B, D), (count, B, width), (count, B, H), *weights]
    given = [torch.randn(shape, generator=random).mul(0.3).to(dtype) for shape in shapes]
    options: dict[str, object] = {"bidirectional": bidirectional, "save": save}
    if masked:
        reset = torch.rand(T, B, generator=random) < 0.1
        options |= {"lengths": torch.tensor([T, 0, T // 2]), "reset": reset}
    with torch.no_grad():
        alone = layers.run(cell.name, given[0], given[3:], given[1:3], backend="cpu", **options)  # type: ignore
    made = run(cell, "cpu", given, dtype, **options)
    expected = run(cell, "reference", given, torch.float64, **options | {"save": "gates"})
    for k, (a, b) in enumerate(zip([*alone, *made], [*expected[:3], *expected], strict=True)):
        error = error_of(a, b)
        assert error < TOLERANCES[dtype], (cell.name, dtype, options, width, k, error)


def compare_stream(call: LayerCall) -> None:
    """Raises AssertionError where steps on packed weights are not the layer's own."""
    T, B, D = call.x.shape
    wide = torch.float64 if call.x.dtype == torch.float64 else torch.float32
    states = [s.to(wide, copy=True) for s in call.states]
    number = [torch.float32, torch.float64, torch.bfloat16].index(call.x.dtype)
    stream = ops._C.Stream(call.cell, number, 0, B, D, H, H, 1, False, [s.data_ptr() for s in states])
    w_ih, b_ih, *params = (w.data_ptr() for w in call.weights)
    stream.pack([[w_ih, 0, b_ih, 0, 0, *params]])
    y = torch.empty(T, B, H, dtype=call.x.dtype)
    for t in range(T):
        stream.run(call.x[t].data_ptr(), 1, y[t].data_ptr())
    for made, expected in zip([y, *states], ops.forward(*call), strict=False):
        torch.testing.assert_close(made.to(call.x.dtype), expected, msg=f"a stream, {call.x.dtype}")


kinds = [(False, False, "gates"), (True, False, "gates"), (False, True, "gates"), (True, True, "gates")]
kinds += [(True, True, "recompute")]  # the slowest: the reference is a loop in Python
shapes = [(COUPLED, H), (COUPLED, 5), (LEAKY, H)]
problems = [
    (cell, dtype, bidirectional, width, masked, save)
    for cell, width in shapes
    for dtype in TOLERANCES
    for bidirectional, masked, save in kinds
]
for problem in problems:
    compare(*problem)
calls = [
    make_call("decay", T=STEPS[save], directions=(1, -1), lengths=masked, reset=masked, save=save, dtype=dtype)
    for dtype in TOLERANCES
    for masked in (False, True)
    for save in STEPS
]
for call in calls:  # the ops themselves, with the states over time and their gradients
    made, expected = by_ops(call, ops.forward, ops.backward), by_reference(call)
    for name, value in expected.items():
        error = error_of(made[name], value)
        assert error < TOLERANCES[call.x.dtype], (call.x.dtype, call.save, name, error)
for dtype in TOLERANCES:
    compare_stream(make_call("decay", dtype=dtype))
print(f"{len(problems) + len(calls) + len(TOLERANCES)} problems agree, by {ops.ISA}")
