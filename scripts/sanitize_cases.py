"""Every case of tests/common/cases.py by the CPU kernels on one thread and three, with gradients and without, streamed,
by weights that stay packed and by those of int8.

Nothing is compared, the sanitizers alone judge (scripts/sanitize.sh): the tests compare, with code compiled as it is
installed, and spend nearly all their time on the reference loop.
"""

import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests/common"))
from cases import DTYPES, Case, inputs, option_cases, shape_cases
from oracle import by_backend, forward

import fused_rnn
from fused_rnn import _C


def streamed(case: Case) -> list[torch.Tensor]:
    """A stream of the case's sizes, with weights of every width it may have, and calls on kept and int8 weights."""
    kind = {"lstm": "LSTM", "gru": "GRU"}.get(case.cell, "RNN")
    options: dict[str, Any] = {"num_layers": case.layers, "bias": case.bias, "dtype": case.dtype}
    options |= {"proj_size": case.proj} if case.proj else {}
    options |= {"nonlinearity": case.cell.removeprefix("rnn_")} if kind == "RNN" else {}
    module = getattr(fused_rnn, kind)(case.D, case.H, **options)
    x = torch.randn(case.T, case.B, case.D).to(case.dtype)
    results = []
    for weights in (None, "bf16", "int8") if case.dtype == torch.float32 else (None,):
        stream = module.stream(case.B, weights=weights)
        results += [stream.step(x[0], out=stream.step(x[0])), stream.steps(x)]
    with torch.no_grad():
        results.append(module.freeze()(x)[0])
        for activations in ("int8", "float32") if case.dtype == torch.float32 else ():
            results.append(fused_rnn.quantize(module, activations=activations)(x)[0])
    return results


def main() -> None:
    cases = [*shape_cases(), *option_cases(DTYPES)]
    for case in cases:
        given = inputs(case)
        for threads in (1, 3):
            torch.set_num_threads(threads)
            results = [*by_backend(case, given, "cpu").values()]
            with torch.no_grad():
                results += forward(case, given, "cpu")
                results += streamed(case) if case.B else []
            assert all(bool(t.isfinite().all()) for t in results), case
    print(f"{_C.isa()}: {len(cases)} cases, no finding")


if __name__ == "__main__":
    main()
