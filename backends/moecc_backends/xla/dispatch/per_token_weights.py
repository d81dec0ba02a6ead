"""A row for each choice, where it is, beside the weights of its expert: for few tokens."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from moecc_backends.xla.dispatch.layout import PlacedRows, Routing
from moecc_backends.xla.dispatch.permutation import Placement
from moecc_backends.xla.trace.padding_rows import with_masked_gradient


class ChosenRows(PlacedRows):
    """Rows in the order of the choices: nothing is sorted, and weights are gathered by row."""

    @classmethod
    def of(cls, routing: Routing) -> ChosenRows:
        """Leave each choice of `routing` where it is."""
        row = jnp.arange(routing.num_choices, dtype=jnp.int32)
        if routing.placed is not None:
            row = jnp.where(routing.placed.reshape(-1), row, -1)
        return cls(routing, Placement(row, row.reshape(routing.experts.shape)))

    @property
    def row_experts(self) -> jax.Array:
        """The expert of each row; the first where the row has none."""
        experts = self.routing.experts.reshape(-1)
        return experts if self.is_full else jnp.where(self.is_used, experts, 0)

    def by_expert(self, values: jax.Array) -> jax.Array:
        """Gather what the expert of each row has."""
        picked = jnp.take(values, self.row_experts, axis=0, mode="clip")
        return picked if self.is_full else with_masked_gradient(picked, self.is_used)
