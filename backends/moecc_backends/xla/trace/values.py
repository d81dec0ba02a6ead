"""Arrays under trace, with the names of their axes, and rows packed without an axis of experts.

A value is a `Named` array, or holds what experts work on as `Rows`: nothing is padded to the
busiest expert.  How rows lie is the matter of their packing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from moecc_backends.xla.trace.padding_rows import poisoned, with_masked_gradient, zeroed

if TYPE_CHECKING:
    from moecc_backends.xla.dispatch.layout import RowPacking

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
    packing: RowPacking

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


def per_row(value: Operand, packing: RowPacking) -> Named:
    """Return `value` so that it broadcasts against packed rows, under the axis ``rows``.

    A value with an expert axis, such as the bias of each expert, is picked by the row's expert,
    and one with a group axis by the group of the row's token.  Rows that nothing was placed in
    reach no gradient of what they share with others.
    """
    if isinstance(value, Rows):
        return value.inner()
    if "group" in value.axes:
        return _masked(_per_group(value, packing), packing)
    if "expert" not in value.axes:
        return _masked(value, packing)
    rest = tuple(a for a in value.axes if a != "expert")
    return Named(packing.by_expert(value.to(("expert", *rest)).array), ("rows", *rest))


def beside(value: Operand, x: Operand) -> Named:
    """Return `value`, whose axes lie within those of `x`, as `x` is laid out."""
    if isinstance(x, Rows):
        return per_row(value, x.packing)
    assert isinstance(value, Named), "it has no axis that the other lacks"
    return value


def with_masked_rows(x: Rows) -> Rows:
    """Return `x`; no cotangent of rows that nothing was placed in gets past it."""
    if x.packing.is_full or not jnp.issubdtype(x.array.dtype, jnp.floating):
        return x
    return x.with_array(with_masked_gradient(x.array, x.packing.is_used))


def zeroed_rows(x: Rows) -> Rows:
    """Return `x` with zeros in the rows that nothing was placed in, in values and cotangents."""
    if x.packing.is_full:
        return x
    return x.with_array(zeroed(x.array, x.packing.is_used))


def poisoned_rows(x: Rows) -> Rows:
    """Return `x` with NaN in the rows that nothing was placed in, in values and cotangents."""
    return x if x.packing.is_full else x.with_array(poisoned(x.array, x.packing.is_used))


def _masked(value: Named, packing: RowPacking) -> Named:
    """Return `value` for each row, with a gradient from those alone that something lies in."""
    if packing.is_full or not jnp.issubdtype(value.array.dtype, jnp.floating):
        return value
    is_used, array = packing.is_used, value.array
    if "rows" not in value.axes:
        array = jnp.broadcast_to(array, (is_used.size, *array.shape))
    rest = tuple(a for a in value.axes if a != "rows")
    return Named(with_masked_gradient(array, is_used), ("rows", *rest))


def _per_group(value: Named, packing: RowPacking) -> Named:
    rest = tuple(a for a in value.axes if a not in ("group", "expert"))
    by_group = value.to(tuple(a for a in ("group", "expert") if a in value.axes) + rest).array
    group = packing.row_groups
    index = (group, packing.row_experts) if "expert" in value.axes else (group,)
    return Named(by_group[index], ("rows", *rest))
