"""Which recurrences run backwards in time, as kernels are told it."""

from __future__ import annotations

from collections.abc import Sequence


def direction_bits(directions: Sequence[int]) -> tuple[int, int]:
    """(bits, period): bit r % period is set where recurrence r runs backwards."""
    backwards = [d < 0 for d in directions]
    count = len(backwards)
    for period in range(1, min(count, 62) + 1):
        if count % period == 0 and backwards == backwards[:period] * (count // period):
            return sum(1 << i for i, b in enumerate(backwards[:period]) if b), period
    raise NotImplementedError(f"directions: {count} in no pattern that repeats within 62; run them in two calls")
