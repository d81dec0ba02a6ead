"""A row for each choice, in its order, with a copy of its expert's weights: for few tokens."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from moecc_backends.xla.dispatch.flat import gathered_matmul, rows_to_tokens, tokens_to_rows
from moecc_backends.xla.dispatch.gather_vjp import permute, permute_choices, sum_rows
from moecc_backends.xla.dispatch.permutation import Permutation
from moecc_backends.xla.trace.padding_rows import with_masked_gradient
from moecc_backends.xla.trace.routing import Routing
from moecc_backends.xla.trace.values import DeferredRows, Named, Operand, Rows


@dataclass(frozen=True)
class PerTokenWeights:
    """Rows in the order of the choices: nothing is sorted, and weights are gathered by row.

    Attributes:
      routing: what was routed.
      permutation: the map between choices and rows.
    """

    routing: Routing
    permutation: Permutation

    @classmethod
    def of(cls, routing: Routing) -> PerTokenWeights:
        """Leave each choice of `routing` where it is."""
        row = jnp.arange(routing.num_choices, dtype=jnp.int32)
        if routing.assigned is not None:
            row = jnp.where(routing.assigned.reshape(-1), row, -1)
        return cls(routing, Permutation(row, row.reshape(routing.experts.shape)))

    @property
    def is_used(self) -> jax.Array:
        """Whether each row has a token: bool ``[rows]``."""
        return self.permutation.choice_of_row >= 0

    @property
    def is_full(self) -> bool:
        """Whether it is certain that every row has a token."""
        return self.routing.assigned is None

    @property
    def row_experts(self) -> jax.Array:
        """The expert of each row; the first where the row has none."""
        experts = self.routing.experts.reshape(-1)
        return experts if self.is_full else jnp.where(self.is_used, experts, 0)

    @property
    def row_groups(self) -> jax.Array:
        """The group of the token of each row; the first where the row has none."""
        return self.routing.row_groups(self.permutation.token_of_row)

    def by_expert(self, values: jax.Array) -> jax.Array:
        """Gather what the expert of each row has."""
        picked = jnp.take(values, self.row_experts, axis=0, mode="clip")
        return picked if self.is_full else with_masked_gradient(picked, self.is_used)

    def permute(self, x: Named) -> Rows:
        """Repeat each token for its choices."""
        return tokens_to_rows(self, x, lambda tokens: permute(tokens, self.permutation))

    def permute_gates(self, gates: jax.Array) -> Rows:
        """Gather the gates of rows from those of choices."""
        return Rows(permute_choices(gates, self.permutation), (), self)

    def unpermute(self, rows: Operand | DeferredRows, gates: jax.Array | None) -> Named:
        """Sum the rows of each token, forward and backward by gathers."""
        assert isinstance(rows, Rows), "`permute` made rows"
        return rows_to_tokens(
            self.routing, rows, lambda flat: sum_rows(flat, self.permutation, gates)
        )

    def of_experts(self, first: jax.Array | int, count: int) -> PerTokenWeights:
        """Return the rows of `count` experts from `first` on; the others stay, unused."""
        return PerTokenWeights.of(self.routing.of_experts(first, count))

    def matmul(self, x: Rows, weight: Named, over: tuple[str, ...], kind: DTypeLike) -> Rows:
        """Multiply each row with a copy of its expert's weights."""
        return gathered_matmul(x, weight, over)
