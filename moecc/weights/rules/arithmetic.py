"""Rules for arithmetic nodes: only those that rounding cannot distinguish."""

from __future__ import annotations

from math import frexp, isfinite

import numpy as np

from moecc.types.arrays import Array
from moecc.weights.arithmetic import Add, Cast, Minimum, Moment, Mul, Scale, Select
from moecc.weights.expr import Expr, Full
from moecc.weights.movement import Merge, Permute, Rename, Split, Tile
from moecc.weights.rounding import is_lossless, round_to, widen


def under_movement(e: Scale | Cast) -> Expr | None:
    """Compute before data are copied or axes change."""
    x = e.x
    if not isinstance(x, Tile | Permute | Rename | Split | Merge):
        return None
    return x.with_operands(e.with_operands(x.x))


def drop_widening(e: Scale | Add | Mul | Minimum | Moment) -> Expr | None:
    """Drop a cast that widens an operand, which arithmetic does anyway."""
    made = e.with_operands(*map(_narrow, e.operands))
    return made if made is not e and made.type == e.type else None


def _narrow(x: Expr) -> Expr:
    return x.x if isinstance(x, Cast) and is_lossless(x.x.type.dtype, x.dtype) else x


def fold_numbers(e: Scale | Cast | Add | Mul | Minimum) -> Expr | None:
    """Fold operations on constant tensors."""
    if not all(isinstance(x, Full) for x in e.operands):
        return None
    values = [_value(x) for x in e.operands if isinstance(x, Full)]
    with np.errstate(all="ignore"):
        made = float(_computed(e, values))
    return Full(made, e.type) if isfinite(made) else None


def _value(e: Full) -> Array:
    return round_to(np.array(e.value), e.type.dtype)


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


def scale_by_one(e: Scale) -> Expr | None:
    """Widen, if the factor is 1."""
    return Cast(e.x, e.type.dtype) if e.factor == 1.0 else None


def scale_of_scale(e: Scale) -> Expr | None:
    """Scale once, where the first factor is a power of two of at least 1.

    Multiplying by it is exact, or overflows, which is an error.  A smaller factor may round a
    subnormal.
    """
    inner = e.x
    if not isinstance(inner, Scale) or abs(frexp(inner.factor)[0]) != 0.5:
        return None
    factor = inner.factor * _rounded(e.factor, e)
    if abs(inner.factor) < 1.0 or not isfinite(_rounded(factor, e)):
        return None
    return Scale(inner.x, factor)


def _rounded(factor: float, e: Scale) -> float:
    """Return a factor rounded to the type of the arithmetic."""
    with np.errstate(over="ignore"):
        return float(e.type.dtype.numpy.type(factor))


def drop_cast(e: Cast) -> Expr | None:
    """Drop a cast to the same type."""
    return e.x if e.dtype is e.x.type.dtype else None


def cast_of_cast(e: Cast) -> Expr | None:
    """Cast once, if the first cast is lossless."""
    inner = e.x
    if not isinstance(inner, Cast) or not is_lossless(inner.x.type.dtype, inner.dtype):
        return None
    return Cast(inner.x, e.dtype)


def mul_by_full(e: Mul) -> Expr | None:
    """Scale by a constant tensor."""
    for x, full in ((e.a, e.b), (e.b, e.a)):
        if isinstance(full, Full):
            made = Scale(x, float(_value(full)))
            if made.type == e.type:
                return made
    return None


def select_constant(e: Select) -> Expr | None:
    """Select the branch of a constant mask."""
    chosen = e.a if e.a is e.b else None
    if isinstance(e.mask, Full):
        chosen = e.a if e.mask.value else e.b
    if chosen is None or chosen.type.axes != e.type.axes:
        return None
    return chosen if chosen.type.dtype is e.type.dtype else Cast(chosen, e.type.dtype)


def moment_of_all(e: Moment) -> Expr | None:
    """Drop a constant true mask."""
    if isinstance(e.mask, Full) and e.mask.value:
        return Moment(e.kind, e.x, None, e.keep)
    return None
