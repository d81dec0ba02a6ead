"""Arrays under trace, with the names of their axes, and rows packed by expert.

A value without a ragged axis is a `Named` array.  One with a ragged axis holds its rows packed,
sorted by group and expert, as `Rows`: nothing is padded to the busiest expert.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

if TYPE_CHECKING:
    from moecc_backends.xla.packing import Packing


@dataclass(frozen=True)
class Named:
    """An array and the names of its axes, in order."""

    array: jax.Array
    axes: tuple[str, ...]

    def size(self, axis: str) -> int:
        """Return the size of `axis`."""
        return int(self.array.shape[self.axes.index(axis)])

    def to(self, axes: tuple[str, ...]) -> Named:
        """Return this array with its axes in the order `axes`, which has the same names."""
        if axes == self.axes:
            return self
        return Named(jnp.transpose(self.array, [self.axes.index(a) for a in axes]), axes)

    def over(self, axes: tuple[str, ...]) -> jax.Array:
        """Return the array laid out for broadcasting over `axes`, which contains all its own."""
        mine = self.to(tuple(a for a in axes if a in self.axes))
        shape = [mine.size(a) if a in mine.axes else 1 for a in axes]
        return mine.array.reshape(shape)


@dataclass(frozen=True)
class Rows:
    """Packed rows ``[rows, *axes]`` in place of the axes group, expert and slot."""

    array: jax.Array
    axes: tuple[str, ...]
    packing: Packing

    def with_array(self, array: jax.Array, axes: tuple[str, ...] | None = None) -> Rows:
        """Return rows of the same packing with other contents."""
        return Rows(array, self.axes if axes is None else axes, self.packing)

    def inner(self) -> Named:
        """Return the rows as an ordinary array whose first axis is called ``rows``."""
        return Named(self.array, ("rows", *self.axes))


Operand = Named | Rows


def per_row(value: Operand, packing: Packing) -> Named:
    """Return `value` so that it broadcasts against packed rows, under the axis ``rows``.

    A value with an expert axis, such as the bias of each expert, is picked by the row's expert.
    """
    if isinstance(value, Rows):
        return value.inner()
    if "expert" not in value.axes:
        return value
    rest = tuple(a for a in value.axes if a not in ("expert", "group"))
    picked = value.to(("expert", *rest)).array[packing.row_experts]
    return Named(picked, ("rows", *rest))
