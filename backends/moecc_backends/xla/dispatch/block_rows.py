"""Some rows of one expert as a layout, for operations between dispatch and combine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from moecc_backends.xla.dispatch.flat import tokens_to_rows
from moecc_backends.xla.dispatch.sorted_rows import Matrices, flat_matmul
from moecc_backends.xla.kernels.grouped_matmul import block_product
from moecc_backends.xla.trace.dtypes import load, store
from moecc_backends.xla.trace.padding_rows import with_masked_gradient
from moecc_backends.xla.trace.routing import Routing
from moecc_backends.xla.trace.values import DeferredRows, Named, Operand, Rows


def matrix_product(rows: jax.Array, matrix: jax.Array, axis: int) -> jax.Array:
    """Multiply rows ``[rows, a]`` with a matrix, summing over its axis `axis`."""
    return block_product(rows, matrix, axis).astype(rows.dtype)


@dataclass(frozen=True)
class BlockOfExpert:
    """Some rows of one expert, which has all to itself what there is of an expert.

    Attributes:
      routing: what was routed.
      choice_of_row: i32 ``[rows]``, the choice in each row; of another expert, or negative, in
        rows that are not used.
      is_used: whether each row is one of the expert: bool ``[rows]``.
      product: multiplies rows with the matrix of the expert, see `matrix_product`.
    """

    routing: Routing
    choice_of_row: jax.Array
    is_used: jax.Array
    product: Callable[[jax.Array, jax.Array, int], jax.Array] = matrix_product

    @property
    def is_full(self) -> bool:
        """False: a block may end beyond the rows of its expert."""
        return False

    @property
    def row_experts(self) -> jax.Array:
        """The only expert, for each row."""
        return jnp.zeros_like(self.choice_of_row)

    @property
    def row_groups(self) -> jax.Array:
        """The group of the token of each row."""
        return self.routing.row_groups(self._tokens)

    @property
    def _tokens(self) -> jax.Array:
        return self.choice_of_row // self.routing.experts.shape[1]

    def by_expert(self, values: jax.Array) -> jax.Array:
        """Repeat what the expert has for each row; a gradient comes from rows that are used."""
        rows = jnp.broadcast_to(values, (self.choice_of_row.size, *values.shape[1:]))
        is_float = jnp.issubdtype(rows.dtype, jnp.floating)
        return with_masked_gradient(rows, self.is_used) if is_float else rows

    def permute(self, x: Named) -> Rows:
        """Gather rows from tokens."""
        rows = tokens_to_rows(
            self,
            x,
            lambda tokens: load(
                jnp.take(store(tokens), self._tokens, axis=0, mode="clip"), tokens.dtype
            ),
        )
        return replace(rows, are_tokens=True)

    def permute_gates(self, gates: jax.Array) -> Rows:
        """Gather the gates of rows from those of choices; a gradient comes from used rows."""
        rows = jnp.take(gates.reshape(-1), self.choice_of_row, mode="clip")
        return Rows(with_masked_gradient(rows, self.is_used), (), self)

    def unpermute(self, rows: Operand | DeferredRows, gates: jax.Array | None) -> Named:
        """Not for a block: a token has rows in several."""
        raise AssertionError("all blocks are combined at once")

    def of_experts(self, first: jax.Array | int, count: int) -> BlockOfExpert:
        """Return the same rows: they have an expert already."""
        return self

    def matmul(self, x: Rows, weight: Named, over: tuple[str, ...], kind: DTypeLike) -> Rows:
        """Multiply rows with the matrix of the expert."""

        def product(flat: jax.Array, matrices: Matrices, axis: int) -> jax.Array:
            return self.product(flat, matrices[0].astype(flat.dtype), axis - 1)

        return flat_matmul(x, weight, over, product)
