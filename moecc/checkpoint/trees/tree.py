"""A tree of arrays, and tensors that are pieces of its arrays."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from moecc.types.arrays import Array

_MOMENTS = {"opt_state", "optimizer", "optimizer_state", "param_states", "mu", "nu", "v", "m"}
"""What the state of an optimiser is called in a tree."""


class ArrayReader(Protocol):
    """Reads arrays by name."""

    def shape(self, key: str) -> tuple[int, ...]:
        """Return the sizes of an array."""
        ...

    def dtype(self, key: str) -> np.dtype[Any]:
        """Return the element type of an array."""
        ...

    def read_box(self, key: str, box: Sequence[tuple[int, int]]) -> Array:
        """Return a box of an array, a range of each axis."""
        ...


@dataclass(frozen=True)
class Tree:
    """The arrays of a checkpoint of a JAX program.

    Attributes:
      format: ``orbax`` or ``t5x``.
      folder: what holds the arrays.
      keys: the array of each path in the tree, by path.
      arrays: reads them.
      files: the files that they are in.
    """

    format: str
    folder: Path
    keys: Mapping[tuple[str, ...], str]
    arrays: ArrayReader
    files: tuple[Path, ...]

    def below(self, marks: Sequence[tuple[str, ...]]) -> dict[tuple[str, ...], str]:
        """Return the arrays of the model: those beside the first path that ends in one of `marks`.

        Optimisers keep arrays of the same names, below words of theirs.
        """
        found = [p[: -len(m)] for p in self.keys for m in marks if p[-len(m) :] == m]
        if not found:
            return {}
        prefix = min(found, key=lambda path: (not _MOMENTS.isdisjoint(path), len(path)))
        return {
            path[len(prefix) :]: key
            for path, key in self.keys.items()
            if path[: len(prefix)] == prefix
        }


@dataclass(frozen=True)
class Piece:
    """A tensor that is a piece of an array, as a matrix ``[rows, columns]`` or a vector.

    Attributes:
      key: the array.
      at: the place on axes that the piece has not, by axis: a layer, an expert.
      rows: the axes that become rows, the slowest first.
      columns: the axes that become columns; none of a vector.
      limit: how many rows there are, where the array has more, padding.
      halves: whether the last axis of the rows has rotary pairs beside each other, which the tensor
        has half of the axis apart.
      scale: what the elements are multiplied by, in float32.
    """

    key: str
    rows: tuple[int, ...]
    columns: tuple[int, ...] = ()
    at: Mapping[int, int] | None = None
    limit: int | None = None
    halves: bool = False
    scale: float = 1.0

    def of_layer(self, layer: int, axis: int = 1) -> Piece:
        """Return the piece of one layer, of an array that has an axis of layers besides."""

        def moved(old: int) -> int:
            return old + (old >= axis)

        at = {moved(old): place for old, place in (self.at or {}).items()}
        rows, columns = (tuple(map(moved, axes)) for axes in (self.rows, self.columns))
        return replace(self, rows=rows, columns=columns, at={**at, axis: layer})

    def shape(self, array: Sequence[int]) -> tuple[int, ...]:
        """Return the sizes of the tensor, of an array with these."""
        count = prod(array[axis] for axis in self.rows)
        count = count if self.limit is None else min(count, self.limit)
        return (count, prod(array[a] for a in self.columns)) if self.columns else (count,)

    def read(self, arrays: ArrayReader, start: int, stop: int) -> Array:
        """Return rows [start, stop)."""
        sizes = arrays.shape(self.key)
        # Rows of one index of the slowest axis are read together: those of a head.
        inner = prod(sizes[axis] for axis in self.rows[1:])
        first, last = start // inner, -(-stop // inner)
        box = [(0, size) for size in sizes]
        for axis, place in (self.at or {}).items():
            box[axis] = (place, place + 1)
        box[self.rows[0]] = (first, last)
        array = arrays.read_box(self.key, box)
        rest = tuple((self.at or {}).keys())
        array = array.transpose(*self.rows, *self.columns, *rest)
        if self.halves:
            array = _halves(array, len(self.rows) - 1)
        values = array.reshape((last - first) * inner, *self.shape(sizes)[1:])
        values = values[start - first * inner : stop - first * inner]
        if self.scale != 1.0:
            values = (values.astype(np.float32) * np.float32(self.scale)).astype(array.dtype)
        return np.ascontiguousarray(values)


def _halves(array: Array, axis: int) -> Array:
    """Return `array` with the even places along an axis before the odd ones."""
    order = np.r_[0 : array.shape[axis] : 2, 1 : array.shape[axis] : 2]
    turned: Array = np.take(array, order, axis)
    return turned
