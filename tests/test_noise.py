"""uniform_noise: the published vectors, independence from the batch, statistics, errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from moe_kernels import uniform_noise
from moe_kernels.ops.noise import philox4x32

# kat_vectors of Random123, philox 4x32 with 10 rounds: counter, key, result.
KNOWN_ANSWERS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000",
     "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff",
     "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0",
     "d16cfe09 94fdcceb 5001e420 24126ea1"),
]  # fmt: skip


def words(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_known_answers(counter: str, key: str, expected: str, device: torch.device) -> None:
    c0, c1, c2, c3 = (torch.tensor([word], device=device) for word in words(counter))
    k0, k1 = words(key)
    result = philox4x32((c0, c1, c2, c3), (k0, k1))
    assert [int(word) for word in result] == words(expected)


def test_layout(device: torch.device) -> None:
    # Counter: position // 4, restart, the index's lower and upper half. Key: the seed's halves.
    seed, index, restart = 2**40 + 7, 2**33 + 5, 3
    noise = uniform_noise(seed, torch.tensor([index], device=device), (2, 5), restart)
    assert (noise.shape, noise.dtype, noise.device.type) == ((1, 2, 5), torch.float32, device.type)
    for position, value in enumerate(noise.flatten().tolist()):
        counter = (position // 4, restart, index % 2**32, index // 2**32)
        c0, c1, c2, c3 = (torch.tensor([word]) for word in counter)
        bits = philox4x32((c0, c1, c2, c3), (7, 2**8))[position % 4]
        assert value == (int(bits) >> 8) / 2**24


def test_independent_of_the_batch(device: torch.device) -> None:
    index = torch.tensor([5, 0, 123456789, 5, 2**40], device=device)
    shape = (3, 33, 35)
    noise = uniform_noise(11, index, shape)
    assert noise.is_contiguous()
    assert torch.equal(noise[0], noise[3])
    for b in range(len(index)):
        assert torch.equal(uniform_noise(11, index[b : b + 1], shape)[0], noise[b])
    order = torch.tensor([3, 1, 4, 0, 2], device=device)
    assert torch.equal(uniform_noise(11, index[order], shape), noise[order])
    many = uniform_noise(11, torch.arange(100, device=device), (7,))
    assert torch.equal(many[5], noise[0].flatten()[:7])
    assert torch.equal(noise.cpu(), uniform_noise(11, index.cpu(), shape))


def test_streams_differ() -> None:
    index = torch.arange(4)
    noise = [
        uniform_noise(seed, index, (1000,), restart)
        for seed, restart in [(0, 0), (1, 0), (2**32, 0), (0, 1), (-1, 0)]
    ]
    rows = torch.cat(noise)
    correlations = torch.corrcoef(rows) - torch.eye(len(rows))
    assert correlations.abs().max().item() < 0.16
    assert torch.equal(uniform_noise(2**64 - 1, index, (1000,)), noise[-1])


def test_statistics() -> None:
    noise = uniform_noise(2024, torch.arange(64), (3, 64, 64)).double()
    count = noise.numel()
    assert 0 <= noise.min().item() < 1e-5
    assert 1 - 1e-5 < noise.max().item() < 1
    # Five standard errors each: mean, variance, correlation of neighbors, the histogram.
    assert abs(noise.mean().item() - 1 / 2) < 5 * (1 / 12 / count) ** 0.5
    assert abs(noise.var().item() - 1 / 12) < 5 * (1 / 180 / count) ** 0.5
    centered = (noise - 1 / 2).flatten()
    for lag in (1, 2, 4, 64, 64 * 64 * 3):
        correlation = 12 * (centered[lag:] * centered[:-lag]).mean().item()
        assert abs(correlation) < 5 / count**0.5
    histogram = torch.histc(noise, bins=256, min=0, max=1)
    chi_square = ((histogram - count / 256) ** 2 / (count / 256)).sum().item()
    assert abs(chi_square - 255) < 5 * (2 * 255) ** 0.5


def test_random_state_is_left_alone() -> None:
    before = torch.get_rng_state()
    uniform_noise(3, torch.arange(4), (5,))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("shape", [(), (0,), (1,), (3, 0, 2)], ids=str)
def test_odd_shapes(shape: tuple[int, ...]) -> None:
    assert uniform_noise(0, torch.arange(3), shape).shape == (3, *shape)
    assert uniform_noise(0, torch.arange(0), shape).shape == (0, *shape)


def test_any_integer_index_and_device() -> None:
    index = torch.arange(4, dtype=torch.int32)
    expected = uniform_noise(0, index.long(), (6,))
    assert torch.equal(uniform_noise(0, index, [6], device="cpu"), expected)


INDEX = torch.arange(3)
ERRORS: dict[str, tuple[tuple[Any, ...], type[Exception], str]] = {
    "float seed": ((0.5, INDEX, (2,)), TypeError, "float"),
    "float index": ((0, INDEX / 2, (2,)), TypeError, "an integer dtype, found torch.float"),
    "index shape": ((0, INDEX.view(3, 1), (2,)), ValueError, r"shape \[B\], found \[3, 1\]"),
    "negative size": ((0, INDEX, (2, -1)), ValueError, r"sizes >= 0, found \[2, -1\]"),
    "restart": ((0, INDEX, (2,), 2**32), ValueError, "restart: .* found 4294967296"),
}  # fmt: skip


@pytest.mark.parametrize("case", ERRORS)
def test_errors_name_what_was_found(case: str) -> None:
    arguments, error, message = ERRORS[case]
    with pytest.raises(error, match=message):
        uniform_noise(*arguments)
