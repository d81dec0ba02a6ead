"""Rows times a matrix, with the gradients that are quick on a CPU.

The gradient of the matrix is a sum over rows, a product of two arrays that both have the rows in
front.  XLA's CPU compiler needs 1.4 times as long for it where the second of them is the narrower
(1,024 rows, widths 768 and 256, one thread), and makes a transposed copy of what it multiplies
where the rows are several axes.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp

from moecc_backends.xla.trace.typed_jax import barrier


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def rows_times(rows: jax.Array, matrix: jax.Array, at: int) -> jax.Array:
    """Return ``[rows, b]``, the sum over ``a`` of ``rows [rows, a]`` times `matrix`.

    Args:
      rows: in one type with the matrix, which is that of the sums.
      matrix: ``[a, b]``, or ``[b, a]``.
      at: the position of ``a`` in the matrix.
    """
    return jax.lax.dot_general(rows, matrix, (((1,), (at,)), ((), ())))


def _forward(
    rows: jax.Array, matrix: jax.Array, at: int
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return rows_times(rows, matrix, at), (rows, matrix)


def _backward(
    at: int, kept: tuple[jax.Array, jax.Array], slope: jax.Array
) -> tuple[jax.Array, jax.Array]:
    rows, matrix = kept
    by_rows = jax.lax.dot_general(slope, matrix, (((1,), (1 - at,)), ((), ())))
    pair = (rows, slope) if at == 0 else (slope, rows)
    return by_rows, _summed_over_rows(*pair)


def _summed_over_rows(x: jax.Array, y: jax.Array) -> jax.Array:
    """Return ``[a, b]`` of ``[rows, a]`` and ``[rows, b]``."""
    over_rows = (((0,), (0,)), ((), ()))
    if x.shape[1] <= y.shape[1]:
        return jax.lax.dot_general(x, y, over_rows)
    # Without the barrier the compiler would exchange the two again.
    turned = barrier(jax.lax.dot_general(y, x, over_rows))
    return jnp.transpose(turned)


rows_times.defvjp(_forward, _backward)
