"""Constant tensors: their numbers as stored, and computed with as the evaluator does."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from moecc.types.arrays import Array
from moecc.types.dtypes import DType
from moecc.weights.arithmetic import Add, Cast, Minimum, Mul, Scale
from moecc.weights.expr import Full
from moecc.weights.rounding import round_to, widen


def value_of(full: Full) -> float:
    """Return the number that a constant tensor holds, rounded to its element type."""
    return float(_array(full))


def rounded(number: float, dtype: DType) -> float:
    """Return `number` rounded to a type of arithmetic, f32 or f64; infinite where it overflows."""
    with np.errstate(over="ignore"):
        return float(dtype.numpy.type(number))


def computed(e: Scale | Cast | Add | Mul | Minimum, operands: Sequence[Full]) -> float:
    """Return the value of an operation on constant tensors; not finite where it overflows."""
    with np.errstate(all="ignore"):
        return float(_computed(e, [_array(x) for x in operands]))


def _array(full: Full) -> Array:
    return round_to(np.array(full.value), full.type.dtype)


def _computed(e: Scale | Cast | Add | Mul | Minimum, values: list[Array]) -> Array:
    if isinstance(e, Cast):
        return round_to(values[0], e.dtype)
    wide = [widen(v, e.type.dtype) for v in values]
    if isinstance(e, Add):
        return np.asarray(wide[0] + wide[1])
    if isinstance(e, Minimum):
        return np.asarray(np.minimum(wide[0], wide[1]))
    factor = wide[0].dtype.type(e.factor) if isinstance(e, Scale) else wide[1]
    return np.asarray(wide[0] * factor)
