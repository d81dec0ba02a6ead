"""The same model at small sizes, for fast runs.

Everything a pass may depend on is kept: the layers and which of them are sparse, experts and top-k,
the ratio of query to key heads, biases and norms, and of every size its small prime
factors, so that divisors of it (a granularity, a mesh) still divide it.
"""

from __future__ import annotations

from collections.abc import Iterator

SMALL_VOCAB = 64
SMALL_MLP = 96
SMALL_SHARED = 2
SMALL_EXPERT = 32
SMALL_NEURONS = 1024
"""The limit on the neurons of all experts of a layer together, if there are many experts."""
SMALL_HEADS = 3
SMALL_HEAD_DIM = 8
SMALL_PATCH = 4
SMALL_PATCHES = 3
SMALL_WINDOW = 3
"""Less than a short test sequence, so that a window has an effect."""


def shrink_size(size: int, most: int) -> int:
    """Return a number up to `most` made of prime factors of `size`: each once, then the rest.

    A size up to `most` stays; one without a prime factor up to `most` becomes 1 or a small prime.
    """
    if size <= most:
        return size
    factors = list(_prime_factors(size, most))
    distinct = sorted(set(factors))
    repeated = list(factors)
    for prime in distinct:
        repeated.remove(prime)
    small = 1
    for prime in (*distinct, *repeated):
        if small * prime <= most:
            small *= prime
    return small if small > 1 else next(p for p in (13, 7, 3, 1) if p <= most)


def _prime_factors(size: int, most: int) -> Iterator[int]:
    for prime in range(2, most + 1):
        while size % prime == 0:
            yield prime
            size //= prime


def shrink_rotated(rotary_dim: int, head_dim: int, small: int) -> int:
    """Return as large a part of a head of width `small`, an even number."""
    return min(max(2, small * rotary_dim // head_dim // 2 * 2), small)
