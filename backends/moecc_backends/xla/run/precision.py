"""The types that jax has: without its switch it makes every float64 a float32 without a word."""

from __future__ import annotations

from contextlib import AbstractContextManager

import jax

from moecc.types.dtypes import F64, DType


def in_precision(*types: DType | None) -> AbstractContextManager[object]:
    """Return the context in which arrays of `types` are what they say; None stands for none."""
    made: AbstractContextManager[object] = jax.enable_x64(F64 in types)
    return made
