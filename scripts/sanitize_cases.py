"""Every case of tests/cases.py by the CPU kernels, with one thread and with three, with gradients and without.

Nothing is compared, the sanitizers alone judge (scripts/sanitize.sh): the tests compare, with code compiled as it is
installed, and spend nearly all their time on the reference loop.
"""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
from cases import DTYPES, inputs, option_cases, shape_cases
from judge import by_backend, forward

from fused_rnn import _C


def main() -> None:
    cases = [*shape_cases(), *option_cases(DTYPES)]
    for case in cases:
        given = inputs(case)
        for threads in (1, 3):
            torch.set_num_threads(threads)
            results = [*by_backend(case, given, "cpu").values()]
            with torch.no_grad():
                results += forward(case, given, "cpu")
            assert all(bool(t.isfinite().all()) for t in results), case
    print(f"{_C.isa()}: {len(cases)} cases, no finding")


if __name__ == "__main__":
    main()
