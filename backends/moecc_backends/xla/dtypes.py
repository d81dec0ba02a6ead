"""The type that sums are kept in."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp


def accumulator(dtype: Any) -> Any:
    """Give the type to accumulate `dtype` in: float32, or float64 for float64."""
    return jnp.promote_types(dtype, jnp.float32)
