"""Boxes: a range of each axis of a type, and mappings between them."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from math import prod

import numpy as np

from moecc.types.arrays import Array
from moecc.types.tensor import TensorType

Box = tuple[tuple[int, int], ...]
"""A range [start, stop) for each axis, in order."""


def whole(type: TensorType) -> Box:
    """Return the box of all elements."""
    return tuple((0, size) for size in type.shape)


def extents(box: Box) -> tuple[int, ...]:
    """Return the shape of a box."""
    return tuple(stop - start for start, stop in box)


def project(box: Box, large: TensorType, small: TensorType) -> Box:
    """Return the box of `small`, whose axes are among those of `large`, within a box of `large`."""
    by_name = dict(zip(large.names, box, strict=True))
    return tuple(by_name[name] for name in small.names)


def align(values: Array, names: tuple[str, ...], order: tuple[str, ...]) -> Array:
    """Return `values`, whose axes are `names`, with the axes `order`, new ones of size 1."""
    known = [names.index(name) for name in order if name in names]
    absent = tuple(at for at, name in enumerate(order) if name not in names)
    return np.expand_dims(values.transpose(known), absent)


def flat_boxes(sizes: tuple[int, ...], start: int, stop: int) -> list[Box]:
    """Return boxes that together hold elements [start, stop), counted in row-major order."""
    if start == stop:
        return [((0, 0), *((0, size) for size in sizes[1:]))]
    if len(sizes) == 1:
        return [((start, stop),)]
    inner = prod(sizes[1:])
    first, last = start // inner, (stop - 1) // inner
    if first == last:
        rest = flat_boxes(sizes[1:], start - first * inner, stop - first * inner)
        return [((first, first + 1), *box) for box in rest]
    boxes: list[Box] = []
    if start % inner:
        boxes += flat_boxes(sizes, start, (first + 1) * inner)
        first += 1
    end = stop // inner
    if first < end:
        boxes.append(((first, end), *((0, size) for size in sizes[1:])))
    if stop % inner:
        boxes += flat_boxes(sizes, end * inner, stop)
    return boxes


def row_blocks(type: TensorType, block_bytes: int) -> Iterator[Box]:
    """Yield boxes, contiguous and in row-major order, of at most about `block_bytes` each.

    A block has at least one element.
    """
    sizes = type.shape
    limit = max(1, block_bytes // type.dtype.itemsize_bytes)
    if prod(sizes) <= limit:
        yield whole(type)
        return
    # The axis to cut: everything within one of its positions fits.
    at = next(i for i in range(len(sizes)) if prod(sizes[i + 1 :]) <= limit)
    step = max(1, limit // prod(sizes[at + 1 :]))
    inner = tuple((0, size) for size in sizes[at + 1 :])
    for place in product(*map(range, sizes[:at])):
        for start in range(0, sizes[at], step):
            ends = (start, min(start + step, sizes[at]))
            yield (*((i, i + 1) for i in place), ends, *inner)


def runs(order: Array) -> Iterator[tuple[int, int, Array]]:
    """Yield the runs [start, stop) of consecutive positions in `order`, and where each is put."""
    places = np.argsort(order, kind="stable")
    positions = order[places]
    breaks = np.flatnonzero(np.diff(positions) != 1) + 1
    for part, into in zip(np.split(positions, breaks), np.split(places, breaks), strict=True):
        yield int(part[0]), int(part[-1]) + 1, into
