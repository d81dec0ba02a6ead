"""Move tokens into the experts' rows and back, with gradients that gather as well.

The derivative that JAX would find for a gather is a scatter-add, which is slow everywhere and
serial on a CPU.  The map is one-to-one, so the derivative is a gather in its other direction.
"""

from __future__ import annotations

from functools import reduce

import jax
import jax.numpy as jnp

from moecc_backends.xla.dispatch.permutation import Permutation
from moecc_backends.xla.trace.dtypes import accumulator, load, store


@jax.custom_vjp
def permute(tokens: jax.Array, permutation: Permutation) -> jax.Array:
    """Copy ``[tokens, embed]`` into ``[rows, embed]``; rows without a token are zero."""
    choice = permutation.choice_of_row
    return _take(tokens, permutation.token_of_row, choice >= 0)


def _permute_forward(
    tokens: jax.Array, permutation: Permutation
) -> tuple[jax.Array, tuple[Permutation]]:
    return permute(tokens, permutation), (permutation,)


def _permute_backward(residuals: tuple[Permutation], d_rows: jax.Array) -> tuple[jax.Array, None]:
    (permutation,) = residuals
    return _sum_choices(d_rows, permutation, None), None


permute.defvjp(_permute_forward, _permute_backward)


@jax.custom_vjp
def permute_choices(values: jax.Array, permutation: Permutation) -> jax.Array:
    """Copy ``[tokens, choice]`` into ``[rows]``; rows without a token have zero."""
    choice = permutation.choice_of_row
    return jnp.where(choice >= 0, jnp.take(values.reshape(-1), choice, mode="clip"), 0)


def _permute_choices_backward(
    residuals: tuple[Permutation], d_rows: jax.Array
) -> tuple[jax.Array, None]:
    row = residuals[0].row_of_choice
    return jnp.where(row >= 0, jnp.take(d_rows, row, mode="clip"), 0), None


permute_choices.defvjp(
    lambda values, permutation: (permute_choices(values, permutation), (permutation,)),
    _permute_choices_backward,
)


def sum_rows(rows: jax.Array, permutation: Permutation, gates: jax.Array | None) -> jax.Array:
    """Sum the rows ``[rows, embed]`` of each token, as they are or weighted with `gates`."""
    if gates is None:
        return unpermute_weighted(rows, permutation)
    return unpermute(rows, permutation, gates)


@jax.custom_vjp
def unpermute_weighted(rows: jax.Array, permutation: Permutation) -> jax.Array:
    """Sum the rows ``[rows, embed]`` of each token, of which nothing is kept for the gradient."""
    return _sum_choices(rows, permutation, None)


def _unpermute_weighted_backward(
    residuals: tuple[Permutation], d_tokens: jax.Array
) -> tuple[jax.Array, None]:
    (permutation,) = residuals
    return _take(d_tokens, permutation.token_of_row, permutation.choice_of_row >= 0), None


unpermute_weighted.defvjp(
    lambda rows, permutation: (unpermute_weighted(rows, permutation), (permutation,)),
    _unpermute_weighted_backward,
)


@jax.custom_vjp
def unpermute(rows: jax.Array, permutation: Permutation, gates: jax.Array) -> jax.Array:
    """Sum the rows ``[rows, embed]`` of each token, weighted with `gates` ``[tokens, choice]``.

    A choice without a row contributes nothing. The sum runs in float32 at least.
    """
    return _sum_choices(rows, permutation, gates)


def _unpermute_forward(
    rows: jax.Array, permutation: Permutation, gates: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, Permutation, jax.Array]]:
    return unpermute(rows, permutation, gates), (rows, permutation, gates)


def _unpermute_backward(
    residuals: tuple[jax.Array, Permutation, jax.Array], d_tokens: jax.Array
) -> tuple[jax.Array, None, jax.Array]:
    rows, permutation, gates = residuals
    has_row = permutation.choice_of_row >= 0
    gate_of_row = jnp.where(has_row, gates.reshape(-1)[permutation.choice_of_row], 0)
    d_rows = _take(d_tokens, permutation.token_of_row, has_row)
    d_rows = (gate_of_row[:, None] * d_rows).astype(rows.dtype)
    return d_rows, None, _gate_gradient(rows, permutation, d_tokens).astype(gates.dtype)


unpermute.defvjp(_unpermute_forward, _unpermute_backward)


def _take(values: jax.Array, index: jax.Array, is_valid: jax.Array) -> jax.Array:
    # Clipping costs nothing; the mask, not the clipped index, decides what is read.
    taken = jnp.take(store(values), index, axis=0, mode="clip")
    return load(jnp.where(is_valid[:, None], taken, 0), values.dtype)


def _sum_choices(rows: jax.Array, permutation: Permutation, gates: jax.Array | None) -> jax.Array:
    # One term a choice, not one gather of all: XLA fuses the terms and stores none of them.
    kind = accumulator(rows.dtype)

    def term(choice: int) -> jax.Array:
        row = permutation.row_of_choice[:, choice]
        taken = _take(rows, row, row >= 0).astype(kind)
        return taken if gates is None else taken * gates[:, choice, None].astype(kind)

    terms = map(term, range(permutation.row_of_choice.shape[1]))
    return reduce(jnp.add, terms).astype(rows.dtype)


def _gate_gradient(rows: jax.Array, permutation: Permutation, d_tokens: jax.Array) -> jax.Array:
    kind = accumulator(rows.dtype)

    def column(choice: int) -> jax.Array:
        row = permutation.row_of_choice[:, choice]
        taken = _take(rows, row, row >= 0).astype(kind)
        return jnp.sum(taken * d_tokens.astype(kind), axis=-1)

    columns = map(column, range(permutation.row_of_choice.shape[1]))
    return jnp.stack(list(columns), axis=-1)
