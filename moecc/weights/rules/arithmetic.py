"""Rules for arithmetic nodes: only those that rounding cannot distinguish.

What needs numpy, which takes longer to import than the rest of moecc, is in
`moecc.weights.constants`, imported where there is a number to compute.
"""

from __future__ import annotations

from math import frexp, isfinite

from moecc.types.dtypes import is_lossless
from moecc.weights.arithmetic import Add, Cast, Minimum, Moment, Mul, Scale, Select
from moecc.weights.expr import Expr, Full
from moecc.weights.movement import Merge, Permute, Rename, Split, Tile


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
    from moecc.weights.constants import computed

    made = computed(e, [x for x in e.operands if isinstance(x, Full)])
    return Full(made, e.type) if isfinite(made) else None


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
    from moecc.weights.constants import rounded

    dtype = e.type.dtype
    factor = inner.factor * rounded(e.factor, dtype)
    if abs(inner.factor) < 1.0 or not isfinite(rounded(factor, dtype)):
        return None
    return Scale(inner.x, factor)


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
            from moecc.weights.constants import value_of

            made = Scale(x, value_of(full))
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
