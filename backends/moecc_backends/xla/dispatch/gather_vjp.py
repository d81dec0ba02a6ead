"""Move tokens into the experts' rows and back, with gradients that gather as well.

The derivative that JAX would find for a gather is a scatter-add, which is slow everywhere and
serial on a CPU.  A placement is one-to-one, so the derivative is a gather in its other direction.
"""

from __future__ import annotations

from functools import reduce

import jax
import jax.numpy as jnp

from moecc_backends.xla.dispatch.permutation import Placement
from moecc_backends.xla.trace.dtypes import accumulator, load, store


@jax.custom_vjp
def dispatch(tokens: jax.Array, placement: Placement) -> jax.Array:
    """Copy ``[tokens, embed]`` into ``[rows, embed]``; rows that nothing was placed in are zero."""
    choice = placement.choice_of_row
    return _take(tokens, _token_of(placement), choice >= 0)


def _dispatch_forward(
    tokens: jax.Array, placement: Placement
) -> tuple[jax.Array, tuple[Placement]]:
    return dispatch(tokens, placement), (placement,)


def _dispatch_backward(residuals: tuple[Placement], d_rows: jax.Array) -> tuple[jax.Array, None]:
    (placement,) = residuals
    return _sum_choices(d_rows, placement, None), None


dispatch.defvjp(_dispatch_forward, _dispatch_backward)


@jax.custom_vjp
def combine(rows: jax.Array, placement: Placement, gates: jax.Array) -> jax.Array:
    """Sum the rows ``[rows, embed]`` of each token, weighted with `gates` ``[tokens, choice]``.

    A choice that was not placed contributes nothing. The sum runs in float32 at least.
    """
    return _sum_choices(rows, placement, gates)


def _combine_forward(
    rows: jax.Array, placement: Placement, gates: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, Placement, jax.Array]]:
    return combine(rows, placement, gates), (rows, placement, gates)


def _combine_backward(
    residuals: tuple[jax.Array, Placement, jax.Array], d_tokens: jax.Array
) -> tuple[jax.Array, None, jax.Array]:
    rows, placement, gates = residuals
    is_sharded = placement.choice_of_row >= 0
    gate_of_row = jnp.where(is_sharded, gates.reshape(-1)[placement.choice_of_row], 0)
    d_rows = _take(d_tokens, _token_of(placement), is_sharded)
    d_rows = (gate_of_row[:, None] * d_rows).astype(rows.dtype)
    return d_rows, None, _gate_gradient(rows, placement, d_tokens).astype(gates.dtype)


combine.defvjp(_combine_forward, _combine_backward)


def _token_of(placement: Placement) -> jax.Array:
    return placement.choice_of_row // placement.row_of_choice.shape[1]


def _take(values: jax.Array, index: jax.Array, is_valid: jax.Array) -> jax.Array:
    # Clipping costs nothing; the mask, not the clipped index, decides what is read.
    taken = jnp.take(store(values), index, axis=0, mode="clip")
    return load(jnp.where(is_valid[:, None], taken, 0), values.dtype)


def _sum_choices(rows: jax.Array, placement: Placement, gates: jax.Array | None) -> jax.Array:
    # One term a choice, not one gather of all: XLA fuses the terms and stores none of them.
    kind = accumulator(rows.dtype)

    def term(choice: int) -> jax.Array:
        row = placement.row_of_choice[:, choice]
        taken = _take(rows, row, row >= 0).astype(kind)
        return taken if gates is None else taken * gates[:, choice, None].astype(kind)

    terms = map(term, range(placement.row_of_choice.shape[1]))
    return reduce(jnp.add, terms).astype(rows.dtype)


def _gate_gradient(rows: jax.Array, placement: Placement, d_tokens: jax.Array) -> jax.Array:
    kind = accumulator(rows.dtype)

    def column(choice: int) -> jax.Array:
        row = placement.row_of_choice[:, choice]
        taken = _take(rows, row, row >= 0).astype(kind)
        return jnp.sum(taken * d_tokens.astype(kind), axis=-1)

    columns = map(column, range(placement.row_of_choice.shape[1]))
    return jnp.stack(list(columns), axis=-1)
