"""Make uniform noise, a function of (seed, sample index, restart, position): Philox4x32-10.

The generator has no state, so an image gets the same noise in any batch, on any number of GPUs and
after any resume. Written in int64 arithmetic of plain torch: equal bits on every device.
Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence

import torch
from torch import Tensor

from moe_kernels.arguments import check_integers

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_INCREMENTS = (0x9E3779B9, 0xBB67AE85)
_NUM_ROUNDS = 10
_MASK = 0xFFFFFFFF
# On the CPU a chunk's words stay in the level-2 cache through all ten rounds.
_CPU_CHUNK = 2**14


def uniform_noise(
    seed: int,
    sample_index: Tensor,
    shape: Sequence[int],
    restart: int = 0,
    device: torch.device | str | None = None,
) -> Tensor:
    """Noise in [0, 1) that depends on nothing but the arguments of each image.

    The value at a position is a multiple of 2^-24, a function of (seed, the image's entry of
    `sample_index`, restart, position in the flattened image). No random state is read or changed.

    Args:
        seed: any integer; taken modulo 2^64.
        sample_index: [B], any integer dtype; an image's place in its data set.
        shape: of one image.
        restart: in [0, 2^32); an independent stream per restart.
        device: of the result; the sample index's if None.
    Returns:
        [B, *shape] float32.
    Raises:
        TypeError: for a seed, restart or index that is not an integer.
        ValueError: for an index that is not [B], a negative size, or a restart out of range.
    """
    seed, restart = operator.index(seed), operator.index(restart)
    check_integers(sample_index=sample_index)
    if sample_index.dim() != 1:
        raise ValueError(f"sample_index: expected shape [B], found {list(sample_index.shape)}")
    if min(shape, default=0) < 0:
        raise ValueError(f"shape: expected sizes >= 0, found {list(shape)}")
    if not 0 <= restart <= _MASK:
        raise ValueError(f"restart: expected a number in [0, 2^32), found {restart}")
    index = sample_index.to(device=device or sample_index.device, dtype=torch.int64)
    num_pixels = math.prod(shape)
    num_blocks = -(-num_pixels // 4)
    key = (seed & _MASK, seed >> 32 & _MASK)
    noise = torch.empty(len(index), num_blocks, 4, dtype=torch.float32, device=index.device)
    # Whole rows of the [B, blocks] grid of counters, as many as fit the cache.
    rows = _CPU_CHUNK // max(num_blocks, 1) if index.device.type == "cpu" else len(index)
    rows = max(rows, 1)
    position = torch.arange(num_blocks, device=index.device)
    for start in range(0, len(index), rows):
        part, out = index[start : start + rows], noise[start : start + rows]
        low, high = (part & _MASK).unsqueeze(1), (part >> 32 & _MASK).unsqueeze(1)
        stream = torch.full_like(low, restart)
        for word, bits in enumerate(philox4x32((position, stream, low, high), key)):
            # The upper 24 bits are all that a float32 in [0, 1) can hold.
            out[:, :, word] = (bits >> 8) * 2.0**-24
    return noise.flatten(1)[:, :num_pixels].reshape(len(index), *shape).contiguous()


def philox4x32(
    counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Ten rounds of Philox on counters of four 32-bit words, each an int64 tensor; they broadcast.

    Returns four int64 tensors that hold 32 random bits each.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_NUM_ROUNDS):
        # The product has 64 bits and wraps into the sign; the mask drops what the shift copies.
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            (p1 >> 32 & _MASK) ^ c1 ^ k0,
            p1 & _MASK,
            (p0 >> 32 & _MASK) ^ c3 ^ k1,
            p0 & _MASK,
        )
        k0, k1 = (k0 + _KEY_INCREMENTS[0]) & _MASK, (k1 + _KEY_INCREMENTS[1]) & _MASK
    return c0, c1, c2, c3
