"""The op that draws masks: Philox's own numbers, their shares, and that nothing but the seed tells them."""

from __future__ import annotations

import pytest
import torch

from fused_rnn import ops

mask = torch.ops.fused_rnn.mask.default if ops.MISSING is None else None
pytestmark = pytest.mark.skipif(mask is None, reason=str(ops.MISSING))

SEED = torch.tensor([0x1122334455667788], device="cpu")


def philox(key: int, counter: int, stream: int) -> list[int]:
    """Philox4x32-10 as Salmon et al. 2011 write it."""
    low = (1 << 32) - 1
    a, b, c, d = counter & low, counter >> 32, stream & low, stream >> 32
    k0, k1 = key & low, (key >> 32) & low
    for _ in range(10):
        x, y = 0xD2511F53 * a, 0xCD9E8D57 * c
        a, b, c, d = (y >> 32) ^ b ^ k0, y & low, (x >> 32) ^ d ^ k1, x & low
        k0, k1 = (k0 + 0x9E3779B9) & low, (k1 + 0xBB67AE85) & low
    return [a, b, c, d]


def test_known_answers() -> None:
    """The test vectors that come with Random123."""
    assert philox(0, 0, 0) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    ones = (1 << 64) - 1
    assert philox(ones, ones, ones) == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]


@pytest.mark.parametrize("p", [0.0, 0.3, 0.5, 1.0])
def test_the_numbers(p: float) -> None:
    """Of a block of 64 the first 16 are the first numbers of 16 counters, and so on."""
    made = mask(SEED, torch.empty(200), p, -1.0, 2.0, 7)
    for i, value in enumerate(made.tolist()):
        block, k = divmod(i, 64)
        number = philox(int(SEED), block * 16 + k % 16, 7)[k // 16]
        assert value == (-1.0 if number < int(p * 2**32) else 2.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_dtypes(dtype: torch.dtype) -> None:
    """The same units in each, whatever is in memory and however it lies."""
    like = torch.full((5, 33, 7), float("nan"), dtype=dtype).transpose(0, 2)
    made = mask(SEED, like, 0.25, 0.0, 1 / 0.75, 1)
    assert made.shape == like.shape and made.dtype == dtype
    expected = mask(SEED, torch.empty(7, 33, 5, dtype=torch.float64), 0.25, 0.0, 1 / 0.75, 1).to(dtype)
    assert torch.equal(made, expected)


def test_shares_and_independence() -> None:
    n = 1 << 20
    first, second = (mask(SEED, torch.empty(n), 0.3, 1.0, 0.0, stream) for stream in (1, 2))
    other = mask(SEED + 1, torch.empty(n), 0.3, 1.0, 0.0, 1)
    for made in (first, second, other):
        assert abs(float(made.mean()) - 0.3) < 5 * (0.21 / n) ** 0.5
    for a, b in ((first, second), (first, other), (first[1:], first[:-1]), (first[64:], first[:-64])):
        assert abs(float((a * b).mean()) - 0.09) < 5 * (0.09 * 0.91 / n) ** 0.5


def test_nothing_and_errors() -> None:
    assert mask(SEED, torch.empty(0, 3), 0.5, 0.0, 1.0, 0).shape == (0, 3)
    for args in (
        (SEED.float(), torch.empty(3), 0.5),
        (torch.zeros(2, dtype=torch.int64), torch.empty(3), 0.5),
        (SEED, torch.empty(3, dtype=torch.int64), 0.5),
        (SEED, torch.empty(3), 1.5),
    ):
        with pytest.raises(RuntimeError, match="fused_rnn"):
            mask(*args, 0.0, 1.0, 0)
