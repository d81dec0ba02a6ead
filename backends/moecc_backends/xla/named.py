"""Arrays under trace, with the names of their axes, and rows packed by expert.

A value without a ragged axis is a `Named` array.  One with a ragged axis holds its rows packed,
sorted by group and expert, as `Rows`: nothing is padded to the busiest expert.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from moecc_backends.xla.expert_rows import expert_rows

if TYPE_CHECKING:
    from moecc_backends.xla.packing import Packing

SLOT_AXES = ("expert", "group", "slot")
"""The axes of slots under a capacity, in the order in which they lie."""


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


def lifted(x: Operand, function: Callable[[Named], Named]) -> Operand:
    """Apply to `x` what does something along its own axes; packed rows keep their packing."""
    return lifted_all(x, lambda full: (function(full),))[0]


def lifted_all(x: Operand, function: Callable[[Named], tuple[Named, ...]]) -> tuple[Operand, ...]:
    """Apply to `x` a function of several results, as `lifted` does."""
    if isinstance(x, Named):
        return function(x)
    return tuple(_packed(made, x) for made in function(x.inner()))


def _packed(made: Named, like: Rows) -> Rows:
    inner = tuple(a for a in made.axes if a != "rows")
    return like.with_array(made.to(("rows", *inner)).array, inner)


def per_row(value: Operand, packing: Packing) -> Named:
    """Return `value` so that it broadcasts against packed rows, under the axis ``rows``.

    A value with an expert axis, such as the bias of each expert, is picked by the row's expert,
    and one with a group axis by the group of the row's token.
    """
    if isinstance(value, Rows):
        return value.inner()
    if "group" in value.axes:
        return _per_group(value, packing)
    if "expert" not in value.axes:
        return value
    rest = tuple(a for a in value.axes if a != "expert")
    assert packing.group_sizes is not None, "packed rows are sorted by expert"
    by_expert = value.to(("expert", *rest)).array
    return Named(expert_rows(by_expert, packing.group_sizes, packing.rows), ("rows", *rest))


def _per_group(value: Named, packing: Packing) -> Named:
    rest = tuple(a for a in value.axes if a not in ("group", "expert"))
    by_group = value.to(tuple(a for a in ("group", "expert") if a in value.axes) + rest).array
    group = packing.row_groups(value.size("group"))
    index = (group, packing.row_experts) if "expert" in value.axes else (group,)
    return Named(by_group[index], ("rows", *rest))
