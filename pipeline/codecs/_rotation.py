"""A seeded rotation of a token's features that spreads outliers, and is exactly repeatable.

Flipping random signs and multiplying by a Hadamard matrix mixes every feature of a block into
every other with equal weight, so one large value becomes many middling ones and a single scale
per token wastes no range. The matrix is applied by additions and subtractions alone, in a fixed
order: the same bits on every device, with any number of threads or tokens.

D features; K tokens; a block is a run of features that are mixed with each other.
"""

from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

MAX_BLOCK = 1024
"""Largest block. Wider ones help only where a single value is hundreds of times the others, and the
guaranteed error grows with them."""

# Up to so many values NumPy's additions start sooner than torch's (64 tokens of 64 features take
# a quarter of the time); with more, torch's are faster.
_NUMPY_VALUES = 1 << 16


def block_size(width: int) -> int:
    """Return the largest power of two that divides `width`, at most `MAX_BLOCK`.

    1024 and 4096 give 1024; 3584 gives 512; 1152 gives 128; an odd width gives 1, which leaves
    every feature as it is.
    """
    return min(width & -width, MAX_BLOCK)


@lru_cache(maxsize=32)
def signs(seed: int, width: int) -> Tensor:
    """Return the (D, 1) float32 signs of a seed, on the CPU; not to be written to.

    Sign i is -1 where the top bit of the i-th output of the generator SplitMix64 with this seed
    is set, so that any language can rebuild it (Steele, Lea, Flood, "Fast splittable
    pseudorandom number generators", OOPSLA 2014).
    """
    steps = np.arange(1, width + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    state = steps + np.array([seed], dtype=np.uint64)
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    state ^= state >> np.uint64(31)
    negative = (state >> np.uint64(63)).astype(np.float32)
    return torch.from_numpy(1 - 2 * negative).unsqueeze(1)


def hadamard(values_DK: Tensor, block: int) -> Tensor:
    """Multiply each block of features by the Hadamard matrix of entries +1 and -1.

    The matrix is Sylvester's, symmetric, and times itself `block` times the identity: the
    inverse is the same call, divided by `block`.

    Args:
        values_DK: D features of K tokens, contiguous; D is a multiple of `block`. Tokens come
            last because that makes every step a long contiguous one.
        block: a power of two.

    Returns:
        (D, K), a new tensor unless `block` is 1.
    """
    # Both take the same calls, and the same sums give the same bits.
    by_numpy = values_DK.device.type == "cpu" and values_DK.numel() <= _NUMPY_VALUES
    library: Any = np if by_numpy else torch
    mixed_DK: Any = values_DK.numpy() if by_numpy else values_DK
    width, count = values_DK.shape
    span = 1
    while span < block:
        pairs = mixed_DK.reshape(width // (2 * span), 2, span * count)
        mixed = library.empty_like(pairs)
        library.add(pairs[:, 0], pairs[:, 1], out=mixed[:, 0])
        library.subtract(pairs[:, 0], pairs[:, 1], out=mixed[:, 1])
        mixed_DK = mixed.reshape(width, count)
        span *= 2
    return torch.as_tensor(mixed_DK)
