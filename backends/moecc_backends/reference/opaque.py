"""Regions of functions of JAX: what they mean is in the function, and not here."""

from __future__ import annotations

from moecc.errors import InputError
from moecc_backends.reference.arrays import Array, meaning


@meaning("jax")
def region(
    *operands: Array,
    into: tuple[tuple[str, int | str], ...],
    dtype: str,
    equations: int,
    lines: str,
) -> Array:
    """Raise InputError: only the function can compute it."""
    raise InputError(
        "a region of JAX is computed by its function alone",
        where=lines or None,
        hint="moe(function) of `moecc.jax` runs the blocks in it",
    )
