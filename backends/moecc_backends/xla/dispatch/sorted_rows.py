"""Rows sorted by expert, multiplied group by group: by a loop over blocks, or `lax.ragged_dot`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from moecc_backends.xla.dispatch.layout import PlacedRows, Routing
from moecc_backends.xla.dispatch.permutation import dropless_placement, sort_by_expert
from moecc_backends.xla.kernels.grouped_matmul import Arrays, grouped_matmul
from moecc_backends.xla.kernels.ragged_dot import ragged_matmul
from moecc_backends.xla.kernels.repeat_by_group import expert_rows


@dataclass(frozen=True)
class SortedRows(PlacedRows):
    """The rows of each expert one after the other; what has no slot has no row.

    Attributes:
      group_sizes: i32 ``[experts]``, how many rows each has.
      journey: how rows came from other devices; None where they are those of the own tokens.
    """

    group_sizes: jax.Array
    journey: object | None = None

    @classmethod
    def of(cls, routing: Routing) -> SortedRows:
        """Sort the choices of `routing`.

        Groups do not matter here: they bound what a capacity counts, and that is settled.
        """
        choices = sort_by_expert(routing.experts, routing.num_experts, routing.placed)
        placement = dropless_placement(choices)
        if routing.num_slots is not None:
            # No more rows can be used than there are slots.
            placement = placement._replace(
                choice_of_row=placement.choice_of_row[: routing.num_slots]
            )
        return cls(routing, placement, choices.group_sizes)

    def by_expert(self, values: jax.Array) -> jax.Array:
        """Repeat what each expert has over its rows."""
        return expert_rows(values, self.group_sizes, self.placement.choice_of_row.size)

    @property
    def row_experts(self) -> jax.Array:
        """The expert of each row; rows that belong to none count to the last expert."""
        ends = jnp.cumsum(self.group_sizes)
        rows = jnp.arange(self.placement.choice_of_row.size, dtype=ends.dtype)
        found = jnp.searchsorted(ends, rows, side="right", method="compare_all")
        return jnp.minimum(found, self.group_sizes.size - 1)

    def products(
        self, rows: jax.Array, weights: Arrays, repeats: int, axis: int, kind: Any
    ) -> Arrays:
        """Multiply rows with each of the weights of their experts.

        Args:
          rows: ``[rows * repeats, a]``, each row as often as its other axes have entries.
          weights: ``[experts, a, b]`` with ``axis=1``, or ``[experts, b, a]`` with ``axis=2``.
          repeats: the entries of a row's other axes.
          axis: the axis of the weights that is summed over.
          kind: the type that a kernel is asked for; the loop sums in float32 at least.
        """
        return grouped_matmul(rows, weights, self.group_sizes * repeats, contracting_axis=axis)


class RaggedRows(SortedRows):
    """Sorted rows whose products are JAX's own."""

    def products(
        self, rows: jax.Array, weights: Arrays, repeats: int, axis: int, kind: Any
    ) -> Arrays:
        """Multiply rows with each of the weights of their experts, see `SortedRows`."""
        sizes = self.group_sizes * repeats
        return tuple(ragged_matmul(rows, w, sizes, axis, kind) for w in weights)
