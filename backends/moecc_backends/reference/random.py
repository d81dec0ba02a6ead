"""The meaning of random numbers: counter-based Threefry-2x32, the same in every backend."""

from __future__ import annotations

import math
from math import prod

import numpy as np

from moecc_backends.reference.arrays import Array, Data, meaning

_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
_PARITY = 0x1BD11BDA


def threefry(key: int, counts: Data) -> Data:
    """Return 64 bits for each count, by Threefry-2x32 in 20 rounds (Salmon et al. 2011).

    Args:
      key: 64 bits.
      counts: 64-bit counts, of any shape.
    """
    keys = [np.uint32(key >> 32), np.uint32(key & 0xFFFFFFFF)]
    keys.append(keys[0] ^ keys[1] ^ np.uint32(_PARITY))
    counts = np.atleast_1d(counts).astype(np.uint64)
    a = (counts >> np.uint64(32)).astype(np.uint32) + keys[0]
    b = (counts & np.uint64(0xFFFFFFFF)).astype(np.uint32) + keys[1]
    for turn in range(5):
        for by in _ROTATIONS[turn % 2]:
            a = a + b
            b = ((b << np.uint32(by)) | (b >> np.uint32(32 - by))) ^ a
        a = a + keys[(turn + 1) % 3]
        b = b + keys[(turn + 2) % 3] + np.uint32(turn + 1)
    return (a.astype(np.uint64) << np.uint64(32)) | b.astype(np.uint64)


def folded(key: int, by: int) -> int:
    """Return another key, derived from `key` and the number `by`."""
    return int(threefry(key, np.asarray(by))[0])


def uniform(key: int, shape: tuple[int, ...]) -> Data:
    """Return numbers on [0, 1) with 23 bits, one for each element in row-major order."""
    words = threefry(key, np.arange(prod(shape)))
    bits = (words >> np.uint64(32)) ^ (words & np.uint64(0xFFFFFFFF))
    return np.asarray((bits >> np.uint64(9)).astype(np.float64) / 2**23).reshape(shape)


def _places(like: Array) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Return the axes of `like` in alphabetical order, and their sizes."""
    axes = tuple(sorted(like.axes))
    return axes, tuple(like.size(a) for a in axes)


@meaning("fold_key")
def fold_key(key: Array, *, by: int) -> Array:
    """Return another key, derived from a key and a number."""
    return Array(np.asarray(folded(int(key.data), by), np.uint64), ())


@meaning("random_uniform")
def random_uniform(key: Array, like: Array, *, low: float, high: float) -> Array:
    """Return independent uniform numbers with the axes of `like`."""
    axes, shape = _places(like)
    numbers = low + uniform(int(key.data), shape) * (high - low)
    return Array(Array(numbers, axes).to(like.axes), like.axes)


@meaning("random_normal")
def random_normal(key: Array, like: Array, *, std: float) -> Array:
    """Return independent normal numbers with the axes of `like` (Box and Muller 1958)."""
    axes, shape = _places(like)
    first, second = (uniform(folded(int(key.data), by), shape) for by in (0, 1))
    numbers = std * np.sqrt(-2 * np.log1p(-first)) * np.cos(2 * math.pi * second)
    return Array(Array(numbers, axes).to(like.axes), like.axes)
