"""Arrays with named axes, and the table from an operation's name to the function that means it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import numpy as np

from moecc.types.arrays import Array as NumpyArray
from moecc.types.dtypes import DType

Data = NumpyArray
"""The elements of an array, without the names of its axes."""

NOTHING = np.iinfo(np.int64).min
"""What stands for an integer beyond a ragged extent, where a float has NaN."""


@dataclass(frozen=True, slots=True)
class SlotAssignment:
    """Where the choices of each group of tokens went.

    Attributes:
      tokens: the token axes, outermost first.
      extents: the slots in use, `[group, expert]`.
      slots: the slots that every expert has: the capacity, or the largest extent.
      is_ragged: whether slots beyond an extent are not there.
    """

    tokens: tuple[str, ...]
    extents: Data
    slots: int
    is_ragged: bool


@dataclass(frozen=True, slots=True)
class Array:
    """An array whose axes have names.

    Attributes:
      data: float64, int64 (uint64 for u64 and keys) or bool.
      axes: the names of its axes, in order.
      dtype: the element type that the graph declares; only a cast asks for it.
      placement: for a result of ``assign_slots``, what ``dispatch`` and ``combine`` need to know.
    """

    data: Data
    axes: tuple[str, ...]
    dtype: DType | None = None
    assignment: SlotAssignment | None = None

    def size(self, axis: str) -> int:
        """Return the size of `axis`."""
        return int(self.data.shape[self.axes.index(axis)])

    def to(self, axes: Iterable[str]) -> Data:
        """Return the data with its axes in the order `axes`; one that is missing has size 1."""
        axes = tuple(axes)
        order = [self.axes.index(a) for a in axes if a in self.axes]
        shape = [self.size(a) if a in self.axes else 1 for a in axes]
        return self.data.transpose(order).reshape(shape)

    def map(self, function: Callable[[Data], Data]) -> Array:
        """Return the array of what `function` makes of the data, whose axes stay."""
        return replace(self, data=function(self.data), assignment=None)

    def positions(self, axes: Iterable[str]) -> tuple[int, ...]:
        """Return the positions of `axes`."""
        return tuple(self.axes.index(a) for a in axes)


def together(*arrays: Array) -> tuple[tuple[str, ...], list[Data]]:
    """Return the axes of the array that has most, and the data of all in that order."""
    axes = max(arrays, key=lambda a: len(a.axes)).axes
    return axes, [a.to(axes) for a in arrays]


Meaning = Callable[..., "Array | tuple[Array, ...]"]
"""Takes the operands, then the attributes by name."""

MEANINGS: dict[str, Meaning] = {}


def meaning(name: str) -> Callable[[Meaning], Meaning]:
    """Register a function as the meaning of the operation `name`."""

    def register(function: Meaning) -> Meaning:
        if name in MEANINGS:
            raise ValueError(f"operation {name!r} has two meanings")
        MEANINGS[name] = function
        return function

    return register
