"""fused_rnn::run_steps: a product and a launch for every step, as the CUDA loops without a team take them."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from fused_rnn import ops

_RUN_STEP = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p)
LOOP, STREAM = 48, 80


@contextmanager
def stepper(step: Callable[[int], int | None]) -> Iterator[tuple[int, int, int]]:
    """A function of Python as calls.h has them: its address, and what it is to be given."""

    def called(loop: int, number: int, stream: int) -> int | None:
        assert (loop, stream) == (LOOP, STREAM)
        return step(number)

    function = _RUN_STEP(called)
    yield ctypes.cast(function, ctypes.c_void_p).value or 0, LOOP, STREAM


def run(products: list[tuple[Tensor, Tensor, Tensor, int]], first: int, last: int, step: Callable[[int], None]) -> None:
    with stepper(step) as told:
        ops.run_steps(*map(list, zip(*products, strict=True)), first, last, *told)


@pytest.mark.parametrize("recurrences", [1, 3])
def test_forward_multiplies_what_the_step_before_left(recurrences: int) -> None:
    entering, weights = torch.randn(recurrences, 2, 5), torch.randn(recurrences, 7, 5).transpose(1, 2)
    product, seen, expected = torch.empty(2, recurrences, 7), list[Tensor](), list[Tensor]()

    def step(number: int) -> None:
        expected.append(torch.bmm(entering, weights).transpose(0, 1))
        seen.append(product.clone())
        entering.add_(number + 1)

    run([(entering, weights, product.transpose(0, 1), 0)], 0, 5, step)
    assert len(seen) == 6
    torch.testing.assert_close(torch.stack(seen), torch.stack(expected), rtol=0, atol=0)


@pytest.mark.parametrize(("first", "last"), [(6, -1), (6, 4), (3, 2), (3, -1), (0, -1)])
def test_backward_multiplies_the_step_after(first: int, last: int) -> None:
    """Two directions, of a window too, whose views start within their memory: recurrences take turns in it."""
    T = 7
    sides = torch.randn(T, 3, 4, 6)[..., 1:].transpose(1, 2)[:, 1:]  # [T, 3, 3, 5]
    weights, product = torch.randn(4, 5, 2)[1:], torch.full((4, 3, 2), torch.nan)[1:]
    products = [(sides[:, i::2], weights[i::2], product[i::2], (1, -1)[i]) for i in range(2)]
    steps = list[int]()

    def step(number: int) -> None:
        steps.append(number)
        if number == T - 1:
            assert product.isnan().all()  # there is no step after it
            return
        for i, way in enumerate((1, -1)):
            time = number + 1 if way > 0 else T - 2 - number
            expected = torch.bmm(sides[time, i::2], weights[i::2])
            torch.testing.assert_close(product[i::2], expected, rtol=0, atol=0)

    run(products, first, last, step)
    assert steps == list(range(first, last - 1, -1))


def test_a_step_is_one_product_and_one_launch() -> None:
    """Nothing else is issued: on a GPU that is what a step costs the host."""
    matrices, launches = (torch.randn(1, 2, 3), torch.randn(1, 3, 4), torch.empty(1, 2, 4), 0), list[int]()
    with torch.profiler.profile() as watched:
        run([matrices], 0, 19, launches.append)
    counts = {event.key: event.count for event in watched.key_averages() if event.key.startswith("aten::")}
    counts.pop("aten::resolve_conj", None)  # the CPU's bmm asks for it
    assert counts == {"aten::bmm": 20}
    assert len(launches) == 20


def test_what_goes_wrong_in_a_step_is_raised() -> None:
    steps, words = list[int](), ctypes.create_string_buffer(b"launch: no kernel")

    def step(number: int) -> int | None:
        steps.append(number)
        return ctypes.addressof(words) if number == 3 else None

    product = ([torch.ones(1, 2, 2)], [torch.ones(1, 2, 2)], [torch.ones(1, 2, 2)], [0])
    with stepper(step) as told, pytest.raises(RuntimeError, match="fused_rnn: launch: no kernel"):
        ops.run_steps(*product, 0, 9, *told)
    assert steps == [0, 1, 2, 3]
    with stepper(step) as told, pytest.raises(RuntimeError, match="got 1, 1 and 0 matrices of 1 products"):
        ops.run_steps(product[0], product[1], [], [0], 0, 9, *told)
