"""Arrays with named axes: the values of the reference."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from moecc.support.lazy import np
from moecc.types import Array as NumpyArray
from moecc.types import DType

Data = NumpyArray
"""The elements of an array, without axis names."""

NOTHING = -(2**63)
"""Stands for an integer beyond a ragged extent, where a float is NaN."""


@dataclass(frozen=True, slots=True)
class SlotAssignment:
    """The slots assigned to the choices of each group of tokens.

    Attributes:
      tokens: the token axes, outermost first.
      extents: the slots in use, `[group, expert]`.
      slots: the number of slots of every expert: the capacity, or the largest extent.
      is_ragged: whether slots beyond an extent do not exist.
    """

    tokens: tuple[str, ...]
    extents: Data
    slots: int
    is_ragged: bool


@dataclass(frozen=True, slots=True)
class Array:
    """An array with named axes.

    Attributes:
      data: float64, int64 (uint64 for u64 and keys) or bool.
      axes: the names of its axes, in order.
      dtype: the declared element type; only a cast reads it.
      assignment: for a result of ``assign_slots``, the data that ``dispatch`` and ``combine`` need.
    """

    data: Data
    axes: tuple[str, ...]
    dtype: DType | None = None
    assignment: SlotAssignment | None = None

    def size(self, axis: str) -> int:
        """Return the size of `axis`."""
        return int(self.data.shape[self.axes.index(axis)])

    def to(self, axes: Iterable[str]) -> Data:
        """Return the data with its axes in the order `axes`; a missing one has size 1."""
        axes = tuple(axes)
        order = [self.axes.index(a) for a in axes if a in self.axes]
        shape = [self.size(a) if a in self.axes else 1 for a in axes]
        return self.data.transpose(order).reshape(shape)

    def map(self, function: Callable[[Data], Data]) -> Array:
        """Return the array with `function` applied to the data; the axes stay."""
        return replace(self, data=function(self.data), assignment=None)

    def positions(self, axes: Iterable[str]) -> tuple[int, ...]:
        """Return the positions of `axes`."""
        return tuple(self.axes.index(a) for a in axes)


def together(*arrays: Array) -> tuple[tuple[str, ...], list[Data]]:
    """Return the axes of the array that has most, and the data of all in that order."""
    axes = max(arrays, key=lambda a: len(a.axes)).axes
    return axes, [a.to(axes) for a in arrays]


def stored(data: Data, dtype: DType) -> Data:
    """Return `data` in the interpreter's representation of the type `dtype`."""
    if dtype.name in ("u64", "key"):
        return data.astype(np.uint64)
    return data.astype({"float": np.float64, "int": np.int64, "bool": np.bool_}[dtype.kind])


def poison(data: Data) -> float | int | bool:
    """Return the filler of nonexistent elements: NaN, the least integer, or False."""
    if data.dtype.kind == "f":
        return float("nan")
    return NOTHING if data.dtype.kind == "i" else False


def poisoned(x: Array, slot: str, assignment: SlotAssignment) -> Array:
    """Return `x` with fillers beyond the extents of its ragged axis `slot`.

    A value that lost its group or expert axis, or part of one, is returned as it is.
    """
    where = ("group", "expert", slot)
    shape = (*assignment.extents.shape, assignment.slots)
    if not set(where) <= set(x.axes) or tuple(x.size(a) for a in where) != shape:
        return x
    beyond = np.arange(assignment.slots) >= assignment.extents[..., None]
    data = np.where(Array(beyond, where).to(x.axes), poison(x.data), x.data)
    return replace(x, data=data.astype(x.data.dtype))
