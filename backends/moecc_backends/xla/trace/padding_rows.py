"""Padding rows, which have no token: zeroed where they would count, or poisoned.

Where choices are dropped, fewer rows are used than there are.  What the others hold is left to
whatever computed it (a kernel of an accelerator may leave anything there), and nothing may read it.
A sum over rows would: the gradient of what rows share.  There it is masked.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


@jax.custom_vjp
def zeroed(rows: jax.Array, is_used: jax.Array) -> jax.Array:
    """Return ``[rows, …]`` with zeros in padding rows, in values and cotangents."""
    return _selected(rows, is_used)


def _selected(rows: jax.Array, is_used: jax.Array) -> jax.Array:
    return jnp.where(_broadcast_over(is_used, rows), rows, jnp.zeros((), rows.dtype))


def _zeroed_forward(rows: jax.Array, is_used: jax.Array) -> tuple[jax.Array, tuple[jax.Array]]:
    # A choice of the two would keep the mask as wide as the rows for its gradient.
    return _selected(rows, is_used), (is_used,)


@jax.custom_vjp
def with_masked_gradient(rows: jax.Array, is_used: jax.Array) -> jax.Array:
    """Return `rows` as they are; the cotangent is zeroed in padding rows."""
    return rows


def _masked_forward(rows: jax.Array, is_used: jax.Array) -> tuple[jax.Array, tuple[jax.Array]]:
    return rows, (is_used,)


def _masked_backward(residuals: tuple[jax.Array], cotangent: jax.Array) -> tuple[jax.Array, None]:
    return _selected(cotangent, residuals[0]), None


zeroed.defvjp(_zeroed_forward, _masked_backward)
with_masked_gradient.defvjp(_masked_forward, _masked_backward)


def poisoned_values(rows: jax.Array, is_used: jax.Array) -> jax.Array:
    """Return floating-point `rows` with NaN in padding rows; cotangents as they are."""
    if not jnp.issubdtype(rows.dtype, jnp.floating):
        return rows
    # Not a choice of the two, whose gradient would be masked.
    nothing = jnp.where(_broadcast_over(is_used, rows), 0, jnp.asarray(jnp.nan, rows.dtype))
    return rows + nothing


@jax.custom_vjp
def with_poisoned_gradient(rows: jax.Array, is_used: jax.Array) -> jax.Array:
    """Return `rows` as they are; the cotangent is NaN in padding rows."""
    return rows


def _poisoned_backward(residuals: tuple[jax.Array], cotangent: jax.Array) -> tuple[jax.Array, None]:
    return poisoned_values(cotangent, residuals[0]), None


with_poisoned_gradient.defvjp(_masked_forward, _poisoned_backward)


def poisoned(rows: jax.Array, is_used: jax.Array) -> jax.Array:
    """Return `rows` with NaN in padding rows, in values and cotangents."""
    if not jnp.issubdtype(rows.dtype, jnp.floating):
        return rows
    return with_poisoned_gradient(poisoned_values(rows, is_used), is_used)


def _broadcast_over(is_used: jax.Array, rows: jax.Array) -> jax.Array:
    return is_used.reshape(-1, *[1] * (rows.ndim - 1))
