"""The printed C++ of users' cells: its text, and every operation of a program by every policy, in the emulator."""

from __future__ import annotations

import shutil

import pytest
import torch
from emulated import on_the_emulator
from emulated_printed import Loader, Printed
from programs import CHAIN, LEAKY
from torch import Tensor

from fused_rnn import ops
from fused_rnn.backends import cuda as backend
from fused_rnn.call import LayerCall
from fused_rnn.cells import CELLS
from fused_rnn.cells.program import BINARY, PREFIX, TERNARY, UNARY, parse
from fused_rnn.cuda import programs
from fused_rnn.cuda.printer import Kernel, definition, source, struct

LEAKY_STRUCT = """// leaky: h, a
struct Printed : CellDefaults {
  static constexpr const char* name = "Printed";
  static constexpr int gates = 1;
  static constexpr int states = 1;
  static constexpr const char* state_names[] = {"h"};
  static constexpr int saved = 1;
  static constexpr int params = 1;
  static constexpr bool recurrent = true;
  static constexpr int apart = 0;
  static constexpr bool reads_h = true;
  static constexpr bool sequences = false;
  static constexpr unsigned backward_after = 0;
  static constexpr unsigned backward_before = 1;

  template <class M, class N>
  static FUSED_RNN_HD void forward(const N (&a)[1], const N (&before)[1], const N (&p)[1], N (&after)[1], N (&s)[1]) {
    const N v0 = M::tanh(a[0]);
    const N v1 = v0 - before[0];
    const N v2 = p[0] * v1 + before[0];
    after[0] = v2;
    s[0] = v0;
  }

  template <class M, class N>
"""


def test_the_text_reads_well() -> None:
    assert struct(parse(LEAKY)).startswith(LEAKY_STRUCT)


def test_a_source_has_what_its_kernels_need() -> None:
    cell = struct(parse(CHAIN), sequences=True)
    assert "bool sequences = true;" in cell
    text = source(cell, [Kernel("persistent_bwd", "bf16", 2, 3), Kernel("pointwise_fwd", "f64")])
    for part in (
        "#define FUSED_RNN_FEWER_BLOCKS 3",
        '#include "cuda/persistent_bwd.h"',
        '#include "cuda/pointwise.h"',
        "persistent_bwd_kernel<fused_rnn::Printed, fused_rnn::cuda::Bf16Product, 2>",
        "pointwise_fwd_kernel<fused_rnn::Printed, double, fused_rnn::Libm<double>>",
    ):
        assert part in text, part


def test_a_built_in_cell_is_named() -> None:
    for cell, name in (("lstm", "Lstm"), ("rnn_relu", "RnnRelu")):
        kernel = Kernel("persistent_fwd", "bf16", 1, shape=3, narrow="int8")
        text = source(definition(CELLS[cell]), [kernel])
        assert f"using Printed = {name};" in text
        narrow = "fused_rnn::cuda::NarrowProduct<fused_rnn::cuda::Bf16Product, fused_rnn::cuda::Narrow::int8>"
        known = "fused_rnn::cuda::KnownTeam<3, fused_rnn::cuda::Bf16Product::kPrecision, fused_rnn::Printed::gates"
        known += ", fused_rnn::cuda::Narrow::int8>"
        assert f"persistent_fwd_kernel<fused_rnn::Printed, {narrow}, 1, {known}>" in text


def test_a_name_of_the_users_cannot_leave_its_place() -> None:
    odd = LEAKY.replace("|leaky|", '|a"};\n#error|').replace("|h|a|", '|h"|a\\|')
    text = struct(parse(odd))
    assert "#error" not in text and "\\" not in text


# Values of three inputs: all that is special, and what is not.
# No negative zero: it would not outlive the sum with the product before it.
SPECIAL = (float("nan"), float("inf"), -float("inf"), 0.0, 1.0, -1.0, 0.5, 41.0, -41.0, 1e-3, 3.25, -2.5)
CONSTANTS = ("0.1", "-3.0", "1e-30", "inf", "-inf", "nan")


def everything() -> str:
    """A cell that keeps the result of every operation on three gates, and of some constants."""
    code = [f"{name} 0" for name in UNARY] + [f"{name} 0 1" for name in BINARY] + [f"{name} 0 1 2" for name in TERNARY]
    code += [f"const {value}" for value in CONSTANTS]
    kept = " ".join(str(4 + i) for i in range(len(code)))
    saved = len(code)
    return PREFIX + (
        f"everything|3 0 0|h||{','.join(code)}>0;{kept}|const 0.0>{saved + 3} {saved + 3} {saved + 3};{saved + 3};"
    )


def grid(dtype: torch.dtype) -> Tensor:
    """[3 gates, units]"""
    each = torch.tensor(SPECIAL, dtype=dtype)
    a, b = torch.meshgrid(each, each, indexing="ij")
    return torch.stack([a.flatten(), b.flatten(), torch.linspace(-2, 2, a.numel(), dtype=dtype)])


@pytest.mark.skipif(shutil.which("g++") is None, reason="the emulator is compiled by g++")
@pytest.mark.skipif(ops.MISSING is not None, reason=str(ops.MISSING))
@pytest.mark.parametrize(("precision", "dtype"), [("f64", torch.float64), ("ieee", torch.float32), ("f16", torch.half)])
def test_every_operation(precision: str, dtype: torch.dtype) -> None:
    text = everything()
    program, gates = parse(text), grid(dtype)
    units = gates.shape[1]
    # Each gate is its bias, which no product with what is not finite passes through.
    weights = [torch.zeros(3 * units, 1, dtype=dtype), gates.flatten()]
    call = LayerCall(torch.zeros(1, 1, 1, dtype=dtype), weights, (), None, None, text, (1,), save="gates")
    loader = Loader([[Printed(text, Kernel("pointwise_fwd", precision))]])
    with on_the_emulator(), programs.emulating(loader):
        saved = backend.forward(call)[2][0, 0, 0]
    zero = torch.zeros(units, dtype=torch.float64)
    expected = program.forward.run([*gates.double(), zero])[1]
    wide = 1e-13 if dtype == torch.float64 else 4 * torch.finfo(dtype).eps
    names = [instruction.op for instruction in program.forward.code]
    for name, ours, right in zip(names, saved, expected, strict=True):
        right = right.expand(units).to(dtype)
        # Subnormal numbers may be flushed; what rounds to 0 keeps no sign.
        close = torch.isclose(ours.double(), right.double(), rtol=wide, atol=1e-37 if dtype != torch.half else 1e-4)
        close |= ours.isnan() & right.isnan()
        where = (~close).nonzero()[:3].flatten().tolist()
        assert not where, (name, [(gates[:, i].tolist(), float(ours[i]), float(right[i])) for i in where])
