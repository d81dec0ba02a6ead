"""Rules that fold arithmetic on constants, in float64 as in the reference."""

from __future__ import annotations

import operator
from collections.abc import Callable
from math import copysign, isfinite

from moecc.ir.builder import Builder
from moecc.ir.graph import Value
from moecc.rewrite import Match, P, Pattern, Rule

Compute = Callable[[Match], float]
"""Returns the result of an operation on constants."""


def _folding(pattern: Pattern, compute: Compute) -> Rule:
    """Return the rule that replaces an operation on constants by a constant."""

    def check(match: Match) -> str | None:
        if not match.root.result.type.dtype.is_float:
            return "integers may overflow"
        value = float(compute(match))
        # An attribute cannot be −0.
        if isfinite(value) and (value != 0 or copysign(1, value) > 0):
            return None
        return f"the result would be {value}"

    def build(match: Match, b: Builder) -> Value:
        dtype = match.root.result.type.dtype.name
        value: Value = b.constant(value=float(compute(match)), dtype=dtype)
        return value

    return Rule("fold-constants", pattern, build, check)


def _of_both(compute: Callable[[float, float], float]) -> Compute:
    return lambda match: compute(match.attr("a"), match.attr("b"))


def _is_float(match: Match) -> str | None:
    type = match.root.result.type
    return None if type.dtype.is_float else f"%{match.root.result.name} is {type}"


def _scale(match: Match, b: Builder) -> Value:
    value: Value = b.scale(match.value("x"), by=match.attr("value"))
    return value


_a, _b = P.constant(value=P.attr("a")), P.constant(value=P.attr("b"))

RULES = (
    # Only operations that IEEE 754 rounds correctly: their result is the same everywhere.
    _folding(P.neg(_a), lambda match: -match.attr("a")),
    _folding(P.scale(_a, by=P.attr("b")), _of_both(operator.mul)),
    _folding(P.add(_a, _b), _of_both(operator.add)),
    _folding(P.sub(_a, _b), _of_both(operator.sub)),
    _folding(P.mul(_a, _b), _of_both(operator.mul)),
    _folding(P.maximum(_a, _b), _of_both(max)),
    _folding(P.minimum(_a, _b), _of_both(min)),
    # x · c is a scale, the more specific form.
    Rule(
        "mul-by-constant", P.mul(P.any("x"), P.constant(value=P.attr("value"))), _scale, _is_float
    ),
)
