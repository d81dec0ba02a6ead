"""The room that an array takes: a TPU keeps arrays in tiles, and pads them to whole ones."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import permutations
from math import ceil, prod

TILE = (8, 128)
"""Entries of the last axis but one and of the last, in one tile of a TPU (XLA, tiled layout)."""

PACKED_ROWS = 2
"""Rows of 16 bits that a TPU packs into one of 32; shards with parts of one are gathered by a sum
(found with SmolLM2 on meshes of 8 to 64 devices, libtpu 0.0.42.1)."""


def padded(sizes: Iterable[float], kind: str) -> float:
    """Return the entries that an array takes on a machine of `kind`, padding included.

    Of all orders of its axes XLA takes one that pads least.
    """
    axes = [s for s in sizes if s != 1]
    whole = float(prod(axes))
    if kind != "tpu" or len(axes) < 2:
        return whole
    return min(
        whole / (outer * inner) * in_tiles(outer, inner) for outer, inner in permutations(axes, 2)
    )


def stacked(sizes: Iterable[float], count: int) -> tuple[float, ...]:
    """Return the sizes of `count` equal parameters of layers, which a program keeps as one."""
    return (float(count), *sizes)


def in_tiles(outer: float, inner: float) -> int:
    """Return the entries that a matrix takes in tiles, its last dimension being `inner`."""
    return _whole(outer, TILE[0]) * _whole(inner, TILE[1])


def _whole(size: float, tile: int) -> int:
    return ceil(size / tile) * tile
