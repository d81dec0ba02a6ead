"""The type that sums are kept in, and the type that narrow floats are moved as."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike


def accumulator(dtype: DTypeLike) -> np.dtype[np.generic]:
    """Give the type to accumulate `dtype` in: float32, or float64 for float64."""
    return jnp.promote_types(dtype, jnp.float32)


def product_type(dtype: DTypeLike, platform: str) -> np.dtype[np.generic]:
    """Give the type that products of `dtype` are asked for in.

    Units of accelerators sum in float32 whatever the result is; asked for float32, a result that
    several devices add up would be sent wide, and gradients would multiply wide with narrow.  A CPU
    sums in the type of the result.
    """
    return accumulator(dtype) if platform == "cpu" else jnp.dtype(dtype)


def stored_as(dtype: DTypeLike) -> np.dtype[np.generic]:
    """Give the type to move `dtype` as: unsigned integers for floats under 32 bits.

    On a CPU, XLA widens those around every operation but a product, moving data included: to write
    a block of bfloat16 into an array is to convert the whole array twice.
    """
    itemsize_bytes = jnp.dtype(dtype).itemsize
    return jnp.dtype(dtype) if itemsize_bytes >= 4 else jnp.dtype(f"uint{8 * itemsize_bytes}")


def store(values: jax.Array) -> jax.Array:
    """View an array as what it is moved as; the bytes stay."""
    kind = stored_as(values.dtype)
    return values if values.dtype == kind else lax.bitcast_convert_type(values, kind)


def load(stored: jax.Array, dtype: DTypeLike) -> jax.Array:
    """View what was stored as `dtype` again."""
    return stored if stored.dtype == dtype else lax.bitcast_convert_type(stored, dtype)
