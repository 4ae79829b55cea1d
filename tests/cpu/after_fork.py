"""A process that has run our kernels on threads, forward and backward, forks; the child runs them again.

Run by test_threads.py in a process of its own: autograd refuses every backward in a child of a process in which it has
started a thread for a device, which any other test, or a GPU, may make it do. Only our kernels run in the child:
torch's own parallel operations do wait there for threads that are gone, so all tensors are made before, and none is
filled with NaN.
"""

from __future__ import annotations

import multiprocessing
from typing import Any

import torch
from cases import Case, Inputs, inputs
from oracle import forward
from torch import Tensor

# Enough work for the kernels to share it out, by the batch and by the hidden units.
WIDE = Case("lstm", T=16, B=64, D=32, H=64)
NARROW = Case("gru", T=64, B=1, D=128, H=257)


def _forward_and_backward(case: Case, given: Inputs, leaves: list[Tensor]) -> list[Tensor]:
    outputs = forward(case, given, "cpu")
    return [*outputs, *torch.autograd.grad(outputs, leaves, given.dout)]


def _in_child(case: Case, given: Inputs, leaves: list[Tensor], queue: Any) -> None:
    queue.put([t.tolist() for t in _forward_and_backward(case, given, leaves)])


def main() -> None:
    torch.set_num_threads(2)
    context = multiprocessing.get_context("fork")
    for case in (WIDE, NARROW):
        given = inputs(case)
        leaves = [t.requires_grad_() for t in (given.x, *given.hx, *given.weights)]
        expected = _forward_and_backward(case, given, leaves)
        queue = context.Queue()
        child = context.Process(target=_in_child, args=(case, given, leaves, queue), daemon=True)
        child.start()
        try:
            results = queue.get(timeout=30)
            child.join(timeout=10)
        finally:
            child.kill()
        assert child.exitcode == 0
        for value, one in zip(results, expected, strict=True):
            torch.testing.assert_close(torch.tensor(value).view_as(one), one)
        print(f"{case}: the child has the same results")


if __name__ == "__main__":
    main()
