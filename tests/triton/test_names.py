"""Names of Triton's own launch code: it overwrites an argument that has one, and no interpreter sees that."""

from __future__ import annotations

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

from fused_rnn.triton import backward, forward

TRITONS = {"params", "specialization", "options", "kwargs", "grid", "warmup"}


@pytest.mark.parametrize("kernel", [forward.fwd_kernel, backward.bwd_kernel], ids=["forward", "backward"])
def test_no_argument_has_one(kernel: object) -> None:
    assert not TRITONS & set(kernel.arg_names)  # type: ignore[attr-defined]
