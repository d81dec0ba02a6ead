"""The meaning of the operations that rename, split, merge, broadcast and pick axes."""

from __future__ import annotations

from math import prod

import numpy as np

from moecc.errors import InputError
from moecc_backends.reference.arrays import NOTHING, Array, meaning

Sizes = tuple[tuple[str, int], ...]


@meaning("rename")
def rename(x: Array, *, axis: str, to: str) -> Array:
    """Return x with one axis under another name."""
    return Array(x.data, tuple(to if a == axis else a for a in x.axes))


@meaning("split")
def split(x: Array, *, axis: str, into: Sizes) -> Array:
    """Return x with one axis cut into several, the first outermost."""
    at = x.axes.index(axis)
    names, sizes = tuple(n for n, _ in into), tuple(s for _, s in into)
    shape = (*x.data.shape[:at], *sizes, *x.data.shape[at + 1 :])
    return Array(x.data.reshape(shape), (*x.axes[:at], *names, *x.axes[at + 1 :]))


@meaning("merge")
def merge(x: Array, *, axes: tuple[str, ...], into: str) -> Array:
    """Return x with several axes merged, at the position of the first, the first outermost."""
    rest = tuple(a for a in x.axes if a not in axes)
    size = prod(x.size(a) for a in axes)
    shape = (*(x.size(a) for a in rest), size)
    merged = Array(x.to((*rest, *axes)).reshape(shape), (*rest, into))
    order = tuple(into if a == axes[0] else a for a in x.axes if a not in axes[1:])
    return Array(merged.to(order), order)


@meaning("broadcast")
def broadcast(x: Array, like: Array) -> Array:
    """Return x repeated along every axis of `like`."""
    return Array(np.broadcast_to(x.to(like.axes), like.data.shape), like.axes)


@meaning("slice")
def slice_(x: Array, *, axis: str, start: int, stop: int) -> Array:
    """Return the range [start, stop) of x along the axis."""
    return x.map(lambda d: d.take(range(start, stop), x.axes.index(axis)))


@meaning("positions")
def positions(like: Array, *, axis: str) -> Array:
    """Return 0, 1, 2 … along the axis."""
    return Array(np.arange(like.size(axis)), (axis,))


@meaning("embedding")
def embedding(table: Array, ids: Array, *, axis: str) -> Array:
    """Return rows of the table, picked by index.

    Raises:
      InputError: an index is outside the table.
    """
    rest = tuple(a for a in table.axes if a != axis)
    there = ids.data != NOTHING
    wrong = ids.data[there & ((ids.data < 0) | (ids.data >= table.size(axis)))]
    if wrong.size:
        raise InputError(
            "an index is outside the table",
            expected=f"0 <= index < {table.size(axis)} along {axis!r}",
            found=str(wrong[0]),
        )
    rows = table.to((axis, *rest))[np.where(there, ids.data, 0)]
    return Array(rows, (*ids.axes, *rest))


@meaning("one_hot")
def one_hot(ids: Array, *, into: Sizes) -> Array:
    """Return 1 at the index, 0 elsewhere, along a new axis; all 0 for an index outside it."""
    ((name, size),) = into
    hot = ids.data[..., None] == np.arange(size)
    return Array(hot.astype(np.float64), (*ids.axes, name))
